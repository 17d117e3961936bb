"""`output_conv`: the 3x3 convolution (stride 1, padding 1) of a merged map, of one level or of all, and its backward.

The levels of a pyramid are one operator because a backend may share a launch between them: the small levels then fill
the SMs that the last tiles of the large ones leave idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.operators import aten, dispatch, plan_cache
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.output_conv import cpu, eager, gradient, triton
from fpn_kernels.operators.output_conv.call import OutputConv, OutputConvBackwardWeight, OutputConvLevels
from fpn_kernels.operators.upsample_add.standard import laid_out


def _standard(call: OutputConv) -> Tensor:
    convolved = F.conv2d(call.feature, call.weight, call.bias, padding=1)
    return laid_out(convolved, call.feature, call.memory_format)


OUTPUT_CONV = Operator(
    "output_conv(Tensor feature, Tensor weight, Tensor? bias, *, MemoryFormat? memory_format=None) -> Tensor",
    OutputConv,
    {
        "native": cpu.OUTPUT_CONV,
        "triton": triton.OUTPUT_CONV,
        "eager": dispatch.eager(eager.output_conv),
    },
    standard=_standard,
    gradient=Gradient(gradient.save, gradient.backward, gradient.by_aten, gradient.recorded_by),
    cast=3,
    exported=True,
)


def _compose(call: OutputConvLevels) -> Callable[[OutputConvLevels], list[Tensor]]:
    plans = [OUTPUT_CONV.plan(each) for each in call.convolutions()]

    def run(call: OutputConvLevels) -> list[Tensor]:
        return [plan(each) for plan, each in zip(plans, call.convolutions(), strict=True)]

    run.transient = any(plan.transient for plan in plans)  # type: ignore[attr-defined]
    return run


def _levels_recorded(call: OutputConvLevels) -> list[Tensor]:
    """One autograd node per level, which frees its maps after its own backward; one node of all would keep them."""
    key = plan_cache.key_of_lists("output_conv_levels, one node per level", call)
    plans: list[plan_cache.Plan] | None = plan_cache.get(key)
    if plans is None:
        call.check()
        plans = [OUTPUT_CONV.plan(each) for each in call.convolutions()]
        if not any(plan.transient for plan in plans):
            plan_cache.put(key, plans)
    return [_level_recorded(plan, each) for plan, each in zip(plans, call.convolutions(), strict=True)]


def _level_recorded(plan: plan_cache.Plan, call: OutputConv) -> Tensor:
    result = gradient.planned_by_aten(plan, call) if gradient.may_be_atens(call) else None
    if result is None:
        *tensors, memory_format = call

        def run(*arguments: Any, **options: Any) -> Any:
            return plan(OutputConv(*arguments, **options))

        result = OUTPUT_CONV.function(run, *tensors, memory_format=memory_format)
    return result


def _standard_levels(call: OutputConvLevels) -> list[Tensor]:
    return [_standard(each) for each in call.convolutions()]


OUTPUT_CONV_LEVELS = Operator(
    "output_conv_levels(Tensor[] features, Tensor[] weights, Tensor[] biases, int[] bias_levels, *, "
    "MemoryFormat? memory_format=None) -> Tensor[]",
    OutputConvLevels,
    {"triton": triton.OUTPUT_CONV_LEVELS},
    standard=_standard_levels,
    gradient=Gradient(
        gradient.save_levels,
        gradient.backward_levels,
        _levels_recorded,
        lambda call, backend: "one node per level, as output_conv",
    ),
    cast=4,
    compose=dispatch.Composition("one output_conv per level", _compose),
    exported=True,
)


def _standard_backward_weight(call: OutputConvBackwardWeight) -> tuple[Tensor, Tensor]:
    _, of_weight, of_bias = aten.gradients(call.grad, call.feature, None, call.wants_bias)
    return of_weight, call.grad.new_empty(0) if of_bias is None else of_bias


OUTPUT_CONV_BACKWARD_WEIGHT = Operator(
    "output_conv_backward_weight(Tensor grad, Tensor feature, *, bool wants_bias=True, "
    "MemoryFormat? memory_format=None) -> (Tensor grad_weight, Tensor grad_bias)",
    OutputConvBackwardWeight,
    {
        "native": cpu.OUTPUT_CONV_BACKWARD_WEIGHT,
        "eager": dispatch.eager(eager.output_conv_backward_weight),
    },
    standard=_standard_backward_weight,
    gradient=Gradient(gradient.save_backward_weight, gradient.double_backward_weight),
)
