"""What is measured, in the order of what it is worth: a run that ends early has measured the first of these.

Needs no torch: the process that reads this must outlive whatever torch does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import (
    CHAINED,
    COMPILE,
    EVEN,
    FORWARD,
    LIBRARY,
    MAX_AUTOTUNE,
    TINY,
    TOP_DOWN,
    TRAINING,
    Case,
    Spot,
)

Unit = dict[str, Any]

# Operator, direction, level; None is all levels: three merges, four lateral connections, four output convolutions.
_SPOTS: tuple[tuple[str, str, int | None], ...] = (
    ("upsample_add", FORWARD, 2),
    ("lateral_connection", FORWARD, 2),
    ("top_down_pathway", FORWARD, None),
    ("neck", FORWARD, None),
    ("neck", TRAINING, None),
    ("output_conv", FORWARD, 2),
    ("upsample_add", FORWARD, None),
    ("lateral_connection", FORWARD, None),
    ("output_conv", FORWARD, None),
    ("upsample_add", TRAINING, 2),
    ("lateral_connection", TRAINING, 2),
    ("weighted_merge", FORWARD, 3),
    ("weighted_merge", TRAINING, 3),
)

# Autotuning takes minutes. The rows without a convolution come first: they are cheap. Then those with one lead to the
# neck, which finds their choices in Inductor's cache; a training step tunes the backward's products as well.
_TUNED: tuple[tuple[str, str, int | None, int], ...] = (
    ("upsample_add", FORWARD, 2, 1),
    ("upsample_add", FORWARD, None, 8),
    ("lateral_connection", FORWARD, 2, 1),
    ("top_down_pathway", FORWARD, None, 1),
    ("output_conv", FORWARD, 2, 1),
    ("neck", FORWARD, None, 1),
    ("output_conv", FORWARD, None, 1),
    ("top_down_pathway", FORWARD, None, 8),
    ("lateral_connection", FORWARD, None, 8),
    ("output_conv", FORWARD, 2, 8),
    ("neck", FORWARD, None, 8),
    ("neck", TRAINING, None, 1),
    ("neck", TRAINING, None, 8),
)

_HEADLINE = (("bf16", "NHWC"),)
_OTHERS = (("bf16", "NCHW"), ("fp16", "NHWC"), ("fp32", "NHWC"), ("fp32", "NCHW"), ("fp16", "NCHW"))

# Seconds that one unit may take; the first of the library's compiles its Triton kernels.
_BUDGET = {COMPILE: 60.0, MAX_AUTOTUNE: 90.0}
_BUDGET_OF_ANY_OTHER = 40.0


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        tiny: maps of a few pixels, batch 1, one dtype: a walk through the steps that measures nothing worth keeping.
        providers: their names, as `benchmarks.providers` gives them for this machine.
    """

    tiny: bool = False
    providers: tuple[str, ...] = (COMPILE, LIBRARY)

    @property
    def forced(self) -> list[str]:
        """The library with a backend named, where it has more than one to choose from."""
        return [name for name in self.providers if name.startswith(f"{LIBRARY}/")]

    def headline(self) -> list[Unit]:
        """bf16 NHWC, batch 1 and 8: the library everywhere first, then each backend, then torch.compile.

        The neck also with the pathway chained and all else as the library chooses: forced, Triton has the output
        convolutions too.
        """
        rows = list(self._rows(_HEADLINE))
        compiled = rows[:2] if self.tiny else rows
        own = [unit for row in rows for unit in self._with([row], self._own(row))]
        return [*own, *self._with(compiled, self._compile)]

    def _own(self, case: Case) -> list[str]:
        """The library's providers of a headline row."""
        chained = case.operator == "neck" and f"{LIBRARY}/triton" in self.providers
        return [LIBRARY, *self.forced, *([CHAINED] if chained else [])]

    def max_autotune(self) -> list[Unit]:
        """The headline rows that have a target against it."""
        if not self._compile:
            return []
        cases = [self._case(*spot, "bf16", "NHWC") for spot in (_TUNED[:1] if self.tiny else _TUNED)]
        return list(self._with(cases, [MAX_AUTOTUNE]))

    def others(self) -> list[Unit]:
        """The other layouts and dtypes: the library first, then each backend, then torch.compile."""
        rows = list(self._rows(_OTHERS[3:4] if self.tiny else _OTHERS))
        units = self._with(rows, [LIBRARY])
        return [*units, *self._with(rows, self.forced), *(() if self.tiny else self._with(rows, self._compile))]

    @property
    def _compile(self) -> list[str]:
        return [COMPILE] if COMPILE in self.providers else []

    def _rows(self, formats: Sequence[tuple[str, str]]) -> Iterator[Case]:
        for dtype, layout in formats:
            for batch in (1,) if self.tiny else (1, 8):
                for operator, direction, level in _SPOTS:
                    yield self._case(operator, direction, level, batch, dtype, layout)

    def _case(self, operator: str, direction: str, level: int | None, batch: int, dtype: str, layout: str) -> Case:
        return Case(operator, direction, _spot(operator, self.tiny, level), batch, dtype, layout)

    def _with(self, cases: Sequence[Case], names: Sequence[str]) -> Iterator[Unit]:
        """The providers of one case follow one another: what they are compared by is measured in the same minute."""
        for case in cases:
            for name in names:
                yield _unit(case, name)


