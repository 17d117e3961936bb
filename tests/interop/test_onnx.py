"""ONNX: `torch.onnx.export` writes standard nodes, and onnxruntime reads the same pixels at every pair of sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exporting
import oracle
import pytest
import torch
from exporting import MODES, UNEVEN, Merge, assert_pyramid
from samples import random_map
from torch import Tensor, nn
from twins import NAMES, SIZES

import fpn_kernels
from fpn_kernels import resampling

onnx = pytest.importorskip("onnx", reason="export to ONNX needs onnx")
pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="a run of what was exported needs onnxruntime")

pytestmark = pytest.mark.filterwarnings(exporting.QUIET)

# Three pairs at which the float32 index is not the rational one, and the ratio 2.
PAIRS = [(30, 58), (98, 194), (116, 230), (29, 58)]

Run = Callable[..., list[Tensor]]


@pytest.fixture
def session(tmp_path: Path) -> Callable[[Any], Run]:
    """Makes a callable of tensors from an exported program, run by onnxruntime on the CPU."""

    def make(program: Any) -> Run:
        assert {node.domain for node in program.model.graph} == {""}, "an operator that is not ONNX's own"
        path = str(tmp_path / "program.onnx")
        program.save(path)
        ready = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in ready.get_inputs()]

        def run(*tensors: Tensor) -> list[Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(output) for output in ready.run(None, feeds)]

        return run

    return make


def _export(module: nn.Module, arguments: tuple, *, dynamic: bool = False) -> Any:
    shapes = exporting.dynamic_shapes(arguments) if dynamic else None
    return torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)


@pytest.mark.parametrize(
    ("mode", "fuse_type", "dtype"),
    [("nearest", "sum", torch.float32), ("nearest-exact", "avg", torch.float32), ("bilinear", "avg", torch.float16)],
    ids=str,
)
def test_the_same_pyramid(mode: str, fuse_type: str, dtype: torch.dtype, session: Any) -> None:
    neck, features = exporting.neck(dtype, mode=mode, fuse_type=fuse_type), exporting.features(dtype=dtype)
    assert_pyramid(session(_export(neck, (features,)))(*features), neck, features)


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.nightly) for mode in MODES[1:])])
def test_dynamic_batch_and_sizes(mode: str, session: Any) -> None:
    neck = exporting.neck(mode=mode)
    run = session(_export(neck, (exporting.features(),), dynamic=True))
    for batch, sizes in (
        (2, SIZES),
        (1, UNEVEN),
        (3, [(200, 32), (100, 16), (50, 8), (25, 4)]),
        (2, [(7, 1), (4, 1), (2, 1), (1, 1)]),
    ):
        features = exporting.features(batch, sizes=sizes)
        assert_pyramid(run(*features), neck, features)


def test_an_image_model(session: Any) -> None:
    model = fpn_kernels.ResNetFPN((1, 1, 1, 1), 8, width=4).eval()
    image = torch.randn(2, 3, 75, 130)
    with torch.no_grad():
        expected = model.double()(image.double())
    run = session(_export(model.float(), (image,), dynamic=True))
    for result, exact in zip(run(image), expected.values(), strict=True):
        assert oracle.error(result, exact) <= 64 * oracle.rounding(torch.float32)


def test_a_program_that_was_exported_before(session: Any) -> None:
    neck, features = exporting.neck(), exporting.features()
    program = torch.export.export(neck, (features,)).run_decompositions(fpn_kernels.decompositions())
    assert_pyramid(session(torch.onnx.export(program, dynamo=True, verbose=False))(*features), neck, features)


def test_maps_by_name(session: Any) -> None:
    neck, features = exporting.neck(), exporting.features()
    # The empty mapping: the exporter takes a last one for keywords.
    program = _export(neck, (dict(zip(NAMES, features, strict=True)), {}))
    assert_pyramid(session(program)(*features), neck, features)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_every_pair_of_dynamic_sizes_reads_the_same_pixels(mode: str, session: Any) -> None:
    run = session(_export(Merge(mode), (torch.ones(2, 1, 3, 4), torch.ones(2, 1, 5, 7)), dynamic=True))
    for in_size in range(1, 60):
        row = torch.arange(in_size, dtype=torch.float32).view(1, 1, 1, in_size)
        for out_size in range(1, 120):
            (result,) = run(row, torch.zeros(1, 1, 1, out_size))
            assert result.flatten().tolist() == oracle.nearest_index(in_size, out_size, mode), (in_size, out_size)
    for in_size, out_size in PAIRS:
        top, zeros = _numbered(in_size, out_size)
        assert torch.equal(run(top, zeros)[0], fpn_kernels.upsample_add(top, zeros, mode=mode))


def _numbered(in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """A square map whose pixels are their own numbers, so that what was read shows which was, and one of zeros."""
    top = torch.arange(in_size * in_size, dtype=torch.float32).view(1, 1, in_size, in_size)
    return top, torch.zeros(1, 1, out_size, out_size)


@pytest.mark.parametrize(
    ("mode", "pair"), [("nearest", (29, 58)), ("nearest", (98, 194)), ("nearest-exact", (116, 230))], ids=str
)
def test_fixed_sizes_read_the_same_pixels(mode: str, pair: tuple[int, int], session: Any) -> None:
    top, zeros = _numbered(*pair)
    program = _export(Merge(mode), (top, zeros))
    resizes = mode == "nearest" and pair == (29, 58)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds == (["Resize", "Add"] if resizes else ["Gather", "Gather", "Add"])
    assert torch.equal(session(program)(top, zeros)[0], fpn_kernels.upsample_add(top, zeros, mode=mode))


@pytest.mark.nightly
def test_resize_reads_those_pixels_wherever_it_is_taken() -> None:
    helper, floats, integers = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    resize = helper.make_node(
        "Resize",
        ["x", "", "", "sizes"],
        ["y"],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    inputs = [
        helper.make_tensor_value_info("x", floats, ["n", "c", "h", "w"]),
        helper.make_tensor_value_info("sizes", integers, [4]),
    ]
    outputs = [helper.make_tensor_value_info("y", floats, ["N", "C", "H", "W"])]
    graph = helper.make_graph([resize], "resize", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run
    others = 0
    for in_size in range(1, 60):
        row = torch.arange(in_size, dtype=torch.float32).view(1, 1, 1, in_size).numpy()
        for out_size in range(1, 120):
            (read,) = run(None, {"x": row, "sizes": torch.tensor([1, 1, 1, out_size]).numpy()})
            same = read.ravel().tolist() == oracle.nearest_index(in_size, out_size, "nearest")
            assert same or not resampling.formulas_agree(in_size, out_size), (in_size, out_size)
            others += not same
    assert others > 100, "Resize agrees at every pair: the reads by index would be needless"


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        (((19, 29), (38, 57)), torch.float32),
        (((9, 8), (4, 1)), torch.float16),
        pytest.param(((1, 1), (7, 9)), torch.float32, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_bilinear_merge(shapes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype, session: Any) -> None:
    # (9, 8) to (4, 1): ONNX's other convention, pytorch_half_pixel, would read pixel 0 for a single column.
    top, lateral = (random_map((2, 3, *size), dtype) for size in shapes)
    (result,) = session(_export(Merge("bilinear", 0.5), (top, lateral)))(top, lateral)
    # Each runtime rounds the position of a pixel for itself, to a few units of its float32.
    position = 4 * max(*shapes[0], *shapes[1]) * oracle.rounding(torch.float32)
    exact = oracle.upsample_add(top, lateral, "bilinear", 0.5)
    assert oracle.error(result, exact) <= position + 1.1 * oracle.rounding(dtype)
