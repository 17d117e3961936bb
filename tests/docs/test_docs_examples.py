"""Every Python block of every document, run as it stands: on the libraries that are here, else on their twins."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import documents
import exporting
import pytest
from documents import DOCUMENTS, ROOT, Block
from foreign import stand_ins
from torch._inductor import config as inductor_config

from fpn_kernels.interop.dialects import DIALECTS
from fpn_kernels.interop.swapping import is_fused

# Blocks of "python" are run here; test_docs.py checks those of "sh".
LANGUAGES = {"python", "sh", "text"}
PYTHON = {
    document: [block for block in documents.blocks(document) if block.language == "python"] for document in DOCUMENTS
}
PAGES = [document for document, blocks in PYTHON.items() if blocks]

# The modules that a block with these words needs.
NEEDS: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
COMPILES = ("torch.compile(", "aoti_compile")


def _missing(block: Block) -> str | None:
    for words, modules in NEEDS.items():
        if words in block.text:
            absent = [module for module in modules if importlib.util.find_spec(module) is None]
            if absent:
                return f"needs {', '.join(absent)}"
    if any(words in block.text for words in COMPILES) and not any(map(shutil.which, ("g++", "clang++"))):
        return "needs a C++ compiler"
    return None


def _said(block: Block) -> list[str]:
    """The lines that the block prints, from its comments."""
    return re.findall(r"# prints (.*)$", block.text, flags=re.MULTILINE)


def _run(document: Path, block: Block, variables: dict[str, Any]) -> None:
    # Blank lines before it, so that an error names the document's own line.
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(ROOT / document), "exec"), variables)


def _in_order(expected: list[str], printed: list[str]) -> str | None:
    """The first line that is not printed after those before it, or None."""
    rest = iter(printed)
    return next((line for line in expected if line not in rest), None)


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # of the libraries
@pytest.mark.filterwarnings(exporting.QUIET)
# The wrapper of a program with symbolic sizes takes the C++ compiler ten seconds to optimise.
@inductor_config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})
@pytest.mark.parametrize("document", PAGES, ids=str)
def test_the_examples_of_a_document_run_in_their_order(
    document: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # for the files that they write
    variables: dict[str, Any] = {}
    left_out: list[str] = []
    for block in PYTHON[document]:
        reason = _missing(block)
        if reason is not None:
            left_out.append(f"line {block.line} {reason}")
            continue
        _run(document, block, variables)
        printed = capsys.readouterr().out.splitlines()
        absent = _in_order(_said(block), printed)
        assert absent is None, f"{document}, from line {block.line}: not printed: {absent!r}, but {printed}"
        if "fuse(model" in block.text:
            assert any(is_fused(module) for module in variables["model"].modules()), f"{document}, line {block.line}"
    if left_out:
        pytest.skip(f"all others ran: {'; '.join(left_out)}")


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(len(PYTHON[Path("README.md")])))
def test_an_example_of_the_readme_stands_alone(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """People copy a single example."""
    stand_ins.install(monkeypatch)
    _run(Path("README.md"), PYTHON[Path("README.md")][number], {})


def test_no_block_is_passed_over() -> None:
    assert {Path("README.md"), Path("docs/deployment.md"), Path("docs/adopting.md")} <= set(PAGES)
    for document in DOCUMENTS:
        languages = {block.language for block in documents.blocks(document)}
        assert languages <= LANGUAGES, f"{document}: a block of another language, or of none"
        # Counted another way: anything that begins like a block of Python.
        text = (ROOT / document).read_text(encoding="utf-8")
        begun = re.findall(r"^[\s>*-]*(?:```+|~~~+)\s*\{?\.?(?:py|python|python3|pycon|ipython)\b", text, re.M | re.I)
        assert len(begun) == len(PYTHON[document]), document


def test_every_document_is_read() -> None:
    ignored = {"site-packages", "build", "dist", "site", ".git", ".pytest_cache", "results"}
    found = {path.relative_to(ROOT) for path in ROOT.rglob("*.md") if not ignored & set(path.relative_to(ROOT).parts)}
    assert found == set(DOCUMENTS)


def test_a_block_that_is_indented_or_nested_is_found() -> None:
    text = "1. item\n\n   ~~~python\n   x = 1\n     # y\n   ~~~\n\n````text\n```python\n```\n````\n"
    assert [(block.language, block.text) for block in documents.parse(text)] == [
        ("python", "x = 1\n  # y\n"),
        ("text", "```python\n```\n"),
    ]
    with pytest.raises(ValueError, match="without an end"):
        documents.parse("```python\nx = 1\n")


def test_what_a_block_says_it_prints_is_compared() -> None:
    block = documents.parse("```python\nprint(\n    1\n)  # prints 1\nprint(3)\n```\n")[0]
    assert _said(block) == ["1"]
    assert _in_order(["1", "3"], ["1", "2", "3"]) is None
    assert _in_order(["3", "1"], ["1", "2", "3"]) == "1"
    assert sum(len(_said(block)) for blocks in PYTHON.values() for block in blocks) >= 20


def test_there_is_one_for_each_dialect() -> None:
    packages = [dialect.packages[0] if dialect.packages else "FPN101" for dialect in DIALECTS]
    texts = [block.text for block in PYTHON[Path("docs/adopting.md")]]
    assert all(any(package in text for text in texts) for package in packages)
