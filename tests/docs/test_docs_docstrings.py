"""Docstrings of the public names: their sections are complete, and their statements are true."""

from __future__ import annotations

import builtins
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import mmdet_twin, stand_ins
from torch import nn

import fpn_kernels
from fpn_kernels import roofline

PUBLIC = {name: getattr(fpn_kernels, name) for name in fpn_kernels.__all__}
CALLABLES = {name: value for name, value in PUBLIC.items() if callable(value)}
MODULES = {name for name, value in CALLABLES.items() if isinstance(value, type) and issubclass(value, nn.Module)}
# These take maps and return maps.
OPERATORS = {"upsample_add", "lateral_connection", "output_conv", "top_down_pathway", "weighted_merge"}

# Sections that a name does not have, and why.
EXEMPT = {
    ("available_backends", "Raises"): "nothing can go wrong",
    ("available_backends", "Source"): "a matter of this library",
    ("decompositions", "Raises"): "nothing can go wrong",
    ("explain", "Source"): "a matter of this library",
    ("unfuse", "Source"): "undoes what fuse did",
}

_HEADING = re.compile(r"^([A-Z][a-z]+(?: [a-z]+)*):$")
_SHAPE = re.compile(r"``\[[\w, ()*/]+(\[\w+\][\w, ]*)*\]``")


def sections(value: Any) -> dict[str, str]:
    """The sections of a docstring (Google's style) by their headings; text outside of any is under ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in (inspect.getdoc(value) or "").splitlines():
        heading = _HEADING.match(line)
        if heading:
            current = heading[1]
            assert current not in found, f"{current} twice"
            found[current] = []
        else:
            if line and not line.startswith(" "):
                current = ""
            found[current].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """``name: text`` of a section of arguments or errors, continued on indented lines."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.match(r"(\*{0,2}\w+): (.*)", line)
        if match:
            name = match[1].lstrip("*")
            found[name] = match[2]
        elif line.strip():
            assert line.startswith(" "), f"neither an entry nor the continuation of one: {line!r}"
            found[name] += " " + line.strip()
    return found


def parameters(value: Any) -> dict[str, inspect.Parameter]:
    if isinstance(value, type) and value.__init__ is nn.Module.__init__:
        return {}
    found = dict(inspect.signature(value.__init__ if isinstance(value, type) else value).parameters)
    found.pop("self", None)
    return found


def required(name: str) -> set[str]:
    value = CALLABLES[name]
    wanted = {"Raises", "Cost", "Source"}
    if parameters(value):
        wanted.add("Args")
    if not isinstance(value, type):
        wanted.add("Returns")
    if name in MODULES:
        wanted |= {"Shape", "Dtypes and layout"}
    if name in OPERATORS | {"assign_levels"}:
        wanted.add("Dtypes and layout")
    return {section for section in wanted if (name, section) not in EXEMPT}


def test_every_public_name_is_looked_at() -> None:
    assert set(PUBLIC) - set(CALLABLES) == {"__version__", "reference"}
    assert set(CALLABLES) > OPERATORS and len(MODULES) >= 7
    assert {name for name, _ in EXEMPT} <= set(CALLABLES)


@pytest.mark.parametrize("name", CALLABLES)
def test_the_sections_are_there_and_say_something(name: str) -> None:
    found = sections(CALLABLES[name])
    assert required(name) - set(found) == set()
    for section in required(name):
        assert len(found[section].split()) >= 3, f"{section}: {found[section]!r}"
    assert found[""].splitlines()[0].endswith("."), "one sentence on the first line"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_described_in_its_order(name: str) -> None:
    described = list(entries(sections(CALLABLES[name]).get("Args", "")))
    assert described == list(parameters(CALLABLES[name]))


