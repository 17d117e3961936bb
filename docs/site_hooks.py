"""MkDocs hooks: add the documents outside docs/ to the site, and adapt the links between all documents."""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Page of the site -> document of the repository.
INCLUDED = {
    "readme.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "csrc.md": "csrc/README.md",
    "experiments.md": "experiments/README.md",
}
_PAGES = {document: page for page, document in INCLUDED.items()}

# Code is matched first and kept: `blocks[0](x)` is not a link.
_CODE_OR_LINK = re.compile(
    r"^```.*?^```|^ {4}.*?$|`[^`\n]+`"
    r"|(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)


def rewritten(markdown: str, document: str, page: str) -> str:
    """Rewrite the links of a document for the site. A link to a file that is not on the site becomes plain text.

    Args:
        markdown: the text.
        document: its path in the repository; its links are relative to this path.
        page: its path on the site.
    """

    def link(match: re.Match[str]) -> str:
        if match["target"] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), match["target"]))
        found = _PAGES.get(target)
        if found is None and target.startswith("docs/"):
            found = target.removeprefix("docs/")
        if found is None:
            return match["text"]
        relative = posixpath.relpath(found, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"

    return _CODE_OR_LINK.sub(link, markdown)


def on_files(files: Files, config: Any) -> Files:
    for page, document in INCLUDED.items():
        text = rewritten((ROOT / document).read_text(encoding="utf-8"), document, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    path = page.file.src_uri
    return markdown if path in INCLUDED else rewritten(markdown, f"docs/{path}", path)
