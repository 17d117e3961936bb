"""`fpn_kernels::top_down_pathway`: one lateral connection a level, coarsest first, and one gradient formula for all.

Chained lateral connections would each hand the level above a gradient, for autograd to add to the one that level has
from its own output: another pass over both.  Here `merge_backward` adds it where it is summed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_kernels.backends import serving
from fpn_kernels.backends.eager import sum_per_channel
from fpn_kernels.backends.layouts import allocate, requested_format, result_format
from fpn_kernels.operators import direct, levels, registration
from fpn_kernels.operators.checks import check_pathway
from fpn_kernels.operators.lateral_connection import (
    aligned,
    feature_gradient,
    merge_gradients,
    prepare,
    weight_gradient,
)

_EACH_ALONE = contextlib.nullcontext()


def _kernel(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    options = (mode, gain, memory_format)
    key = levels.likeness("top_down_pathway", features, weights, biases, bias_levels, *options)
    known: serving.Prepared | list[serving.Prepared] | None = serving.recall(key)
    placed = levels.by_level(biases, bias_levels, len(features))
    if known is None:
        check_pathway(features, weights, placed, mode, memory_format)
        if features[0].shape[0] == 0:
            return _fake(features, weights, biases, bias_levels, mode=mode, gain=gain, memory_format=memory_format)
        matrices = [weight.flatten(1) for weight in weights]
        composition = "one lateral_connection a level"
        known = serving.prepare_whole(
            *(key, "top_down_pathway", features, matrices, placed, *options), composition=composition
        )
    if isinstance(known, serving.Prepared):
        whole: list[Tensor] = known(features, [weight.flatten(1) for weight in weights], placed, *options)
        return whole
    return _level_by_level(features, weights, placed, options, key, known)


def _level_by_level(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    placed: Sequence[Tensor | None],
    options: tuple[Any, ...],
    key: tuple[Any, ...] | None,
    connections: Sequence[serving.Prepared] | None,
) -> list[Tensor]:
    """One lateral connection after the other; `connections`, where they are known, are remembered under `key`."""
    prepared: list[serving.Prepared] = []
    merged: list[Tensor] = []
    top: Tensor | None = None
    for level in reversed(range(len(features))):
        feature, weight, bias = features[level], weights[level], placed[level]
        connection = prepare(feature, weight, bias, top, *options) if connections is None else connections[level]
        top = connection(feature, weight.flatten(1), bias, top, *options)
        prepared.append(connection)
        merged.append(top)
    if connections is None:
        levels.remember(key, prepared[::-1])
    return merged[::-1]


def _fake(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_levels: Sequence[int],
    *,
    mode: str = "nearest",
    gain: float = 1.0,
    memory_format: torch.memory_format | None = None,
) -> list[Tensor]:
    check_pathway(features, weights, levels.by_level(biases, bias_levels, len(features)), mode, memory_format)
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
    ctx.formats = [result_format(feature) for feature in features]
    ctx.sizes = [feature.shape[2:] for feature in features]
    ctx.weight_shapes = [weight.shape for weight in weights]
    ctx.bias_levels = list(bias_levels)
    ctx.mode, ctx.gain = keyword_only_inputs["mode"], keyword_only_inputs["gain"]
    # A level whose map nobody used has no gradient of its own: None, not a map of zeros.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[None] | None]:
    count = len(ctx.sizes)
    wants_features, wants_weights, wants_some_biases, _ = ctx.wants
    wants_biases = [False] * count
    for level, wants in zip(ctx.bias_levels, wants_some_biases, strict=True):
        wants_biases[level] = wants
    # Read once: activation checkpointing computes what was saved anew, for one reading.
    saved = ctx.saved_tensors
    wanted = (wants_features, wants_weights, wants_biases)
    # What comes in between is as these are.
    operators = direct.operators(*(grad for grad in grads if grad is not None), *saved)
    with serving.together(_likeness(ctx, grads, saved, wanted)) if operators is direct.KERNELS else _EACH_ALONE:
        of_features, of_weights, of_biases = _gradients(ctx, operators, grads, saved, wanted)
    # An empty list counts as one of tensors, and its gradient is an empty list.
    nothing: list[None] | None = None if ctx.bias_levels else []
    return of_features, of_weights, [of_biases[level] for level in ctx.bias_levels], nothing


def _likeness(
    ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Tensor | None], wanted: tuple[list[bool], ...]
) -> tuple[Any, ...] | None:
    """All that the calls of a backward go by."""
    if grads[0] is None:
        return None
    given = (*grads, *saved[len(grads) :])
    tensors = [tensor for tensor in given if tensor is not None]
    missing = [tensor is None for tensor in given]
    settings = (ctx.mode, ctx.gain, *missing, *ctx.formats, *ctx.sizes, *itertools.chain(*wanted))
    return serving.likeness_of("top_down_pathway_backward", tensors, settings)


def _gradients(
    ctx: Any,
    operators: Any,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    wanted: tuple[list[bool], ...],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Of each level's feature, weight and bias, from the finest level to the coarsest."""
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
                    operators, grad, ctx.sizes[coarser], carried, wants_bias, options
                )
                wants_bias = False
            feature, weight = features[level], weights[level]
            if wants_features[level] or wants_weights[level]:
                grad = aligned(operators, grad, ctx.formats[level])
            if weight is not None:
                of_features[level] = feature_gradient(operators, grad, weight, gain, ctx.formats[level])
            if feature is not None:
                shape = ctx.weight_shapes[level]
                of_weights[level], bias = weight_gradient(grad, feature, shape, gain, wants_bias)
                of_biases[level] = bias if wants_bias else of_biases[level]
            elif wants_bias:
                of_biases[level] = sum_per_channel(grad, gain)
        grad = carried
    return of_features, of_weights, of_biases


_NAME = registration.define(
    # Biases are those that there are, with their levels: a list with None among its tensors has no autograd.
    "top_down_pathway(Tensor[] features, Tensor[] weights, Tensor[] biases, int[] bias_levels, *, "
    "str mode='nearest', float gain=1.0, MemoryFormat? memory_format=None) -> Tensor[]",
    _kernel,
    _fake,
)
registration.differentiable(_NAME, _backward, _setup_context)
registration.autocast(_NAME)
