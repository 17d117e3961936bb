"""The launch of `descriptor_kernels.convolve`: tiles, weights as matrices, scratch memory, and what it compiles."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from fpn_kernels.backends.triton import descriptor_kernels as kernels
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant
from torch import Tensor
from triton.runtime import _allocation

from fpn_kernels.gpu import geometry, launch

# Output channels, and input channels of one of them, that a program packs.
_PACKED_ROWS, _PACKED_COLUMNS = 8, 64


@dataclasses.dataclass(frozen=True)
class BoxConfig:
    """A tile of the result, a box of pixels by output channels; input channels a step; and how it is run.

    Attributes:
        rows, columns: the box of pixels; at least 16 bytes along either axis.
        channels: output channels of a tile.
        depth: input channels a step of the sum.
        num_warps, num_stages: as Triton has them.
        parts: in how many parts (1 or 2) the epilogue takes the channels; two halve what it stages in shared memory.
        resident: programs a multiprocessor.
    """

    rows: int
    columns: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int = 1
    resident: int = 1

    @property
    def turned(self) -> BoxConfig:
        """The same tile over a box of the other orientation."""
        return dataclasses.replace(self, rows=self.columns, columns=self.rows)

    def tiles(self, batch: int, out_channels: int, sizes: Sequence[tuple[int, int]]) -> int:
        """How many of it cover maps of these sizes."""
        boxes = sum(-(-height // self.rows) * -(-width // self.columns) for height, width in sizes)
        return batch * boxes * -(-out_channels // self.channels)

    def constexprs(self) -> dict[str, Any]:
        tile = {"ROWS": self.rows, "COLUMNS": self.columns, "CHANNELS": self.channels}
        return {**tile, "DEPTH": self.depth, "PARTS": self.parts}

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.channels}x{self.depth}"


# The most channels of a tile that is written element by element, each by an address of its own: more of them spill
# (compiled for sm_100 with gathered coarse pixels at 256 channels: 171 instructions to and from local memory).
MOST_SCATTERED = 128


def fitting(
    table: Mapping[tuple[str, str], BoxConfig], arithmetic: str, out_channels: int, in_boxes: bool
) -> list[BoxConfig]:
    """A table's tiles that fit a call, largest first; `in_boxes` says that results are written through descriptors."""
    configs = [config for (kind, _), config in table.items() if kind == arithmetic]
    fit = [c for c in configs if out_channels > c.channels // 2 and (in_boxes or c.channels <= MOST_SCATTERED)]
    return fit or configs[-1:]


def filling(
    fit: Sequence[BoxConfig], batch: int, out_channels: int, sizes: Sequence[tuple[int, int]], processors: int
) -> BoxConfig:
    """The largest of the tiles that fit of which there are as many as multiprocessors, or the smallest."""
    return next((config for config in fit if config.tiles(batch, out_channels, sizes) >= processors), fit[-1])


@dataclasses.dataclass(frozen=True)
class Level:
    """One map's convolution; of `out`, shape and strides alone are read."""

    feature: Tensor
    weight: Tensor
    bias: Tensor | None
    top: Tensor | None
    out: Tensor


Matrices = Callable[[Sequence[Tensor]], list[Tensor]]


def plan_matrices(weights: Sequence[Tensor], arithmetic: str, depth: int) -> tuple[Matrices, tuple[int, int], bool]:
    """What makes the weights of several levels, of one shape and the same strides, into matrices [Cout, taps * Cin].

    A 1x1 weight is such a matrix already where its rows are contiguous, a 3x3 weight in channels_last where `depth`
    divides its channels: these are views.  Others are packed by one launch for all levels, which reads and writes each
    weight once (256 to 256 channels in 16 bits: 1.2 MB each way), and so is every weight for TF32, to be rounded.
    Nothing is remembered between calls.

    Returns:
        The function, the stride and the number of the matrices' columns, and whether the function launches.
    """
    if arithmetic != "tf32" and all(_is_matrix(weight, depth) for weight in weights):
        view = _as_matrix(weights[0])
        return lambda weights: [_as_matrix(weight) for weight in weights], (view.stride(0), view.shape[1]), False
    out_channels, in_channels = weights[0].shape[:2]
    taps = weights[0][0, 0].numel()
    padded = -(-in_channels // depth) * depth
    pack = launch.Launch(
        kernels.pack,
        (taps * -(-out_channels // _PACKED_ROWS), -(-padded // _PACKED_COLUMNS), len(weights)),
        (taps, in_channels, out_channels, *(*geometry.strides(weights[0]), 0, 0)[:4], padded),
        {"LEVELS": len(weights), "ARITHMETIC": arithmetic, "ROWS": _PACKED_ROWS, "COLUMNS": _PACKED_COLUMNS},
        weights[0],
    )

    def packed(weights: Sequence[Tensor]) -> list[Tensor]:
        result = weights[0].new_empty(len(weights), out_channels, taps * padded)
        pack(tuple(weights), result)
        return list(result)

    return packed, (taps * padded, taps * padded), True


def matrices(weights: Sequence[Tensor], arithmetic: str, depth: int) -> list[Tensor]:
    return plan_matrices(weights, arithmetic, depth)[0](weights)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


def _is_matrix(weight: Tensor, depth: int) -> bool:
    """Whether a descriptor can read a view of the weight as [Cout, taps * Cin]."""
    if weight.dim() == 4:
        if weight.shape[1] % depth or not weight.permute(0, 2, 3, 1).is_contiguous():
            return False
        weight = _as_matrix(weight)
    return geometry.rows_are_aligned(weight)


@contextlib.contextmanager
def scratch(device: torch.device) -> Iterator[list[Tensor]]:
    """Memory for descriptors made on the device, listed; whatever allocator the caller had told Triton is put back."""
    used: list[Tensor] = []

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        # The caching allocator aligns to 512 bytes, descriptors want 128; freed memory is reused in stream order.
        used.append(torch.empty(size, dtype=torch.int8, device=device))
        return used[-1]

    previous = _allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        yield used
    finally:
        triton.set_allocator(previous)


def top_reading(feature: Tensor, top: Tensor | None, config: BoxConfig) -> str | None:
    """How a tile reads the coarser map: None, "gather", or, where it has half the size, boxes along an axis."""
    if top is None:
        return None
    inner = geometry.inner_axis(top)
    if inner is None or not geometry.has_half_the_size(top, feature):
        return "gather"
    # Sixteen bytes is the least that TMA moves along the innermost axis.
    narrow = inner == "pixels" and config.columns // 2 < geometry.full_access(top)
    return "gather" if narrow else inner


def result_axis(outs: Sequence[Tensor]) -> str:
    """The axis along which all the dense results are contiguous: where NHWC and NCHW are one, "channels"."""
    nhwc = all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)
    return "channels" if nhwc else "pixels"


def boxed(outs: Sequence[Tensor]) -> bool:
    """Whether descriptors can write the results along that axis."""
    dim = 1 if result_axis(outs) == "channels" else 3
    return all(geometry.alignment(out, dim, out.shape[dim]) >= geometry.full_access(out) for out in outs)


# Called with the features, weights, biases and results of the levels, the top and the gain; returns what a launch that
# follows must not overwrite.
Convolution = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor], Tensor | None, float],
    Sequence[Tensor],
]


