"""`output_conv` and `output_conv_levels` by Triton: tiles, weights as matrices, launches.

The kernel (`kernels.py`) is an implicit matrix product over NHWC maps: the nine taps are nine shifted reads of the same
box, so no unfolded copy of the map exists, and the bias is added to the float32 accumulators.

The levels of a pyramid each have a weight of their own.  A level that fills the chip has a launch of its own, with the
tile that is fastest for it; the small levels share a launch, with one numbering of their tiles.  The launches overlap
(`launch.Link`): the first tiles of one launch take the SMs that the last tiles of the previous one leave idle.

Which calls it serves by default: measured against cuDNN with a bias on an H100, 256 channels, bfloat16; see `_opt_in`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.gpu import autotune, availability, geometry
from fpn_kernels.gpu.launch import ALONE, Launch, Link, stand_in
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.layouts import allocator
from fpn_kernels.operators.output_conv.call import OutputConv, OutputConvLevels
from fpn_kernels.operators.output_conv.tiles import TABLE, BoxConfig, fitting, launches, links_of, on_chip

# `kernels.MAX_LEVELS`, without the import of Triton.
MAX_LEVELS = 5
# Output channels, and input channels of one of them, that a program packs.
_PACKED_ROWS, _PACKED_COLUMNS = 8, 64


Matrices = Callable[[Sequence[Tensor]], list[Tensor]]


def plan_matrices(weights: Sequence[Tensor], arithmetic: str, depth: int) -> tuple[Matrices, tuple[int, int]]:
    """Plan how the weights of several levels, of one shape and equal strides, become matrices [Cout, 9 * Cin].

    A weight in channels_last whose channels `depth` divides is a view of such a matrix.  Other weights are packed by
    one launch for all levels, which reads and writes each weight once (256 to 256 channels in 16 bits: 1.2 MB each
    way).  For TF32 every weight is packed, to be rounded.  Nothing is cached between calls.

    Returns:
        A function of the weights, and the stride and the number of the matrices' columns.
    """
    from fpn_kernels.operators.output_conv import kernels

    if arithmetic != "tf32" and all(_is_matrix(weight, depth) for weight in weights):
        view = _as_matrix(weights[0])
        return lambda weights: [_as_matrix(weight) for weight in weights], (view.stride(0), view.shape[1])
    out_channels, in_channels = weights[0].shape[:2]
    padded = -(-in_channels // depth) * depth
    pack = Launch(
        kernels.pack,
        (9 * -(-out_channels // _PACKED_ROWS), -(-padded // _PACKED_COLUMNS), len(weights)),
        (in_channels, out_channels, *geometry.strides(weights[0]), padded),
        {"LEVELS": len(weights), "ARITHMETIC": arithmetic, "ROWS": _PACKED_ROWS, "COLUMNS": _PACKED_COLUMNS},
        weights[0],
    )

    def packed(weights: Sequence[Tensor]) -> list[Tensor]:
        result = weights[0].new_empty(len(weights), out_channels, 9 * padded)
        pack(tuple(weights), result)
        return list(result)

    return packed, (9 * padded, 9 * padded)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1)


def _is_matrix(weight: Tensor, depth: int) -> bool:
    """Whether a descriptor can read a view of the weight as [Cout, 9 * Cin]."""
    if weight.shape[1] % depth or not weight.permute(0, 2, 3, 1).is_contiguous():
        return False
    return geometry.rows_are_aligned(_as_matrix(weight))


@contextlib.contextmanager
def scratch(device: torch.device) -> Iterator[list[Tensor]]:
    """Give Triton an allocator for descriptors that are made on the device; restore the previous one at the end.

    Yields:
        A list of the buffers allocated; a launch that overlaps the next must keep them.
    """
    import triton
    from triton.runtime import _allocation

    used: list[Tensor] = []

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        # The caching allocator aligns to 512 bytes, descriptors need 128; freed memory is reused in stream order.
        used.append(torch.empty(size, dtype=torch.int8, device=device))
        return used[-1]

    previous = _allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        yield used
    finally:
        triton.set_allocator(previous)


def result_axis(outs: Sequence[Tensor]) -> str:
    """The axis along which all dense results are contiguous; "channels" where NHWC and NCHW coincide."""
    nhwc = all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
    return "channels" if nhwc else "pixels"


def boxed(outs: Sequence[Tensor]) -> bool:
    """Whether descriptors can write the results along that axis."""
    dim = 1 if result_axis(outs) == "channels" else 3
    return all(geometry.alignment(out, dim, out.shape[dim]) >= geometry.full_access(out) for out in outs)


@dataclasses.dataclass(frozen=True)
class Level:
    """One map's convolution; of `out`, only shape and strides are read."""

    feature: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor


# A function of the features, matrices, biases and results of the levels; returns the buffers that must live until the
# next launches are queued.
Convolution = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], Sequence[Tensor]
]


