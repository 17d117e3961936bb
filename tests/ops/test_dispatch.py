"""Dispatch: the order of backends, forcing, `explain`, and `python -m fpn_kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fpn_kernels
from fpn_kernels import native
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.dispatch import BackendUnavailableError, Implementation
from fpn_kernels.operators.operator import OPERATORS
from fpn_kernels.operators.output_conv import OUTPUT_CONV
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD, eager
from fpn_kernels.operators.upsample_add.call import UpsampleAdd, UpsampleAddBackward

TOP, LATERAL = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 4)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def _forty_two(call: UpsampleAdd) -> Tensor:
    return torch.full_like(call.lateral, 42.0)


def _prefer(monkeypatch: pytest.MonkeyPatch, implementation: Implementation) -> None:
    """Add a backend "fake" of first choice that has `upsample_add`."""
    monkeypatch.setattr(dispatch, "BACKENDS", {"fake": lambda: None, **dispatch.BACKENDS})
    monkeypatch.setitem(UPSAMPLE_ADD.backends, "fake", implementation)


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of first choice that serves `upsample_add` in float32 with a wrong, recognisable result."""

    def refusal(call: UpsampleAdd) -> str | None:
        return None if call.top.dtype == torch.float32 else f"serves float32 only, got {call.top.dtype}"

    _prefer(monkeypatch, Implementation(lambda call: _forty_two, refusal))


def test_eager_is_here_and_last() -> None:
    assert fpn_kernels.available_backends()[-1] == "eager"


@pytest.mark.usefixtures("fake_backend")
def test_the_first_backend_that_does_not_refuse_serves() -> None:
    with dispatch.record_calls() as calls:
        assert float(fpn_kernels.upsample_add(TOP, LATERAL)[0, 0, 0, 0]) == 42
        fpn_kernels.upsample_add(TOP.double(), LATERAL.double())
    assert calls[0] == ("upsample_add", "fake") and calls[1][1] != "fake"


@pytest.mark.usefixtures("fake_backend")
def test_a_forced_backend_that_refuses_raises_with_its_reason() -> None:
    refusal = pytest.raises(ValueError, match="upsample_add: .*fake: serves float32 only, got torch.float64")
    with fpn_kernels.use_backend("fake"), refusal:
        fpn_kernels.upsample_add(TOP.double(), LATERAL.double())


@pytest.mark.usefixtures("fake_backend")
def test_a_forced_backend_leaves_the_operators_it_does_not_have_to_eager() -> None:
    with fpn_kernels.use_backend("fake"):
        with dispatch.record_calls() as calls:
            fpn_kernels.lateral_connection(LATERAL, torch.ones(2, 2))
        explanation = fpn_kernels.explain("lateral_connection", LATERAL, torch.ones(2, 2))
    assert calls == [("lateral_connection", "eager")]
    assert (explanation.backend, explanation.forced) == ("eager", True)
    assert explanation.refusals == {"fake": "has no implementation of lateral_connection"}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"first": torch.channels_last, "second": torch.contiguous_format}, torch.channels_last),
        ({"first": None, "second": torch.channels_last}, torch.channels_last),  # the first serves other devices
        ({"first": torch.preserve_format, "second": torch.channels_last}, torch.preserve_format),  # either layout
        ({"absent": torch.channels_last, "second": torch.contiguous_format}, torch.contiguous_format),
        ({}, torch.preserve_format),
    ],
)
def test_the_fastest_layout_is_that_of_the_backend_that_would_serve(
    answers: dict[str, torch.memory_format | None], expected: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {name: (lambda name=name: "not here" if name == "absent" else None) for name in answers}
    monkeypatch.setattr(dispatch, "BACKENDS", {**reasons, "eager": dispatch.BACKENDS["eager"]})
    ours = {
        name: Implementation(lambda call: _forty_two, fastest_format=lambda kind, dtype, answer=answer: answer)
        for name, answer in answers.items()
    }
    monkeypatch.setattr(OUTPUT_CONV, "backends", {**ours, "eager": OUTPUT_CONV.backends["eager"]})
    assert dispatch.fastest_format(OUTPUT_CONV, "cpu", torch.float32) == expected
    with fpn_kernels.use_backend("eager"):
        assert dispatch.fastest_format(OUTPUT_CONV, "cpu", torch.float32) == torch.preserve_format


@pytest.mark.usefixtures("fake_backend")
def test_use_backend_nests_and_gives_back() -> None:
    with fpn_kernels.use_backend("fake"):
        with fpn_kernels.use_backend("eager"):
            assert fpn_kernels.explain("upsample_add", TOP, LATERAL).backend == "eager"
        assert fpn_kernels.explain("upsample_add", TOP, LATERAL).backend == "fake"
        with fpn_kernels.use_backend(None):
            assert not fpn_kernels.explain("upsample_add", TOP, LATERAL).forced
    assert not fpn_kernels.explain("upsample_add", TOP, LATERAL).forced


def test_an_opt_in_call_is_passed_over_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = Implementation(
        lambda call: _forty_two,
        lambda call: None if call.top.dtype == torch.float32 else "serves float32 only",
        lambda call: "not measured" if call.top is TOP else None,
        optional=True,
    )
    _prefer(monkeypatch, implementation)
    explanation = fpn_kernels.explain("upsample_add", TOP, LATERAL)
    assert explanation.backend != "fake"
    assert explanation.refusals["fake"] == "opt-in: not measured"
    assert fpn_kernels.explain("upsample_add", TOP.clone(), LATERAL).backend == "fake"
    with fpn_kernels.use_backend("fake"):
        assert fpn_kernels.explain("upsample_add", TOP, LATERAL).backend == "fake"
        assert float(fpn_kernels.upsample_add(TOP, LATERAL)[0, 0, 0, 0]) == 42
        # Eager serves what the forced backend refuses, because the implementation is optional.
        refused = fpn_kernels.explain("upsample_add", TOP.double(), LATERAL.double())
        assert (refused.backend, refused.refusals) == ("eager", {"fake": "serves float32 only"})
    # A refusal precedes opt-in, also where the backend is not forced.
    assert fpn_kernels.explain("upsample_add", TOP.double(), LATERAL.double()).refusals["fake"] == "serves float32 only"


def test_use_backend_without_a_block_holds_until_changed() -> None:
    try:
        fpn_kernels.use_backend("eager")
        assert fpn_kernels.explain("upsample_add", TOP, LATERAL).forced
    finally:
        fpn_kernels.use_backend(None)
    assert not fpn_kernels.explain("upsample_add", TOP, LATERAL).forced


def test_the_forced_backend_holds_in_other_threads() -> None:
    """Autograd runs the backward of CUDA tensors in threads of its own."""
    seen: list[bool] = []
    with fpn_kernels.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(fpn_kernels.explain("upsample_add", TOP, LATERAL).forced))
        thread.start()
        thread.join()
    assert seen == [True]


