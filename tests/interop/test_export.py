"""The operators as standard ones: a saved program and an AOTInductor package run where this library is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import exporting
import numpy as np
import oracle
import pytest
import torch
from exporting import MODES, UNEVEN, assert_pyramid
from samples import LAYOUTS, MERGES, random_map
from torch import nn
from twins import group_norm

import fpn_kernels
from fpn_kernels import resampling
from fpn_kernels.operators import decompositions

pytestmark = pytest.mark.filterwarnings(exporting.QUIET)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _exported(module: nn.Module, arguments: tuple, *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = exporting.dynamic_shapes(arguments) if dynamic else None
    return torch.export.export(module, arguments, dynamic_shapes=shapes)


def _decomposed(module: nn.Module, arguments: tuple, *, dynamic: bool) -> torch.export.ExportedProgram:
    program = _exported(module, arguments, dynamic=dynamic)
    assert _own_operators(program), "a module that never calls the library would prove nothing"
    program = program.run_decompositions(fpn_kernels.decompositions())
    assert _own_operators(program) == set()
    return program


def _own_operators(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target for target in targets if target.startswith("fpn_kernels")}


def test_every_forward_operator_has_a_decomposition() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpn_kernels::")}
    assert {"fpn_kernels::upsample_add", "fpn_kernels::lateral_connection"} <= names
    # Gradients alone call the sums for a bias.
    forward = {name for name in names - {"fpn_kernels::channel_sums"} if "_backward" not in name}
    assert {operator.name() for operator in fpn_kernels.decompositions()} == forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_a_merge_is_rounded_once_and_laid_out_as_by_the_operator(mode: str, gain: float, dtype: torch.dtype) -> None:
    for number, sizes in enumerate(MERGES):
        shape = (sizes.batch, sizes.channels)
        top = random_map((*shape, *sizes.top), dtype, layout=LAYOUTS[number % len(LAYOUTS)])
        lateral = random_map((*shape, *sizes.fine), dtype, layout=LAYOUTS[(number + number // 7) % len(LAYOUTS)])
        result = decompositions.upsample_add(top, lateral, mode=mode, gain=gain)
        operator = torch.ops.fpn_kernels.upsample_add(top, lateral, mode=mode, gain=gain)
        assert (result.dtype, result.stride()) == (operator.dtype, operator.stride()), str(sizes)
        if mode != "bilinear" and gain == 1.0:
            assert torch.equal(result, operator), str(sizes)
        exact = oracle.upsample_add(top, lateral, mode, gain)
        assert oracle.error(result, exact) <= 1.1 * oracle.rounding(dtype) + 8 * oracle.rounding(torch.float32), sizes


@pytest.mark.parametrize("memory_format", [None, torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "permuted"])
def test_a_lateral_connection_is_laid_out_as_by_the_operator(layout: str, memory_format: Any) -> None:
    feature, bias = random_map((2, 6, 15, 9), torch.float32, layout=layout), torch.randn(5)
    options = {"mode": "nearest", "gain": 0.5}
    for weight in (torch.randn(5, 6), torch.randn(5, 6, 1, 1)):
        for top in (None, random_map((2, 5, 8, 5), torch.float32, layout=layout)):
            arguments = (feature, weight, bias, top)
            result = decompositions.lateral_connection(*arguments, **options, memory_format=memory_format)
            operator = torch.ops.fpn_kernels.lateral_connection(*arguments, **options, memory_format=memory_format)
            assert result.stride() == operator.stride()
            assert oracle.error(result, oracle.lateral_connection(*arguments, **options)) <= 4 * oracle.rounding(
                torch.float32
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_weighted_merge_is_that_of_the_operator(mode: str, count: int, dtype: torch.dtype) -> None:
    for layout in ("nchw", "nhwc"):
        first, last = random_map((2, 5, 58, 9), dtype, layout=layout), random_map((2, 5, 30, 4), dtype, layout=layout)
        third = random_map((2, 5, 58, 9), dtype) if count == 3 else None
        weights = torch.rand(count, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        # In 16 bits one rounding more or less; else the order of a few products, and that of the bilinear weights.
        due = 2 if dtype.itemsize == 2 else 8
        for normalization in ("none", "relu", "softmax"):
            options = {"mode": mode, "normalization": normalization, "eps": 0.25}
            ours = decompositions.weighted_merge(first, last, third, weights, **options)
            expected = torch.ops.fpn_kernels.weighted_merge(first, last, third, weights, **options)
            assert ours.stride() == expected.stride()
            assert oracle.error(ours, expected.double()) <= due * oracle.rounding(dtype)


def test_under_autocast_they_compute_in_the_operators_dtype() -> None:
    feature, weight, bias = torch.randn(1, 6, 10, 14), torch.randn(5, 6), torch.randn(5)
    top, double = torch.randn(1, 5, 5, 7, dtype=torch.bfloat16), torch.randn(1, 5, 10, 14, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        merged = decompositions.lateral_connection(feature, weight, bias, top)
        operator = torch.ops.fpn_kernels.lateral_connection(feature, weight, bias, top)
        assert merged.dtype == operator.dtype == torch.bfloat16
        assert oracle.error(merged, operator.double()) <= 4 * oracle.rounding(torch.bfloat16)
        added = decompositions.upsample_add(top, operator.float())
        assert torch.equal(added, torch.ops.fpn_kernels.upsample_add(top, operator.float()))
        assert decompositions.upsample_add(top.double(), double).dtype == torch.float64


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="top: expected the batch and channels of lateral"):
        decompositions.upsample_add(torch.ones(1, 2, 3, 3), torch.ones(1, 3, 6, 6))
    with pytest.raises(TypeError, match="weight: expected the dtype of feature"):
        decompositions.lateral_connection(torch.ones(1, 2, 3, 3), torch.ones(4, 2).half(), None, None)


def test_the_formulas_agree_where_float32_arithmetic_says_so() -> None:
    disagree = 0
    for in_size in range(1, 60):
        for out_size in range(1, 120):
            destination = np.arange(out_size)
            inverse = np.float32(out_size) / np.float32(in_size)
            index = np.array(oracle.nearest_index(in_size, out_size, "nearest"))
            by_division = np.minimum(np.floor(destination.astype(np.float32) / inverse), in_size - 1)
            agree = (by_division == index).all() and (destination * in_size // out_size == index).all()
            assert resampling.formulas_agree(in_size, out_size) == agree, (in_size, out_size)
            disagree += not agree
    assert disagree > 100
    assert all(resampling.formulas_agree(size, 2 * size) for size in range(1, 1000))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_decomposed_program_gives_the_pyramid_and_its_gradients(mode: str, dynamic: bool) -> None:
    neck, features = exporting.neck(mode=mode, fuse_type="avg"), exporting.features()
    program = _decomposed(neck, (features,), dynamic=dynamic)
    assert_pyramid(program.module()(features), neck, features)
    if dynamic:
        others = exporting.features(3, sizes=UNEVEN)
        assert_pyramid(program.module()(others), neck, others)
    leaves = [feature.requires_grad_() for feature in features]
    ours = torch.autograd.grad(sum((p**2).sum() for p in program.module()(leaves)), leaves)
    theirs = torch.autograd.grad(sum((p**2).sum() for p in neck(leaves)), leaves)
    for result, expected in zip(ours, theirs, strict=True):
        assert oracle.error(result, expected.double()) <= 64 * oracle.rounding(torch.float32)


def test_a_program_that_is_not_decomposed_keeps_the_operators() -> None:
    program = _exported(exporting.neck(), (exporting.features(),), dynamic=True)
    assert _own_operators(program) == {
        f"fpn_kernels.{name}.default" for name in ("top_down_pathway", "output_conv_levels")
    }
    # Blocks that run as modules: the merges alone are the library's.
    normed = _decomposed(exporting.neck(norm_layer=group_norm), (exporting.features(),), dynamic=False)
    kinds = {str(node.target) for node in normed.graph.nodes}
    assert "aten.group_norm.default" in kinds, "what is not the library's stays as it is"


# What runs where this library is not: PyTorch alone, with the import made impossible.
_ELSEWHERE = """
import sys
sys.modules["fpn_kernels"] = None
import torch

