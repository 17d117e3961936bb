"""Any convolution, forward and backward, against float64 and against eager: `lateral_connection` and `output_conv`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import oracle
import pytest
import torch
from targets import Target, parameters
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import strategies
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import NCHW, Layout, at_every_level

import fpn_kernels
from fpn_kernels import reference
from fpn_kernels.operators.layouts import requested_format

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A 1x1 convolution that may have a top, or (`kernel_size` 3) an output convolution."""

    kernel_size: int
    batch: int
    cin: int
    cout: int
    top: Size | None
    fine: Size
    has_bias: bool
    flat_weight: bool
    dtype: torch.dtype
    mode: str
    gain: float
    memory_format: torch.memory_format
    layouts: tuple[Layout, Layout, Layout, Layout]  # of the feature, of the top, of the gradient, of the weight
    wanted: tuple[bool, ...]
    seed: int
    scale: float

    def tensors(self, device: str) -> tuple[list[Tensor | None], Tensor]:
        """Feature, weight, bias and top (None where there is none), and the gradient of the result."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(layout: Layout, scale: float, *shape: int) -> Tensor:
            return layout.place(strategies.values(shape, self.dtype, generator, scale).to(device))

        k, of_feature, of_top, of_grad, of_weight = self.kernel_size, *self.layouts
        feature = draw(of_feature, self.scale, self.batch, self.cin, *self.fine)
        weight = draw(of_weight, 1 / (k * self.cin**0.5), self.cout, self.cin, k, k)
        bias = draw(NCHW, self.scale, 1, self.cout, 1, 1).flatten() if self.has_bias else None
        top = None if self.top is None else draw(of_top, self.scale, self.batch, self.cout, *self.top)
        grad = draw(of_grad, self.scale, self.batch, self.cout, *self.fine)
        return [feature, weight.flatten(1) if self.flat_weight else weight, bias, top], grad

    def summands(self, name: str) -> float:
        """How many numbers a gradient adds up; the result has a bound of its own."""
        pixels = self.fine[0] * self.fine[1]
        coarse = 1 if self.top is None else self.top[0] * self.top[1]
        every = self.batch * pixels
        count = {"result": 0, "feature": self.cout * self.kernel_size**2, "top": pixels / coarse}.get(name, every)
        if any(layout.expanded for layout in self.layouts):
            # Numbers that repeat add up in proportion to how many they are, and so do their roundings: n / 2 at most,
            # which is the bound below for so many.
            count = max(count, count**2 / 6)
        return count

    def chain(self, module: object) -> Callable[..., Tensor]:
        """The function of a module (the library, its eager twin, or the oracle), over the tensors above."""
        oracular = module is oracle

        def lateral_connection(*tensors: Tensor | None) -> Tensor:
            if oracular:
                # The indices of the dtype under test, whatever the oracle's own.
                feature, weight, bias, top = tensors
                result = oracle.lateral_connection(feature, weight, bias)
                if top is None:
                    return result
                return self.gain * (result + oracle.resize(top, self.fine, self.mode, self.dtype))
            options = {"mode": self.mode, "gain": self.gain, "memory_format": self.memory_format}
            return module.lateral_connection(*tensors, **options)  # type: ignore[attr-defined]

        def output_conv(*tensors: Tensor | None) -> Tensor:
            options = {} if oracular else {"memory_format": self.memory_format}
            return module.output_conv(*tensors[:3], **options)  # type: ignore[attr-defined]

        return lateral_connection if self.kernel_size == 1 else output_conv


@st.composite
def convolutions(draw: st.DrawFn, kernel_size: int) -> Convolution:
    top, fine = draw(strategies.merged_sizes())
    has_top = kernel_size == 1 and draw(st.integers(0, 3)) > 0
    batch = draw(st.integers(1, 3))
    channels = strategies.counts(48, fine, *[top] * has_top, batch=batch)
    return Convolution(
        kernel_size=kernel_size,
        batch=batch,
        cin=draw(channels),
        cout=draw(channels),
        top=top if has_top else None,
        fine=fine,
        has_bias=draw(st.booleans()),
        flat_weight=kernel_size == 1 and draw(st.booleans()),
        dtype=draw(strategies.dtypes),
        mode=draw(strategies.modes) if has_top else "nearest",
        gain=draw(strategies.gains) if has_top else 1.0,
        memory_format=draw(strategies.formats),
        layouts=draw(st.tuples(*[strategies.layouts] * 4)),
        wanted=draw(strategies.subsets(4)),
        seed=draw(strategies.seeds),
        scale=draw(strategies.scales),
    )


def _gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The result, then one gradient a leaf that asks for one; the others have None."""
    result = run(*leaves)
    required = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    assert result.requires_grad == bool(required)
    found = iter(torch.autograd.grad(result, required, grad) if required else ())
    return [result.detach(), *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)]


