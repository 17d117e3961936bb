"""Every dialect with every option: the fused module against its original, forward and backward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from fusion_cases import CASES, ONE_EACH, Case, assert_same_gradients, assert_same_output, leaves
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


@_both
@_every_case
def test_outputs_and_gradients_are_the_twins(case: Case, training: bool) -> None:
    assert_same_gradients(*_pair(case, training), case.example())


@_every_case
def test_the_report_names_it_the_fused_calls_compute_it_and_checkpoints_load(case: Case) -> None:
    twin, other = case.make(), case.make()
    scramble(twin)
    model, report = fpn_kernels.fuse(nn.ModuleDict({"inside": copy.deepcopy(twin)}), report=True)
    assert set(report.fused.values()) == {case.dialect}
    assert all(path.startswith("inside") and is_fused(model.get_submodule(path)) for path in report.fused)
    fused, twin = model["inside"].eval(), twin.eval()
    other.load_state_dict(fused.state_dict(), strict=True)
    scramble(twin)
    fused.load_state_dict(twin.state_dict(), strict=True)
    example = case.example()
    with torch.no_grad():
        assert served(lambda: assert_same_output(fused(*example), twin(*example))) == case.calls


@_one_each
def test_autocast(case: Case) -> None:
    fused, twin = _pair(case)
    example = case.example()
    with torch.no_grad():
        truth = twin(*example)
        with torch.autocast("cpu", torch.bfloat16):
            actual, eager = fused(*example), twin(*example)
    for got, theirs, exact in zip(leaves(actual), leaves(eager), leaves(truth), strict=True):
        if case.dialect != "EfficientDet FpnCombine":  # its nodes are float32 in eager
            assert got.dtype == theirs.dtype
        # Eager's pathway is float32 here, the library's bfloat16: a few roundings more.
        assert error(got, exact.double()) <= 8 * rounding(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@_one_each
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    fused, twin = _pair(case)
    example = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), case.example())
    with torch.no_grad():
        actual, expected = fused.to(dtype)(*example), twin.to(dtype)(*example)
    assert_same_output(actual, expected, 8 * rounding(dtype) if dtype == torch.bfloat16 else 1e-6)


# Every option is verified nightly and on a GPU; in `make test`, one per dialect.
@pytest.mark.parametrize(
    ("case", "device"),
    [pytest.param(case, "cpu", marks=[] if case in ONE_EACH else pytest.mark.nightly) for case in CASES]
    + [pytest.param(case, "cuda", marks=pytest.mark.gpu) for case in CASES],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_verification_agrees(case: Case, device: str) -> None:
    model = case.make().to(device)
    scramble(model)
    move = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, lambda x: x.to(device))
    example = move(case.example())
    fpn_kernels.fuse(model, verify=example)
    with torch.no_grad():
        assert served(lambda: model.eval()(*example)) == case.calls


# ------------------------------------------------------------------------------------ particulars of each system


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def _outcome(call: Any) -> Any:
    """The shapes of a result, or the error."""
    try:
        return [leaf.shape for leaf in leaves(call())]
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("size", [(64, 100), (72, 96), (65, 97)])
def test_detectron2_odd_sizes_raise_the_same_error(size: tuple[int, int]) -> None:
    fused, twin = _pair(_case("detectron2-pool"))
    x = torch.randn(1, 3, *size)
    assert isinstance(_outcome(lambda: twin(x)), str) and _outcome(lambda: fused(x)) == _outcome(lambda: twin(x))


@pytest.mark.parametrize("name", ["mmdet-scale-factor", "sam2-published", "smp-nearest"])
def test_a_map_of_one_pixel_is_broadcast_as_before(name: str) -> None:
    fused, twin = _pair(_case(name))
    channels = [m.shape[1] for m in leaves(_case(name).example())]
    maps = [torch.randn(1, c, *size) for c, size in zip(channels, [(8, 8), (4, 4), (1, 1), (1, 1)], strict=True)]
    example = tuple(maps) if name.startswith("mmdet") else maps
    assert _outcome(lambda: fused(example)) == _outcome(lambda: twin(example))


def test_mmdet_wrong_number_of_maps_is_its_own_assertion() -> None:
    fused, _ = _pair(_case("mmdet-pool"))
    with pytest.raises(AssertionError):
        fused(tuple(leaves(_case("mmdet-pool").example()))[:3])


def test_detectron2_reads_its_lists_not_its_submodules() -> None:
    fused, twin = _pair(_case("detectron2-plain"))
    for model in (fused, twin):
        model.fpn_lateral3 = nn.Conv2d(12, 12, 1)
    x = torch.randn(1, 3, 64, 64)
    assert_same_output(fused(x), twin(x))


def test_options_changed_after_fusing_are_honoured() -> None:
    fused, twin = _pair(_case("mmdet-relu"))
    for model in (fused, twin):
        model.num_outs, model.relu_before_extra_convs, model.upsample_cfg = 5, False, {"mode": "bilinear"}
    example = _case("mmdet-relu").example()
    assert_same_output(fused(*example), twin(*example))


def test_sam2_merges_in_float32_whatever_the_convolutions_run_in() -> None:
    fused, twin = _pair(_case("sam2-published"))
    example = _case("sam2-published").example()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(*example), twin(*example)
    assert [m.dtype for m in actual[0]] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    assert_same_output(actual[0], expected[0], rounding(torch.bfloat16))


def test_mmdet_of_version_1_has_two_booleans_for_the_source() -> None:
    for on_inputs, name in ((True, "mmdet-on-input"), (False, "mmdet-on-output")):
        fused, twin = _pair(_case(name))
        fused.add_extra_convs, fused.extra_convs_on_inputs = True, on_inputs
        example = _case(name).example()
        assert_same_output(fused(*example), twin(*example))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("mmdet-pool", lambda m: m.upsample_cfg.update(mode="bicubic"), "upsample_cfg: mode 'bicubic' is not one of"),
        (
            "mmdet-bilinear",
            lambda m: m.upsample_cfg.update(align_corners=True),
            "upsample_cfg: align_corners=True is not",
        ),
        ("mmdet-pool", lambda m: m.upsample_cfg.update(antialias=True), "upsample_cfg: antialias is not supported"),
        ("mmdet-pool", lambda m: m.upsample_cfg.update(scale_factor=1.5), "upsample_cfg: scale_factor=1.5 is not a"),
        ("mmdet-relu", lambda m: setattr(m, "add_extra_convs", "on_top"), "add_extra_convs='on_top' is not one of"),
        ("detectron2-plain", lambda m: setattr(m, "_fuse_type", "max"), "fuse_type='max' is not one of"),
        ("sam2-published", lambda m: setattr(m, "fpn_interp_model", "bicubic"), "fpn_interp_model: mode 'bicubic'"),
        ("sam2-published", lambda m: setattr(m, "fuse_type", "cat"), "fuse_type='cat' is not one of"),
        ("smp-nearest", lambda m: setattr(m.p3, "interpolation_mode", "area"), "interpolation_mode: mode 'area'"),
        (
            "effdet-size",
            lambda m: setattr(m.fnode[1], "weight_method", "fastattn"),
            "weight_method='fastattn': only 'sum'",
        ),
        ("effdet-size", lambda m: setattr(m.fnode[0].resample["2"].upsample, "mode", "bicubic"), "upsample: mode 'bic"),
    ],
)
def test_an_unsupported_option_is_an_error_and_nothing_is_changed(name: str, edit: Any, message: str) -> None:
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
