"""The gradients of `top_down_pathway`, from the finest level to the coarsest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_kernels.operators import paths, plan_cache
from fpn_kernels.operators.lateral_connection.gradient import (
    aligned,
    feature_gradient,
    merge_gradients,
    weight_gradient,
)
from fpn_kernels.operators.layouts import result_format
from fpn_kernels.operators.sums import sum_per_channel
from fpn_kernels.operators.top_down_pathway.call import TopDownPathway

_NOT_SEQUENCED = contextlib.nullcontext()


def save(ctx: Any, call: TopDownPathway, result: list[Tensor]) -> None:
    features, weights = call.features, call.weights
    wants_features, wants_weights = ctx.needs_input_grad[: len(features)], ctx.needs_input_grad[len(features) :]
    ctx.save_for_backward(
        *(feature if wants else None for feature, wants in zip(features, wants_weights, strict=False)),
        *(weight if wants else None for weight, wants in zip(weights, wants_features, strict=True)),
    )
    ctx.formats = [result_format(feature) for feature in features]
    ctx.sizes = [feature.shape[2:] for feature in features]
    ctx.weight_shapes = [weight.shape for weight in weights]
    ctx.bias_levels = list(call.bias_levels)
    ctx.mode, ctx.gain = call.mode, call.gain
    # A level whose map is not used has no upstream gradient: None, not a map of zeros.
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[None] | None]:
    count = len(ctx.sizes)
    wants_features, wants_weights, wants_some_biases, _ = ctx.wants
    wants_biases = [False] * count
    for level, wants in zip(ctx.bias_levels, wants_some_biases, strict=True):
        wants_biases[level] = wants
    # Read once: activation checkpointing recomputes what was saved, for one reading.
    saved = ctx.saved_tensors
    wanted = (wants_features, wants_weights, wants_biases)
    # The maps between the levels take the same path as these tensors.
    path = paths.path_of(*(grad for grad in grads if grad is not None), *saved)
    sequenced = path == paths.KERNEL
    with plan_cache.Sequenced(_key(ctx, grads, saved, wanted)) if sequenced else _NOT_SEQUENCED:
        of_features, of_weights, of_biases = _gradients(ctx, path, grads, saved, wanted)
    # An empty list counts as a list of tensors, and its gradient is an empty list.
    of_bias_levels: list[None] | None = None if ctx.bias_levels else []
    return of_features, of_weights, [of_biases[level] for level in ctx.bias_levels], of_bias_levels


def _key(
    ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Tensor | None], wanted: tuple[list[bool], ...]
) -> plan_cache.Key | None:
    """The cache key of all calls of one backward."""
    if grads[0] is None:
        return None
    given = (*grads, *saved[len(grads) :])
    tensors = [tensor for tensor in given if tensor is not None]
    missing = [tensor is None for tensor in given]
    settings = (ctx.mode, ctx.gain, *missing, *ctx.formats, *ctx.sizes, *itertools.chain(*wanted))
    return plan_cache.key_of_tensors("top_down_pathway_backward", tensors, settings)


def _gradients(
    ctx: Any,
    path: str,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    wanted: tuple[list[bool], ...],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """The gradients of each level's feature, weight and bias."""
    count = len(grads)
    features, weights = saved[:count], saved[count:]
    wants_features, wants_weights, wants_biases = wanted
    of_features: list[Tensor | None] = [None] * count
    of_weights: list[Tensor | None] = [None] * count
    of_biases: list[Tensor | None] = [None] * count
    options = {"mode": ctx.mode, "gain": ctx.gain}
    grad = grads[0]
    for level in range(count):
        last = level == count - 1
        coarser = level + 1
        carried = None if last else grads[coarser]
        if grad is not None:
            gain = 1.0 if last else ctx.gain
            wants_bias = wants_biases[level]
            if any(any(wants[coarser:]) for wants in wanted):
                carried, of_biases[level] = merge_gradients(
                    path, grad, ctx.sizes[coarser], carried, wants_bias, options
                )
                wants_bias = False
            feature, weight = features[level], weights[level]
            if wants_features[level] or wants_weights[level]:
                grad = aligned(path, grad, ctx.formats[level])
            if weight is not None:
                of_features[level] = feature_gradient(path, grad, weight, gain, ctx.formats[level])
            if feature is not None:
                shape = ctx.weight_shapes[level]
                of_weights[level], bias = weight_gradient(grad, feature, shape, gain, wants_bias)
                of_biases[level] = bias if wants_bias else of_biases[level]
            elif wants_bias:
                of_biases[level] = sum_per_channel(grad, gain)
        grad = carried
    return of_features, of_weights, of_biases