def _leaves(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    pairs = zip(tensors, wanted, strict=True)
    return [None if tensor is None else tensor.detach().requires_grad_(wants) for tensor, wants in pairs]


def _squares(case: Convolution, leaves: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The sum of the squares of what each result and gradient adds up: what chance makes of the sum's own size."""
    squares = _leaves([None if x is None else x.detach().double().cpu() ** 2 for x in leaves], [True] * 4)
    return _gradients(dataclasses.replace(case, gain=case.gain**2).chain(oracle), squares, grad.double().cpu() ** 2)


def check(case: Convolution, target: Target) -> None:
    tensors, grad = case.tensors(target.device)
    wanted = [wants and tensor is not None for wants, tensor in zip(case.wanted, tensors, strict=True)]
    before = [None if tensor is None else tensor.clone() for tensor in (*tensors, grad)]
    leaves = _leaves(tensors, wanted)
    results = at_every_level(target, lambda: _gradients(case.chain(fpn_kernels), leaves, grad))

    eager = _gradients(case.chain(reference), leaves, grad)
    wide = _leaves([None if x is None else x.detach().double().cpu() for x in leaves], wanted)
    exact = _gradients(case.chain(oracle), wide, grad.double().cpu())
    squares = _squares(case, leaves, grad)
    largest = torch.finfo(case.dtype).max / 2
    assume(all(x is None or float(x.abs().max()) < largest for x in exact))  # sums of numbers that repeat may overflow
    feature = tensors[0]
    assert feature is not None
    memory_format = requested_format(feature, case.memory_format)
    for level in results:
        assert level[0] is not None and level[0].is_contiguous(memory_format=memory_format)
        for name, ours, theirs, true, square in zip(NAMES, level, eager, exact, squares, strict=True):
            assert (ours is None) == (true is None), name
            if ours is None:
                continue
            assert true is not None and theirs is not None and square is not None
            assert ours.dtype == case.dtype and ours.shape == true.shape, name
            no_worse_than_eager(name, ours, theirs, true, square, case.summands(name))
    for tensor, was in zip((*tensors, grad), before, strict=True):
        assert tensor is None or torch.equal(tensor, was), "an input was written to"


NAMES = ("result", "feature", "weight", "bias", "top")
# Beside the roundings that `oracle.py` has: in few numbers the one that eager is lucky with shows.
_DUE = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 16}


def no_worse_than_eager(
    name: str, result: Tensor, eager: Tensor, exact: Tensor, squares: Tensor, summands: float
) -> None:
    """`oracle.no_worse_than_eager` where a sum of a few numbers may cancel: an error is that of its terms.

    Partial sums of n random terms, one after another, grow as the root of how many there are so far; each is rounded,
    by a third of the unit roundoff squared on average.  Together that is sqrt(n / 6) roundings of the sum's own size;
    where the results are few, three times as many are not rare.
    """
    assert torch.isfinite(result).all(), name
    error, allowed = ((x.double().cpu() - exact).norm() for x in (result, eager))
    size = torch.maximum(exact.norm(), squares.clamp(min=0).sum().sqrt())
    roundings = _DUE[result.dtype]
    if result.dtype in (torch.float32, torch.float64):
        roundings = max(roundings, 3 * (summands / 6) ** 0.5)
    due = roundings * oracle.rounding(result.dtype) * size
    # Below the smallest normal number the spacing no longer shrinks with the value.
    due = due + torch.finfo(result.dtype).smallest_normal * oracle.rounding(result.dtype) * result.numel() ** 0.5
    assert float(error) <= max(1.1 * float(allowed), float(due)), (name, error / size, allowed / size)


@pytest.mark.parametrize("target", parameters("lateral_connection"), ids=str)
@given(case=convolutions(kernel_size=1))
def test_lateral_connection(target: Target, case: Convolution) -> None:
    assume(case.dtype in target.dtypes())
    check(case, target)


@pytest.mark.parametrize("target", parameters("output_conv"), ids=str)
@given(case=convolutions(kernel_size=3))
def test_output_conv(target: Target, case: Convolution) -> None:
    target.require_operator("output_conv")
    assume(case.dtype in target.dtypes())
    check(case, target)