def plan_launch(
    levels: Sequence[Level], config: BoxConfig, arithmetic: str, columns: tuple[int, int], link: Link = ALONE
) -> Convolution:
    """Plan one launch that writes each level's convolution into its dense `out`.

    Several levels have equal batch, channels, dtype, layout of `out`, strides of weight and bias, and all or none have
    a bias; their features are dense NHWC maps.  `columns` is as `plan_matrices` returns it.
    """
    from fpn_kernels.operators.output_conv import kernels

    one = levels[0]
    outs = [level.out for level in levels]
    batch, in_channels, out_channels = one.feature.shape[0], one.feature.shape[1], one.out.shape[1]
    sizes = [(level.feature.shape[2], level.feature.shape[3]) for level in levels]
    tiles = config.tiles(batch, out_channels, sizes)
    convolve = Launch(
        kernels.convolve,
        (min(tiles, config.ctas_per_sm * geometry.sm_count(one.feature)),),
        (
            *(batch, in_channels, out_channels),
            *geometry.strides(one.feature),
            *(*columns, 0 if one.bias is None else geometry.strides(one.bias)[0]),
            *itertools.chain(*sizes, *[(1, 1)] * (MAX_LEVELS - len(levels))),
        ),
        {
            "LEVELS": len(levels),
            "ARITHMETIC": arithmetic,
            "ACCESS": geometry.full_access(one.feature),
            "OUT": result_axis(outs),
            "BOXED": boxed(outs),
            "BIAS": one.bias is not None,
            "WIDE": geometry.needs_int64(*outs),
            **config.constexprs(),
            **link.constants(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        one.feature,
    )

    def run(
        features: Sequence[Tensor],
        matrices: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        outs: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        addends = outs if biases[0] is None else biases
        with scratch(features[0].device) as used:
            convolve(tuple(features), tuple(matrices), tuple(addends), tuple(outs))
        return used

    return run


def _of(values: Sequence[Any], group: Sequence[int]) -> list[Any]:
    return [values[level] for level in group]


def _measured(levels: Sequence[Level], arithmetic: str, config: BoxConfig) -> BoxConfig:
    """The fastest tile for levels that share a launch, alone on the chip; `config` where nothing can be measured."""
    features, weights, outs = ([getattr(level, name) for level in levels] for name in ("feature", "weight", "out"))
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    in_boxes, weight = boxed(outs), weights[0]
    fit = fitting(TABLE, arithmetic, weight.shape[0], in_boxes)
    in_bulk = availability.copies_in_bulk(features[0])

    def launch(candidate: BoxConfig) -> None:
        results = [torch.empty_like(out, device=features[0].device) for out in outs]
        to_matrices, columns = plan_matrices(weights, arithmetic, candidate.depth)
        convolve = plan_launch(levels, candidate, arithmetic, columns)
        convolve(features, to_matrices(weights), [level.bias for level in levels], results)

    classes = autotune.size_class(len(outs[0]), *itertools.chain(*sizes))
    return autotune.fastest(
        "output_conv",
        (arithmetic, result_axis(outs), in_boxes, len(levels), *weight.shape, *classes),
        features[0],
        [on_chip(tile, in_bulk) for c in fit for tile in dict.fromkeys((c, c.transposed))],
        config,
        launch,
    )


def _plan_levels(call: OutputConvLevels) -> Callable[[OutputConvLevels], list[Tensor]]:
    """Plan all levels: the `launches`, and one before them where weights are packed.

    The levels have equal batch, channels and dtype, and all or none have a bias; sizes and strides differ.
    """
    features, weights, biases = call.features, call.weights, call.placed()
    batch, out_channels = features[0].shape[0], weights[0].shape[0]
    # A map of one pixel is NHWC and NCHW at once: the other maps decide.
    formats = {each.out_format() for each in call.convolutions()}
    out_format = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    shapes = [(batch, out_channels, *feature.shape[2:]) for feature in features]
    outs = [stand_in(shape, features[0], out_format) for shape in shapes]
    allocators = [allocator(shape, out_format) for shape in shapes]
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    arithmetic, sms = geometry.arithmetic_of(features[0]), geometry.sm_count(features[0])
    in_bulk = availability.copies_in_bulk(features[0])
    groups = [
        (group, on_chip(config, in_bulk))
        for group, config in launches(arithmetic, batch, out_channels, sizes, sms, boxed(outs))
    ]
    overlap = availability.overlap_refusal(features[0]) is None
    links = links_of(len(groups)) if overlap else [ALONE] * len(groups)
    # All weights are packed before the first launch: a launch between two others would keep them from overlapping.
    to_matrices, columns = plan_matrices(weights, arithmetic, groups[0][1].depth)
    convolutions: list[tuple[tuple[int, ...], Convolution]] = []
    for (group, config), link in zip(groups, links, strict=True):
        levels = [Level(features[n], weights[n], biases[n], outs[n]) for n in group]
        tile = _measured(levels, arithmetic, config) if autotune.ENABLED else config
        convolutions.append((group, plan_launch(levels, tile, arithmetic, columns, link)))

    def run(call: OutputConvLevels) -> list[Tensor]:
        features, biases = call.features, call.placed()
        results = [new(features[0]) for new in allocators]
        matrices = to_matrices(call.weights)
        in_use: list[Sequence[Tensor]] = []
        for group, convolve in convolutions:
            parts = (_of(features, group), _of(matrices, group), _of(biases, group), _of(results, group))
            in_use.append(convolve(*parts))
        return results

    return run


def _plan(call: OutputConv) -> Callable[[OutputConv], Tensor]:
    levels = _plan_levels(call.as_levels())
    return lambda call: levels(call.as_levels())[0]


def _descriptor_refusal(feature: Tensor) -> str | None:
    if geometry.inner_axis(feature) == "channels":
        return None
    return (
        "feature is read through a tensor descriptor: an NHWC map that begins at a multiple of 16 bytes, whose strides "
        f"are such multiples and whose contiguous axis is one, got the shape {list(feature.shape)}, the strides "
        f"{list(feature.stride())} and {feature.dtype}"
    )


def _product_refusal(feature: Tensor, weight: Tensor) -> str | None:
    """The kernel counts tiles (of at least 4 x 4 pixels by 32 channels) and offsets of the weight in int32."""
    batch, _, height, width = feature.shape
    boxes = batch * -(-height // 4) * -(-width // 4) * -(-weight.shape[0] // 32)
    if boxes >= 2**31:
        return f"{boxes} tiles or more: the kernel counts tiles in int32"
    if geometry.needs_int64(weight) or weight.shape[0] * 9 * (weight.shape[1] + 64) >= 2**31:
        return f"the kernel counts the offsets of a weight in int32, got the shape {list(weight.shape)}"
    return None


def _refusal(call: OutputConv) -> str | None:
    feature = call.feature
    reason = availability.tensor_refusal(feature) or _descriptor_refusal(feature)
    return reason or _product_refusal(feature, call.weight)


def _levels_refusal(call: OutputConvLevels) -> str | None:
    """Why the levels cannot share a launch, or one of them cannot be served."""
    levels = call.convolutions()
    if len(levels) > MAX_LEVELS:
        return f"{len(levels)} levels: the kernel takes at most {MAX_LEVELS} of them in one launch"
    if any(each.feature.numel() == 0 for each in levels):
        return "a level has no pixels to compute"
    first = levels[0]
    for level, each in enumerate(levels):
        feature, weight, bias = each.feature, each.weight, each.bias
        alike = feature.shape[:2] == first.feature.shape[:2] and feature.dtype == first.feature.dtype
        if not alike or (weight.shape, weight.stride()) != (first.weight.shape, first.weight.stride()):
            return f"level {level} differs from level 0 in batch, channels, dtype or the strides of its weight"
        if (bias is None) != (first.bias is None) or (bias is not None and not bias.is_contiguous()):
            return f"level {level}: biases are all None or all contiguous"
        reason = _refusal(each)
        if reason is None and not feature.is_contiguous(memory_format=torch.channels_last):
            reason = "several levels are read as dense NHWC maps"
        if reason is not None:
            return f"level {level}: {reason}"
    return None


# 256 channels on an H100 in tiles of 128 pixels by 128 channels: 70 tiles (50 x 80 pixels) took 20.5 us where cuDNN
# with the bias took 21.2, and 24 tiles (25 x 40) at best 18.0, cuDNN 15.9.
_MIN_TILES = 64
_TILE_PIXELS = _TILE_CHANNELS = 128
_MIN_CHANNELS = 256


def _opt_in(call: OutputConv) -> str | None:
    feature, weight = call.feature, call.weight
    reason = availability.unmeasured(feature)
    if reason is not None:
        return reason
    if call.bias is None:
        return "cuDNN is faster where no bias is added"
    if min(weight.shape[:2]) < _MIN_CHANNELS:
        return f"only measured from {_MIN_CHANNELS} channels; these are {weight.shape[1]} to {weight.shape[0]}"
    pixels = feature.shape[0] * feature.shape[2] * feature.shape[3]
    tiles = -(-pixels // _TILE_PIXELS) * -(-weight.shape[0] // _TILE_CHANNELS)
    return None if tiles >= _MIN_TILES else f"cuDNN is faster on so small a map, of {pixels} pixels"


def _levels_opt_in(call: OutputConvLevels) -> str | None:
    """The largest level decides: the small ones take the SMs that its last tiles leave idle."""
    levels = [_opt_in(each) for each in call.convolutions()]
    return None if None in levels else f"level 0: {levels[0]}"


def _fastest_format(device_type: str, dtype: torch.dtype) -> torch.memory_format:
    """NHWC where the 3x3 kernel serves; its results have either layout."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return torch.preserve_format
    major, _ = availability.capability(torch.cuda.current_device())
    return torch.channels_last if major == 9 else torch.preserve_format


OUTPUT_CONV = dispatch.Implementation(
    autotune.planned(_plan),
    _refusal,
    _opt_in,
    _fastest_format,
    optional=True,
)
OUTPUT_CONV_LEVELS = dispatch.Implementation(
    autotune.planned(_plan_levels),
    _levels_refusal,
    _levels_opt_in,
    optional=True,
)
