"""`lateral_connection` by Triton: one tiled matrix product with bias, coarse pixels and gain in its epilogue.

A tile is some pixels of one image by some output channels.  The sum over input channels is pipelined through shared
memory; bias, coarse pixels and gain are applied to the float32 accumulators.  The feature is read in place in either
layout (16-bit tensor cores take both operand orders).  The tile is transposed for an NCHW result, so that consecutive
threads have consecutive addresses of the result.  Row and column of a pixel are computed once per row of the tile.
Programs walk over the output channels of a pixel tile first: its second reader finds it in L2.

Bilinear is composed: the product alone, then `upsample_add` in place.

Which calls it serves: with a merge it reads and writes each map once, where PyTorch takes more passes for bias, resize
and sum.  In 16 bits and as TF32, bytes decide (C2 of 800 x 1280 takes 114 and 57 operations per byte; an H100 computes
268 and 137 per byte): it serves on every GPU.  Without a merge, and in bilinear mode, it saves the bias at most, and
serves where it was measured.  In float32 without TF32, operations decide, and the product was never timed: eager
serves, with one merge.  Eager also serves maps that this kernel would move by single elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fpn_kernels import compatibility
from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import ALONE, Launch, Link, stand_in
from fpn_kernels.gpu.tiles import walk_of
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.dispatch import named
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.layouts import allocator
from fpn_kernels.operators.upsample_add.triton import plan_merge


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """A tile of the result (pixels by output channels), input channels per step, warps, and pipeline stages."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.pixels} pixels x {self.channels} channels x {self.depth}, {self.num_warps} warps"


# (arithmetic, size of the tile) -> tile.  128 x 128 with 8 warps is 64 accumulators per thread, which leaves registers
# for the coarse tile; Hopper's tensor cores need at least 64 rows per warpgroup.  "narrow" is for maps whose accesses
# are not vectorised: with one address per element the large tile spills (compiled: 27 stores on sm_80).
#
# Measured on an H100, 16 bits, to 256 channels (us, 4 of them the launch and its measurement): from 256 at 200 x 320
# large 42.8, medium 52.0, small 65.5; from 512 at 100 x 160 18.5, 22.1, 28.0; from 1024 at 50 x 80 (32 large tiles, 126
# medium ones) 16.5, 13.2, 14.5; from 2048 at 25 x 40 21.3, 16.4, 14.7.
TABLE = {
    ("half", "large"): ProductConfig(128, 128, 64, 8, 3),
    ("half", "medium"): ProductConfig(64, 128, 64, 4, 4),
    ("half", "small"): ProductConfig(64, 64, 64, 4, 4),
    ("half", "narrow"): ProductConfig(64, 64, 32, 4, 2),
    ("tf32", "large"): ProductConfig(128, 128, 32, 8, 3),
    ("tf32", "small"): ProductConfig(64, 64, 32, 4, 4),
    ("tf32", "narrow"): ProductConfig(64, 64, 32, 4, 2),
    ("ieee", "large"): ProductConfig(64, 64, 16, 4, 3),
    ("ieee", "small"): ProductConfig(32, 32, 16, 4, 3),
    ("ieee", "narrow"): ProductConfig(32, 32, 16, 4, 2),
}

# The least number of elements that can be moved at once, in every operand and the result: for any tile but the narrow
# one, and for all tiles.
_MIN_ACCESS = 2
_FULL_ACCESS = 8