def plan(
    levels: Sequence[Level],
    config: BoxConfig,
    taps: int,
    arithmetic: str,
    mode: str = "nearest",
    link: launch.Link = launch.ALONE,
    columns: tuple[int, int] | None = None,
) -> Convolution:
    """What writes each level's convolution into its dense `out`.

    Several levels agree in batch, channels, dtype, the layout of `out`, the strides of weight and bias, and in having
    a bias or not; their features are dense NHWC maps, and they have no top.  Where `columns` is given, as by
    `plan_matrices`, the weights that the result is called with are such matrices already.
    """
    one = levels[0]
    outs = tuple(level.out for level in levels)
    top = one.out if one.top is None else one.top
    (batch, in_channels, height, width), out_channels = one.feature.shape, one.out.shape[1]
    sizes = [(level.feature.shape[2], level.feature.shape[3]) for level in levels]
    tiles = config.tiles(batch, out_channels, sizes)
    to_matrices: Matrices = list
    if columns is None:
        to_matrices, columns, packs = plan_matrices([level.weight for level in levels], arithmetic, config.depth)
        if packs:
            # What packs the weights stands between this launch and the one that it would follow.
            link = dataclasses.replace(link, follows=False)
    convolve = launch.Launch(
        kernels.convolve,
        (min(tiles, config.resident * geometry.processors(one.feature)),),
        (
            *(geometry.scale(top.shape[2], height), geometry.scale(top.shape[3], width)),
            *(batch, in_channels, out_channels),
            *geometry.strides(one.feature),
            *(*columns, 0 if one.bias is None else geometry.strides(one.bias)[0]),
            *(*top.shape[2:], *geometry.strides(top)),
            *itertools.chain(*sizes, *[(1, 1)] * (kernels.MOST_LEVELS - len(levels))),
        ),
        {
            "LEVELS": len(levels),
            "TAPS": taps,
            "MODE": mode,
            "ARITHMETIC": arithmetic,
            "ACCESS": geometry.full_access(one.feature),
            "FEATURE": geometry.inner_axis(one.feature),
            "TOP": top_reading(one.feature, one.top, config),
            "TOP_CHANNELS": geometry.alignment(top, 1, out_channels) if one.top is not None else 0,
            "OUT": result_axis(outs),
            "BOXED": boxed(outs),
            "BIAS": one.bias is not None,
            "WIDE": geometry.needs_int64(top, *outs),
            **config.constexprs(),
            **link.constants(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        one.feature,
    )

    def run(
        features: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        outs: Sequence[Tensor],
        top: Tensor | None,
        gain: float,
    ) -> Sequence[Tensor]:
        results, matrices = tuple(outs), tuple(to_matrices(weights))
        addends = results if biases[0] is None else tuple(biases)
        with scratch(features[0].device) as used:
            convolve(tuple(features), matrices, addends, results, results[0] if top is None else top, gain)
        return (*matrices, *used)

    return run


def convolve_variant(
    config: BoxConfig,
    description: str,
    *,
    arithmetic: str,
    taps: int,
    feature: str = "channels",
    top: str | None = None,
    out: str = "channels",
    boxed: bool = True,
    levels: int = 1,
    link: launch.Link = launch.ALONE,
    capabilities: tuple[int, ...] = (),
) -> Variant:
    """Describes one compilation of `convolve`, on aligned tensors."""
    element_size = 2 if arithmetic == "half" else 4
    constexprs = {
        **{"LEVELS": levels, "TAPS": taps, "MODE": "nearest", "ARITHMETIC": arithmetic, "ACCESS": 16 // element_size},
        **{"FEATURE": feature, "TOP": top, "TOP_CHANNELS": 0 if top in (None, "pixels") else 16, "OUT": out},
        **{"BOXED": boxed, "BIAS": True, "WIDE": False, **config.constexprs()},
        **{"FOLLOWS": link.follows, "LEADS": link.leads},
    }
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    pointer = POINTER_TYPES[element_size]
    for position, name in enumerate(kernels.convolve.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in kernels.POINTERS:
            signature[name] = (pointer,) * levels
            attrs.update({(position, level): [["tt.divisibility", 16]] for level in range(levels)})
        elif name == "top":
            signature[name] = pointer
            attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in kernels.NUMBERS else "fp32"
    return Variant(
        *(kernels.convolve, signature, constexprs, attrs),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        description=f"{description}-{arithmetic}-{config}",
        wide={"LDGSTS": 0},
        matrix_product=arithmetic != "ieee",
        descriptors=True,
        link=link,
        capabilities=capabilities,
    )


def pack_variant(arithmetic: str, levels: int) -> Variant:
    """Describes one compilation of `pack`, on aligned tensors."""
    pointer = POINTER_TYPES[2 if arithmetic == "half" else 4]
    constexprs = {"LEVELS": levels, "ARITHMETIC": arithmetic, "ROWS": _PACKED_ROWS, "COLUMNS": _PACKED_COLUMNS}
    kinds = {"weights": (pointer,) * levels, "packed": pointer, **dict.fromkeys(constexprs, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernels.pack.arg_names}
    places = [(0, level) for level in range(levels)] + [(1,)]
    attrs: dict[tuple[int, ...], list[list[Any]]] = {place: [["tt.divisibility", 16]] for place in places}
    description = f"pack-{levels}levels-{arithmetic}"
    return Variant(kernels.pack, signature, constexprs, attrs, {"num_warps": 4}, description)
