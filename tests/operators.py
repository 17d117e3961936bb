"""The operators under test: public function, plain PyTorch twin, float64 oracle, samples, and inputs that are refused.

An entry of `OPERATORS` is all that `ops/test_contract.py` and the tests of transforms and defaults need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from samples import NCHW, NHWC, Bad, Make, Operator, Sample, as_they_are
from torch import Tensor

import fpn_kernels
from fpn_kernels import functional, reference

# ---- plain PyTorch twins and float64 oracles


def _gathered(grad: Tensor, top_size: Sequence[int], *, mode: str = "nearest", gain: float = 1.0) -> Tensor:
    top = torch.zeros(*grad.shape[:2], *top_size, dtype=grad.dtype, device=grad.device, requires_grad=True)
    with torch.enable_grad():
        resized = reference.upsample_add(top, torch.zeros_like(grad), mode=mode, gain=gain)
        (result,) = torch.autograd.grad(resized, top, grad, create_graph=True)
    return result


def _merge_backward(grad: Tensor, top_size: Any, upstream: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    top = _gathered(grad, top_size, **options)
    return top if upstream is None else top + upstream, options.get("gain", 1.0) * grad.sum((0, 2, 3))


def _weight_gradients(grad: Tensor, feature: Tensor, **_: Any) -> tuple[Tensor, ...]:
    leaves = [grad.new_zeros(grad.shape[1], feature.shape[1], 3, 3), grad.new_zeros(grad.shape[1])]
    with torch.enable_grad():
        result = reference.output_conv(feature, *[leaf.requires_grad_() for leaf in leaves])
        return torch.autograd.grad(result, leaves, grad, create_graph=True)


def _levels(convolve: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def call(features: Any, weights: Any, biases: Any = None, **options: Any) -> list[Tensor]:
        options.pop("memory_format", None)
        given = biases or [None] * len(features)
        return [convolve(*level, **options) for level in zip(features, weights, given, strict=True)]

    return call


def _exact_pathway(features: Any, weights: Any, biases: Any = None, **options: Any) -> list[Tensor]:
    merged: list[Tensor] = []
    for level in reversed(range(len(features))):
        bias, top = biases and biases[level], merged[0] if merged else None
        merged.insert(0, oracle.lateral_connection(features[level], weights[level], bias, top, **options))
    return merged


def _with_bias_levels(features: Any, weights: Any, biases: Any = None) -> tuple[Any, ...]:
    present = [(level, bias) for level, bias in enumerate(biases or []) if bias is not None]
    return list(features), list(weights), [bias for _, bias in present], [level for level, _ in present]


def _with_third(inputs: Any, weights: Tensor) -> tuple[Any, ...]:
    return inputs[0], inputs[1], inputs[2] if len(inputs) == 3 else None, weights


def _exact_merge(inputs: Any, weights: Tensor, *, mode: str = "nearest", **normalization: Any) -> Tensor:
    return oracle.weighted_merge(inputs, oracle.fusion_factors(weights, **normalization), mode)


def _without_format(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, memory_format=None, **options: function(*arguments, **options)


# ---- the table

_MAP = "expected 4 dimensions"
_FORMATS = {
    "format": Bad(as_they_are, ValueError, "memory_format: .*last_3d", {"memory_format": torch.channels_last_3d}),
    "type of format": Bad(as_they_are, TypeError, "memory_format: .*, got str", {"memory_format": "NHWC"}),
}
_MODES = {
    "mode": Bad(as_they_are, ValueError, "mode: expected one of 'nearest'.*'area'", {"mode": "area"}),
    "type of mode": Bad(as_they_are, TypeError, "mode: expected a string, got int", {"mode": 2}),
    "gain": Bad(as_they_are, TypeError, "gain: expected a number, got NoneType", {"gain": None}),
    "gain is a flag": Bad(as_they_are, TypeError, "gain: expected a number, got bool", {"gain": True}),
}


def _bad(*rows: tuple[Callable[..., Sequence[Any]], type[Exception], str], **shared: Bad) -> dict[str, Bad]:
    return {message: Bad(change, error, message) for change, error, message in rows} | shared


_UPSAMPLE_ADD = Operator(
    "upsample_add",
    fpn_kernels.upsample_add,
    reference.upsample_add,
    oracle.upsample_add,
    samples=(
        Sample("uneven ratios, channels with a tail", lambda m: (m.map(2, 6, 3, 5), m.map(2, 6, 7, 10))),
        Sample("whole ratio 2, whole vectors", lambda m: (m.map(2, 16, 4, 6), m.map(2, 16, 8, 12)), {"gain": 0.7}),
        Sample("bilinear", lambda m: (m.map(1, 6, 3, 5), m.map(1, 6, 10, 8)), {"mode": "bilinear", "gain": 0.5}),
        Sample("a top that shrinks", lambda m: (m.map(2, 7, 9, 8), m.map(2, 7, 4, 3)), {"mode": "nearest-exact"}),
    ),
    like=lambda top, lateral: [lateral],
    bad=_bad(
        (lambda t, x: ([t], x), TypeError, "top: expected a tensor, got list"),
        (lambda t, x: (t, None), TypeError, "lateral: expected a tensor, got NoneType"),
        (lambda t, x: (t[0], x), ValueError, r"top: expected 4 dimensions.*got 3: \[6, 3, 5\]"),
        (lambda t, x: (t, x[None]), ValueError, "lateral: expected 4 dimensions.*got 5"),
        (lambda t, x: (t[:, :3], x), ValueError, r"top: .*\[2, 6, h, w\], got \[2, 3, 3, 5\]"),
        (lambda t, x: (t[:, :, :0], x), ValueError, "top: expected at least one pixel"),
        (lambda t, x: (t, x[..., :0]), ValueError, "lateral: expected at least one pixel"),
        (lambda t, x: (t.long(), x), TypeError, "top: .*float64, got torch.int64"),
        (lambda t, x: (t.double(), x), TypeError, "top: .*lateral, torch.float32, got torch.float64"),
        (lambda t, x: (t, x.to_sparse()), TypeError, "lateral: expected a dense"),
        (lambda t, x: (t, x.to("meta")), ValueError, "top: expected the device of lateral, meta, got"),
        **_MODES,
    ),
)

_UPSAMPLE_ADD_BACKWARD = Operator(
    "upsample_add_backward",
    torch.ops.fpn_kernels.upsample_add_backward,
    _gathered,
    oracle.upsample_add_backward,
    samples=(
        Sample("uneven ratios", lambda m: (m.map(2, 6, 7, 10), (3, 5)), {"gain": 0.5}),
        Sample("whole ratio 2", lambda m: (m.map(2, 16, 8, 12), (4, 6))),
        Sample("bilinear", lambda m: (m.map(1, 6, 10, 8), (3, 5)), {"mode": "bilinear"}),
        Sample("a top that shrank", lambda m: (m.map(2, 7, 4, 3), (9, 8)), {"mode": "nearest-exact"}),
    ),
    like=lambda grad, size: [grad],
    bad=_bad(
        (lambda g, size: (g, (0, 3)), ValueError, r"top_size: expected two sizes.*0"),
        (lambda g, size: (g, (2, 3, 4)), ValueError, "top_size: expected two sizes"),
        (lambda g, size: (g[0], size), ValueError, f"grad: {_MAP}"),
    ),
    public=False,
)

_LATERAL_CONNECTION = Operator(
    "lateral_connection",
    fpn_kernels.lateral_connection,
    reference.lateral_connection,
    _without_format(oracle.lateral_connection),
    samples=(
        Sample(
            "tails in every dimension",
            lambda m: (m.map(2, 5, 10, 13), m.weight(10, 5), m.bias(10), m.map(2, 10, 5, 7)),
            {"gain": 0.7},
        ),
        Sample("the convolution alone, a 2-D weight", lambda m: (m.map(2, 6, 7, 8), m.weight(5, 6).flatten(1))),
        Sample("no top: no gain", lambda m: (m.map(1, 8, 4, 5), m.weight(3, 8), m.bias(3)), {"gain": 0.5}),
        Sample(
            "no bias, bilinear, NHWC required",
            lambda m: (m.map(2, 6, 7, 8), m.weight(5, 6), None, m.map(2, 5, 3, 4)),
            {"mode": "bilinear", "memory_format": NHWC},
        ),
        Sample(
            "whole tiles and whole ratio, NCHW required",
            lambda m: (m.map(1, 64, 8, 12), m.weight(32, 64), m.bias(32), m.map(1, 32, 4, 6)),
            {"memory_format": NCHW},
        ),
    ),
    like=lambda feature, *_: [feature],
    arguments=lambda feature, weight, bias=None, top=None: (feature, weight, bias, top),
    bad=_bad(
        (lambda f, w, b, t: (f.tolist(), w), TypeError, "feature: expected a tensor, got list"),
        (lambda f, w, b, t: (f, None), TypeError, "weight: expected a tensor, got NoneType"),
        (lambda f, w, b, t: (f, w, 1.0), TypeError, "bias: expected a tensor or None, got float"),
        (lambda f, w, b, t: (f, w, b, 2), TypeError, "top: expected a tensor or None, got int"),
        (lambda f, w, b, t: (f[0], w, b, t), ValueError, f"feature: {_MAP}"),
        (lambda f, w, b, t: (f[:, :0], w, b, t), ValueError, "feature: expected at least one channel"),
        (lambda f, w, b, t: (f[:, :2], w, b, t), ValueError, r"weight: .*\[Cout, 2\], got \[10, 5, 1"),
        (lambda f, w, b, t: (f, w.expand(10, 5, 3, 3), b, t), ValueError, r"weight: .*\[10, 5, 3, 3\]"),
        (lambda f, w, b, t: (f, w[..., 0], b, t), ValueError, r"weight: expected the shape \[Cout, 5"),
        (lambda f, w, b, t: (f, w, b[:3], t), ValueError, r"bias: expected the shape \[10\], got \[3\]"),
        (lambda f, w, b, t: (f, w, b[None], t), ValueError, r"bias: .*got \[1, 10\]"),
        (lambda f, w, b, t: (f, w, b, t[:, :3]), ValueError, r"top: .*\[2, 10, h, w\], got \[2, 3, "),
        (lambda f, w, b, t: (f, w.double(), b, t), TypeError, "weight: expected the dtype of feature"),
        (lambda f, w, b, t: (f, w, b.half(), t), TypeError, "bias: expected the dtype of feature"),
        (lambda f, w, b, t: (f, w, b, t.double()), TypeError, "top: expected the dtype of feature"),
        (lambda f, w, b, t: (f.int(), w, b, t), TypeError, "feature: .*got torch.int32"),
        (lambda f, w, b, t: (f, w.to("meta"), b, t), ValueError, "weight: expected the device of feature"),
        **_MODES,
        **_FORMATS,
    ),
)

_MERGE_BACKWARD = Operator(
    "merge_backward",
    torch.ops.fpn_kernels.merge_backward,
    _merge_backward,
    oracle.merge_backward,
    samples=(
        Sample("whole ratio, a gradient to add", lambda m: (m.map(2, 16, 8, 16), (4, 8), m.map(2, 16, 4, 8))),
        Sample("uneven ratios, none to add", lambda m: (m.map(2, 6, 9, 7), (5, 3), None), {"gain": 0.7}),
        Sample("bilinear", lambda m: (m.map(2, 6, 7, 9), (1, 2), m.map(2, 6, 1, 2)), {"mode": "bilinear"}),
    ),
    like=lambda grad, size, upstream: [grad],
    bad=_bad(
        (lambda g, s, up: (g, s, up[:, :, 1:]), ValueError, r"upstream: expected the shape \[2, 16, 4, 8\], got"),
        (lambda g, s, up: (g, s, up.double()), TypeError, "upstream: expected the dtype of grad"),
        (lambda g, s, up: (g, s, up[0]), ValueError, f"upstream: {_MAP}"),
    ),
    public=False,
)

_OUTPUT_CONV = Operator(
    "output_conv",
    fpn_kernels.output_conv,
    reference.output_conv,
    _without_format(oracle.output_conv),
    samples=(
        Sample("tails in every dimension", lambda m: (m.map(2, 5, 10, 13), m.weight(10, 5, 3), m.bias(10))),
        Sample(
            "whole vectors, no bias, NHWC required",
            lambda m: (m.map(1, 32, 8, 12), m.weight(64, 32, 3)),
            {"memory_format": NHWC},
        ),
        Sample("one pixel: only the middle tap reads it", lambda m: (m.map(1, 1, 1, 1), m.weight(3, 1, 3), m.bias(3))),
        Sample("one column", lambda m: (m.map(3, 2, 50, 1), m.weight(17, 2, 3), m.bias(17)), {"memory_format": NCHW}),
        Sample("a large map", lambda m: (m.map(2, 16, 38, 57), m.weight(16, 16, 3), m.bias(16))),
    ),
    like=lambda feature, *_: [feature],
    arguments=lambda feature, weight, bias=None: (feature, weight, bias),
    bad=_bad(
        (lambda f, w, b: (None, w, b), TypeError, "feature: expected a tensor, got NoneType"),
        (lambda f, w, b: (f, [1], b), TypeError, "weight: expected a tensor, got list"),
        (lambda f, w, b: (f, w, 1), TypeError, "bias: expected a tensor or None, got int"),
        (lambda f, w, b: (f[0], w, b), ValueError, f"feature: {_MAP}"),
        (lambda f, w, b: (f[:, :0], w[:, :0], b), ValueError, "feature: expected at least one channel"),
        (lambda f, w, b: (f, w[..., :1, :1], b), ValueError, r"weight: .*\[Cout, 5, 3, 3\], got \[10, 5, 1"),
        (lambda f, w, b: (f, w, b[1:]), ValueError, r"bias: .*\[10\], got \[9\]"),
        (lambda f, w, b: (f.double(), w, b), TypeError, "weight: expected the dtype of feature"),
        (lambda f, w, b: (f.int(), w, b), TypeError, "feature: .*got torch.int32"),
        (lambda f, w, b: (f, w.to("meta"), b), ValueError, "weight: expected the device of feature"),
        **_FORMATS,
    ),
)

_OUTPUT_CONV_BACKWARD_WEIGHT = Operator(
    "output_conv_backward_weight",
    torch.ops.fpn_kernels.output_conv_backward_weight,
    _weight_gradients,
    _without_format(oracle.output_conv_backward_weight),
    samples=(
        Sample("tails in every dimension", lambda m: (m.map(2, 10, 10, 13), m.map(2, 5, 10, 13))),
        Sample("one pixel", lambda m: (m.map(1, 3, 1, 1), m.map(1, 1, 1, 1)), {"memory_format": NCHW}),
        Sample("one column", lambda m: (m.map(3, 17, 50, 1), m.map(3, 2, 50, 1)), {"memory_format": NHWC}),
        Sample("a large map", lambda m: (m.map(2, 16, 38, 57), m.map(2, 16, 38, 57)), {"memory_format": NHWC}),
    ),
    like=lambda grad, feature: [],
    bad=_bad(
        (lambda g, f: (g[0], f), ValueError, f"grad: {_MAP}"),
        (lambda g, f: (g, f.int()), TypeError, "feature: .*got torch.int32"),
        (lambda g, f: (g.double(), f), TypeError, "feature: expected the dtype of grad"),
        (lambda g, f: (g, f.to("meta")), ValueError, "feature: expected the device of grad"),
        (lambda g, f: (g, f[:, :0]), ValueError, "feature: expected at least one channel"),
        (lambda g, f: (g[:, :0], f), ValueError, "grad: expected at least one channel"),
        (lambda g, f: (g, f[:, :, 1:]), ValueError, r"feature: .*\[2, Cin, 10, 13\], got \[2, 5, 9, 13\]"),
        (lambda g, f: (g, f[:1]), ValueError, r"feature: .*got \[1, 5, 10, 13\]"),
        format=_FORMATS["format"],
    ),
    public=False,
)


def _pyramid(m: Make, k: int, biases: Sequence[bool]) -> tuple[Any, ...]:
    sizes, channels, width = [(10, 13), (5, 7), (1, 2)], [5, 8, 16] if k == 1 else [16] * 3, 10
    features = [m.map(2, cin, *size) for cin, size in zip(channels, sizes, strict=True)]
    return features, [m.weight(width, cin, k) for cin in channels], [m.bias(width) if has else None for has in biases]


def _of_levels(channels: int) -> dict[str, Bad]:
    return _bad(
        (lambda f, w, b: ([], [], None), ValueError, "features: expected at least one map"),
        (lambda f, w, b: (f[0], w, b), TypeError, "features: expected a list or tuple of tensors, got Tensor"),
        (lambda f, w, b: (f, w[:2], b), ValueError, "weights: expected .*3.*, got 2"),
        (lambda f, w, b: (f, w, b[:2]), ValueError, "biases: expected .*3.*, got 2"),
        (lambda f, w, b: ([*f[:2], None], w, b), TypeError, r"features\[2\]: expected a tensor, got NoneType"),
        (lambda f, w, b: ([f[0].sum(), *f[1:]], w, b), ValueError, rf"features\[0\]: {_MAP}"),
        (lambda f, w, b: (f, [w[0].sum(), *w[1:]], b), ValueError, rf"weights\[0\]: .*\[Cout, {channels},"),
        (lambda f, w, b: (f, w, [*b[:2], b[0][1:]]), ValueError, r"biases\[2\]: expected the shape \[10\]"),
        (lambda f, w, b: ([f[0], f[1].half(), f[2]], w, b), TypeError, r"weights\[1\]: expected the dtype"),
        (
            lambda f, w, b: ([f[0], f[1].half(), f[2]], [w[0], w[1].half(), w[2]], None),
            TypeError,
            r"features\[1\]: expected the dtype of features\[0\]",
        ),
        **_FORMATS,
    )


_OUTPUT_CONV_LEVELS = Operator(
    "output_conv_levels",
    functional.output_conv_levels,
    _levels(reference.output_conv),
    _levels(oracle.output_conv),
    samples=(
        Sample("a level without a bias", lambda m: _pyramid(m, 3, (True, False, True))),
        Sample("NHWC required, every bias", lambda m: _pyramid(m, 3, (True,) * 3), {"memory_format": NHWC}),
    ),
    like=lambda features, *_: features,
    arguments=_with_bias_levels,
    served_as=("output_conv_levels", "output_conv"),
    bad=_of_levels(16),
)

_TOP_DOWN_PATHWAY = Operator(
    "top_down_pathway",
    fpn_kernels.top_down_pathway,
    reference.top_down_pathway,
    _without_format(_exact_pathway),
    samples=(
        Sample("levels without a bias", lambda m: _pyramid(m, 1, (True, False, False)), {"gain": 0.5}),
        Sample("NHWC required, every bias", lambda m: _pyramid(m, 1, (True,) * 3), {"memory_format": NHWC}),
        Sample("bilinear, no bias", lambda m: _pyramid(m, 1, ())[:2], {"mode": "bilinear"}),
    ),
    like=lambda features, *_: features,
    arguments=_with_bias_levels,
    served_as=("top_down_pathway", "lateral_connection"),
    bad=_of_levels(5)
    | _MODES
    | _bad(
        (lambda f, w, b: ([*f[:2], f[2][:1]], w, b), ValueError, r"features\[2\]: expected the batch of .*2, g"),
        (lambda f, w, b: (f, [*w[:2], w[2][:5]], None), ValueError, r"weights\[2\]: expected the output chan"),
    ),
)

_WEIGHTED_MERGE = Operator(
    "weighted_merge",
    fpn_kernels.weighted_merge,
    reference.weighted_merge,
    _exact_merge,
    samples=(
        Sample("a top-down node", lambda m: ([m.map(2, 6, 7, 10), m.map(2, 6, 3, 5)], m.factors(0.7, 1.9))),
        Sample(
            "a bottom-up node; a negative weight, which the ReLU switches off",
            lambda m: ([m.map(2, 16, 4, 6) for _ in range(3)], m.factors(0.7, 1.9, -0.4)),
        ),
        Sample(
            "a coarse map last, bilinear, softmax",
            lambda m: ([m.map(1, 6, 7, 10), m.map(1, 6, 7, 10), m.map(1, 6, 3, 5)], m.factors(0.7, 1.9, -0.4)),
            {"mode": "bilinear", "normalization": "softmax"},
        ),
        Sample(
            "two coarse maps of two sizes",
            lambda m: ([m.map(2, 6, 7, 10), m.map(2, 6, 3, 5), m.map(2, 6, 1, 1)], m.factors(0.7, 1.9, 0.4)),
            {"eps": 0.25},
            not_triton=True,
        ),
    ),
    like=lambda inputs, weights: inputs[:1],
    arguments=_with_third,
    bad=_bad(
        (lambda x, w: (x[0], w), TypeError, "inputs: expected a list or tuple of tensors, got Tensor"),
        (lambda x, w: (x[:1], w[:1]), ValueError, "inputs: expected two or three maps, got 1"),
        (lambda x, w: (x * 2, w), ValueError, "inputs: expected two or three maps, got 4"),
        (lambda x, w: ([x[0], 3], w), TypeError, r"inputs\[1\]: expected a tensor, got int"),
        (lambda x, w: ([x[0], x[1][0]], w), ValueError, r"inputs\[1\]: expected 4 dimensions.*got 3"),
        (lambda x, w: ([x[0], x[1][:, 1:]], w), ValueError, r"inputs\[1\]: .*\[2, 6, h, w\], got \[2, 5,"),
        (lambda x, w: ([x[0][:, :, :0], x[1]], w), ValueError, r"inputs\[0\]: expected at least one pixel"),
        (lambda x, w: ([x[0].long(), x[1]], w), TypeError, r"inputs\[0\]: .*float64, got torch.int64"),
        (lambda x, w: ([x[0], x[1].half()], w), TypeError, r"inputs\[1\]: .*inputs\[0\], torch.float32, got"),
        (lambda x, w: ([x[0], x[1].to("meta")], w), ValueError, r"inputs\[1\]: expected the device"),
        (lambda x, w: ([x[0], x[1].to_sparse()], w), TypeError, r"inputs\[1\]: expected a dense"),
        (lambda x, w: (x, [1.0, 1.0]), TypeError, "weights: expected a tensor, got list"),
        (lambda x, w: (x, w[:1]), ValueError, r"weights: expected the shape \[2\].*got \[1\]"),
        (lambda x, w: (x, w.long()), TypeError, "weights: expected a floating-point tensor, got"),
        (lambda x, w: (x, w.to("meta")), ValueError, "weights: expected the device of the maps"),
        normalization=Bad(as_they_are, ValueError, "normalization: .*'softmax', got 'sum'", {"normalization": "sum"}),
        eps=Bad(as_they_are, ValueError, "eps: expected a finite number of at least 0, got -1e-09", {"eps": -1e-9}),
        nan=Bad(as_they_are, ValueError, "eps: .*got nan", {"eps": float("nan")}),
        type_of_eps=Bad(as_they_are, TypeError, "eps: expected a number, got str", {"eps": "1e-4"}),
        mode=_MODES["mode"],
    ),
)

_WEIGHTED_MERGE_BACKWARD = Operator(
    "weighted_merge_backward",
    torch.ops.fpn_kernels.weighted_merge_backward,
    lambda grad, input, factor: ((grad * factor).to(grad.dtype), (grad * input).to(factor.dtype).sum()),
    lambda grad, input, factor: (grad.double().cpu() * factor.double().cpu(), (grad.double() * input.double()).sum()),
    samples=(
        Sample("a tail of channels", lambda m: (m.map(2, 6, 7, 10), m.map(2, 6, 7, 10), m.factors(0.3)[0])),
        Sample("whole vectors", lambda m: (m.map(1, 16, 8, 12), m.map(1, 16, 8, 12), m.factors(1.9)[0])),
    ),
    like=lambda grad, *_: [grad],
    bad=_bad(
        (lambda g, x, w: (g, x[:, :, :3], w), ValueError, r"input: expected the shape of grad, .*got \[2, 6, 3, 10\]"),
        (lambda g, x, w: (g, x, w[None]), ValueError, r"factor: expected a single number .*\[1\]"),
        (lambda g, x, w: (g, x, w.double()), TypeError, "factor: expected torch.float32"),
    ),
    public=False,
)

_REORDER = Operator(
    "reorder",
    torch.ops.fpn_kernels.reorder,
    lambda source, memory_format: source.clone(),
    lambda source, memory_format: source.double().cpu(),
    samples=(
        Sample("tails of channels and pixels", lambda m: (m.map(2, 33, 19, 29),), {"memory_format": NHWC}),
        Sample("to NCHW", lambda m: (m.map(1, 6, 7, 10),), {"memory_format": NCHW}),
        Sample("one channel: both layouts are the same bytes", lambda m: (m.map(3, 1, 7, 9),), {"memory_format": NHWC}),
    ),
    like=lambda source: [source],
    bad=_bad(
        (lambda x: (x[0],), ValueError, f"source: {_MAP}"),
        (lambda x: (x.int(),), TypeError, "source: .*got torch.int32"),
        format=Bad(as_they_are, ValueError, "memory_format: .*preserve", {"memory_format": torch.preserve_format}),
    ),
    public=False,
)

_CHANNEL_SUMS = Operator(
    "channel_sums",
    torch.ops.fpn_kernels.channel_sums,
    lambda source: source.sum((0, 2, 3)),
    lambda source: source.double().cpu().sum((0, 2, 3)),
    samples=(
        Sample("a tail of one channel", lambda m: (m.map(3, 33, 3, 4),)),
        Sample("one pixel", lambda m: (m.map(2, 5, 1, 1),)),
    ),
    like=lambda source: [],
    bad=_bad(
        (lambda x: (x[0],), ValueError, f"source: {_MAP}"),
        (lambda x: (x.int(),), TypeError, "source: .*got torch.int32"),
    ),
    public=False,
)

OPERATORS = [
    _UPSAMPLE_ADD,
    _UPSAMPLE_ADD_BACKWARD,
    _LATERAL_CONNECTION,
    _MERGE_BACKWARD,
    _OUTPUT_CONV,
    _OUTPUT_CONV_BACKWARD_WEIGHT,
    _OUTPUT_CONV_LEVELS,
    _TOP_DOWN_PATHWAY,
    _WEIGHTED_MERGE,
    _WEIGHTED_MERGE_BACKWARD,
    _REORDER,
    _CHANNEL_SUMS,
]
PUBLIC = [operator for operator in OPERATORS if operator.public]
