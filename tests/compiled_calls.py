"""The calls whose launches are compiled: together they reach every tile of every table and every branch of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from compilations import Call, fake

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NHWC, NCHW = torch.channels_last, torch.contiguous_format
CALLS: dict[str, Call] = {}


def add(
    name: str,
    operator: str,
    *arguments: Any,
    dense: bool = False,
    tf32: bool = False,
    candidates: bool = False,
    **options: Any,
) -> None:
    name = f"{operator} {name}".rstrip()
    assert name not in CALLS
    CALLS[name] = Call(operator, arguments, options, dense, tf32, candidates)


# Layout, channels and dtype.  256 channels are a neck's, 64 the narrowest BiFPN's; some tables have a tile for 16.
DENSE = [("nhwc", channels, BF16) for channels in (256, 64, 16)] + [("nhwc", 64, F32), ("nhwc", 16, F32)]
DENSE += [("nchw", 256, BF16), ("nchw", 256, F32)]
STRIDED = [("nhwc strided int64", 256, BF16), ("nchw strided int64", 256, BF16)]
UNEVEN = [("nhwc", 257, F16), ("nhwc", 10, F32), ("nchw", 6, F16)]
# Mode, size of the top, size of the fine map: the ratios that a merge and its adjoint distinguish.
BOTH = {
    "doubled": ("nearest", (16, 32), (32, 64)),
    "taller": ("nearest-exact", (32, 32), (32, 64)),
    "bilinear": ("bilinear", (16, 32), (32, 64)),
}
ADJOINT = {
    "window4": ("nearest", (8, 16), (32, 64)),
    "area": ("nearest", (4, 8), (32, 64)),
    "bilinear area": ("bilinear", (4, 8), (32, 64)),
}
ODD = {
    "doubled": ("nearest", (25, 57), (50, 114)),
    "odd": ("nearest", (38, 57), (75, 113)),
    "odd bilinear": ("bilinear", (38, 57), (75, 113)),
    "pixel": ("nearest", (1, 1), (9, 10)),
}
for maps in DENSE + STRIDED + UNEVEN:
    layout, channels, dtype = maps
    title, dense = f"{layout} {channels} {str(dtype)[6:]}", maps in DENSE
    for ratio, (mode, top_size, size) in (ODD if maps in UNEVEN else {**BOTH, **ADJOINT}).items():
        name = f"{title} {ratio}"
        top, fine = fake(channels, top_size, layout, dtype), fake(channels, size, layout, dtype)
        factors = fine.new_empty(3, dtype=F32)
        if ratio not in ADJOINT:
            add(name, "upsample_add", top, fine, mode=mode, dense=dense)
            add(f"two {name}", "weighted_merge", fine, top, None, factors.new_empty(2), mode=mode, dense=dense)
            add(f"three {name}", "weighted_merge", fine, fine, top, factors, mode=mode, dense=dense)
        add(name, "upsample_add_backward", fine, top_size, mode=mode, dense=dense)
        add(name, "merge_backward", fine, top_size, None, mode=mode, dense=dense)
        if channels == 256:  # an upstream gradient is one more load, whatever the tile
            add(f"upstream {name}", "merge_backward", fine, top_size, top, mode=mode)
    add(f"two same {title}", "weighted_merge", fine, fine, None, factors.new_empty(2), dense=dense)
    # Normalised weights may have any dtype; 8 bits are widened before the launch.
    kinds = (torch.float64, F16, BF16, torch.float8_e4m3fn) if maps in (DENSE[0], DENSE[5]) else ()
    for kind in (F32, *kinds):
        factors, norm = fine.new_empty(3, dtype=kind), "softmax" if kinds else "none"
        name = f"same {title} weights {str(kind)[6:]}"
        add(name, "weighted_merge", fine, fine, fine, factors, normalization=norm, dense=dense)
    add(title, "weighted_merge_backward", fine, fine, fine.new_empty((), dtype=F32), dense=dense)
    if layout == "nhwc":
        add(title, "channel_sums", fine, dense=dense)
# The gradient of a sum is expanded.
fine = fake(256, (32, 64), "nchw", BF16)
expanded = fine.new_empty(()).expand_as(fine)
add("expanded", "weighted_merge_backward", expanded, fine, fine.new_empty((), dtype=F32))

PAPER = ((200, 320), (100, 160), (50, 80), (25, 40))  # P2 to P5 of 800 x 1280
TINY = ((16, 32), (8, 16), (4, 8), (2, 4))  # one launch on every chip
for arithmetic, dtype, tf32 in (("half", BF16, False), ("tf32", F32, True), ("ieee", F32, False)):
    how: dict[str, Any] = {"tf32": tf32, "candidates": True}
    # Layout, input channels, batch, sizes of the top and of the feature.
    for name, layout, count, batch, top_size, size in (
        ("", "nhwc", 256, 2, (16, 32), (32, 64)),
        ("", "nchw", 256, 2, (16, 32), (32, 64)),
        ("not doubled", "nchw", 256, 2, (20, 32), (32, 64)),
        ("", "nhwc cropped", 256, 2, (16, 32), (32, 64)),
        ("", "nhwc int64", 256, 2, (16, 32), (32, 64)),
        ("even, many tiles", "nchw", 258, 8, (20, 50), (30, 75)),
        ("even, few tiles", "nchw", 258, 1, (20, 50), (10, 75)),
        ("even", "nchw int64", 258, 2, (20, 50), (30, 75)),
        ("single elements", "nhwc", 257, 2, (16, 32), (32, 64)),
        ("", "nchw strided int64", 256, 2, (16, 32), (32, 64)),
    ):
        feature, top = fake(count, size, layout, dtype, batch), fake(256, top_size, layout, dtype, batch)
        weight, bias = feature.new_empty(256, count), feature.new_empty(256)
        dense = count == 256 and "strided" not in layout
        add(f"{arithmetic} {layout} {name}", "lateral_connection", feature, weight, bias, top, dense=dense, **how)
    feature, top = fake(256, (32, 64), "nchw", dtype), fake(256, (16, 32), "nhwc", dtype)
    weight, bias = feature.new_empty(256, 256), feature.new_empty(256)
    nhwc = fake(256, (32, 64), "nhwc", dtype)
    add(f"{arithmetic} alone", "lateral_connection", nhwc, weight, None, None, dense=True, **how)
    # As in the gradient of the feature.
    mixed = (feature, weight.t(), bias, top)
    add(f"{arithmetic} transposed weight", "lateral_connection", *mixed, memory_format=NHWC, dense=True, **how)
    for layout in ("nhwc", "nchw"):
        features = [fake(256, size, layout, dtype, 1) for size in PAPER]
        weights, biases = [weight] * 4, [bias] * 4
        name = f"{arithmetic} {layout}"
        add(name, "top_down_pathway", features, weights, biases, [0, 1, 2, 3], tf32=tf32, dense=True)

    kernel, matrix = (fake(256, (3, 3), layout, dtype, 256) for layout in ("nchw", "nhwc"))
    for out in (NHWC, NCHW):
        title = f"{arithmetic} to {'NHWC' if out == NHWC else 'NCHW'}"
        add(title, "output_conv", nhwc, matrix, bias, memory_format=out, **how)
        # No descriptor writes a row of 258 channels or 66 pixels in 16 bits, or of 257 and 65 in float32.
        extra = 2 if arithmetic == "half" else 1
        feature = fake(256, (32, 64 + extra), "nhwc", dtype)
        scattered = fake(256, (3, 3), "nhwc", dtype, 256 + extra)
        add(f"scattered {title}", "output_conv", feature, scattered, None, memory_format=out, **how)
    levels = [[fake(256, size, "nhwc", dtype, 1) for size in sizes] for sizes in (PAPER, TINY)]
    for name, features, kernels in (("paper", levels[0], [kernel] * 4), ("tiny", levels[1], [matrix] * 4)):
        how["candidates"] = name == "tiny"
        add(f"{arithmetic} {name}", "output_conv_levels", features, kernels, [bias] * 4, [0, 1, 2, 3], **how)
    add(f"{arithmetic} packed", "output_conv", nhwc, kernel, bias, tf32=tf32)