def test_unknown_and_absent_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"name: expected one of \('native', 'triton', 'eager'\), got 'cuda'"):
        fpn_kernels.use_backend("cuda")
    with pytest.raises(TypeError, match="name: expected a backend's name or None, got int"):
        fpn_kernels.use_backend(3)  # type: ignore[arg-type]
    monkeypatch.setitem(dispatch.BACKENDS, "absent", lambda: "no such hardware")
    with pytest.raises(BackendUnavailableError, match="name: backend 'absent' is not available here: no such hardware"):
        fpn_kernels.use_backend("absent")
    assert "absent" not in fpn_kernels.available_backends()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "absent")
    with pytest.raises(ValueError, match="FPN_KERNELS_BACKEND: backend 'absent' is not available here"):
        fpn_kernels.upsample_add(TOP, LATERAL)


@pytest.mark.usefixtures("fake_backend")
def test_the_environment_variable_forces_and_use_backend_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "eager")
    assert fpn_kernels.explain("upsample_add", TOP, LATERAL).backend == "eager"
    with fpn_kernels.use_backend("fake"):
        assert fpn_kernels.explain("upsample_add", TOP, LATERAL).backend == "fake"


@pytest.mark.usefixtures("fake_backend")
def test_explain_names_the_backend_and_the_refusals() -> None:
    with dispatch.record_calls() as calls:
        explanation = fpn_kernels.explain(fpn_kernels.upsample_add, TOP.double(), LATERAL.double(), gain=0.5)
    assert calls == [], "nothing is computed"
    assert explanation.refusals["fake"] == "serves float32 only, got torch.float64"
    assert str(explanation).startswith(
        f"upsample_add: served by {explanation.backend}\n  fake does not: serves float32"
    )


def test_explain_checks_the_call() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        fpn_kernels.explain("upsample_add", TOP, LATERAL, mode="cubic")
    with pytest.raises(TypeError, match="top: expected the dtype of lateral"):
        fpn_kernels.explain("upsample_add", TOP.double(), LATERAL)
    with pytest.raises(TypeError, match="upsample_add: the arguments do not fit its schema"):
        fpn_kernels.explain("upsample_add", TOP)
    with pytest.raises(ValueError, match="operator: expected one of .*'upsample'"):
        fpn_kernels.explain("upsample", TOP, LATERAL)
    assert fpn_kernels.explain("lateral_connection", LATERAL, torch.ones(2, 2)).operator == "lateral_connection"
    # A public function whose arguments are not the operator's own.
    merge = fpn_kernels.explain("weighted_merge", [LATERAL, TOP], torch.ones(2), normalization="softmax")
    assert str(merge) == str(fpn_kernels.explain(fpn_kernels.weighted_merge, [LATERAL, TOP], torch.ones(2)))
    assert merge.operator == "weighted_merge"
    # One that is made of others where no backend has it as a whole.
    pathway = fpn_kernels.explain("top_down_pathway", [LATERAL, TOP], [torch.ones(2, 2)] * 2)
    assert pathway.backend == "composition: one lateral_connection per level"
    assert pathway.refusals["eager"] == "has no implementation of top_down_pathway"
    assert "nothing to launch" in fpn_kernels.explain("upsample_add", TOP[:0], LATERAL[:0]).backend


