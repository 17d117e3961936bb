"""Run a Hopper kernel in Gluon on the CPU: its schedule and its arithmetic.  Triton's interpreter does not run Gluon.

The kernel's own Python functions run, with stand-ins for the language in their globals.  Each group of warps is a
thread.  One thread runs at a time, and at each call into the language any other may be next.  Asynchronous operations
complete late or at a random moment: a bulk copy to shared memory at any time before its barrier completes (until then
its target holds NaN), a bulk copy from shared memory and a product as late as their wait.  Shared memory and results
begin as NaN.  So a schedule that reads or overwrites a buffer too early gives NaN or wrong numbers, and a deadlock
raises.

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
    """All groups of warps wait, and no copy is pending."""


@dataclasses.dataclass
class DType:
    dtype: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        return 8 * self.dtype.itemsize


def _operator(name: str) -> Callable[[Value, Any], Value]:
    def apply(self: Value, other: Any) -> Value:
        return Value(getattr(self.data, name)(other.data if isinstance(other, Value) else other))

    return apply


class Value:
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.type = types.SimpleNamespace(layout=None)

    __add__ = __radd__ = _operator("__add__")
    __mul__ = __rmul__ = _operator("__mul__")
    __sub__, __floordiv__, __lt__ = map(_operator, ("__sub__", "__floordiv__", "__lt__"))

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
    """An accumulator; pending products are added when they are waited for."""

    def __init__(self, data: torch.Tensor, pending: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(torch.full_like(data, float("nan")) if pending else data)
        self.total, self.pending = data, pending


class Pointer:
    """The address of a tensor's first element, or of several elements."""

    def __init__(self, memory: torch.Tensor, offsets: Any = 0) -> None:
        # The memory from the tensor's first element on, whatever its strides.
        size = memory.untyped_storage().nbytes() // memory.itemsize - memory.storage_offset()
        self.memory = memory.as_strided((size,), (1,))
        self.offsets = offsets
        self.dtype = types.SimpleNamespace(element_ty=DType(memory.dtype))

    def __add__(self, offsets: Value) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)


class Shared:
    """A buffer in shared memory, or a part of one."""

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
        self.chip.switch()
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.chip.switch()
        assert value.data.dtype == self.data.dtype, (value.data.dtype, self.data.dtype)
        self.data.copy_(value.data)
        self.chip.group.unfenced = True


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, more: int) -> None:
        self.pending -= arrivals
        self.bytes += more
        assert self.pending >= 0 and self.bytes >= 0, "more arrivals or bytes than expected"
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
            assert stride > 0 and stride * size % 16 == 0, (
                f"TMA needs strides that are multiples of 16 bytes, got {stride} elements"
            )

    def window(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the map that a box covers, as slices of the map and of the box."""
        assert all(at >= 0 for at in corner)
        ends = [min(at + n, size) for at, n, size in zip(corner, self.box, self.memory.shape, strict=True)]
        in_map = tuple(slice(at, max(at, end)) for at, end in zip(corner, ends, strict=True))
        return in_map, tuple(slice(0, part.stop - part.start) for part in in_map)


class Group:
    """A group of warps: a thread that runs when it is chosen."""

    def __init__(self, name: str, run: Callable[[], None], speed: float = 1.0) -> None:
        self.name, self.run, self.speed = name, run, speed
        self.ready: Callable[[], bool] = lambda: True
        self.done, self.unfenced = False, False
        self.stores: list[Callable[[], None]] = []


class Chip:
    """One SM, which runs one program at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # The latency of copies and the relative speed of the groups are random per program.
        self.arrival = 10 ** self.random.uniform(-3, 0)
        self.lock = threading.Condition()
        self.groups: list[Group] = []
        self.group = Group("before the groups", lambda: None)
        self.loads: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.program = self.programs = 0
        # Called when the previous launch has ended.
        self.previous_ends: Callable[[], None] = lambda: None

    def _choose(self) -> None:
        """Complete pending copies at random, and choose the next group."""
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

    def switch(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let another group run; return when this one is chosen again and `ready` holds."""
        mine = self.group
        mine.ready = ready
        if not self.groups:
            assert ready(), "a wait before the groups begin"
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
                lambda f=function, a=arguments: f(*a),
                10 ** self.random.uniform(-2, 0),
            )
            for place, (function, arguments) in enumerate(groups)
        ]

        def run_thread(group: Group) -> None:
            with self.lock:
                self.lock.wait_for(lambda: self.group is group or self.error is not None)
                try:
                    if self.error is None:
                        group.run()
                        assert not group.stores, f"{group.name} ends with stores that it did not wait for"
                        group.done = True
                        self._choose()
                except SystemExit:
                    pass
                except BaseException as error:
                    self.error = error
                self.lock.notify_all()

        threads = [threading.Thread(target=run_thread, args=(group,), daemon=True) for group in self.groups]
        with self.lock:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.groups = []
        if self.error is not None:
            raise self.error
        assert not self.loads, "a program ends with pending copies"

    def language(self) -> dict[str, Any]:
        """The names that a kernel's module imports from Gluon."""
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
            chip.switch()
            barrier.change(1, size)

        def arrive(barrier: Barrier, *, count: int) -> None:
            chip.switch()
            barrier.change(count, 0)

        def init(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        def describe(
            base: Pointer, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], layout: Any
        ) -> Descriptor:
            return Descriptor(base.memory.as_strided(tuple(shape), tuple(strides)), box)

        def fetch(source: Descriptor, corner: Sequence[int], barrier: Barrier, target: Shared) -> None:
            chip.switch()
            target.data.fill_(float("nan"))
            in_map, in_box = source.window(corner)

            def arrived() -> None:
                target.data.zero_()
                target.data[in_box] = source.memory[in_map]
                barrier.change(0, -target.data.nbytes)

            chip.loads.append(arrived)

        def write(target: Descriptor, corner: Sequence[int], source: Shared) -> None:
            chip.switch()
            assert not chip.group.unfenced, "no fence between a store to shared memory and the bulk copy that reads it"
            in_map, in_box = target.window(corner)
            chip.group.stores.append(lambda: target.memory[in_map].copy_(source.data[in_box]))

        def store_wait(pending: int) -> None:
            chip.switch()
            while len(chip.group.stores) > pending:
                chip.group.stores.pop(0)()

        def fence() -> None:
            chip.group.unfenced = False

        def multiply(left: Shared, right: Shared, total: Value, *, is_async: bool) -> Product:
            chip.switch()
            assert is_async
            earlier = total.pending if isinstance(total, Product) else []
            data = total.total if isinstance(total, Product) else total.data
            return Product(data, [*earlier, (left.data, right.data)])

        def wait(outstanding: int, deps: Sequence[Product]) -> Product:
            chip.switch()
            (product,) = deps
            total, pending = product.total, list(product.pending)
            while len(pending) > outstanding:
                left, right = pending.pop(0)
                total = total + left.float() @ right.float()
            return Product(total, pending)

        def previous_has_ended() -> None:
            chip.switch()
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
                wait=lambda barrier, parity: chip.switch(lambda: barrier.phase & 1 != parity),
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
    """Run a kernel, one program after another.

    Args:
        module: the module of the kernel and of all device functions that it calls.
        kernel: the name of the kernel.
        grid: the number of programs.
        arguments: all arguments, by position; a tensor for a pointer.
        seed: the seed of the random order of events.
        previous_ends: called each time a program waits for the previous launch.
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
