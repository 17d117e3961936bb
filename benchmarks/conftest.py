"""pytest's side of the suite: options, the cases of each file, the machine's description.

Read only where `benchmarks` is among the paths that pytest is given, so that the options exist nowhere else.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fpn_kernels
from benchmarks import allocator, cases, machine, providers
from benchmarks.harness import Harness
from benchmarks.options import add_options
from benchmarks.report import format_seconds
from fpn_kernels import compatibility

BEFORE, AFTER = "before", "after"
_STARTED = pytest.StashKey[tuple[float, float | None]]()
_PROGRESS = pytest.StashKey["Progress"]()
ALLOCATOR = allocator.keep_pages()


class Progress:
    """How long the rows still to come will take, if they take as long as those before."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._done: set[str] = set()
        self._began = time.monotonic()

    def left(self, row: str) -> str:
        """For the line of a row that is done; nothing after the last one."""
        self._done.add(row)
        seconds = (time.monotonic() - self._began) / len(self._done) * (self._rows - len(self._done))
        return f", about {format_seconds(seconds)} left" if seconds else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("fpn_kernels benchmarks").addoption)


def _preset(config: pytest.Config) -> str:
    return next((name for name in ("tiny", "full") if config.getoption(f"--{name}")), "quick")


def _device(config: pytest.Config) -> torch.device:
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


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing; unset it")
    device = _device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config.stash[_STARTED] = (time.monotonic(), _stalled_seconds())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    preset, device = _preset(config), _device(config)
    asked = (config.getoption(f"--{name}") for name in ("dtype", "layout", "batch"))
    selection = cases.select(preset, device.type, *asked)
    if "moment" in metafunc.fixturenames:
        metafunc.parametrize("moment", (BEFORE, AFTER))
    if "ceiling_dtype" in metafunc.fixturenames:
        metafunc.parametrize("ceiling_dtype", selection.dtypes)
    if "case" in metafunc.fixturenames:
        available = fpn_kernels.available_backends()
        # The providers of one case run back to back: a ratio then compares the same minute of the machine.
        rows = [
            pytest.param(case, provider, id=f"{case.direction} {case} {provider}".replace(" ", "-"))
            for case in selection.cases(metafunc.module.OPERATOR)
            for provider in providers.providers(device.type, preset, available, selection.compiled(case))
        ]
        metafunc.parametrize(("case", "provider"), rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Half of the ceilings go last: the best of two moments is less at the mercy of what else the machine did."""

    def goes_last(item: pytest.Item) -> bool:
        return isinstance(item, pytest.Function) and hasattr(item, "callspec") and _moment(item) == AFTER

    items.sort(key=goes_last)  # stable: everything else stays in its order


def _moment(item: pytest.Function) -> Any:
    return item.callspec.params.get("moment")


@pytest.fixture
def harness(benchmark: Any, request: pytest.FixtureRequest) -> Harness:
    config = request.config
    properties = request.node.user_properties
    return Harness(
        benchmark=benchmark,
        device=_device(config),
        seconds=float(config.getoption("benchmark_max_time")),
        min_rounds=config.getoption("benchmark_min_rounds"),
        tiny=_preset(config) == "tiny",
        announce=lambda median: properties.append(("median", median)),  # for the progress line
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[_PROGRESS] = Progress(len(session.items))


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """The progress line ends in the row's time and what is left of the run rather than in PASSED."""
    progress = config.stash.get(_PROGRESS, None)
    median = dict(report.user_properties).get("median")
    if report.when != "call" or not report.passed or not isinstance(median, float):
        return None
    return "passed", ".", f"{format_seconds(median)}{'' if progress is None else progress.left(report.nodeid)}"


def pytest_report_header(config: pytest.Config) -> str:
    return f"benchmarks: {_preset(config)} selection on {_device(config)}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = _device(config)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif isinstance(machine_info.get("cpu"), dict):
        name = machine_info["cpu"].get("brand_raw", name)
    machine_info["fpn_kernels"] = {
        "version": fpn_kernels.__version__,
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "capability": machine.capability(device),
        "backends": list(fpn_kernels.available_backends()),
        "forced_backend": os.environ.get("FPN_KERNELS_BACKEND"),
        "selection": _preset(config),
        "allocator": ALLOCATOR,
        "tf32": compatibility.tf32_is_allowed(),
        "contention": _contention(config),
    }


def _stalled_seconds() -> float | None:
    """Seconds since boot in which something that wanted a CPU had none; None where the kernel does not count them."""
    try:
        text = Path("/proc/pressure/cpu").read_text()
        return int(text.splitlines()[0].rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None


def _contention(config: pytest.Config) -> float | None:
    """The share of the run in which the CPUs were wanted by more than they could serve."""
    begin, stalled_before = config.stash[_STARTED]
    stalled = _stalled_seconds()
    if stalled is None or stalled_before is None:
        return None
    return (stalled - stalled_before) / (time.monotonic() - begin)
