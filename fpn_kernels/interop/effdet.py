"""EfficientDet-style cells: the `FpnCombine` nodes that add an enlarged map to another one.

A node resamples each of its inputs and adds them.  The fused calls never write an enlarged map to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fpn_kernels.interop.dialect import Dialect, Random, block_parameters, resize_refusal
from fpn_kernels.interop.swapping import FusedForward
from fpn_kernels.modules.alterations import runs_own_forward
from fpn_kernels.modules.fusing import is_plain_sequential
from fpn_kernels.modules.pathway import add_top, merge_level


class EffdetForward(FusedForward):
    """The list of all maps so far to the sum of this node's inputs."""

    inputs_offsets: Sequence[int]
    resample: nn.ModuleDict

    def forward(self, x: Sequence[Tensor]) -> Any:
        resamples: list[Any] = list(self.resample.values())
        features = [x[offset] for offset in self.inputs_offsets]
        enlarges = [_enlarges(resample) for resample in resamples]
        if all(enlarges) or not any(enlarges):
            return super().forward(x)  # type: ignore[misc]
        block = _only_convolution(resamples[enlarges.index(False)]) if len(enlarges) == 2 else None
        tops: list[tuple[Tensor, Any]] = []
        plain: list[Tensor] = []
        for resample, feature, enlarge in zip(resamples, features, enlarges, strict=True):  # in the node's order
            if enlarge:
                for module in list(resample)[:-1]:
                    feature = module(feature)
                tops.append((feature, resample.upsample))
            else:
                plain.append(feature if block is not None else resample(feature))
        if block is not None:
            (top, upsample), (feature,) = tops[0], plain
            if _target(upsample, top) == tuple(feature.shape[2:]):
                return merge_level(feature, block, block_parameters(block, 1), top, mode=upsample.mode)
            plain = [block(feature)]
        total: Tensor = sum(plain)  # type: ignore[assignment]
        for top, upsample in tops:
            if _target(upsample, top) == tuple(total.shape[2:]):
                total = add_top(total, top, mode=upsample.mode)
            else:  # the error, or the broadcast, of PyTorch's addition
                total = total + upsample(top)
        return total


def _only_convolution(resample: Any) -> nn.Module | None:
    """The convolution of a branch without other modules, if it has fused parameters; or None."""
    if not is_plain_sequential(resample) or len(resample) != 1:
        return None
    block: nn.Module = resample[0]
    return block if block_parameters(block, 1) is not None else None


def _enlarges(resample: Any) -> bool:
    """Whether this is a plain sequence that ends in an upsampling without hooks or patches."""
    if not is_plain_sequential(resample) or len(resample) == 0:
        return False
    upsample = resample._modules.get("upsample")
    return upsample is not None and upsample is resample[-1] and runs_own_forward(upsample)


def _target(upsample: Any, top: Tensor) -> tuple[int, ...]:
    if upsample.size is not None:
        size = upsample.size
        return (size, size) if isinstance(size, int) else tuple(size)
    height, width = _factors(upsample)
    return (int(top.shape[2] * height), int(top.shape[3] * width))


def _factors(upsample: Any) -> tuple[float, float]:
    factor = upsample.scale_factor
    return tuple(factor) if isinstance(factor, tuple) else (factor, factor)  # type: ignore[return-value]


class EffdetDialect(Dialect):
    name = "EfficientDet FpnCombine"
    packages = ("effdet",)
    class_names = ("FpnCombine",)
    parts = ((nn.ModuleDict, ("resample",)),)
    options = ("inputs_offsets", "weight_method")
    forwards = (EffdetForward,)

    def refusal(self, module: Any) -> str | None:
        if module.weight_method != "sum":
            return f"weight_method={module.weight_method!r}: only 'sum' is supported"
        for resample in module.resample.values():
            if not _enlarges(resample):
                continue
            upsample = resample.upsample
            factors = (None,) if upsample.size is not None else _factors(upsample)
            for factor in factors:
                align_corners = getattr(upsample, "align_corners", None)
                reason = resize_refusal("upsample", upsample.mode, align_corners=align_corners, scale_factor=factor)
                if reason is not None:
                    return reason
        return None

    def nothing_to_do(self, module: Any) -> str | None:
        enlarging = [_enlarges(resample) for resample in module.resample.values()]
        if not any(enlarging):
            return "none of its inputs is enlarged"
        return "all of its inputs are enlarged" if all(enlarging) else None

    def example(self, module: Any, random: Random) -> tuple[Any, ...]:
        maps = [random.normal(1, 1, 1, 1) for _ in range(max(module.inputs_offsets) + 1)]
        branches = {offset: module.resample[str(offset)] for offset in module.inputs_offsets}
        shrinks = any(hasattr(resample, "downsample") for resample in branches.values())
        for offset, resample in branches.items():
            if shrinks:  # the pooling was made for these sizes
                size = tuple(resample.input_size)
            elif not _enlarges(resample):
                size = (6, 10)
            else:
                size = (3, 5)
                if resample.upsample.size is not None:
                    resample.upsample.size = (6, 10)  # in the copy: the sizes of a real image are slow
            maps[offset] = random.normal(2, resample.in_channels, *size)
        return (maps,)