def test_a_library_that_does_not_load_keeps_its_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setattr(native, "LIBRARY", broken)
    native.load_error.cache_clear()
    try:
        assert "would not load" in str(native.load_error())
        assert "_native.so" in str(native.load_error())
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
        native.load_error.cache_clear()
        assert str(native.load_error()).startswith("the compiled library was not built")
    finally:
        native.load_error.cache_clear()


def test_importing_needs_no_triton_and_compiles_nothing() -> None:
    code = (
        "import sys, builtins\n"
        "sys.modules['triton'] = None\n"  # makes `import triton` raise ImportError
        "import subprocess; subprocess.Popen = None\n"  # no compiler can be started
        "import torch, fpn_kernels\n"
        "assert 'triton' not in [m for m, v in sys.modules.items() if v is not None]\n"
        "print(fpn_kernels.upsample_add(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2)).sum().item())\n"
        "print(fpn_kernels.operators.dispatch.BACKENDS['triton']())\n"
    )
    run = _python(code, TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stderr
    total, reason = run.stdout.splitlines()
    assert float(total) == 8.0
    assert "Triton" in reason or "triton" in reason


def test_importing_does_not_import_triton() -> None:
    run = _python("import sys, fpn_kernels; print('triton' in sys.modules)", TRITON_INTERPRET="0")
    assert run.stdout.strip() == "False", run.stderr


def test_importing_imports_nothing_of_the_compiler() -> None:
    """Symbolic shapes alone take 0.7 s, eight times what all of the library does."""
    code = "import sys, torch; before = set(sys.modules); import fpn_kernels; print(*set(sys.modules) - before)"
    run = _python(code)
    assert run.returncode == 0, run.stderr
    imported = run.stdout.split()
    assert "fpn_kernels" in imported and not {"sympy", "torch._dynamo", "torch._inductor"} & set(imported)


def test_the_operators_are_registered_once() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fpn_kernels::")]
    assert sorted(names) == sorted(set(names)) == sorted(f"fpn_kernels::{name}" for name in OPERATORS)


def test_the_report_names_versions_devices_and_who_serves() -> None:
    run = subprocess.run([sys.executable, "-m", "fpn_kernels"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert f"torch        {torch.__version__}" in run.stdout
    for operator in OPERATORS:
        assert f"{operator}: served by" in run.stdout
    assert "native" in run.stdout and "triton" in run.stdout and "cpu: " in run.stdout


def test_the_report_shows_a_forced_backend_that_refuses() -> None:
    code = "from fpn_kernels import diagnostics; print(diagnostics.report())"
    run = _python(code, FPN_KERNELS_BACKEND="nonsense")
    assert run.returncode == 0, run.stderr
    assert "FPN_KERNELS_BACKEND: expected one of" in run.stdout


def test_explain_names_who_records_the_gradient() -> None:
    top = TOP.clone().requires_grad_()
    explanation = fpn_kernels.explain("upsample_add", top, LATERAL)
    assert explanation.gradient == "one node of this library" and "gradient: one node" in str(explanation)
    assert fpn_kernels.explain("upsample_add", TOP, LATERAL).gradient == ""
    with torch.no_grad():
        assert fpn_kernels.explain("upsample_add", top, LATERAL).gradient == ""


def test_explain_reads_the_kernel_from_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(call: UpsampleAdd) -> object:
        def run(call: UpsampleAdd) -> Tensor:
            raise AssertionError("nothing is computed")

        run.kernel = f"rows of {call.lateral.shape[3]}"  # type: ignore[attr-defined]
        return run

    _prefer(monkeypatch, Implementation(plan))  # type: ignore[arg-type]
    assert fpn_kernels.explain("upsample_add", TOP, LATERAL).kernel == "rows of 4"


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_eager_has_an_adjoint_of_its_own_where_aten_has_none(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that CUDA takes at uneven sizes (ATen's CUDA backward is not exact there), shown on the CPU."""
    for before, after in [((3, 5), (7, 10)), ((30, 2), (58, 141)), ((1, 1), (5, 4)), ((9, 8), (4, 3))]:
        grad = torch.randn(2, 3, *after, dtype=torch.float64)
        call = UpsampleAddBackward(grad, before, mode, 0.7)
        expected = eager.upsample_add_backward(call)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "_aten_adjoint_is_exact", lambda *_: False)
            torch.testing.assert_close(
                eager.upsample_add_backward(UpsampleAddBackward(grad, before, mode, 0.7)), expected
            )
