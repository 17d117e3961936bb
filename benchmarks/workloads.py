"""A case as tensors and calls: the inputs, the eager call, the library's call, and their minimal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fpn_kernels
from benchmarks.cases import FORWARD, TOP_DOWN, TRAINING, Case
from benchmarks.internals import output_conv_levels
from benchmarks.options import DTYPES
from fpn_kernels import reference, roofline
from fpn_kernels.roofline import Cost

# The coarsest level has no top to merge.
_LEVELS = {"upsample_add": (2, 3, 4), "lateral_connection": (2, 3, 4, 5), "output_conv": (2, 3, 4, 5)}


@dataclass
class Contender:
    """A call on the workload's inputs, and the parameters that it holds itself."""

    call: Callable[..., Any]
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Workload:
    """The tensors and calls of a case.

    Attributes:
        inputs: in the order of the arguments of both calls; a training case differentiates all of them.
        eager, fused: the baseline and the library's call.
        cost: minimal bytes and operations, with the backward in a training case.
        exact: whether the forward promises the bits of eager.
        differences: index of an input to the size of the sums whose difference its gradient is. Where they cancel, the
            error is judged by that size.
        roundings: how many times as many roundings add up as in one merge, e.g. one per level of a pathway.
    """

    inputs: tuple[Tensor, ...]
    eager: Contender
    fused: Contender
    cost: Cost
    exact: bool = False
    differences: Mapping[int, float] = field(default_factory=dict)
    roundings: int = 1


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of the maps."""
    dtype: torch.dtype = getattr(torch, DTYPES[case.dtype.removeprefix("amp-")])
    return dtype


def memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "NHWC" else torch.contiguous_format


class Maker:
    """Random tensors of a case: seeded, in its dtype and layout, differentiable in training.

    With `blank`, memory that is never written: enough for launches behind a driver that launches nothing.
    """

    def __init__(self, case: Case, device: torch.device, *, blank: bool = False) -> None:
        self.case, self.device, self.blank = case, device, blank
        self.dtype = dtype_of(case)
        self.generator = torch.Generator(device).manual_seed(2017)

    def _random(self, *shape: int) -> Tensor:
        if self.blank:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _leaf(self, tensor: Tensor, *, parameter: bool = False) -> Tensor:
        wide = parameter and self.case.dtype.startswith("amp-")
        leaf = tensor.to(torch.float32 if wide else self.dtype)
        if leaf.dim() == 4 and self.blank:
            # A view of the same memory: `to` would write it.
            n, c, h, w = leaf.shape
            nhwc = self.case.layout == "NHWC"
            leaf = leaf.view(n, h, w, c).permute(0, 3, 1, 2).detach() if nhwc else leaf
        elif leaf.dim() == 4:
            leaf = leaf.to(memory_format=memory_format(self.case.layout))
        return leaf.requires_grad_(self.case.direction == TRAINING)

    def map(self, channels: int, height: int, width: int) -> Tensor:
        return self._leaf(self._random(self.case.batch, channels, height, width))

    def weight(self, out_channels: int, in_channels: int, kernel_size: int = 1) -> Tensor:
        """Of a convolution; scaled so that a result is of the order of 1."""
        values = self._random(out_channels, in_channels, kernel_size, kernel_size)
        return self._leaf(values / (kernel_size * in_channels**0.5), parameter=True)

    def fusion_weights(self, count: int) -> Tensor:
        """Of a weighted merge, before normalisation: positive, so that each has a gradient."""
        return self._leaf(self._random(count).abs() + 0.5)

    def bias(self, channels: int) -> Tensor:
        return self._leaf(self._random(channels), parameter=True)


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a result, in order, whether it is one, a tuple or a mapping."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def training_step(contender: Contender, call: Callable[..., Any], grads: list[Tensor]) -> Callable[..., list[Tensor]]:
    """Forward, then the gradients of every input and parameter, as one call."""

    def step(*inputs: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(tensors(call(*inputs)), [*inputs, *contender.parameters], grads))

    return step


def workload(case: Case, device: torch.device, *, blank: bool = False) -> Workload:
    """Makes a case; one without a level is all levels in one call, or one call after the other."""
    make = _WORKLOADS[case.operator]
    levels = each_level(case)
    if levels == [case]:
        work = make(Maker(case, device, blank=blank))
    else:
        work = _together([make(Maker(level, device, blank=blank)) for level in levels])
        if case.operator == "output_conv":  # as the neck calls them
            work.fused = Contender(lambda *t: output_conv_levels(t[0::3], t[1::3], t[2::3]))
    if case.dtype.startswith("amp-"):
        for contender in (work.eager, work.fused):
            contender.call = _autocast(contender.call, device.type, dtype_of(case))
    return work


def each_level(case: Case) -> list[Case]:
    """The cases of one level each of a case without a level, where the operator has levels."""
    if case.spot.level is not None or case.operator not in _LEVELS:
        return [case]
    return [replace(case, spot=replace(case.spot, level=level)) for level in _LEVELS[case.operator]]


def _autocast(call: Callable[..., Any], device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    def autocast(*inputs: Tensor) -> Any:
        with torch.autocast(device_type, dtype):
            return call(*inputs)

    return autocast


def _both(make: Maker, operator: str, inputs: Sequence[Tensor], shapes: Sequence[Any], **options: Any) -> Workload:
    """The workload of a function of `reference` and of the library, whose cost `roofline` has."""
    eager, fused = (partial(getattr(module, operator), **options) for module in (reference, fpn_kernels))
    cost: Cost = getattr(roofline, operator)(*shapes, make.dtype)
    if make.case.direction == TRAINING:
        cost += getattr(roofline, f"{operator}_backward")(*shapes, make.dtype)
    return Workload(tuple(inputs), Contender(eager), Contender(fused), cost)


def _upsample_add(make: Maker) -> Workload:
    image, spot = make.case.spot.image, make.case.spot
    assert spot.level is not None
    lateral = make.map(image.out_channels, *image.level(spot.level)[1:])
    top = make.map(image.out_channels, *image.level(spot.level + 1)[1:])
    shapes = tuple(lateral.shape), tuple(top.shape[2:])
    work = _both(make, "upsample_add", (top, lateral), shapes, mode=spot.mode)
    work.exact = spot.mode != "bilinear"
    return work


def _lateral_connection(make: Maker) -> Workload:
    """The coarsest level has no top."""
    image, spot = make.case.spot.image, make.case.spot
    assert spot.level is not None
    channels, height, width = image.level(spot.level)
    feature = make.map(channels, height, width)
    inputs = [feature, make.weight(image.out_channels, channels), make.bias(image.out_channels)]
    top_size = None
    if spot.level < 5:
        top_size = image.level(spot.level + 1)[1:]
        inputs.append(make.map(image.out_channels, *top_size))
    return _both(make, "lateral_connection", inputs, (feature.shape, image.out_channels, top_size), mode=spot.mode)


def _output_conv(make: Maker) -> Workload:
    image, level = make.case.spot.image, make.case.spot.level
    assert level is not None
    channels = image.out_channels
    feature = make.map(channels, *image.level(level)[1:])
    inputs = (feature, make.weight(channels, channels, 3), make.bias(channels))
    return _both(make, "output_conv", inputs, (feature.shape, channels))


def _weighted_merge(make: Maker) -> Workload:
    """A map and a coarser one (top-down), or three of one size (bottom-up)."""
    image, spot = make.case.spot.image, make.case.spot
    assert spot.level is not None
    size, coarse = (image.level(spot.level + step)[1:] for step in (0, 1))
    others = [coarse] if spot.node == TOP_DOWN else [size, size]
    maps = [make.map(image.out_channels, *each) for each in (size, *others)]
    weights = make.fusion_weights(len(maps))
    work = _both(make, "weighted_merge", (*maps, weights), (tuple(maps[0].shape), others), mode=spot.mode)
    for contender in (work.eager, work.fused):
        contender.call = _first_and_last(contender.call)
    # In 16 bits eager rounds the factors, each product and each sum.
    work.roundings = 4
    if not make.blank:
        # The gradient of the weights is a difference of sums of N C H W random products, divided by the weights' sum.
        work.differences = {len(maps): maps[0].numel() ** 0.5 / float(weights.detach().sum())}
    return work


def _first_and_last(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: call(inputs[:-1], inputs[-1])


def _top_down_pathway(make: Maker) -> Workload:
    image = make.case.spot.image
    assert make.case.direction == FORWARD
    features = [make.map(*image.level(level)) for level in (2, 3, 4, 5)]
    weights = [make.weight(image.out_channels, channels) for channels in image.channels]
    biases = [make.bias(image.out_channels) for _ in image.channels]

    def of(pathway: Callable[..., Any]) -> Contender:
        return Contender(lambda *t: pathway(t[:4], t[4:8], t[8:]))

    return Workload(
        inputs=(*features, *weights, *biases),
        eager=of(reference.top_down_pathway),
        fused=of(fpn_kernels.top_down_pathway),
        cost=roofline.top_down_pathway([feature.shape for feature in features], image.out_channels, make.dtype),
        roundings=4,
    )


def _neck(make: Maker) -> Workload:
    """C2..C5 to P2..P5: the module against the same network in plain PyTorch, with the same weights."""
    case, image = make.case, make.case.spot.image
    features = tuple(make.map(*image.level(level)) for level in (2, 3, 4, 5))
    torch.manual_seed(2017)
    eager = reference.FeaturePyramidNetwork(image.channels, image.out_channels)
    fused = fpn_kernels.FeaturePyramidNetwork(image.channels, image.out_channels)
    fused.load_state_dict(eager.state_dict())
    dtype = torch.float32 if case.dtype.startswith("amp-") else make.dtype

    def of(module: nn.Module) -> Contender:
        # mypy does not know the overload of `to` that takes a memory format.
        module = module.to(device=make.device, dtype=dtype)
        module = module.to(memory_format=memory_format(case.layout))  # type: ignore[call-overload]
        module.requires_grad_(case.direction == TRAINING)
        return Contender(
            lambda *t: module({str(level): feature for level, feature in enumerate(t)}), tuple(module.parameters())
        )

    cost = roofline.neck_forward_backward if case.direction == TRAINING else roofline.neck
    shapes = [feature.shape for feature in features]
    return Workload(
        features, of(eager), of(fused), cost(shapes, image.out_channels, make.dtype, pool=False), roundings=4
    )


_WORKLOADS: dict[str, Callable[[Maker], Workload]] = {
    "upsample_add": _upsample_add,
    "lateral_connection": _lateral_connection,
    "output_conv": _output_conv,
    "weighted_merge": _weighted_merge,
    "top_down_pathway": _top_down_pathway,
    "neck": _neck,
}


def _together(parts: Sequence[Workload]) -> Workload:
    """Several workloads as one: inputs, calls and results one after the other, costs added."""
    ends = [sum(len(part.inputs) for part in parts[: index + 1]) for index in range(len(parts))]

    def of(calls: Sequence[Callable[..., Any]]) -> Contender:
        places = list(zip(calls, [0, *ends], ends, strict=False))
        return Contender(lambda *t: [result for call, a, b in places for result in tensors(call(*t[a:b]))])

    return Workload(
        inputs=tuple(tensor for part in parts for tensor in part.inputs),
        eager=of([part.eager.call for part in parts]),
        fused=of([part.fused.call for part in parts]),
        cost=sum((part.cost for part in parts[1:]), start=parts[0].cost),
        exact=all(part.exact for part in parts),
    )
