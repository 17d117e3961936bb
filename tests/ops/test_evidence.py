"""The evidence in an `Explanation`: its figures equal those of the stored runs, and no call claims another's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fpn_kernels
from benchmarks import records
from fpn_kernels import native
from fpn_kernels.gpu import availability
from fpn_kernels.operators import dispatch, evidence
from fpn_kernels.operators.dispatch import Implementation
from fpn_kernels.operators.lateral_connection import LATERAL_CONNECTION, eager
from fpn_kernels.operators.lateral_connection.call import LateralConnection
from fpn_kernels.operators.upsample_add import UPSAMPLE_ADD
from fpn_kernels.operators.upsample_add.call import UpsampleAdd

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
CPU_ROWS = {
    "AVX512": ("cpu-xeon-amx-2026-11-21.json", "fp32"),
    "AMX": ("cpu-xeon-amx-2026-11-21.json", "bf16"),
    "AVX2": ("cpu-epyc-avx2-2026-11-28.json", "fp32"),
}
HOPPER, AMPERE = 94, 95


def _row(name: str) -> tuple[str, str]:
    return evidence.ROWS.get(name, (name, "forward"))


def _range(ratios: list[float]) -> tuple[float, float]:
    return round(min(ratios), 2), round(max(ratios), 2)


def test_the_gpu_figures_are_those_of_the_run() -> None:
    (path,) = RESULTS.glob("nvidia-h100-*.json")
    run = json.loads(path.read_text())
    assert run["date"][:10] in evidence.GPU_RUN
    for (backend, name), by_layout in evidence.GPU.items():
        operator = "lateral_connection" if name == "product" else name
        rows = [
            row
            for row in run["rows"]
            if row["status"] == "ok"
            and row["provider"].startswith("fpn_kernels")
            and (row["operator"], row["direction"]) == _row(name)
            and row["served_by"].get(operator) == backend
        ]
        assert {row["dtype"] for row in rows} == {"bf16"} and {row["layout"] for row in rows} == set(by_layout)
        for layout, figures in by_layout.items():
            ratios = [row["device"]["ratio"] for row in rows if row["layout"] == layout]
            assert _range(ratios) == figures, (backend, name, layout)


def test_the_cpu_figures_are_those_of_the_runs() -> None:
    for run, (file, dtype) in CPU_ROWS.items():
        rows = records.load(RESULTS / file).rows
        assert file[-15:-5] in evidence.CPU_RUNS[run]
        for name, by_run in evidence.CPU.items():
            served = [r for r in rows if (r.operator, r.direction, r.dtype) == (*_row(name), dtype)]
            ratios = [records.ratio_to_eager(r, None, r.clock) for r in served if r.provider == "fpn_kernels"]
            assert _range([ratio for ratio in ratios if ratio is not None]) == by_run[run], (name, run)


@pytest.mark.skipif(native.load_error() is not None, reason="the compiled library was not built")
def test_explain_says_what_was_measured_on_a_cpu_like_this(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(dtype: torch.dtype, mode: str = "nearest", capability: str = "AVX2") -> str:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        top, lateral = torch.zeros(1, 2, 2, 2, dtype=dtype), torch.zeros(1, 2, 4, 4, dtype=dtype)
        return fpn_kernels.explain("upsample_add", top, lateral, mode=mode).evidence

    assert said(torch.float32) == "measured on an EPYC with AVX2, float32, 2026-11-28: 1.82x to 3.31x eager"
    assert "Xeon with AMX, float32" in said(torch.float32, capability="AVX512")
    for unmeasured in (
        said(torch.float64),
        said(torch.float16),
        said(torch.float32, "bilinear"),
        said(torch.float32, capability="DEFAULT"),
    ):
        assert unmeasured.startswith("argued by bytes: one pass where PyTorch takes two; not measured for float")
    with fpn_kernels.use_backend("eager"):
        assert said(torch.float32) == "PyTorch's own operators"


def test_evidence_is_the_last_line_if_there_is_any() -> None:
    top, lateral = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)
    answer = fpn_kernels.explain("upsample_add", top, lateral)
    assert str(answer).splitlines()[-1] == f"  evidence: {answer.evidence}"
    assert "evidence" not in str(dispatch.Explanation("upsample_add", "theirs", {}))
    pathway = fpn_kernels.explain("top_down_pathway", [lateral], [torch.ones(2, 2)])
    assert pathway.evidence == "each of these calls is selected by itself"


# ---- on GPUs that this machine may lack


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100 and an A100 with Triton; float32 is multiplied as TF32."""

    def capability(device: Any) -> tuple[int, int]:
        return {HOPPER: (9, 0), AMPERE: (8, 0)}[device if isinstance(device, int) else device.index]

    monkeypatch.setattr(availability, "capability", capability)
    monkeypatch.setattr(availability, "unavailable", lambda: None)
    monkeypatch.setattr(availability, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setitem(dispatch.BACKENDS, "triton", lambda: None)
    monkeypatch.setattr(native, "cuda_refusal", lambda index: "was built without kernels for CUDA")
    with FakeTensorMode():
        yield


def _connection(
    device: int = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (8, 8),
    layout: torch.memory_format = torch.channels_last,
    merge: bool = True,
    bias: bool = True,
    mode: str = "nearest",
    channels: int = 64,
) -> LateralConnection:
    def made(*size: int, **how: Any) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=f"cuda:{device}", **how)

    feature = made(1, channels, *size, memory_format=layout)
    top = made(1, 64, size[0] // 2, size[1] // 2, memory_format=layout) if merge else None
    return LateralConnection(feature, made(64, channels), made(64) if bias else None, top, mode)


def _served(call: LateralConnection) -> tuple[str, str]:
    _, answer = dispatch.select(LATERAL_CONNECTION, call)
    reason = answer.refusals.get("triton", "")
    return answer.backend, answer.evidence if answer.backend == "triton" else reason


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """TF32 off, by PyTorch's own switch."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("gpus")
def test_a_connection_says_what_was_measured_and_what_is_argued() -> None:
    nhwc = "triton", f"measured on {evidence.GPU_RUN}: 3.81x to 6.09x eager in NHWC"
    assert _served(_connection()) == nhwc
    assert _served(_connection(layout=torch.contiguous_format))[1].endswith("1.13x to 1.19x eager in NCHW")
    assert _served(_connection(dtype=torch.float16))[1] == f"{nhwc[1]}; float16 has the same sizes and rates"
    argued = "argued by bytes: one pass for product, bias and merge, where PyTorch takes up to four; not measured for"
    assert _served(_connection(AMPERE)) == ("triton", f"{argued} bfloat16, nearest in NHWC on compute capability 8.0")
    tf32 = _served(_connection(dtype=torch.float32))
    assert tf32 == ("triton", f"{argued} float32, nearest in NHWC on compute capability 9.0")
    # The gradient of a feature, where nothing is merged.
    assert "forward and backward 2.98x to 3.20x" in _served(_connection(merge=False, bias=False))[1]


@pytest.mark.usefixtures("gpus")
def test_a_product_that_was_not_timed_is_eagers() -> None:
    def passed_over(**how: Any) -> str:
        backend, reason = _served(_connection(**how))
        assert backend == "eager" and reason.startswith("opt-in: "), (backend, reason)
        return reason

    for layout in (torch.channels_last, torch.contiguous_format):
        for device in (HOPPER, AMPERE):
            with _ieee():
                assert "without TF32" in passed_over(device=device, dtype=torch.float32, layout=layout)
                assert _served(_connection(device, layout=layout))[0] == "triton", "16 bits do not go by it"
            assert _served(_connection(device, torch.float32, layout=layout))[0] == "triton"
    for bias in (False, True):
        assert "this is 8.0" in passed_over(device=AMPERE, merge=False, bias=bias)
        assert "16 bits" in passed_over(dtype=torch.float32, merge=False, bias=bias)
    assert "this is 8.0" in passed_over(device=AMPERE, mode="bilinear")
    assert _served(_connection(mode="bilinear"))[0] == "triton"
    # 75 x 113 pixels in NCHW, and channels that are odd.
    assert "single elements" in passed_over(size=(75, 113), layout=torch.contiguous_format)
    assert "single elements" in passed_over(channels=65)
    assert _served(_connection(size=(75, 113)))[0] == "triton"


@pytest.mark.usefixtures("gpus")
def test_forced_it_serves_and_claims_nothing() -> None:
    with _ieee(), dispatch.use_backend("triton"):
        backend, said = _served(_connection(dtype=torch.float32))
        assert (backend, said) == (
            "triton",
            "none, it is opt-in: its product in float32 without TF32 has not been timed",
        )
        # What it cannot compute it refuses still: opt-in for some calls is not optional for all.
        with pytest.raises(dispatch.BackendUnavailableError, match="triton: torch.float64 is none of"):
            _served(_connection(dtype=torch.float64))


def test_eager_merges_in_one_pass_where_a_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[tuple[int, ...]] = []

    def merge(call: UpsampleAdd) -> torch.Tensor:
        assert (call.mode, call.gain) == ("bilinear", 0.5)
        merged.append(call.lateral.stride())
        return torch.empty_like(call.lateral)

    monkeypatch.setattr(dispatch, "BACKENDS", {"merging": lambda: None, "eager": lambda: None})
    monkeypatch.setitem(UPSAMPLE_ADD.backends, "merging", Implementation(lambda call: merge))
    # On a device that is not the CPU, and needs no driver.
    feature, top = (torch.empty(1, 8, n, n, device="meta") for n in (6, 3))
    weight, bias = torch.empty(8, 8, device="meta"), torch.empty(8, device="meta")
    call = LateralConnection(feature, weight, bias, top, "bilinear", 0.5)
    result = eager.lateral_connection(call)
    assert merged == [result.stride()] and result.is_contiguous()
    eager.lateral_connection(call._replace(top=None))
    with dispatch.use_backend("eager"):
        plain = eager.lateral_connection(call)
    assert plain.stride() == result.stride() and len(merged) == 1, "nothing to merge, or eager forced"
