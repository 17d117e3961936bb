"""Every dialect with every option: the fused module against the twin that it was, forward and backward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from fusion_cases import CASES, ONE_EACH, Case, fused_calls, leaves, requiring_grad
from oracle import error, rounding
from torch import nn
from twins import scramble, served

import fpn_kernels
from fpn_kernels.interop.swapping import is_fused

_both = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
_one_each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


def _pair(case: Case, training: bool = False) -> tuple[nn.Module, nn.Module]:
    twin = case.make()
    scramble(twin)
    if any(isinstance(m, nn.SyncBatchNorm) for m in twin.modules()) and training:
        pytest.skip("SyncBatchNorm trains on GPUs only")
    fused = copy.deepcopy(twin).train(training)
    return fpn_kernels.fuse(fused), twin.train(training)


def _assert_same(actual: Any, expected: Any, limit: float = 2e-5) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    assert len(leaves(actual)) == len(leaves(expected))
    for left, right in zip(leaves(actual), leaves(expected), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert error(left, right.double()) < limit


@_both
@_every_case
def test_outputs_and_gradients_are_the_twins(case: Case, training: bool) -> None:
    fused, twin = _pair(case, training)
    example = case.example()
    x, y = requiring_grad(example), requiring_grad(example)
    actual, expected = fused(*x), twin(*y)
    _assert_same(actual, expected)
    weights = [torch.randn_like(leaf) for leaf in leaves(expected)]
    for results in (actual, expected):
        sum((leaf * weight).sum() for leaf, weight in zip(leaves(results), weights, strict=True)).backward()
    theirs = dict(twin.named_parameters())
    pairs = [(name, p.grad, theirs[name].grad) for name, p in fused.named_parameters()]
    pairs += [("input", a.grad, b.grad) for a, b in zip(leaves(x), leaves(y), strict=True)]
    for name, got, want in pairs:
        assert (got is None) == (want is None), name
        if want is not None:
            # A 3x3 convolution under BatchNorm in training has a gradient that all but cancels.
            assert (got - want).norm() <= 2e-5 * want.norm() + 2e-6, name
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(fused.named_buffers())[name], buffer)


@_every_case
def test_the_fused_calls_serve_it(case: Case) -> None:
    fused, twin = _pair(case)
    example = case.example()
    with torch.no_grad():
        assert fused_calls(lambda: fused(*example)) == case.calls
        assert served(lambda: twin(*example)) == []


@_every_case
def test_checkpoints_load_strictly_both_ways(case: Case) -> None:
    fused, twin = _pair(case)
    other = case.make()
    other.load_state_dict(fused.state_dict(), strict=True)
    scramble(twin)
    fused.load_state_dict(twin.state_dict(), strict=True)
    example = case.example()
    with torch.no_grad():
        _assert_same(fused(*example), twin(*example))


@_every_case
def test_the_report_names_it(case: Case) -> None:
    model, report = fpn_kernels.fuse(nn.ModuleDict({"inside": case.make()}), report=True)
    assert set(report.fused.values()) == {case.dialect}
    assert all(path.startswith("inside") and is_fused(model.get_submodule(path)) for path in report.fused)


@_one_each
def test_autocast(case: Case) -> None:
    fused, twin = _pair(case)
    example = case.example()
    with torch.no_grad():
        truth = twin(*example)
        with torch.autocast("cpu", torch.bfloat16):
            actual, eager = fused(*example), twin(*example)
    for got, theirs, exact in zip(leaves(actual), leaves(eager), leaves(truth), strict=True):
        if case.dialect != "EfficientDet FpnCombine":  # whose nodes are float32 in eager: this one's are the promise's
            assert got.dtype == theirs.dtype
        # Eager carries the pathway in float32 here, the library in bfloat16: a few roundings more are its promise.
        assert error(got, exact.double()) <= 8 * rounding(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@_one_each
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    fused, twin = _pair(case)
    example = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), case.example())
    with torch.no_grad():
        actual, expected = fused.to(dtype)(*example), twin.to(dtype)(*example)
    _assert_same(actual, expected, 8 * rounding(dtype) if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@_every_case
def test_verification_agrees(case: Case, device: str) -> None:
    model = case.make().to(device)
    scramble(model)
    move = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, lambda x: x.to(device))
    example = move(case.example())
    fpn_kernels.fuse(model, verify=example)
    with torch.no_grad():
        assert fused_calls(lambda: model.eval()(*example)) == case.calls


# ------------------------------------------------------------------------- what each system is particular about


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("size", [(64, 100), (72, 96), (65, 97)])
def test_detectron2_odd_sizes_stay_the_error_they_are(size: tuple[int, int]) -> None:
    fused, twin = _pair(_case("detectron2-pool"))
    errors = []
    for model in (fused, twin):
        with pytest.raises(RuntimeError) as caught:
            model(torch.randn(1, 3, *size))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["mmdet-scale-factor", "sam2-published", "smp-nearest"])
def test_a_map_of_one_pixel_is_broadcast_as_it_was(name: str) -> None:
    fused, twin = _pair(_case(name))
    channels = [m.shape[1] for m in leaves(_case(name).example())]
    maps = [torch.randn(1, c, *size) for c, size in zip(channels, [(8, 8), (4, 4), (1, 1), (1, 1)], strict=True)]
    example = tuple(maps) if name.startswith("mmdet") else maps
    errors = []
    for model in (fused, twin):
        try:
            errors.append([leaf.shape for leaf in leaves(model(example))])
        except RuntimeError as caught:
            errors.append(str(caught))
    assert errors[0] == errors[1]


def test_mmdet_wrong_number_of_maps_is_its_own_assertion() -> None:
    fused, _ = _pair(_case("mmdet-pool"))
    with pytest.raises(AssertionError):
        fused(tuple(leaves(_case("mmdet-pool").example()))[:3])


def test_detectron2_reads_its_lists_not_its_submodules() -> None:
    fused, twin = _pair(_case("detectron2-plain"))
    for model in (fused, twin):
        model.fpn_lateral3 = nn.Conv2d(12, 12, 1)
    x = torch.randn(1, 3, 64, 64)
    _assert_same(fused(x), twin(x))


def test_options_changed_after_fusing_are_honoured() -> None:
    fused, twin = _pair(_case("mmdet-relu"))
    for model in (fused, twin):
        model.num_outs, model.relu_before_extra_convs, model.upsample_cfg = 5, False, {"mode": "bilinear"}
    example = _case("mmdet-relu").example()
    _assert_same(fused(*example), twin(*example))


def test_sam2_merges_in_float32_whatever_the_convolutions_run_in() -> None:
    fused, twin = _pair(_case("sam2-published"))
    example = _case("sam2-published").example()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(*example), twin(*example)
    assert [m.dtype for m in actual[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    _assert_same(actual[0], expected[0], rounding(torch.bfloat16))


def test_mmdet_of_version_1_says_its_source_by_two_booleans() -> None:
    for on_inputs, source in ((True, "on_input"), (False, "on_output")):
        fused, twin = _pair(_case("mmdet-on-input" if on_inputs else "mmdet-on-output"))
        fused.add_extra_convs, fused.extra_convs_on_inputs = True, on_inputs
        example = _case(f"mmdet-{source.replace('_', '-')}").example()
        _assert_same(fused(*example), twin(*example))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("mmdet-pool", lambda m: m.upsample_cfg.update(mode="bicubic"), "upsample_cfg: mode 'bicubic' is not one of"),
        (
            "mmdet-bilinear",
            lambda m: m.upsample_cfg.update(align_corners=True),
            "upsample_cfg: align_corners=True is not",
        ),
        ("mmdet-pool", lambda m: m.upsample_cfg.update(antialias=True), "upsample_cfg: antialias is not served"),
        ("mmdet-pool", lambda m: m.upsample_cfg.update(scale_factor=1.5), "upsample_cfg: scale_factor=1.5 is not a"),
        ("mmdet-relu", lambda m: setattr(m, "add_extra_convs", "on_top"), "add_extra_convs='on_top' is not one of"),
        ("detectron2-plain", lambda m: setattr(m, "_fuse_type", "max"), "fuse_type='max' is not one of"),
        ("sam2-published", lambda m: setattr(m, "fpn_interp_model", "bicubic"), "fpn_interp_model: mode 'bicubic'"),
        ("sam2-published", lambda m: setattr(m, "fuse_type", "cat"), "fuse_type='cat' is not one of"),
        ("smp-nearest", lambda m: setattr(m.p3, "interpolation_mode", "area"), "interpolation_mode: mode 'area'"),
        ("effdet-size", lambda m: setattr(m.fnode[1], "weight_method", "fastattn"), "weight_method='fastattn': only a"),
        ("effdet-size", lambda m: setattr(m.fnode[0].resample["2"].upsample, "mode", "bicubic"), "upsample: mode 'bic"),
    ],
)
def test_an_option_that_cannot_be_served_is_an_error_and_nothing_is_changed(name: str, edit: Any, message: str) -> None:
    model = nn.ModuleDict({"good": _case("torchvision-plain").make(), "bad": _case(name).make()})
    edit(model["bad"])
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"model: bad.*{message}"):
        fpn_kernels.fuse(model)
    assert [type(module) for module in model.modules()] == classes


def test_effdet_nodes_without_anything_to_enlarge_are_left() -> None:
    _, report = fpn_kernels.fuse(_case("effdet-size").make(), report=True)
    assert list(report.fused) == ["fnode.0", "fnode.1"]
    assert set(report.left.values()) == {"none of its inputs is enlarged"}
