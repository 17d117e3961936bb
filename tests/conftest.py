"""The markers of the tests, the one place that skips tests on this machine, and the fixtures that all tests share."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from targets import INTERPRETED, Target, clear_plans, description, parameters, triton_unavailable

MARKERS = {
    "gpu": "needs an NVIDIA GPU; skipped elsewhere",
    "ecosystem": "runs other libraries' models; skipped where they are not installed",
    "interpreter": "runs Triton kernels on the CPU, under TRITON_INTERPRET=1",
    "large": "takes 16 GB of memory and a minute; `make test-large` runs these",
    "nightly": "slow, and rarely breaks; `make test-nightly` runs these (all tests in tests/nightly/ have it)",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if torch.cuda.is_available():
        # float32 is compared with float64, so its products are IEEE's. `test_tf32.py` covers TF32.
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
    # Two test processes share two cores: more threads would wait for each other.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    interpreter = "on" if INTERPRETED else "off"
    return [f"torch {torch.__version__}, GPU: {gpu}, Triton interpreter: {interpreter}", description()]


def _is_nightly(config: pytest.Config) -> bool:
    """Whether the run selects nightly tests: `-m nightly`, as in `make test-nightly`."""
    return "nightly" in (config.getoption("markexpr") or "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "nightly":
            item.add_marker(pytest.mark.nightly)
    # A test that is named on the command line runs, nightly or not.
    if not _is_nightly(config) and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    _skip(items)


def _skip(items: list[pytest.Item]) -> None:
    """The one place that skips tests for a missing machine or library, each with the reason."""
    no_ecosystem = None if importlib.util.find_spec("torchvision") else "needs torchvision (`make test-ecosystem`)"
    no_interpreter = triton_unavailable() if INTERPRETED else "needs TRITON_INTERPRET=1 (the second run of `make test`)"
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "interpreter": no_interpreter,
        "ecosystem": no_ecosystem,
        "large": None if os.environ.get("FPN_KERNELS_LARGE") == "1" else "takes 16 GB (`make test-large` runs it)",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=parameters(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """A backend on a device."""
    chosen: Target = request.param
    return chosen


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """A test that changes the choice of a backend meets no plan of an earlier test."""
    clear_plans()


if INTERPRETED and triton_unavailable() is None:
    from triton.runtime import interpreter

    def _call_of_a_function(self: Any, *arguments: Any, **keywords: Any) -> Any:
        """A kernel's call of a `triton.jit` function, without patching Triton's language again.

        The launch has patched it already, except for the module of Triton's own functions (`tl.zeros`), which is
        patched here once.  Patching at each call took an eighth of the time of the pathway's tests.
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
        """Only nightly runs check every sum and product of integers for overflow: the checks take half of the time."""
        builder = interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=_is_nightly(request.config))
        monkeypatch.setattr(builder, "options", options)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Each result starts as NaN, and an operation that is not deterministic raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
