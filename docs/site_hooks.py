"""What MkDocs is told about documents that lie outside docs/: they are pages of the site, and links to them hold."""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Page of the site to document of the repository. Included, not copied: there is one text of each.
INCLUDED = {
    "readme.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "csrc.md": "csrc/README.md",
}
_PAGES = {document: page for page, document in INCLUDED.items()}

# Code is matched first, and left as it is: `blocks[0](x)` is no link.
_CODE_OR_LINK = re.compile(
    r"^```.*?^```|^ {4}.*?$|`[^`\n]+`"
    r"|(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)


def rewritten(markdown: str, document: str, page: str) -> str:
    """The text with links that hold on the site; a link to a file that is no page, or a picture that is not the
    site's, becomes its words.

    Args:
        markdown: the text.
        document: its path in the repository, from which its links count.
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
