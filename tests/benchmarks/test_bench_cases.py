"""The rows of a run, and the targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, options, providers
from benchmarks.cases import COMPILE, EAGER, EVEN, FORWARD, LIBRARY, MAX_AUTOTUNE, TRAINING, Selection
from benchmarks.targets import TARGETS, Target
from fpn_kernels import roofline

HERE = ("native", "triton", "eager")


def test_options_know_their_aliases() -> None:
    assert options.dtypes("bf16,float32,bf16") == ("bf16", "fp32")
    assert options.layouts("channels_last,nchw") == ("NHWC", "NCHW")
    assert options.batches("1,8") == (1, 8)


def _providers(selection: Selection) -> list[str]:
    rows = list(selection.rows())
    return [provider for case, provider in rows if case == rows[0][0]]


def test_each_case_has_the_baseline_first_and_each_backend_that_is_here() -> None:
    assert _providers(Selection("tiny", "cpu", ("eager",))) == [EAGER, LIBRARY]
    narrow = Selection("quick", "cuda", HERE, dtypes=("bf16",), layouts=("NHWC",))
    assert _providers(narrow) == [EAGER, COMPILE, LIBRARY, f"{LIBRARY}/native", f"{LIBRARY}/triton"]
    # Never Triton's interpreter.
    assert _providers(Selection("full", "cpu", HERE)) == [
        *(EAGER, COMPILE, LIBRARY),
        *(f"{LIBRARY}/native", f"{LIBRARY}/eager"),
    ]


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_a_preset_has_every_operator_direction_dtype_and_layout(preset: str) -> None:
    found = [case for case, _ in Selection(preset, "cpu", ("eager",)).rows()]
    for operator in ("upsample_add", "lateral_connection", "output_conv", "neck", "weighted_merge"):
        here = [case for case in found if case.operator == operator]
        assert {case.direction for case in here} == {FORWARD, TRAINING}
        assert {(case.dtype, case.layout) for case in here} == {
            (d, x) for d in ("fp32", "bf16") for x in options.LAYOUTS
        }


def _part(name: str, compiler: bool = True) -> list[tuple[cases.Case, str]]:
    return list(Selection(name, "cuda", HERE, compiler).rows())


def test_a_part_measures_the_library_before_its_rivals_and_nothing_twice() -> None:
    for name in ("users", "missed", "others"):
        rows = _part(name)
        order = [provider for _, provider in rows]
        assert len(set(rows)) == len(rows)
        assert order.index(COMPILE) > max(place for place, name in enumerate(order) if name.startswith(LIBRARY))
        assert COMPILE not in {provider for _, provider in _part(name, compiler=False)}
    users = {(case.operator, case.dtype, case.layout, case.batch) for case, _ in _part("users")}
    assert ("neck", "fp32", "NCHW", 2) in users and ("neck", "amp-fp16", "NCHW", 8) in users


def test_every_row_with_a_target_is_measured() -> None:
    def keys(name: str, provider: str) -> set[tuple[Any, ...]]:
        found = [case for case, each in _part(name) if each == provider]
        return {(c.operator, c.direction, c.spot.level, c.batch, c.dtype, c.layout) for c in found}

    aimed = {(t.operator, t.direction, t.level, t.batch, t.dtype, t.layout) for t in TARGETS["NVIDIA H200"]}
    assert aimed <= keys("missed", LIBRARY)
    assert {key for key in aimed if key[-1] == "NHWC"} <= keys("tuned", MAX_AUTOTUNE)


def _cost(target: Target) -> roofline.Cost:
    shapes = {level: (target.batch, *EVEN.level(level)) for level in (2, 3, 4, 5)}
    merged = {level: (target.batch, 256, *shape[2:]) for level, shape in shapes.items()}
    sizes = {level: shapes[level + 1][2:] if level < 5 else None for level in shapes}
    dtype = torch.bfloat16
    if target.operator == "top_down_pathway":
        return roofline.top_down_pathway(list(shapes.values()), 256, dtype)
    if target.operator == "neck":
        return roofline.neck(list(shapes.values()), 256, dtype, pool=False)
    of_level = {
        "upsample_add": lambda level: roofline.upsample_add(merged[level], sizes[level], dtype),
        "lateral_connection": lambda level: roofline.lateral_connection(shapes[level], 256, sizes[level], dtype),
        "output_conv": lambda level: roofline.output_conv(merged[level], 256, dtype),
    }[target.operator]
    levels = [target.level] if target.level else range(2, 5 if target.operator == "upsample_add" else 6)
    return sum((of_level(level) for level in levels), start=roofline.Cost(0, 0))


# Bytes and operations per second that `targets.py` names.
RATES = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}


def test_a_target_is_possible_at_the_rates_of_its_gpu() -> None:
    for gpu, targets in TARGETS.items():
        for target in targets:
            if target.seconds is not None:
                assert 0.6 * target.seconds <= _cost(target).floor(*RATES[gpu]) < target.seconds, (gpu, target)


def test_a_provider_is_found_by_its_name() -> None:
    assert providers.named(f"{LIBRARY}/triton").backend == "triton" and providers.named(LIBRARY).backend is None
    assert providers.named(COMPILE).compile_mode == "default" and not providers.named(EAGER).fused
    with pytest.raises(ValueError, match="name: expected 'eager', 'torch.compile'"):
        providers.named("tensorrt")
