"""Runs a Gluon kernel of Hopper's on the CPU, for its schedule and its arithmetic: Triton's interpreter has no Gluon.

The kernel's own Python functions are run, with stand-ins for the language in their globals.  Groups of warps are
threads, of which one runs at a time and any may be next at every call into the language.  What is asynchronous on the
chip happens late here, or at a random moment: a bulk copy to shared memory any time before the barrier tells (until
then its target holds NaN), one from shared memory as late as its wait, a product as late as its wait.  Shared memory
and results begin as NaN.  A schedule that reads too early, or fills a buffer too early, gives NaN or wrong numbers, and
one that stands still raises.

Not emulated: layouts, which the compiler checks, and the threads within a group.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch


class DeadlockError(AssertionError):
    """Every group of warps waits, and nothing is under way that could wake one."""


@dataclasses.dataclass
class DType:
    dtype: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        return 8 * self.dtype.itemsize


class Value:
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.type = types.SimpleNamespace(layout=None)

    def _with(self, other: Any, operation: str) -> Value:
        return Value(getattr(self.data, operation)(other.data if isinstance(other, Value) else other))

    def __add__(self, other: Any) -> Value:
        return self._with(other, "__add__")

    def __mul__(self, other: Any) -> Value:
        return self._with(other, "__mul__")

    def __sub__(self, other: Any) -> Value:
        return self._with(other, "__sub__")

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, "__floordiv__")

    def __lt__(self, other: Any) -> Value:
        return self._with(other, "__lt__")

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def to(self, dtype: DType) -> Value:
        return Value(self.data.to(dtype.dtype))

    def reshape(self, shape: Sequence[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: Sequence[int]) -> Value:
        return Value(self.data.permute(order))

    def expand_dims(self, axis: int) -> Value:
        return Value(self.data.unsqueeze(axis))

    def split(self) -> tuple[Value, Value]:
        return Value(self.data[..., 0]), Value(self.data[..., 1])


class Product(Value):
    """A sum to which products are added; those under way are added when they are waited for."""

    def __init__(self, data: torch.Tensor, under_way: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(torch.full_like(data, float("nan")) if under_way else data)
        self.total, self.under_way = data, under_way


class Pointer:
    """The address of a tensor's first element, or of several elements."""

    def __init__(self, memory: torch.Tensor, offsets: Any = 0) -> None:
        # All that lies behind the tensor's first element, of whatever strides it has.
        size = memory.untyped_storage().nbytes() // memory.itemsize - memory.storage_offset()
        self.memory = memory.as_strided((size,), (1,))
        self.offsets = offsets
        self.dtype = types.SimpleNamespace(element_ty=DType(memory.dtype))

    def __add__(self, offsets: Value) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data: torch.Tensor, layout: Any, chip: Chip) -> None:
        self.data, self.layout, self.chip = data, layout, chip
        self.dtype = DType(data.dtype)

    def index(self, index: int) -> Shared:
        return Shared(self.data[index], self.layout, self.chip)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.layout, self.chip)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.layout, self.chip)

    def _reinterpret(self, dtype: DType, shape: Sequence[int], layout: Any) -> Shared:
        assert dtype.dtype == self.data.dtype
        return Shared(self.data.view(-1).view(*shape), layout, self.chip)

    def load(self, layout: Any) -> Value:
        self.chip.turn()
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.chip.turn()
        assert value.data.dtype == self.data.dtype, (value.data.dtype, self.data.dtype)
        self.data.copy_(value.data)
        self.chip.group.unfenced = True


class Barrier:
    """An mbarrier: a phase is over when its arrivals have come, and the bytes that they announced."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, more: int) -> None:
        self.pending -= arrivals
        self.bytes += more
        assert self.pending >= 0 and self.bytes >= 0, "more arrivals, or bytes, than were waited for"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Barriers:
    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, index: int) -> Barrier:
        return self.each[index]


@dataclasses.dataclass
class Descriptor:
    memory: torch.Tensor
    box: Sequence[int]

    def __post_init__(self) -> None:
        size = self.memory.itemsize
        assert self.memory.stride(-1) == 1 and 1 <= self.memory.dim() <= 5
        for stride in self.memory.stride()[:-1]:
            assert stride > 0 and stride * size % 16 == 0, f"TMA wants strides of whole 16 bytes, got {stride}"

    def window(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the map that a box covers, in the map and in the box."""
        assert all(at >= 0 for at in corner)
        ends = [min(at + n, size) for at, n, size in zip(corner, self.box, self.memory.shape, strict=True)]
        in_map = tuple(slice(at, max(at, end)) for at, end in zip(corner, ends, strict=True))
        return in_map, tuple(slice(0, part.stop - part.start) for part in in_map)


