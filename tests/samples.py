"""Shapes and layouts of the operator tests, and the types of the table in `operators.py`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ("nchw", "nhwc", "sliced", "sliced-nhwc", "permuted", "expanded", "misaligned")
NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = {"preserve": torch.preserve_format, "nchw": NCHW, "nhwc": NHWC}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A merge: batch, channels, the size of the coarser map and of the finer one."""

    batch: int
    channels: int
    top: tuple[int, int]
    fine: tuple[int, int]
    why: str

    def __str__(self) -> str:
        h, w = self.top
        height, width = self.fine
        return f"{self.batch}x{self.channels}-{h}x{w}-to-{height}x{width}"


MERGES = [
    Sizes(2, 16, (4, 6), (8, 12), "whole ratio 2, the fast path of every kernel"),
    Sizes(1, 256, (5, 4), (10, 8), "the width of the paper"),
    Sizes(1, 257, (3, 4), (6, 8), "a tail of one channel after whole vectors"),
    Sizes(1, 5, (19, 29), (38, 57), "C5 to C4 of a 600 x 900 image: even rows, odd columns"),
    Sizes(1, 10, (38, 57), (75, 113), "C4 to C3 of a 600 x 900 image: uneven float32 indices"),
    Sizes(2, 1, (1, 1), (7, 9), "a 1 x 1 top over one channel"),
    Sizes(1, 3, (30, 98), (58, 194), "sizes where the float32 index is not the rational one"),
    Sizes(1, 4, (116, 2), (230, 141), "more such sizes, nearest-exact included"),
    Sizes(1, 6, (3, 5), (10, 8), "ratios that are not whole"),
    Sizes(2, 7, (9, 8), (4, 3), "a top larger than the lateral: the resize shrinks"),
    Sizes(1, 2, (5, 3), (5, 3), "equal sizes: the resize is the identity"),
    Sizes(3, 8, (1, 8), (2, 24), "a whole ratio of 3 along one axis"),
]


def random_map(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", layout: str = "nchw") -> Tensor:
    """Fresh random values of a shape, in one of `LAYOUTS`."""
    n, c, h, w = shape

    def values(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).to(device=device, dtype=dtype)

    if layout == "nhwc":
        return values(n, c, h, w).contiguous(memory_format=NHWC)
    if layout == "sliced":
        return values(n, c + 2, h + 3, 2 * w)[:, 1 : c + 1, 2 : h + 2, ::2]
    if layout == "sliced-nhwc":
        whole = values(n, c + 3, h + 1, w + 2).contiguous(memory_format=NHWC)
        return whole[:, 1 : c + 1, 1:, 1 : w + 1]
    if layout == "permuted":
        return values(w, n, h, c).permute(1, 3, 2, 0)
    if layout == "expanded":
        return values(1, c, 1, w).expand(n, c, h, w)
    if layout == "misaligned":
        return values(n * c * h * w + 1)[1:].view(n, c, h, w)
    assert layout == "nchw", layout
    return values(n, c, h, w)


class Make:
    """Makes the tensors of a sample: the maps in the given layouts in turn, of a third of the sides, or of batch 0."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *layouts: str,
        empty: bool = False,
        tiny: bool = False,
    ) -> None:
        self.dtype, self.device, self.empty, self.tiny = dtype, device, empty, tiny
        self.layouts = itertools.cycle(layouts or ("nchw",))

    def map(self, n: int, c: int, h: int, w: int) -> Tensor:
        if self.tiny:
            h, w = (h + 2) // 3, (w + 2) // 3
        return random_map((0 if self.empty else n, c, h, w), self.dtype, self.device, next(self.layouts))

    def weight(self, cout: int, cin: int, k: int = 1) -> Tensor:
        return random_map((cout, cin, k, k), self.dtype, self.device) / (k * cin**0.5)

    def bias(self, count: int) -> Tensor:
        return random_map((1, count, 1, 1), self.dtype, self.device).flatten()

    def factors(self, *values: float) -> Tensor:
        """Fusion weights, in the dtype in which maps of this dtype are summed."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.tensor(values, dtype=torch.float64).to(self.device, dtype)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an operator and the reason for it."""

    why: str
    arguments: Callable[[Make], tuple[Any, ...]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    # A call that Triton leaves to eager.
    not_triton: bool = False


@dataclasses.dataclass(frozen=True)
class Bad:
    """A change to the arguments of the first sample, and the error that it raises."""

    change: Callable[..., Sequence[Any]]
    error: type[Exception]
    message: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def as_they_are(*arguments: Any) -> tuple[Any, ...]:
    return arguments


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator and all that the contract tests need to know about it."""

    name: str
    call: Callable[..., Any]
    eager: Callable[..., Any]
    exact: Callable[..., Any]
    samples: tuple[Sample, ...]
    bad: dict[str, Bad]
    # The maps that the results are laid out like.
    like: Callable[..., Sequence[Tensor]]
    # The arguments of `torch.ops.fpn_kernels.<name>`, from those of the public function.
    arguments: Callable[..., tuple[Any, ...]] = as_they_are
    # The names under which a backend may compute the call.
    served_as: tuple[str, ...] = ()
    # Called by users: autocast, export and transforms apply.
    public: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.fpn_kernels, self.name).default


def of_tensors(function: Callable[..., Any], arguments: Any, options: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """The function as one of the tensors among its arguments alone, with a list of tensors as the result."""
    leaves, spec = pytree.tree_flatten(arguments)

    def call(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = function(*pytree.tree_unflatten(filled, spec), **options)
        return [result] if isinstance(result, Tensor) else list(result)

    return call


def tensors_of(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
