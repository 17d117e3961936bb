"""The Triton kernels of `output_conv`, below the operator: every tile, layout and tail, against float64.

Run under the interpreter, which also checks the alignment and contiguity that a tensor descriptor needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from native_calls import by_triton, refusal_of
from samples import random_map
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels.gpu import geometry
from fpn_kernels.operators.output_conv import kernels, tiles
from fpn_kernels.operators.output_conv import triton as output_conv

interpreted = pytest.mark.interpreter
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def _weight(out_channels: int, in_channels: int, dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    scale = (9 * in_channels) ** 0.5
    return (random_map((out_channels, in_channels, 3, 3), torch.float64, layout=layout) / scale).to(dtype)


def _exact(feature: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(feature.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def _close(result: Tensor, exact: Tensor) -> None:
    """Within one rounding of the result and a few of the float32 sum, whose terms add up to about 3 in size."""
    assert torch.isfinite(result).all(), "an element was not written"
    bound = oracle.rounding(result.dtype) * exact.abs() * 1.001 + 64 * torch.finfo(torch.float32).eps
    excess = (result.double() - exact).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float(excess.max())} more than rounding allows"


def _dtype_of(arithmetic: str) -> torch.dtype:
    return random.choice([torch.float16, torch.bfloat16]) if arithmetic == "half" else torch.float32


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launch allocates is NaN before it is written."""

    def poisoned(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **keywords: plain(*arguments, **keywords).fill_(float("nan"))

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))


