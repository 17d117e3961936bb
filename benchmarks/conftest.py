"""The pytest side of the suite: its options, the items of a selection, and their records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fpn_kernels
from benchmarks import cases, measure, providers
from benchmarks.clock import keep_pages
from benchmarks.options import add_options

keep_pages()

# Seconds that an item may take; the first rows of the library compile its Triton kernels.
_BUDGET = 60.0
_BUDGETS = {cases.COMPILE: 90.0, cases.MAX_AUTOTUNE: 120.0}
# Few Python installations on a GPU machine have it; without it the rounds run in a plain loop.
try:
    import pytest_benchmark  # noqa: F401
except ImportError:

    @pytest.fixture
    def benchmark() -> None:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fpn_kernels benchmarks")
    add_options(group.addoption)
    group.addoption("--select", default="quick", help="a preset or a part of a GPU run (cases.py)")
    group.addoption("--small", action="store_true", help="maps of a few pixels")
    group.addoption("--seconds", type=float, default=0.4, help="for the rounds of one clock of a row")
    group.addoption("--candidates", default="", metavar="MODULE", help="a module with a list CANDIDATES")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing; unset it")
    if device_of(config).type == "cuda":
        torch.cuda.set_device(device_of(config))


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device: {name!r} is not a device; write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: the suite measures cpu and cuda, not {device.type}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise pytest.UsageError(f"--device: {name} is not here; {torch.cuda.device_count()} CUDA devices are")
    return device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind, values_of in _VALUES.items():
        if kind in metafunc.fixturenames:
            values = list(values_of(metafunc.config))
            metafunc.parametrize(kind, values, ids=[_unit(kind, value)["id"] for value in values])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Attaches the units, which `plugin.py` writes; the second half of the ceilings goes last."""
    found = []
    for item in items:
        assert isinstance(item, pytest.Function)
        kind, value = next(iter(item.callspec.params.items()))
        if isinstance(value, tuple):  # pytest makes an item of an empty list of values, too
            item.user_properties.append(("unit", _unit(kind, value)))
            found.append(item)
    items[:] = sorted(found, key=lambda item: "-after]" in item.nodeid)


def _unit(kind: str, value: tuple[Any, ...]) -> dict[str, Any]:
    """The description of an item, of which its record is an extension."""
    if kind == "ceiling":
        return {"id": "-".join(value).replace(" ", "-"), "kind": kind, "budget": _BUDGET}
    case, provider = value[0], str(value[1])
    name = f"{case.operator} {case.direction} {case} {provider}".replace(" ", "-")
    budget = 300.0 if kind == "launch" else _BUDGETS.get(provider, _BUDGET)
    return {"id": name, "kind": kind, **case.described(), "provider": provider, "budget": budget}


def _selection(config: pytest.Config) -> cases.Selection:
    device_type = device_of(config).type
    return cases.Selection(
        config.getoption("--select"),
        device_type,
        fpn_kernels.available_backends(),
        providers.compiler_missing(device_type) is None,
        config.getoption("--small"),
        *(config.getoption(f"--{name}") for name in ("dtype", "layout", "batch")),
    )


def _launches(config: pytest.Config) -> Values:
    """For compute-sanitizer ("sanitize"), or to compile the Triton kernels of a GPU run ("prepare")."""
    name = config.getoption("--select")
    if name == "sanitize":
        backends = [backend for backend in fpn_kernels.available_backends() if backend != "eager"]
        yield from ((*launch, False) for launch in cases.launches(True, backends))
    if name == "prepare":
        yield from ((*launch, True) for launch in cases.launches(config.getoption("--small"), ["triton"]))


def _candidates(config: pytest.Config) -> Values:
    if config.getoption("--candidates"):
        for candidate in providers.candidates(config.getoption("--candidates")):
            yield from ((case, candidate) for case in candidate.cases)


Values = Iterator[tuple[Any, ...]]
_VALUES: dict[str, Callable[[pytest.Config], Values]] = {
    "ceiling": lambda config: _selection(config).ceilings(),
    "row": lambda config: _selection(config).rows(),
    "launch": _launches,
    "candidate": _candidates,
}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A dictionary that becomes the record of the item."""
    made: dict[str, Any] = {}
    request.node.user_properties.append(("record", made))
    yield made


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return device_of(request.config)


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--seconds"))


@pytest.fixture
def repeat(benchmark: Any) -> measure.Repeat:
    """Runs the rounds by pytest-benchmark, whose own table and options then work, or in a plain loop."""
    if benchmark is None:
        return measure.plain_repeat
    return lambda once, before, rounds: benchmark.pedantic(once, setup=before, rounds=rounds, iterations=1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A row that cannot be measured here is skipped with the reason."""
    outcome = yield
    if outcome.excinfo is not None and isinstance(outcome.excinfo[1], providers.NotMeasuredError):
        outcome.force_exception(pytest.skip.Exception(str(outcome.excinfo[1]), _use_item_location=True))
