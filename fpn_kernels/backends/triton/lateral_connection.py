"""`lateral_connection`: ``gain * (conv1x1(feature) + bias + resize(top))`` as one tiled matrix product.

A tile is some pixels of one image by some output channels; the sum over input channels is pipelined through shared
memory, and bias, coarse pixels and gain are applied to the float32 sums on the way out.  The feature is read in place
in either layout (16-bit tensor cores take both operand orders), the tile is transposed for an NCHW result so that
consecutive threads always have consecutive addresses of the result, and a pixel's row and column are found once a
row of the tile.  Programs go over the output channels of a pixel tile first: its second reader finds it in L2.

Bilinear is composed: the product alone, then `upsample_add` in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fpn_kernels.backends.layouts import allocator, requested_format
from fpn_kernels.backends.selection import AtOnce
from fpn_kernels.backends.triton import (
    autotune,
    eligibility,
    geometry,
    lateral_connection_descriptors,
    lateral_connection_stationary,
    launching,
    upsample_add,
)
from fpn_kernels.backends.triton.compiled import POINTER_TYPES, Variant, variant
from fpn_kernels.backends.triton.descriptor_convolution import BoxConfig
from fpn_kernels.backends.triton.lateral_connection_kernel import connect
from fpn_kernels.backends.triton.lateral_connection_stationary import StationaryConfig


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """A tile of the result (pixels by output channels), input channels a step, warps, and stages of the pipeline."""

    pixels: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


# A tile of one of the three kernels; its type says of which.
Tile = ProductConfig | BoxConfig | StationaryConfig

# (arithmetic, size of the tile) -> tile.  128 x 128 with 8 warps keeps 64 sums a thread, which leaves registers for the
# coarse tile; Hopper's tensor cores want at least 64 rows a warpgroup.  "narrow" is for maps whose accesses are not
# vectorised: one address an element, so that the large tile spills (compiled: 27 stores on sm_80).
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

# Arithmetics whose calls go to the other kernel, `lateral_connection_descriptors`, where it serves them.  None: on an
# H100 its best tile took, in the order above, 42.6, 22.9, 17.0 and 17.2 us, and on eight images of the first size 263
# to this one's 267.  FPN_KERNELS_AUTOTUNE measures both, class of calls by class of calls.
DESCRIPTORS: frozenset[str] = frozenset()

# Elements that each operand can be read by, and the result written by, at least, for any tile but the narrow one, and
# for all of them.
_NARROWEST_ACCESS = 2
_FULL_ACCESS = 8


def choose(
    arithmetic: str, batch: int, pixels: int, channels: int, processors: int, access: int, wide: bool
) -> ProductConfig:
    """The largest tile of which there are as many as multiprocessors (medium: three for four), else the small one.

    `access` is how many elements the layouts allow to be moved at once, 0 for strided ones; `wide` says that offsets
    are int64.
    """
    if access < _NARROWEST_ACCESS:
        return TABLE[arithmetic, "narrow"]
    # Many addresses of 64 bits each are too much for these: 4 registers spilled on sm_90 (compiled).
    if access >= _FULL_ACCESS or not wide:
        for size, share in (("large", 1.0), ("medium", 0.75)):
            tile = TABLE.get((arithmetic, size))
            if tile is None or channels <= tile.channels // 2:
                continue
            # Triton 3.6 spilled 32 bytes on sm_80 (compiled; 3.7 none): 4 warps have twice the addresses a thread.
            if size == "medium" and access < _FULL_ACCESS:
                continue
            tiles = batch * -(-pixels // tile.pixels) * -(-channels // tile.channels)
            if tiles >= share * processors:
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
) -> Tile:
    """The fastest tile of the three kernels; unmeasured, `chosen`, or a box where DESCRIPTORS says so."""
    arithmetic = geometry.arithmetic_of(feature)
    candidates: list[Tile] = [chosen]
    if access >= _FULL_ACCESS:
        candidates = [tile for (kind, size), tile in TABLE.items() if kind == arithmetic and size != "narrow"]
    default: Tile = chosen
    if eligibility.lateral_connection_descriptors(feature, weight) is None:
        boxes = lateral_connection_descriptors.candidates(arithmetic, out)
        candidates += boxes
        if arithmetic in DESCRIPTORS:
            default = lateral_connection_descriptors.choose(arithmetic, out, geometry.processors(feature))
    if autotune.UNPROVEN:
        candidates += lateral_connection_stationary.candidates(feature, weight, bias, top, out)
    layouts = [None if t is None else geometry.inner_axis(t) for t in (feature, top, out)]
    if top is not None and top.is_meta and autotune.ENABLED:
        top = torch.empty_like(top, device=feature.device).normal_()  # a pathway's, which is yet to be computed
    doubled = top is not None and geometry.has_half_the_size(top, out)
    return autotune.fastest(
        "lateral_connection",
        (arithmetic, *layouts, access, doubled, *weight.shape, *autotune.size_class(out.shape[0], *out.shape[2:])),
        feature,
        candidates,
        default,
        lambda candidate: launch(
            *(feature, weight, bias, top, torch.empty_like(out, device=feature.device), mode, 1.0, candidate)
        ),
    )


def plan(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    config: Tile | None = None,
    link: launching.Link = launching.ALONE,
) -> Callable[..., Sequence[Tensor]]:
    """What writes the connection into the dense `out`; `mode` is a nearest one, and `config` is for measuring.

    To be called with feature, weight, bias, top, out and gain; of `out`, shape and strides alone are read here.  It
    returns what a launch that follows must not overwrite.
    """
    batch, in_channels, height, width = feature.shape
    out_channels = weight.shape[0]
    top_height, top_width = (height, width) if top is None else top.shape[2:]
    pixels_last = upsample_add.walk_of(out) == "planes"
    # Where a row of coarse pixels is contiguous, or may be, and each is read by two pixels of a tile's row.
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
        # Where both axes have stride 1, one of them has size 1 in truth: one choice is enough.
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
        tile = choose(arithmetic, batch, height * width, out_channels, geometry.processors(feature), access, wide)
        config = tile
        if autotune.ENABLED or arithmetic in DESCRIPTORS:
            config = _measured(feature, weight, bias, top, out, mode, access, tile)
    if isinstance(config, BoxConfig):
        return lateral_connection_descriptors.plan(config, feature, weight, bias, top, out, mode, link)
    if isinstance(config, StationaryConfig):
        return lateral_connection_stationary.plan(config, feature, weight, bias, top, out, mode, link)
    pixel_tiles, channel_tiles = -(-height * width // config.pixels), -(-out_channels // config.channels)
    launch_connect = launching.Launch(
        connect,
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

    def run(
        feature: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor | None, out: Tensor, gain: float
    ) -> Sequence[Tensor]:
        launch_connect(feature, weight, out if bias is None else bias, out if top is None else top, out, gain)
        return ()

    return run


def launch(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    out: Tensor,
    mode: str,
    gain: float,
    config: Tile | None = None,
) -> None:
    plan(feature, weight, bias, top, out, mode, config)(feature, weight, bias, top, out, gain)


@AtOnce
def lateral_connection(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: Tensor | None,
    mode: str,
    gain: float,
    memory_format: torch.memory_format | None,
) -> Callable[..., Tensor]:
    shape, out_format = (
        (feature.shape[0], weight.shape[0], *feature.shape[2:]),
        requested_format(feature, memory_format),
    )
    new, like = allocator(shape, out_format), launching.stand_in(shape, feature, out_format)
    if top is not None and mode == "bilinear":
        # Composed: the connection alone, then the merge in place.
        connection = plan(feature, weight, bias, None, like, "nearest")
        merge = upsample_add.plan(top, like, like, mode)
    else:
        connection, merge = plan(feature, weight, bias, top, like, "nearest" if top is None else mode), None

    def run(
        feature: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        top: Tensor | None,
        mode: str,
        gain: float,
        memory_format: torch.memory_format | None,
    ) -> Tensor:
        out = new(feature)
        if merge is None:
            connection(feature, weight, bias, top, out, gain)
        else:
            connection(feature, weight, bias, None, out, 1.0)
            merge(top, out, out, gain)
        return out

    return run


_LAYOUTS = {
    # feature's alignment by channels and by pixels, weight's by input and by output channels, top, out, transposed tile
    "nhwc": (16, 0, 16, 0, 16, 16, False),
    "nchw": (0, 16, 16, 0, 16, 16, True),
    # NCHW in and NHWC out, the weight transposed as in the gradient of the feature.
    "mixed": (0, 16, 0, 16, 16, 16, False),
    # Counts that are even and no more, as of 150 x 225 maps.
    "even": (0, 2, 2, 0, 0, 2, True),
    "strided": (0, 0, 0, 0, 0, 1, True),
}
_COMPILED = {
    "large": ("nhwc", "nchw", "nchw-gather", "mixed", "even", "nhwc-alone", "nhwc-wide", "nhwc-crop"),
    "medium": ("nhwc", "nchw", "nchw-gather", "mixed", "nhwc-alone", "nhwc-wide", "nhwc-crop"),
    "small": ("nhwc", "nchw", "nchw-gather", "mixed", "even", "even-wide", "nhwc-alone"),
    "narrow": ("strided",),
}


def connect_variant(
    arithmetic: str,
    size: str,
    layout: str,
    operator: str = "lateral_connection",
    link: launching.Link = launching.ALONE,
) -> Variant:
    """Describes one compilation of `connect`: a tile of the table in a layout of `_COMPILED`."""
    config = TABLE[arithmetic, size]
    kind = POINTER_TYPES[2 if arithmetic == "half" else 4]
    name, _, special = layout.partition("-")
    by_channels, by_pixels, weight_in, weight_out, top, out, pixels_last = _LAYOUTS[name]
    dense = name in ("nhwc", "nchw", "mixed")
    return variant(
        connect,
        dict.fromkeys(("feature", "weight", "bias", "top", "out"), kind),
        ("gain", "scale_y", "scale_x"),
        {
            **{"MODE": "nearest", "HAS_TOP": special != "alone", "ARITHMETIC": arithmetic},
            "DOUBLED": name == "nchw" and special not in ("alone", "gather"),
            "PIXELS_LAST": pixels_last,
            "FLAT": name != "strided" and special != "crop",
            "WIDE": name == "strided" or special == "wide",
            **{"FEATURE_CHANNELS": by_channels, "FEATURE_PIXELS": by_pixels},
            **{"WEIGHT_IN": weight_in, "WEIGHT_OUT": weight_out},
            **{"BIAS": 16 if dense else 0, "TOP": 0 if special == "gather" else top, "OUT": out},
            **{"PIXELS": config.pixels, "CHANNELS": config.channels, "DEPTH": config.depth},
            **{"FOLLOWS": link.follows, "LEADS": link.leads},
        },
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        f"{operator}-{layout}-{arithmetic}-{config.pixels}x{config.channels}x{config.depth}",
        aligned=name != "strided",
        wide=("LDGSTS", "STG") if dense else (),
        matrix_product=arithmetic != "ieee",
        link=link,
    )


def variants() -> Iterator[Variant]:
    """What `launch` may compile: every tile of the table in each layout that may choose it, merged and alone."""
    for arithmetic, size in TABLE:
        for layout in _COMPILED[size]:
            if arithmetic != "ieee" or layout not in ("mixed", "nhwc-alone", "nhwc-crop"):
                yield connect_variant(arithmetic, size, layout)
