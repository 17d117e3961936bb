"""`top_down_pathway`: one lateral connection per level, coarsest first, with one gradient formula for all of them.

Chained lateral connections would each hand the level above a gradient, which autograd would add to the gradient of that
level's own result: another pass over both.  Here `merge_backward` adds it in the pass that computes it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fpn_kernels.operators import dispatch, plan_cache
from fpn_kernels.operators.lateral_connection import LATERAL_CONNECTION
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.operator import Gradient, Operator
from fpn_kernels.operators.top_down_pathway import gradient, triton
from fpn_kernels.operators.top_down_pathway.call import TopDownPathway


def _level_by_level(call: TopDownPathway, connect: Callable[[int, LateralConnection], Tensor]) -> list[Tensor]:
    """The merged maps, each by `connect` of its level and call."""
    options = (call.mode, call.gain, call.memory_format)
    biases, merged = call.placed(), []
    top: Tensor | None = None
    for level in range(len(call.features) - 1, -1, -1):
        connection = LateralConnection(call.features[level], call.weights[level], biases[level], top, *options)
        top = connect(level, connection)
        merged.append(top)
    return merged[::-1]


def _compose(call: TopDownPathway) -> Callable[[TopDownPathway], list[Tensor]]:
    """One lateral connection after the other.  The first run plans them: the plan of a level depends on its top."""
    plans: dict[int, plan_cache.Plan] = {}

    def first_run(level: int, connection: LateralConnection) -> Tensor:
        plan = LATERAL_CONNECTION.plan(connection)
        if not plan.transient:
            plans[level] = plan
        result: Tensor = plan(connection)
        return result

    def run(call: TopDownPathway) -> list[Tensor]:
        if len(plans) < len(call.features):
            return _level_by_level(call, first_run)
        return _level_by_level(call, lambda level, connection: plans[level](connection))

    return run


def _standard(call: TopDownPathway) -> list[Tensor]:
    return _level_by_level(call, lambda level, connection: LATERAL_CONNECTION.standard(*connection))


TOP_DOWN_PATHWAY = Operator(
    "top_down_pathway(Tensor[] features, Tensor[] weights, Tensor[] biases, int[] bias_levels, *, "
    "str mode='nearest', float gain=1.0, MemoryFormat? memory_format=None) -> Tensor[]",
    TopDownPathway,
    {"triton": triton.TOP_DOWN_PATHWAY},
    standard=_standard,
    gradient=Gradient(gradient.save, gradient.backward),
    cast=4,
    compose=dispatch.Composition("one lateral_connection per level", _compose),
    exported=True,
)
