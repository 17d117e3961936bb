"""What the property tests draw: sizes, layouts in memory, dtypes, options, and which gradients are wanted.

Two profiles: ``default``, the same examples in each run, so that a failure in CI is one everywhere; and ``nightly``
(``make test-nightly``), many more and other ones each time, whose failures hypothesis keeps in ``.hypothesis``.

Hypothesis draws the shape of a case; the values come from a seed, as drawing each number would take seconds.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from levels import here, limited
from targets import INTERPRETED, Target
from torch import Tensor

import fpn_kernels
from fpn_kernels.resampling import MODES

_COMMON = settings(
    deadline=None,
    # A fixture that is made once for all examples of a test holds no state of theirs.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
    # Without `explain`, which would run a failing case some hundred times more.
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
settings.register_profile("default", _COMMON, max_examples=25, derandomize=True, database=None)
settings.register_profile("nightly", _COMMON, max_examples=400, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "default")

# Under Triton's interpreter, which takes a millisecond an instruction, fewer and smaller cases.
ELEMENTS = 400 if INTERPRETED else 12_000
if INTERPRETED:
    _fewer = settings(max_examples=max(1, settings().max_examples // 8))
    settings.register_profile("interpreter", _fewer)
    settings.load_profile("interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, *(() if INTERPRETED else (torch.float64,)))

dtypes = st.sampled_from(DTYPES)
modes = st.sampled_from(MODES)
gains = st.sampled_from((1.0, 0.5, 0.7, -1.25))
seeds = st.integers(0, 2**31)
# Powers of two: what is exact at one scale is at another.
scales = st.sampled_from((1.0, 2.0**-6, 8.0))
formats = st.sampled_from((torch.preserve_format, torch.contiguous_format, torch.channels_last))

# Mostly short; the others are around the widths of vectors and of the kernels' blocks.
_WIDE = (31, 32, 33) if INTERPRETED else (31, 32, 33, 63, 64, 65, 100, 129)
sides = st.one_of(st.integers(1, 20), st.sampled_from(_WIDE))
sizes = st.tuples(sides, sides)


@st.composite
def side_pairs(draw: st.DrawFn) -> tuple[int, int]:
    """A coarse side and a fine one: any two, or those that strides of 2 and odd images give."""
    fine = draw(sides)
    coarse = draw(st.one_of(sides, st.sampled_from(((fine + 1) // 2, max(1, fine // 2), fine))))
    return coarse, fine


@st.composite
def merged_sizes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of a coarse map and of the fine one that it is merged with."""
    rows, columns = draw(side_pairs()), draw(side_pairs())
    return (rows[0], columns[0]), (rows[1], columns[1])


def counts(most: int, *sizes: tuple[int, int], batch: int = 1) -> st.SearchStrategy[int]:
    """A number of channels, so small that no map is larger than the tests can afford."""
    pixels = batch * max(height * width for height, width in sizes)
    return st.integers(1, max(1, min(most, ELEMENTS // pixels)))


# ---------------------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the numbers of a 4-D map lie; around and between them are NaNs, which no result may have read."""

    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    steps: tuple[int, int, int, int] = (1, 1, 1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    expanded: tuple[int, ...] = ()
    offset: int = 0
    # The stride of dimensions of one, which says nothing and may be anything; None leaves it.
    unit_stride: int | None = None

    def place(self, values: Tensor) -> Tensor:
        """The values (of the first index only, along an expanded dimension) in this layout."""
        shape = list(values.shape)
        for dim in self.expanded:
            values = values.narrow(dim, 0, 1)
        sides = list(zip(values.shape, self.steps, self.margins, strict=True))
        room = [size * step + 2 * margin for size, step, margin in sides]
        in_memory = [room[dim] for dim in self.order]
        storage = torch.full((self.offset + math.prod(in_memory),), math.nan, dtype=values.dtype, device=values.device)
        view = storage[self.offset :].view(in_memory).permute([self.order.index(dim) for dim in range(4)])
        view = view[tuple(slice(margin, margin + size * step, step) for size, step, margin in sides)]
        view.copy_(values)
        view = view.expand(shape)
        if self.unit_stride is None:
            return view
        strides = [self.unit_stride if size == 1 else stride for size, stride in zip(shape, view.stride(), strict=True)]
        return view.as_strided(shape, strides)


NCHW, NHWC = Layout(), Layout(order=(0, 2, 3, 1))


@st.composite
def _any_layouts(draw: st.DrawFn) -> Layout:
    four = st.tuples(*[st.sampled_from((1, 1, 2, 3))] * 4)
    none_or_some = st.tuples(*[st.sampled_from((0, 0, 1, 2))] * 4)
    return Layout(
        order=draw(st.sampled_from(((0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (3, 0, 2, 1), (2, 3, 1, 0)))),
        steps=draw(st.one_of(st.just((1, 1, 1, 1)), four)),
        margins=draw(none_or_some),
        expanded=tuple(draw(st.sets(st.integers(0, 3), max_size=2))) if draw(st.booleans()) else (),
        offset=draw(st.integers(0, 9)),
        unit_stride=draw(st.sampled_from((None, None, 0, 1, 7))),
    )


layouts = st.one_of(st.sampled_from((NCHW, NHWC)), _any_layouts())


def values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)


def subsets(count: int) -> st.SearchStrategy[tuple[bool, ...]]:
    """Which of so many tensors want a gradient: all of them more often than chance has it."""
    return st.one_of(st.just((True,) * count), st.tuples(*[st.booleans()] * count))


# --------------------------------------------------------------------------------------------------- backends


def at_every_level(target: Target, compute: Callable[[], list[Tensor | None]]) -> list[list[Tensor | None]]:
    """What the backend computes; on the CPU, the compiled library with every kind of instructions that it has."""
    with fpn_kernels.use_backend(target.backend):
        if (target.backend, target.device) != ("native", "cpu"):
            return [compute()]
        results = []
        for level in reversed(here()):
            with limited(level):
                results.append(compute())
        return results


def strides_when_traced(operator: Callable[..., Tensor], *arguments: object, **options: object) -> tuple[int, ...]:
    """The strides that the operator's fake implementation promises for arguments laid out as these."""

    def fake(argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")

    return operator(*map(fake, arguments), **options).stride()