batches, saved, package = (f"{sys.argv[1]}/{name}" for name in ("batches.pt", "saved.pt2", "package.pt2"))
runs = [torch.export.load(saved).module(), torch._inductor.aoti_load_package(package)]
with torch.no_grad():
    pyramids = [[list(run(features)) for features in torch.load(batches)] for run in runs]
torch.save(pyramids, f"{sys.argv[1]}/pyramids.pt")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_saved_and_aot_compiled_programs_run_without_the_library(tmp_path: Path) -> None:
    neck = exporting.neck()
    batches = [exporting.features(), exporting.features(3, sizes=UNEVEN)]
    program = _decomposed(neck, (batches[0],), dynamic=True)
    torch.save(batches, tmp_path / "batches.pt")
    torch.export.save(program, tmp_path / "saved.pt2")
    # The wrapper of a program with symbolic sizes takes the C++ compiler ten seconds to optimise.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "package.pt2"), inductor_configs=options
    )
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved, compiled = torch.load(tmp_path / "pyramids.pt")
    for pyramids in (saved, compiled):
        for features, pyramid in zip(batches, pyramids, strict=True):
            assert_pyramid(pyramid, neck, features)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_an_aot_compiled_program_with_the_operators_calls_the_kernels(tmp_path: Path) -> None:
    top, lateral = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 8, 9)
    program = _exported(exporting.Merge(), (top, lateral), dynamic=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    run = torch._inductor.aoti_load_package(package)
    with fpn_kernels.backends.selection.record_calls() as calls:
        result = run(top, lateral)
    assert [operator for operator, _ in calls] == ["upsample_add"]
    assert torch.equal(result, fpn_kernels.upsample_add(top, lateral))