def choose(arithmetic: str, batch: int, pixels: int, channels: int, sms: int, access: int, wide: bool) -> ProductConfig:
    """The largest tile of which there are as many as SMs (medium: three per four SMs), else the small one.

    `access` is how many elements the layouts allow to be moved at once, 0 for strided ones; `wide` whether offsets are
    int64.
    """
    if access < _MIN_ACCESS:
        return TABLE[arithmetic, "narrow"]
    # With many 64-bit addresses, 4 registers of these tiles spilled on sm_90 (compiled).
    if access >= _FULL_ACCESS or not wide:
        for size, share in (("large", 1.0), ("medium", 0.75)):
            tile = TABLE.get((arithmetic, size))
            if tile is None or channels <= tile.channels // 2:
                continue
            # Triton 3.6 spilled 32 bytes on sm_80 (compiled; 3.7 none): 4 warps have twice the addresses per thread.
            if size == "medium" and access < _FULL_ACCESS:
                continue
            tiles = batch * -(-pixels // tile.pixels) * -(-channels // tile.channels)
            if tiles >= share * sms:
                return tile
    return TABLE[arithmetic, "small"]


def _measured(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    access: int,
    chosen: ProductConfig,
) -> ProductConfig:
    """The fastest tile of the table; `chosen` where nothing can be measured."""
    arithmetic = geometry.arithmetic_of(feature)
    candidates = [chosen]
    if access >= _FULL_ACCESS:
        candidates = [tile for (kind, size), tile in TABLE.items() if kind == arithmetic and size != "narrow"]
    layouts = [None if t is None else geometry.inner_axis(t) for t in (feature, top, out)]
    doubled = top is not None and geometry.has_half_the_size(top, out)
    if top is not None and top.is_meta:
        top = torch.empty_like(top, device=feature.device).normal_()  # a pathway has not computed it yet
    measured_top = top

    def launch(candidate: ProductConfig) -> None:
        result = torch.empty_like(out, device=feature.device)
        run = plan_connection(feature, weight, bias, measured_top, result, mode, candidate)
        run(feature, weight, bias, measured_top, result, 1.0)

    return autotune.fastest(
        "lateral_connection",
        (arithmetic, *layouts, access, doubled, *weight.shape, *autotune.size_class(out.shape[0], *out.shape[2:])),
        feature,
        candidates,
        chosen,
        launch,
    )


def plan_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    config: ProductConfig | None = None,
    link: Link = ALONE,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float], None]:
    """Plan the launch that writes the connection into the dense `out`.

    Args:
        feature, weight, bias, top, out: `weight` is ``[Cout, Cin]``.  Of `out`, and of a `top` that is not written yet,
            only shape and strides are read.
        mode: one of the nearest modes.
        config: the tile, for measurements; None chooses it.
        link: the launch's place in a chain of overlapping launches.

    Returns:
        A function of feature, weight, bias, top, out and gain that launches.
    """
    from fpn_kernels.operators.lateral_connection import kernels

    batch, in_channels, height, width = feature.shape
    out_channels = weight.shape[0]
    top_height, top_width = (height, width) if top is None else top.shape[2:]
    pixels_last = walk_of(out) == "planes"
    # Two pixels of a row of the tile read one coarse pixel, and a row of coarse pixels may be contiguous.
    doubled = pixels_last and top is not None and geometry.has_half_the_size(top, feature)
    top_access = 0
    if top is not None:
        top_access = geometry.alignment(top, 3, top_width) if doubled else geometry.alignment(top, 1, out_channels)
    flat_out = out.view(batch, out_channels, height * width)
    flat = geometry.pixels_are_flat(feature)
    by_channels = geometry.alignment(feature, 1, in_channels)
    by_pixels = 0
    feature_strides = geometry.strides(feature)
    if flat:
        flat_feature = feature.view(batch, in_channels, height * width)
        feature_n, feature_c, feature_p = geometry.strides(flat_feature)
        feature_strides = (feature_n, feature_c, 0, feature_p)
        # Where both axes have stride 1, one of them has size 1: one choice is enough.
        by_pixels = 0 if by_channels else geometry.alignment(flat_feature, 2, height * width)
    weight_in = geometry.alignment(weight, 1, in_channels)
    if pixels_last:
        out_alignment = geometry.alignment(flat_out, 2, height * width)
    else:
        out_alignment = geometry.alignment(flat_out, 1, out_channels)
    arithmetic = geometry.arithmetic_of(feature)
    weight_out = 0 if weight_in else geometry.alignment(weight, 0, out_channels)
    wide = geometry.needs_int64(*(t for t in (feature, weight, bias, top, out) if t is not None))
    access = min(by_channels or by_pixels, weight_in or weight_out, out_alignment)
    if config is None:
        config = choose(arithmetic, batch, height * width, out_channels, geometry.sm_count(feature), access, wide)
        if autotune.ENABLED:
            config = _measured(feature, weight, bias, top, out, mode, access, config)
    pixel_tiles, channel_tiles = -(-height * width // config.pixels), -(-out_channels // config.channels)
    launch_connect = Launch(
        kernels.connect,
        (batch * pixel_tiles * channel_tiles,),
        (
            *(geometry.scale(top_height, height), geometry.scale(top_width, width)),
            *(in_channels, out_channels, height, width, top_height, top_width),
            *feature_strides,
            *geometry.strides(weight),
            0 if bias is None else geometry.strides(bias)[0],
            *((0, 0, 0, 0) if top is None else geometry.strides(top)),
            *geometry.strides(flat_out),
            *(pixel_tiles, channel_tiles),
        ),
        {
            "MODE": mode,
            "HAS_TOP": top is not None,
            "DOUBLED": doubled,
            "ARITHMETIC": arithmetic,
            "PIXELS_LAST": pixels_last,
            "FLAT": flat,
            "WIDE": wide,
            "FEATURE_CHANNELS": by_channels,
            "FEATURE_PIXELS": by_pixels,
            "WEIGHT_IN": weight_in,
            "WEIGHT_OUT": weight_out,
            "BIAS": None if bias is None else geometry.alignment(bias, 0, out_channels),
            "TOP": top_access,
            "OUT": out_alignment,
            "PIXELS": config.pixels,
            "CHANNELS": config.channels,
            "DEPTH": config.depth,
            **link.constants(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        feature,
    )

    def run(feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float) -> None:
        launch_connect(feature, weight, out if bias is None else bias, out if top is None else top, out, gain)

    return named(run, f"a tile is {config}; {arithmetic} products")


def refusal(call: LateralConnection) -> str | None:
    feature, top = call.feature, call.top
    reason = availability.tensor_refusal(feature)
    if reason is None and top is not None:
        reason = availability.side_refusal(*top.shape[2:], *feature.shape[2:])
        reason = reason or availability.rows_refusal(call.weight.shape[0], feature.shape[2])
    return reason or availability.pixels_refusal(*feature.shape[2:])


def _opt_in(call: LateralConnection) -> str | None:
    feature = call.feature
    if not feature.is_cuda:
        return availability.interpreter_only(feature)
    if feature.dtype == torch.float32 and not compatibility.tf32_is_allowed():
        return "its product in float32 without TF32 has not been timed"
    if _moves_single_elements(feature, call.matrix(), call.out_format()):
        return "it would move single elements, which has not been timed (an odd count of channels or of NCHW pixels)"
    if call.top is not None and call.mode != "bilinear":
        return None
    reason = availability.unmeasured(feature)
    return None if reason is None else f"without a merge in the same pass it was {reason}"


def _moves_single_elements(feature: Tensor, weight: Tensor, out_format: torch.memory_format) -> bool:
    """Whether some tensor cannot be read or written two elements at once: the kernel then uses its narrow tile."""
    divisor, pixels = geometry.common_divisor, feature.shape[2] * feature.shape[3]
    by_channels = divisor(feature, 1, feature.shape[1])
    by_pixels = divisor(feature.flatten(2), 2, pixels) if geometry.pixels_are_flat(feature) else 0
    of_weight = divisor(weight, 1, weight.shape[1]) or divisor(weight, 0, weight.shape[0])
    of_result = weight.shape[0] if out_format == torch.channels_last else pixels
    return max(by_channels, by_pixels) < 2 or of_weight < 2 or of_result % 2 == 1


def _plan(call: LateralConnection) -> Callable[[LateralConnection], Tensor]:
    feature, matrix, bias, top = call.feature, call.matrix(), call.bias, call.top
    shape, out_format = call.shape(), call.out_format()
    new, like = allocator(shape, out_format), stand_in(shape, feature, out_format)
    if top is not None and call.mode == "bilinear":
        connection = plan_connection(feature, matrix, bias, None, like, "nearest")
        merge = plan_merge(top, like, like, call.mode)

        def run_two(call: LateralConnection) -> Tensor:
            out = new(call.feature)
            connection(call.feature, call.matrix(), call.bias, None, out, 1.0)
            merge(call.top, out, out, call.gain)
            return out

        return named(run_two, f"{connection.kernel}, then upsample_add in place")  # type: ignore[attr-defined]
    connection = plan_connection(feature, matrix, bias, top, like, "nearest" if top is None else call.mode)

    def run(call: LateralConnection) -> Tensor:
        out = new(call.feature)
        connection(call.feature, call.matrix(), call.bias, call.top, out, call.gain)
        return out

    return named(run, connection.kernel)  # type: ignore[attr-defined]


LATERAL_CONNECTION = dispatch.Implementation(autotune.planned(_plan), refusal, _opt_in)