def _spot(operator: str, tiny: bool, level: int | None) -> Spot:
    """Of a BiFPN's nodes the one that merges a coarser map."""
    return Spot(TINY if tiny else EVEN, level, node=TOP_DOWN if operator == "weighted_merge" else None)


def _unit(case: Case, provider: str) -> Unit:
    return {
        "id": f"{case.operator} {case.direction} {case} {provider}",
        "kind": "row",
        "budget": _BUDGET.get(provider, _BUDGET_OF_ANY_OTHER),
        "operator": case.operator,
        "direction": case.direction,
        "case": str(case),
        "level": case.spot.level,
        "batch": case.batch,
        "dtype": case.dtype,
        "layout": case.layout,
        "tiny": case.spot.image is TINY,
        "provider": provider,
    }


def case_of(unit: Unit) -> Case:
    """The case that a unit of kind "row" measures."""
    spot = _spot(unit["operator"], unit["tiny"], unit["level"])
    return Case(unit["operator"], unit["direction"], spot, unit["batch"], unit["dtype"], unit["layout"])


def candidates(tiny: bool) -> list[Unit]:
    """Every level of the operators that have tables of configurations, as Triton alone would serve them."""
    formats = (("bf16", "NHWC"),) if tiny else (("bf16", "NHWC"), ("bf16", "NCHW"), ("fp32", "NHWC"))
    cases = [
        Case(operator, FORWARD, _spot(operator, tiny, None), batch, dtype, layout)
        for dtype, layout in formats
        for batch in ((1,) if tiny else (1, 8))
        for operator in ("lateral_connection", "output_conv", "upsample_add")
        # The kernel of the 3x3 reads NHWC maps alone.
        if (operator, layout) != ("output_conv", "NCHW")
    ]
    units = [_unit(case, f"{LIBRARY}/triton") for case in cases]
    return [{**unit, "id": f"candidates {unit['id']}", "kind": "candidates", "budget": 60.0} for unit in units]


def ceilings(tiny: bool) -> list[Unit]:
    """The copy, and the products in each dtype."""
    common = {"budget": 30.0, "tiny": tiny}
    units: list[Unit] = [{"id": "ceiling copy", "kind": "ceiling", "measures": "copy", **common}]
    for dtype in ("bf16",) if tiny else ("bf16", "fp16", "fp32"):
        for measures in ("matrix product", "3x3 convolution"):
            name = f"ceiling {measures} {dtype}"
            units.append({"id": name, "kind": "ceiling", "measures": measures, "dtype": dtype, **common})
    return units


SMOKE_OPERATORS = (
    *("upsample_add", "lateral_connection", "output_conv", "output_conv_levels"),
    *("top_down_pathway", "weighted_merge", "neck"),
)


def smoke(tiny: bool, backends: Sequence[str]) -> list[Unit]:
    """Each operator, forward and backward, against float64: as the library serves it, then backend by backend."""
    return [
        {
            "id": f"smoke {operator} {dtype} {layout} {backend or 'as served'}",
            "kind": "smoke",
            "budget": 30.0,
            "tiny": tiny,
            "operator": operator,
            "dtype": dtype,
            "layout": layout,
            "backend": backend,
        }
        for backend in (None, *backends)
        for dtype, layout in (("bf16", "NHWC"), ("fp16", "NCHW"), ("fp32", "NHWC"))
        for operator in SMOKE_OPERATORS
    ]


def sample(backends: Sequence[str]) -> list[Unit]:
    """A few launches of every kernel on small maps, for the sanitizer, which slows each of them a hundredfold."""
    return [
        {
            "id": f"sample {operator} {dtype} {layout} {backend}",
            "kind": "sample",
            "budget": 600.0,
            "tiny": True,
            "operator": operator,
            "dtype": dtype,
            "layout": layout,
            "backend": backend,
        }
        for backend in backends
        for dtype, layout in (("bf16", "NHWC"), ("fp32", "NCHW"))
        for operator in (
            "upsample_add",
            "lateral_connection",
            "weighted_merge",
            "top_down_pathway",
            "output_conv_levels",
        )
    ]
