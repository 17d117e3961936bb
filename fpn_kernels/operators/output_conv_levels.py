"""`fpn_kernels::output_conv_levels`: the output convolutions of a whole pyramid, each level with its own weight.

Nothing of one level enters another.  They are one operator because a backend may have one launch for all of them, in
which the small levels fill what the last tiles of the large ones leave idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.layouts import allocate, requested_format, result_format
from fpn_kernels.operators import direct, levels, output_conv, registration
from fpn_kernels.operators.checks import check_output_conv_levels


def _kernel(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    key = levels.likeness("output_conv_levels", features, weights, biases, bias_levels, memory_format)
    known: serving.Prepared | list[serving.Prepared] | None = serving.recall(key)
    placed = levels.by_level(biases, bias_levels, len(features))
    if known is None:
        check_output_conv_levels(features, weights, placed, memory_format)
        if all(feature.numel() > 0 for feature in features):
            composition = "one output_conv a level"
            known = serving.prepare_whole(
                *(key, "output_conv_levels", features, weights, placed, memory_format), composition=composition
            )
    if isinstance(known, serving.Prepared):
        whole: list[Tensor] = known(features, weights, placed, memory_format)
        return whole
    each = [(*level, memory_format) for level in zip(features, weights, placed, strict=True)]
    if known is None:
        known = [output_conv.prepare(*level) for level in each]
        levels.remember(key, known)
    return [convolve(*level) for convolve, level in zip(known, each, strict=True)]


def _recorded(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    """A node of autograd's a level, which lets its maps go when it has been differentiated; one of all keeps them."""
    key = levels.likeness("output_conv_levels, a node each", features, weights, biases, bias_levels, memory_format)
    known: list[serving.Prepared] | None = serving.recall(key)
    placed = levels.by_level(biases, bias_levels, len(features))
    if known is None:
        check_output_conv_levels(features, weights, placed, memory_format)
        known = [output_conv.prepare(*level, memory_format) for level in zip(features, weights, placed, strict=True)]
        levels.remember(key, known)
    results: list[Tensor] = []
    for prepared, feature, weight, bias in zip(known, features, weights, placed, strict=True):
        result: Tensor | None = None
        if output_conv.may_be_atens(feature, weight):
            result = output_conv.recorded_by_aten(prepared, feature, weight, bias, memory_format)
        if result is None:
            result = direct.DIFFERENTIABLE.output_conv(feature, weight, bias, memory_format=memory_format)
        results.append(result)
    return results


def _fake(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    check_output_conv_levels(features, weights, levels.by_level(biases, bias_levels, len(features)), memory_format)
    return [
        allocate((f.shape[0], w.shape[0], *f.shape[2:]), f, requested_format(f, memory_format))
        for f, w in zip(features, weights, strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    features, weights, _, bias_levels = inputs
    wants_features, wants_weights = ctx.needs_input_grad[: len(features)], ctx.needs_input_grad[len(features) :]
    ctx.save_for_backward(
        *(feature if wants else None for feature, wants in zip(features, wants_weights, strict=False)),
        *(weight if wants else None for weight, wants in zip(weights, wants_features, strict=True)),
    )
    ctx.formats = [
        (result_format(feature), result_format(weight)) for feature, weight in zip(features, weights, strict=True)
    ]
    ctx.bias_levels = list(bias_levels)
    # A level whose map nobody used: None, not a map of zeros.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[None] | None]:
    count = len(ctx.formats)
    wants_features, wants_weights, wants_some_biases, _ = ctx.wants
    wants_biases = dict(zip(ctx.bias_levels, wants_some_biases, strict=True))
    # Read once: activation checkpointing computes what was saved anew, for one reading.
    saved = ctx.saved_tensors
    features, weights = saved[:count], saved[count:]
    of_features: list[Tensor | None] = [None] * count
    of_weights: list[Tensor | None] = [None] * count
    of_biases: list[Tensor | None] = [None] * count
    for level, grad in enumerate(grads):
        wants = (wants_features[level], wants_weights[level], wants_biases.get(level, False))
        if grad is not None:
            of_features[level], of_weights[level], of_biases[level] = output_conv.gradients(
                grad, features[level], weights[level], wants, ctx.formats[level]
            )
    # An empty list counts as one of tensors, and its gradient is an empty list.
    nothing: list[None] | None = None if ctx.bias_levels else []
    return of_features, of_weights, [of_biases[level] for level in ctx.bias_levels], nothing


_NAME = registration.define(
    # The biases as in top_down_pathway.py.
    "output_conv_levels(Tensor[] features, Tensor[] weights, Tensor[] biases, int[] bias_levels, *, "
    "MemoryFormat? memory_format=None) -> Tensor[]",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context, _recorded)
registration.autocast(_NAME)
