"""One parametrisation over backends, and the one place that skips what this machine does not have."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from targets import INTERPRETED, Target, description, parameters

from fpn_kernels.backends import serving, triton

ALL_CASES = os.environ.get("FPN_KERNELS_ALL_CASES") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped elsewhere")
    config.addinivalue_line("markers", "ecosystem: runs other libraries' models; skipped where they are not installed")
    config.addinivalue_line("markers", "interpreter: runs Triton kernels on the CPU, under TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "large: takes 16 GB of memory and a minute; `make test-large` runs these")
    config.addinivalue_line("markers", "nightly: slow, and rarely breaks; `make test-nightly` runs these")
    config.addinivalue_line("markers", "sampled(n): one case in n (2n, interpreted); `make test-nightly` runs all")
    if torch.cuda.is_available():
        # float32 is compared with float64: products in IEEE's. `test_tf32.py` is about the other kind.
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
    # Two test processes on two cores: more threads each would only wait for one another.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    interpreter = "on" if INTERPRETED else "off"
    return [f"torch {torch.__version__}, GPU: {gpu}, Triton interpreter: {interpreter}", description()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_nightly_out(config, items)
    _sample(config, items)
    _skip(items)


def _leave_nightly_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked `nightly`, except in a nightly run or where a test is named on the command line."""
    if ALL_CASES or any("::" in argument for argument in config.args):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=nightly)
    items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test's many cases a part, always the same one: `make test` has fifteen minutes on two cores.

    Each case is drawn by its own name; then the first that has a value which none of those has, so that every value of
    every parameter is met, but of one with more values than the part has cases.
    """
    if ALL_CASES or any("[" in argument for argument in config.args):
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for cases in tests.values() for item in set(cases) - _sample_of(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _sample_of(cases: list[pytest.Item]) -> set[pytest.Item]:
    """Some cases of one test; half as many under the interpreter, which takes a hundred times as long for each."""
    marker = cases[0].get_closest_marker("sampled")
    assert marker is not None
    of = marker.args[0] * (2 if INTERPRETED else 1)
    drawn = [case for case in cases if _drawn(case, of)]
    part = max(len(drawn), -(-len(cases) // of))
    values: dict[str, set[int]] = {}
    for case in cases:
        for name, value in _values(case).items():
            values.setdefault(name, set()).add(value)
    wanted = {(name, value) for name, all_ in values.items() if len(all_) <= part for value in all_}
    wanted -= {pair for case in drawn for pair in _values(case).items()}
    for case in cases:
        if not wanted.isdisjoint(_values(case).items()):
            drawn.append(case)
            wanted -= set(_values(case).items())
    return set(drawn)


def _values(case: pytest.Item) -> dict[str, int]:
    """What tells the values of each parameter apart: not all of them can be compared."""
    params: dict[str, Any] = case.callspec.params  # type: ignore[attr-defined]
    return {name: id(value) for name, value in params.items()}


def _drawn(item: pytest.Item, of: int) -> bool:
    """One in `of`, always the same ones; not by a checksum, whose remainder one parameter alone may decide."""
    digest = hashlib.blake2b(item.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % of == 0


def _skip(items: list[pytest.Item]) -> None:
    """The one place that skips for want of a machine, each time with the reason."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "interpreter": _no_interpreter(),
        "ecosystem": _no_ecosystem(),
        "large": None if os.environ.get("FPN_KERNELS_LARGE") == "1" else "takes 16 GB (`make test-large` runs it)",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_ecosystem() -> str | None:
    return None if importlib.util.find_spec("torchvision") else "needs torchvision (`make test-ecosystem` installs it)"


def _no_interpreter() -> str | None:
    if not INTERPRETED:
        return "needs TRITON_INTERPRET=1 (`make test` has a second run with it)"
    return triton.BACKEND.unavailable()


@pytest.fixture(params=parameters(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend on a device."""
    chosen: Target = request.param
    return chosen


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_prepared() -> None:
    """A test that changes what selection goes by meets no call that another one prepared."""
    serving.forget()


if INTERPRETED and triton.BACKEND.unavailable() is None:
    from triton.runtime import interpreter

    def _call_of_a_function(self: Any, *arguments: Any, **keywords: Any) -> Any:
        """A kernel's call of a `triton.jit` function, which finds the interpreter's operations where a launch put them.

        Triton puts them there once more at each such call: an eighth of the time of the pathway's tests.  But the
        module that its own functions read (`tl.zeros`) is one that a launch leaves out; what is put there stays.
        """
        if interpreter.tl.core.is_builtin(interpreter.tl.core.load):
            interpreter._patch_lang(interpreter.tl.zeros.fn)
        try:
            return self.rewrite()(*arguments, **keywords)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = _call_of_a_function  # type: ignore[method-assign]

    @pytest.fixture(autouse=True)
    def _overflow_checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether the interpreter asks of every sum and product of integers if it overflows: half of all its time.

        In one test of eight, and in all of them where all cases run.  What overflows gives wrong results, too, which
        every test looks for.
        """
        options = interpreter.interpreter_builder.options
        checked = ALL_CASES or _drawn(request.node, 8)
        changed = dataclasses.replace(options, sanitize_overflow=checked)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", changed)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every result starts as NaN, and whatever would not repeat itself raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
