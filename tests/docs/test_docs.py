"""Files, headings, commands, modules, variables, commits and public names in the documents exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import documents
import pytest
from documents import DOCUMENTS, ROOT

import fpn_kernels

TEXTS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])+\]\(([^)\s]+)\)")


def _anchor(heading: str) -> str:
    """As GitHub and Python-Markdown make it of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


def test_a_heading_is_named_as_the_sites_do() -> None:
    assert _anchor("The merge: `upsample_add`") == "the-merge-upsample_add"
    assert _anchor("Its adjoint: upsample_add_backward, merge_backward") == (
        "its-adjoint-upsample_add_backward-merge_backward"
    )


# ---- links


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in _LINK.findall(documents.prose(document)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), f"{document}: {target}"
        assert path.resolve().is_relative_to(ROOT), f"{document}: {target} leads out of the project"
        if anchor:
            assert anchor in _anchors(path), f"{document}: {target}"


def test_links_are_found() -> None:
    found = [target for document in DOCUMENTS for target in _LINK.findall(documents.prose(document))]
    assert len(found) >= 25
    assert {"csrc/README.md", "docs/kernels.md", "../README.md#what-has-been-measured", "pyramid.svg"} <= set(found)


# ---- commands


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def _code(document: Path) -> str:
    """All code of a document: fenced, indented or in backticks."""
    text = TEXTS[document]
    fenced = [block.text for block in documents.blocks(document)]
    indented = re.findall(r"^(?: {4}|\t)(.*)$", text, flags=re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_make_target_exists(document: Path) -> None:
    named = set(re.findall(r"(?:^|[\s`])make ([a-z][\w-]*)", _code(document), flags=re.MULTILINE))
    assert named <= _targets()


def test_every_target_is_in_the_help_and_in_phony() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[0].split())
    assert phony == _targets()
    shown = set(re.findall(r"@echo 'make ([\w-]+)", makefile))
    assert shown == phony - {"help"}
    assert {"docs", "dist"} <= phony


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_module_that_is_run_exists(document: Path) -> None:
    for module in re.findall(r"python3? -m ([\w.]+)", _code(document)):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__") is not None, f"{module} cannot be run"


OPTIONS = (
    (r'make bench ARGS="([^"]*)"', "benchmarks"),
    (r"python -m benchmarks\.report ([^`\n]*)", "benchmarks.report"),
)


@pytest.mark.parametrize(("command", "module"), OPTIONS, ids=[module for _, module in OPTIONS])
def test_every_option_of_a_command_exists(command: str, module: str) -> None:
    named = {
        option
        for document in DOCUMENTS
        for arguments in re.findall(command, _code(document))
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments)
    }
    assert len(named) >= 2
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert named <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_file_that_is_named_exists(document: Path) -> None:
    folders = ("fpn_kernels", "csrc", "tests", "benchmarks", "examples", "docs")
    pattern = rf"(?<![\w./*-])((?:{'|'.join(folders)})/[\w./-]+\.(?:py|cpp|h|cu|sh|md|inc))(?![\w*<{{])"
    named = set(re.findall(pattern, _code(document)))
    # A test may be named without its folder: file names are unique over all of tests/.
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").rglob("*.py")}
    assert {path for path in named - tests if not (ROOT / path).is_file()} == set()


# ---- variables


def test_every_environment_variable_is_documented() -> None:
    """Those of the library, and those that setup.py lists."""
    sources = "".join(path.read_text() for path in (ROOT / "fpn_kernels").rglob("*.py"))
    own = set(re.findall(r'^ENVIRONMENT_VARIABLE = "(\w+)"', sources, flags=re.MULTILINE))
    assert own == {"FPN_KERNELS_BACKEND", "FPN_KERNELS_AUTOTUNE", "FPN_KERNELS_LIBRARY"}
    listed = (ROOT / "setup.py").read_text().split("Environment:\n")[1].split('"""')[0]
    building = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", "\n".join(line[:26] for line in listed.splitlines())))
    assert len(building) >= 8
    page = TEXTS[Path("docs/backends.md")]
    rows = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE))))
    assert own | building <= rows
    assert {row for row in rows if row.isupper()} == own | building, "a variable that nothing reads"


# ---- public names


def test_every_public_name_has_a_place_in_the_api_pages() -> None:
    pages = "".join(text for path, text in TEXTS.items() if path.parts[:2] == ("docs", "api"))
    shown = re.findall(r"^::: fpn_kernels\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(shown)), "a name twice"
    # Documented elsewhere: the modules of formulas, and the version in a sentence of its own.
    assert set(shown) - {"roofline", "resampling"} == set(fpn_kernels.__all__) - {"__version__"}
    assert "`fpn_kernels.__version__`" in pages


# ---- the drawing


def test_the_pyramid_is_drawn_with_the_words_of_the_field() -> None:
    root = ElementTree.parse(ROOT / "docs" / "pyramid.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    words = {text.text for text in root.iter(f"{space}text")}
    assert {"lateral", "top", "merged", "output", *(f"{map_}{k}" for map_ in "CMP" for k in range(2, 6))} <= words
    assert root.find(f"{space}title") is not None and root.find(f"{space}desc") is not None


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_drawing_is_legible(scheme: str) -> None:
    """A contrast of at least 4.5 (WCAG 2.1, AA) of each text against its own background."""
    style = (ROOT / "docs" / "pyramid.svg").read_text().split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colours: dict[str, str] = {}
    for part in (light, dark) if scheme == "dark" else (light,):
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", part):
            fill = re.search(r"fill: (#[0-9a-f]{6})", body)
            for selector in re.sub(r"/\*.*?\*/", "", selectors, flags=re.DOTALL).split(","):
                if fill:
                    colours[selector.strip()] = fill[1]
    pairs = [("text", on) for on in (".panel", ".c", ".m", ".p")] + [(".small", ".panel"), (".red", ".panel")]
    for text, ground in pairs:
        high, low = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# ---- the site

NO_SITE = next(
    (f"needs {name}" for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)),
    None,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if NO_SITE is not None:
        pytest.skip(f"{NO_SITE} (`make docs` installs it)")
    place = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", place],
        cwd=ROOT,
        # A proxy that is not there: what would be fetched fails.
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return place


@pytest.mark.nightly
def test_the_site_is_built_strictly_and_holds_every_page(site: Path) -> None:
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    expected = {str(path.relative_to("docs").with_suffix(".html")) for path in DOCUMENTS if path.parts[0] == "docs"}
    assert expected | {"readme.html", "contributing.html", "changelog.html", "csrc.html"} <= pages
    assert not list(site.rglob("*.py"))


@pytest.mark.nightly
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)", path.read_text()
        )
        assert loaded == [], path.name


@pytest.mark.nightly
def test_every_public_name_is_rendered_with_its_sections(site: Path) -> None:
    rendered = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for name in fpn_kernels.__all__:
        if name not in ("__version__", "reference"):
            assert f'id="fpn_kernels.{name}"' in rendered, name
    for section in ("Dtypes and layout", "Cost", "Source", "Raises:"):
        assert rendered.count(section) >= 5, section


@pytest.mark.nightly
def test_included_documents_keep_their_links(site: Path) -> None:
    readme = (site / "readme.html").read_text()
    assert 'href="csrc.html"' in readme and 'href="contributing.html"' in readme
    assert 'href="readme.html#what-has-been-measured"' in (site / "benchmarks.html").read_text()
    assert 'href="kernels.html"' in (site / "contributing.html").read_text()
