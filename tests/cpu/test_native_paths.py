"""The queries of the product that computes a call: their answers per dtype, ISA and shape.

Other tests check that the operators follow them, e.g. `test_native_lateral_connection_vectors.py`.
"""

from __future__ import annotations

import pytest
import torch
from levels import AMX, AVX2, AVX512, LEVELS, PORTABLE, here, limited

from fpn_kernels import native
from fpn_kernels.operators import aten

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no compiled library: {native.load_error()}")

FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def _map(dtype: torch.dtype, channels: int, size: tuple[int, int] = (16, 16), *, nhwc: bool = False) -> torch.Tensor:
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.zeros(1, channels, *size, dtype=dtype).contiguous(memory_format=memory_format)


def _lateral(dtype: torch.dtype, cin: int, *, nhwc: bool = False, top: bool = True, result_nhwc: bool = False) -> str:
    weight = torch.zeros(64, cin, dtype=dtype)
    coarse = _map(dtype, 64, (8, 8), nhwc=nhwc) if top else None
    feature = _map(dtype, cin, nhwc=nhwc)
    path: str = torch.ops.fpn_kernels_native.lateral_connection_path(feature, weight, coarse, nhwc or result_nhwc)
    return path


def _output(dtype: torch.dtype, cin: int = 64, cout: int = 64, size: tuple[int, int] = (16, 16)) -> str:
    weight = torch.zeros(cout, cin, 3, 3, dtype=dtype)
    path: str = torch.ops.fpn_kernels_native.output_conv_path(_map(dtype, cin, size), weight)
    return path


def _gradient(dtype: torch.dtype, channels: int = 256, *, nhwc: bool = True) -> str:
    grad, feature = (_map(dtype, channels, (32, 32), nhwc=nhwc) for _ in range(2))
    path: str = torch.ops.fpn_kernels_native.output_conv_backward_weight_path(grad, feature)
    return path


def _needs(level: int) -> None:
    if max(here()) < level:
        pytest.skip(f"this CPU has no {LEVELS[level]}")


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16, FLOAT64], ids=str)
def test_without_vectors_pytorch_computes_every_call(dtype: torch.dtype) -> None:
    with limited(PORTABLE):
        assert _lateral(dtype, 64) == ""
        assert _output(dtype) == _gradient(dtype) == "convolution"


@pytest.mark.parametrize("level", [AVX2, AVX512], ids=LEVELS.get)
def test_float32_and_float16(level: int) -> None:
    _needs(level)
    fma = {AVX2: "AVX2 FMA", AVX512: "AVX-512 FMA"}[level]
    with limited(level):
        for dtype in (FLOAT32, FLOAT16):
            assert _lateral(dtype, 64) == _lateral(dtype, 64, nhwc=True) == fma
            assert _output(dtype) == f"Winograd, {fma}"
            assert _gradient(dtype) == (f"Winograd, {fma}" if level == AVX2 else "convolution")
            assert _gradient(dtype, nhwc=False) == "convolution"
        assert _lateral(FLOAT64, 64) == ""
        assert _output(FLOAT64) == _gradient(FLOAT64) == "convolution"


@pytest.mark.parametrize("level", [AVX2, AVX512], ids=LEVELS.get)
def test_long_sums_of_float32_are_left_to_the_convolution(level: int) -> None:
    _needs(level)
    with limited(level):
        assert _lateral(FLOAT32, 511, nhwc=True) != "convolution"
        assert _lateral(FLOAT32, 512, nhwc=True) == "convolution"
        assert (_lateral(FLOAT32, 512) == "convolution") == (level == AVX2)
        assert _lateral(FLOAT16, 512, nhwc=True) != "convolution"
        assert _output(FLOAT32, cin=512) != "convolution"
        assert _output(FLOAT32, cin=513) == "convolution"
        assert _output(FLOAT16, cin=513) != "convolution"


def test_avx2_without_a_top_or_many_pixels_is_left_to_the_convolution() -> None:
    _needs(AVX2)
    with limited(AVX2):
        assert _lateral(FLOAT32, 64, top=False) == "convolution"
        feature, weight = _map(FLOAT32, 64, (64, 128)), torch.zeros(8, 64)
        path = torch.ops.fpn_kernels_native.lateral_connection_path
        assert path(feature, weight, None, False) == "AVX2 FMA"
        assert path(feature, weight, None, True) == "convolution"


def test_layouts_without_a_product_are_left_to_pytorch() -> None:
    """An NHWC feature for an NCHW result, a top in another layout than the result, and uneven pixels."""
    _needs(AVX2)
    path = torch.ops.fpn_kernels_native.lateral_connection_path
    nchw, nhwc = (_map(FLOAT16, 64, nhwc=nhwc) for nhwc in (False, True))
    top, weight = _map(FLOAT16, 8, (8, 8)), torch.zeros(8, 64, dtype=FLOAT16)
    assert path(nhwc, weight, None, False) == path(nchw, weight, top, True) == ""
    assert path(nchw[..., 1:], weight, top, False) == ""
    assert path(nchw, weight, top, False).endswith("FMA")


def test_bfloat16_by_the_best_instructions() -> None:
    _needs(AVX2)
    with limited(AVX2):
        assert _lateral(BFLOAT16, 64) == "AVX2 FMA"
        assert _output(BFLOAT16) == _gradient(BFLOAT16) == "Winograd, AVX2 FMA"
    with limited(AVX512) as level:
        if level == AVX512:
            assert _lateral(BFLOAT16, 64) in ("AVX-512 BF16 pairs", "")
            assert _output(BFLOAT16) == _gradient(BFLOAT16) == "convolution"


def test_short_sums_of_bfloat16_without_a_top_are_left_to_onednn() -> None:
    by_onednn = aten.onednn_multiplies(BFLOAT16)
    assert (_lateral(BFLOAT16, 1024, nhwc=True, top=False) == "convolution") == by_onednn
    assert _lateral(BFLOAT16, 1025, nhwc=True, top=False) != "convolution"
    assert _lateral(BFLOAT16, 1024, nhwc=True) != "convolution"
    assert _lateral(BFLOAT16, 1024, top=False) != "convolution"


def test_amx_tiles() -> None:
    _needs(AMX)
    assert _lateral(BFLOAT16, 64, nhwc=True) == _output(BFLOAT16) == _gradient(BFLOAT16) == "AMX tiles"
    assert _lateral(BFLOAT16, 64) == "", "a top in NCHW"
    assert _lateral(FLOAT32, 64) == "AVX-512 FMA"
    assert _gradient(BFLOAT16, nhwc=False) == "AMX tiles"