@pytest.mark.parametrize("name", sorted(OPERATORS | {"assign_levels"}))
def test_the_shape_of_every_tensor_is_stated(name: str) -> None:
    found = sections(CALLABLES[name])
    arguments = entries(found["Args"])
    for argument, parameter in parameters(CALLABLES[name]).items():
        if "Tensor" in str(parameter.annotation):
            assert _SHAPE.search(arguments[argument]), argument
    assert _SHAPE.search(found["Returns"])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_states_the_shapes_it_takes_and_gives(name: str) -> None:
    assert _SHAPE.search(sections(CALLABLES[name])["Shape"])


@pytest.mark.parametrize("name", CALLABLES)
def test_errors_are_exceptions_each_with_its_reason(name: str) -> None:
    for error, reason in entries(sections(CALLABLES[name]).get("Raises", "")).items():
        assert issubclass(getattr(builtins, error), Exception) and len(reason.split()) >= 3


@pytest.mark.parametrize("name", sorted(OPERATORS | MODULES | {"assign_levels"}))
def test_dtypes_and_layouts_are_named(name: str) -> None:
    said = sections(CALLABLES[name])["Dtypes and layout"]
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert re.search(rf"\b{dtype}\b", said), dtype
    if name != "assign_levels":  # takes no map
        assert re.search(r"\bNHWC\b", said) and re.search(r"\bNCHW\b", said)


@pytest.mark.parametrize("name", CALLABLES)
def test_the_cost_is_in_bytes(name: str) -> None:
    assert re.search(r"\bbytes\b", sections(CALLABLES[name])["Cost"])


LIBRARIES = ("torchvision", "Detectron2", "as their libraries publish them")


@pytest.mark.parametrize("name", [name for name in CALLABLES if (name, "Source") not in EXEMPT])
def test_the_source_is_a_paper_a_torch_function_or_a_library(name: str) -> None:
    said = sections(CALLABLES[name])["Source"]
    papers = re.findall(r"arXiv (\d{4}\.\d{4,5})\b", said)
    functions = re.findall(r"`torch\.([\w.]+)`", said)
    assert papers or functions or any(library in said for library in LIBRARIES)
    for function in functions:
        value: Any = torch
        for part in function.split("."):
            value = getattr(value, part)


# ---- the formulas, against fpn_kernels.roofline

N, CIN, C, H, W, SMALL_H, SMALL_W = 2, 24, 16, 14, 10, 7, 5
SIZES = {"N": N, "Cin": CIN, "Cout": C, "C": C, "H": H, "W": W, "h": SMALL_H, "w": SMALL_W, "itemsize": 2}
LEVELS = [{"H_l": 14, "W_l": 10, "Cin_l": 24}, {"H_l": 7, "W_l": 5, "Cin_l": 40}]
MAPS = [{"h_i": H, "w_i": W}, {"h_i": SMALL_H, "w_i": SMALL_W}]
FEATURES = [(N, level["Cin_l"], level["H_l"], level["W_l"]) for level in LEVELS]
HALF = torch.bfloat16


def evaluate(formula: str) -> int:
    """A formula as the docstrings write it: a space between factors, `sum_l` over levels, `sum_i` over maps.

    A sum reaches as far as the factors that follow it.
    """
    names = dict(SIZES)
    for index, each in (("l", LEVELS), ("i", MAPS)):
        match = re.search(rf"sum_{index} ((?:\w+ |\((?:[^()]|\([^()]*\))*\) ?)+)", formula)
        if match:
            names["total"] = sum(_value(match[1], {**SIZES, **one}) for one in each)
            formula = formula.replace(match[0], "total ")
    return _value(formula, names)


def _value(formula: str, names: dict[str, int]) -> int:
    """Python's value of a formula whose factors stand side by side."""
    spaced = re.sub(r"(?<=[\w)]) +(?=[\w(])", " * ", formula.strip())
    result: int = eval(spaced, {"__builtins__": {}}, names)
    return result


