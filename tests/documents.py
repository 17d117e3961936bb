"""The documents of the project and the code in them, as the tests read them."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "csrc/**/*.md", "docs/**/*.md", "experiments/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^ *(?P<marks>```+|~~~+) *(?P<language>[^`\n]*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" where it names none), its text, and the line of the document it starts on."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order.

    Raises:
        ValueError: the last one has no end.
    """
    return parse((ROOT / document).read_text(encoding="utf-8"), str(document))


def parse(text: str, name: str = "the text") -> list[Block]:
    found: list[Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, lines, start = fence, [], number + 1
        elif fence is not None and fence["marks"].startswith(opened["marks"]) and not fence["language"]:
            found.append(Block(opened["language"].strip(), textwrap.dedent("\n".join(lines)) + "\n", start))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{name}: a block without an end")
    return found


def prose(document: Path) -> str:
    """The document without its code: neither fenced, nor indented, nor in backticks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1[`~]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)
