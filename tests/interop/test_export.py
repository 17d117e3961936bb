"""The operators as standard ones: decompositions, and programs made of them."""

from __future__ import annotations

import exporting
import numpy as np
import oracle
import pytest
import torch
from exporting import MODES, UNEVEN, assert_pyramid
from operators import PUBLIC
from samples import Make, Operator, Sample
from twins import group_norm

import fpn_kernels
from fpn_kernels import resampling

pytestmark = pytest.mark.filterwarnings(exporting.QUIET)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_every_forward_operator_has_a_decomposition() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpn_kernels::")}
    assert {"fpn_kernels::upsample_add", "fpn_kernels::lateral_connection"} <= names
    # Gradients alone call the sums for a bias.
    forward = {name for name in names - {"fpn_kernels::channel_sums"} if "_backward" not in name}
    assert {operator.name() for operator in fpn_kernels.decompositions()} == forward


DECOMPOSED = [(op, sample) for op in PUBLIC for sample in op.samples]


@pytest.mark.parametrize(("op", "sample"), DECOMPOSED, ids=[f"{op}: {sample.why}" for op, sample in DECOMPOSED])
def test_a_decomposition_has_the_numbers_and_strides_of_the_operator(op: Operator, sample: Sample) -> None:
    decomposition = fpn_kernels.decompositions()[op.overload]
    for dtype, layouts in (
        (torch.float32, ("nchw",)),
        (torch.float32, ("sliced", "nhwc", "expanded")),
        (torch.bfloat16, ("nhwc", "sliced-nhwc")),
        (torch.float16, ("permuted", "nchw")),
        (torch.float64, ("nhwc",)),
    ):
        arguments = op.arguments(*sample.arguments(Make(dtype, "cpu", *layouts)))
        options = dict(sample.options)
        if op.name == "weighted_merge":
            options.setdefault("normalization", "relu")
        ours, theirs = (run(*arguments, **options) for run in (decomposition, op.overload))
        pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
        for result, expected in pairs:
            assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())
            # In 16 bits one rounding more or less per level; else the order of sums.
            due = {torch.bfloat16: 4, torch.float16: 4}.get(dtype, 16) * oracle.rounding(dtype)
            assert oracle.error(result, expected.double()) <= due + 8 * oracle.rounding(torch.float32)


def test_under_autocast_they_compute_in_the_operators_dtype() -> None:
    feature, weight, bias = torch.randn(1, 6, 10, 14), torch.randn(5, 6), torch.randn(5)
    top, double = torch.randn(1, 5, 5, 7, dtype=torch.bfloat16), torch.randn(1, 5, 10, 14, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        forms = fpn_kernels.decompositions()
        connect, merge = (
            forms[getattr(torch.ops.fpn_kernels, name).default] for name in ("lateral_connection", "upsample_add")
        )
        merged = connect(feature, weight, bias, top)
        operator = torch.ops.fpn_kernels.lateral_connection(feature, weight, bias, top)
        assert merged.dtype == operator.dtype == torch.bfloat16
        assert oracle.error(merged, operator.double()) <= 4 * oracle.rounding(torch.bfloat16)
        added = merge(top, operator.float())
        assert torch.equal(added, torch.ops.fpn_kernels.upsample_add(top, operator.float()))
        assert merge(top.double(), double).dtype == torch.float64


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
    program = exporting.decomposed(neck, (features,), dynamic=dynamic)
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
    program = exporting.exported(exporting.neck(), (exporting.features(),), dynamic=True)
    assert exporting.own_operators(program) == {
        f"fpn_kernels.{name}.default" for name in ("top_down_pathway", "output_conv_levels")
    }
    # Blocks that run as modules: the merges alone are the library's.
    normed = exporting.decomposed(exporting.neck(norm_layer=group_norm), (exporting.features(),), dynamic=False)
    kinds = {str(node.target) for node in normed.graph.nodes}
    assert "aten.group_norm.default" in kinds, "what is not the library's stays as it is"