def test_a_formula_is_read_as_it_is_meant() -> None:
    assert evaluate("(2 N C H W + N C h w) itemsize") == (2 * N * C * H * W + N * C * SMALL_H * SMALL_W) * 2
    assert evaluate("sum_l (N H_l W_l (Cin_l + Cout)) itemsize") == 2 * N * (140 * (24 + C) + 35 * (40 + C))
    assert evaluate("sum_l N H_l W_l (2 Cin_l)") == 2 * N * (140 * 24 + 35 * 40)
    assert evaluate("(sum_i N C h_i w_i + N C H W) itemsize") == 2 * N * C * (140 + 35 + 140)


def _formula(name: str, of: str = "bytes") -> str:
    pattern = {"bytes": r"``([^`]*\bitemsize)``\s+bytes", "operations": r"``([^`]*)``\s+operations"}[of]
    match = re.search(pattern, sections(CALLABLES[name])["Cost"])
    assert match is not None, f"{name} states no formula of its {of}"
    return " ".join(match[1].split())


COSTS: dict[str, Callable[[], roofline.Cost]] = {
    "upsample_add": lambda: roofline.upsample_add((N, C, H, W), (SMALL_H, SMALL_W), HALF),
    "lateral_connection": lambda: roofline.lateral_connection((N, CIN, H, W), C, (SMALL_H, SMALL_W), HALF),
    "output_conv": lambda: roofline.output_conv((N, CIN, H, W), C, HALF),
    "top_down_pathway": lambda: roofline.top_down_pathway(FEATURES, C, HALF),
    "FeaturePyramidNetwork": lambda: roofline.neck(FEATURES, C, HALF, pool=False),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_bytes_are_those_of_the_roofline(name: str) -> None:
    assert evaluate(_formula(name)) == COSTS[name]().bytes


@pytest.mark.parametrize("name", ["lateral_connection", "output_conv", "FeaturePyramidNetwork"])
def test_the_operations_are_those_of_the_roofline(name: str) -> None:
    assert evaluate(_formula(name, "operations")) == COSTS[name]().flops


@pytest.mark.parametrize("name", ["weighted_merge", "WeightedMerge"])
def test_the_bytes_of_a_weighted_merge_are_those_of_the_roofline_but_for_the_weights(name: str) -> None:
    whole = roofline.weighted_merge((N, C, H, W), [(SMALL_H, SMALL_W)], HALF)
    assert whole.bytes - evaluate(_formula(name)) == 4 * len(MAPS)


# ---- the examples


def _blocks(value: Any) -> list[str]:
    text = inspect.getdoc(value) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```") / 2, f"a block of {value} that is not run"
    return [textwrap.dedent(block) for block in blocks]


EXAMPLES = {name: "\n".join(blocks) for name, value in CALLABLES.items() if (blocks := _blocks(value))}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The variables of the examples: maps and pyramids."""
    stand_ins.install(monkeypatch)
    import torchvision

    monkeypatch.chdir(tmp_path)
    channels = [256, 512, 1024, 2048]
    maps = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)]
    return {
        "torch": torch,
        "fpn_kernels": fpn_kernels,
        "torchvision": torchvision,
        "top": torch.randn(1, 8, 3, 3),
        "lateral": torch.randn(1, 8, 5, 5),
        "fpn": fpn_kernels.FeaturePyramidNetwork(channels, 256),
        "mmdet_neck": mmdet_twin.FPN(channels, 256, 4),
        "features": maps,
        **dict(zip(("c2", "c3", "c4", "c5"), maps, strict=True)),
    }


def test_there_are_examples_and_no_other_kind() -> None:
    assert len(EXAMPLES) >= 7
    assert [name for name, value in CALLABLES.items() if "::\n" in (inspect.getdoc(value) or "")] == []


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, variables: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[name], f"the example of {name}", "exec"), variables)
    if name == "use_backend":
        assert variables["merged"].shape == variables["lateral"].shape
    elif name == "FeaturePyramidNetwork":
        assert list(variables["pyramid"]) == ["0", "1", "2", "3", "pool"]
    elif name == "explain":
        assert "upsample_add: served by" in capsys.readouterr().out