class Group:
    """A group of warps: a thread that runs when it is its turn."""

    def __init__(self, name: str, run: Callable[[], None], speed: float = 1.0) -> None:
        self.name, self.run, self.speed = name, run, speed
        self.ready: Callable[[], bool] = lambda: True
        self.done, self.unfenced = False, False
        self.stores: list[Callable[[], None]] = []


class Chip:
    """One multiprocessor with one program at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # How soon copies arrive, and how fast each group is beside the others, differ from chip to chip.
        self.arrival = 10 ** self.random.uniform(-3, 0)
        self.lock = threading.Condition()
        self.groups: list[Group] = []
        self.group = Group("before the groups", lambda: None)
        self.loads: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.program = self.programs = 0
        # What happens when the launch before has ended.
        self.previous_ends: Callable[[], None] = lambda: None

    def _choose(self) -> None:
        """Has a copy that is under way arrive, now and then, and says which group is next."""
        while self.loads and self.random.random() < self.arrival:
            self.loads.pop(self.random.randrange(len(self.loads)))()
        waiting = [group for group in self.groups if not group.done]
        while waiting:
            ready = [group for group in waiting if group.ready()]
            if ready:
                (self.group,) = self.random.choices(ready, [group.speed for group in ready])
                return
            if not self.loads:
                raise DeadlockError(", ".join(group.name for group in waiting))
            self.loads.pop(self.random.randrange(len(self.loads)))()

    def turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Gives the turn away, and returns when it is back and the group may go on."""
        mine = self.group
        mine.ready = ready
        if not self.groups:
            assert ready(), "waits before there are groups"
            return
        self._choose()
        self.lock.notify_all()
        self.lock.wait_for(lambda: self.group is mine or self.error is not None)
        if self.error is not None:
            raise SystemExit
        mine.ready = lambda: True

    def specialize(
        self, groups: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any
    ) -> None:
        assert len(groups) == 1 + len(warps) == 1 + len(registers)
        self.groups = [
            Group(
                f"{function.__name__} {place}",
                lambda f=function, a=arguments: f(*a),  # type: ignore[misc]
                10 ** self.random.uniform(-2, 0),
            )
            for place, (function, arguments) in enumerate(groups)
        ]

        def live(group: Group) -> None:
            with self.lock:
                self.lock.wait_for(lambda: self.group is group or self.error is not None)
                try:
                    if self.error is None:
                        group.run()
                        assert not group.stores, f"{group.name} ends with stores that nobody waited for"
                        group.done = True
                        self._choose()
                except SystemExit:
                    pass
                except BaseException as error:
                    self.error = error
                self.lock.notify_all()

        threads = [threading.Thread(target=live, args=(group,), daemon=True) for group in self.groups]
        with self.lock:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.groups = []
        if self.error is not None:
            raise self.error
        assert not self.loads, "a program ends with copies under way"

    def language(self) -> dict[str, Any]:
        """What the kernel's module imports of Gluon, by the names that it has there."""
        chip = self

        def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
            if layout == "barriers":
                return Barriers(shape[0])
            return Shared(torch.full(shape, float("nan"), dtype=dtype.dtype), layout, chip)

        def load(pointer: Pointer, mask: Value | None = None, other: float = 0.0) -> Value:
            offsets = pointer.offsets.data
            if mask is None:
                assert int(offsets.min()) >= 0, "an address before the map"
                return Value(pointer.memory[offsets.long()])
            inside, offsets = torch.broadcast_tensors(mask.data, offsets)
            values = torch.full(offsets.shape, other, dtype=pointer.memory.dtype)
            values[inside] = pointer.memory[offsets[inside]]
            return Value(values)

        def expect(barrier: Barrier, size: int) -> None:
            chip.turn()
            barrier.change(1, size)

        def arrive(barrier: Barrier, *, count: int) -> None:
            chip.turn()
            barrier.change(count, 0)

        def init(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        def describe(
            base: Pointer, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], layout: Any
        ) -> Descriptor:
            return Descriptor(base.memory.as_strided(tuple(shape), tuple(strides)), box)

        def fetch(source: Descriptor, corner: Sequence[int], barrier: Barrier, target: Shared) -> None:
            chip.turn()
            target.data.fill_(float("nan"))
            in_map, in_box = source.window(corner)

            def arrived() -> None:
                target.data.zero_()
                target.data[in_box] = source.memory[in_map]
                barrier.change(0, -target.data.nbytes)

            chip.loads.append(arrived)

        def write(target: Descriptor, corner: Sequence[int], source: Shared) -> None:
            chip.turn()
            assert not chip.group.unfenced, "stored to shared memory, and not fenced before the bulk copy reads it"
            in_map, in_box = target.window(corner)
            chip.group.stores.append(lambda: target.memory[in_map].copy_(source.data[in_box]))

        def store_wait(pending: int) -> None:
            chip.turn()
            while len(chip.group.stores) > pending:
                chip.group.stores.pop(0)()

        def fence() -> None:
            chip.group.unfenced = False

        def multiply(left: Shared, right: Shared, total: Value, *, is_async: bool) -> Product:
            chip.turn()
            assert is_async
            earlier = total.under_way if isinstance(total, Product) else []
            data = total.total if isinstance(total, Product) else total.data
            return Product(data, [*earlier, (left.data, right.data)])

        def wait(outstanding: int, deps: Sequence[Product]) -> Product:
            chip.turn()
            (product,) = deps
            total, under_way = product.total, list(product.under_way)
            while len(under_way) > outstanding:
                left, right = under_way.pop(0)
                total = total + left.float() @ right.float()
            return Product(total, under_way)

        def previous_has_ended() -> None:
            chip.turn()
            chip.previous_ends()

        gl = types.SimpleNamespace(
            program_id=lambda axis: chip.program,
            num_programs=lambda axis: chip.programs,
            static_range=range,
            arange=lambda first, end, layout: Value(torch.arange(first, end)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype.dtype)),
            load=load,
            minimum=lambda value, most: Value(value.data.clamp(max=most)),
            allocate_shared_memory=allocate,
            warp_specialize=chip.specialize,
            SliceLayout=lambda *_: None,
            NVMMADistributedLayout=lambda **_: None,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_: None),
            float32=DType(torch.float32),
            int32=DType(torch.int32),
            int64=DType(torch.int64),
        )
        return {
            "gl": gl,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=init,
                expect=expect,
                arrive=arrive,
                wait=lambda barrier, parity: chip.turn(lambda: barrier.phase & 1 != parity),
            ),
            "tma": types.SimpleNamespace(
                make_tensor_descriptor=describe,
                async_copy_global_to_shared=fetch,
                async_copy_shared_to_global=write,
                store_wait=store_wait,
            ),
            "fence_async_shared": fence,
            "warpgroup_mma": multiply,
            "warpgroup_mma_wait": wait,
            "gdc_wait": previous_has_ended,
            "gdc_launch_dependents": lambda: None,
        }


def emulate(
    module: types.ModuleType,
    kernel: str,
    grid: int,
    arguments: Sequence[Any],
    *,
    seed: int = 0,
    previous_ends: Callable[[], None] = lambda: None,
) -> None:
    """Runs a kernel of a module, one program after the other.

    Args:
        module: where the kernel is, and all device functions that it calls.
        kernel: its name.
        grid: how many programs.
        arguments: all of them, by position; a tensor stands for its address.
        seed: of the order in which things happen.
        previous_ends: called when a program first waits for the launch before.
    """
    chip = Chip(seed)
    names: dict[str, Any] = {"__builtins__": __builtins__}
    for name, value in vars(module).items():
        if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    names.update(chip.language())
    chip.programs, chip.previous_ends = grid, previous_ends
    for program in range(grid):
        chip.program = program
        names[kernel](*(Pointer(each) if isinstance(each, torch.Tensor) else each for each in arguments))
