"""Markers, seeds, and the one place that skips.  Run by `python -m pytest experiments/tests`, also interpreted."""

from __future__ import annotations

import os
import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels.gpu.availability import INTERPRETED

# Each run draws other orders of events; EXPERIMENTS_SEED repeats a run.  The processes of pytest-xdist inherit it.
SEED = int(os.environ.setdefault("EXPERIMENTS_SEED", str(random.randrange(1 << 30))))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU of compute capability 9.0")
    config.addinivalue_line("markers", "interpreter: runs a kernel on the CPU, under TRITON_INTERPRET=1")


def pytest_report_header() -> str:
    return f"EXPERIMENTS_SEED={SEED}, Triton interpreter: {'on' if INTERPRETED else 'off'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for item in items:
        if bool(item.get_closest_marker("interpreter")) != INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=" + "01"[not INTERPRETED]))
        elif item.get_closest_marker("gpu") and not is_hopper:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU of compute capability 9.0"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)