@interpreted
@pytest.mark.parametrize(
    ("key", "transposed"),
    [
        # A kernel per arithmetic and orientation; the tiles differ in sizes alone.
        pytest.param(
            key,
            transposed,
            id=f"{'transposed' if transposed else ''}-{'-'.join(key)}",
            marks=() if key[1] in ("small", "wide") else pytest.mark.nightly,
        )
        for key, config in tiles.TABLE.items()
        for transposed in ((False, True) if config.transposed != config else (False,))
    ],
)
def test_every_tile(key: tuple[str, str], transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and column more than a box, more channels than a tile and than a step, in both layouts of the result."""
    arithmetic, _ = key
    config = tiles.TABLE[key].transposed if transposed else tiles.TABLE[key]
    monkeypatch.setattr(tiles, "choose", lambda *arguments: config)
    monkeypatch.setattr(geometry, "arithmetic_of", lambda feature: arithmetic)
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", 3)  # each program has several tiles
    # Packing 8 rows of weights per program took two thirds of the time.
    monkeypatch.setattr(output_conv, "_PACKED_ROWS", 64)
    _poison(monkeypatch)
    dtype = _dtype_of(arithmetic)
    in_channels, out_channels = config.depth + 8, config.channels + 8
    for layout, out_layout in zip(FORMATS, reversed(FORMATS), strict=True):
        feature = random_map((1, in_channels, config.rows + 1, config.columns + 1), dtype, layout="nhwc")
        weight, bias = _weight(out_channels, in_channels, dtype, layout), torch.randn(out_channels).to(dtype)
        result = by_triton("output_conv", feature, weight, bias, FORMATS[out_layout])
        assert result.is_contiguous(memory_format=FORMATS[out_layout])
        _close(result, _exact(feature, weight, bias))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        pytest.param((2, 8, 5, 7), 3, id="fewer-channels-than-a-step"),
        pytest.param((1, 64, 1, 1), 16, id="one-pixel"),
        pytest.param((1, 64, 19, 1), 8, id="one-column"),
        pytest.param((1, 72, 1, 24), 65, id="one-row-and-tails-of-channels"),
        pytest.param((3, 16, 6, 24), 24, id="whole-vectors"),
    ],
)
def test_sizes_and_tails(
    shape: tuple[int, ...], out_channels: int, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch)
    feature, weight = random_map(shape, dtype, layout="nhwc"), _weight(out_channels, shape[1], dtype)
    assert refusal_of("triton", "output_conv", feature, weight, None, FORMATS[layout]) is None
    _close(by_triton("output_conv", feature, weight, None, FORMATS[layout]), _exact(feature, weight, None))


@interpreted
def test_slices_are_read_in_place() -> None:
    """Channels of a larger map, every second row, a weight of any strides, a bias that steps."""
    whole = random_map((2, 48, 12, 9), torch.float16, layout="nhwc")
    feature = whole[:, 16:40, 1::2, 2:]
    weight = _weight(24, 10, torch.float16).transpose(0, 1).flip(2, 3)
    bias = torch.randn(20).half()[::2]
    assert refusal_of("triton", "output_conv", feature, weight, bias, None) is None
    _close(by_triton("output_conv", feature, weight, bias, None), _exact(feature, weight, bias))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # in the channels beyond the last one
def test_infinities_stay_where_they_are() -> None:
    """Neither the zeros around a map nor those after its last channel meet another tap's infinity."""
    feature, weight = random_map((1, 8, 9, 9), torch.float32, layout="nhwc"), _weight(8, 8, torch.float32)
    feature[0, 3, 4, 4] = float("inf")
    result = by_triton("output_conv", feature, weight, None, None)
    touched = torch.zeros(9, 9, dtype=torch.bool)
    touched[3:6, 3:6] = True
    assert torch.equal(result.isinf().all(1)[0], touched) and torch.isfinite(result[0, :, ~touched]).all()


@interpreted
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_levels_of_a_pyramid(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch)
    monkeypatch.setattr(geometry, "_DEFAULT_SM_COUNT", 5)
    sizes = [(1, 1), (13, 20), (7, 12), (4, 4)]
    features = [random_map((2, 24, *size), dtype, layout="nhwc") for size in sizes]
    weights, biases = [_weight(40, 24, dtype) for _ in sizes], [torch.randn(40).to(dtype) for _ in sizes]
    assert refusal_of("triton", "output_conv_levels", features, weights, biases, [0, 1, 2, 3], FORMATS[layout]) is None
    results = by_triton("output_conv_levels", features, weights, biases, [0, 1, 2, 3], FORMATS[layout])
    for feature, weight, bias, result in zip(features, weights, biases, results, strict=True):
        assert result.is_contiguous(memory_format=FORMATS[layout])
        _close(result, _exact(feature, weight, bias))


@interpreted
def test_only_weights_that_no_descriptor_reads_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = kernels.pack

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            packed.append(1)
            return pack[grid]

    monkeypatch.setattr(kernels, "pack", Recorded())
    whole, tail = _weight(8, 128, torch.float16, "nhwc"), _weight(8, 72, torch.float16, "nhwc")
    assert output_conv.plan_matrices([whole], "half", 64)[0]([whole])[0].data_ptr() == whole.data_ptr()
    assert not packed
    for weight, arithmetic in ((tail, "half"), (whole.contiguous(), "half"), (whole.float(), "tf32")):
        (matrix,) = output_conv.plan_matrices([weight], arithmetic, 64)[0]([weight])
        channels = weight.shape[1]
        expected = F.pad(weight.permute(0, 2, 3, 1), (0, -channels % 64)).flatten(1)
        assert torch.equal(matrix, expected)
    assert len(packed) == 3


@interpreted
def test_int64_offsets_give_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    feature, weight = random_map((2, 8, 5, 7), torch.float32, layout="nhwc"), _weight(5, 8, torch.float32)
    expected = [by_triton("output_conv", feature, weight, None, memory_format) for memory_format in FORMATS.values()]
    monkeypatch.setattr(geometry, "needs_int64", lambda *tensors: True)
    for result, memory_format in zip(expected, FORMATS.values(), strict=True):
        assert torch.equal(by_triton("output_conv", feature, weight, None, memory_format), result)


@interpreted
def test_the_callers_allocator_is_put_back() -> None:
    import triton
    from triton.runtime import _allocation

    def theirs(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("not theirs to serve")

    before = _allocation._allocator.get()
    try:
        triton.set_allocator(theirs)
        by_triton(
            "output_conv",
            random_map((1, 8, 2, 2), torch.float16, layout="nhwc"),
            _weight(8, 8, torch.float16),
            None,
            None,
        )
        assert _allocation._allocator.get() is theirs
    finally:
        triton.set_allocator(before)


@interpreted
def test_reasons_to_refuse() -> None:
    weight = _weight(16, 16, torch.float16)

    def refusal(feature: Tensor, weight: Tensor = weight) -> str | None:
        return refusal_of("triton", "output_conv", feature, weight, None, None)

    nhwc = random_map((1, 32, 4, 4), torch.float16, layout="nhwc")
    assert refusal(nhwc[:, :16]) is None
    for feature in (nhwc.contiguous()[:, :16], nhwc[:, 1:17], nhwc[:, :12], nhwc[:1, :, :1, :1].expand(1, 32, 4, 4)):
        assert "an NHWC map that begins at a multiple of 16 bytes" in str(refusal(feature))
    assert "float64" in str(refusal(nhwc.double()))
    endless = torch.empty(1).half().expand(2**31, 16, 2**8, 2**8)
    assert "tiles in int32" in str(output_conv._product_refusal(endless, weight))
    huge = torch.empty(1).half().expand(2**20, 2**11, 3, 3)
    assert "offsets of a weight" in str(output_conv._product_refusal(nhwc, huge))


@interpreted
def test_reasons_to_refuse_a_pyramid() -> None:
    maps = [random_map((1, 16, size, size), torch.float16, layout="nhwc") for size in (8, 4)]
    weights, biases = [_weight(16, 16, torch.float16)] * 2, [torch.zeros(16).half()] * 2

    def refusal(features: list[Tensor], weights: list[Tensor], biases: list[Tensor | None]) -> str:
        present = [(level, bias) for level, bias in enumerate(biases) if bias is not None]
        given = ([bias for _, bias in present], [level for level, _ in present])
        return str(refusal_of("triton", "output_conv_levels", features, weights, *given))

    assert refusal(maps, weights, biases) == "None"
    assert "at most 5" in refusal(maps * 3, weights * 3, biases * 3)
    assert "level 1 differs from level 0" in refusal([maps[0], torch.cat([maps[1]] * 2)], weights, biases)
    assert "level 1 differs" in refusal(maps, [weights[0], weights[0].transpose(0, 1)], biases)
    assert "level 1: biases are all None" in refusal(maps, weights, [biases[0], None])
    assert "level 1: several levels are read as dense" in refusal([maps[0], maps[1][:, :, ::2]], weights, biases)
    assert "level 1: feature is read through" in refusal([maps[0], maps[1].contiguous()], weights, biases)
    assert output_conv.MAX_LEVELS == kernels.MAX_LEVELS
