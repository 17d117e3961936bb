"""`python -m benchmarks.caller`, and a bound on what lies between a call and its kernel that needs no clock."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import INTERPRETED

from benchmarks import caller
from fpn_kernels.operators import plan_cache

CPU = torch.device("cpu")


def _functions_called(call: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, one call comes to."""
    count = 0

    def event(frame: object, kind: str, argument: object) -> None:
        nonlocal count
        count += kind in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(event)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return count


# A quarter more than was counted on Python 3.11 and torch 2.13, with the compiled library and without.
MOST = {
    "upsample_add": 70,
    "lateral_connection": 100,
    "output_conv": 80,
    "top_down_pathway": 260,
    "weighted_merge": 110,
    "neck": 900,
    "neck, forward + backward": 2100,
}


@pytest.mark.skipif(sys.gettrace() is not None, reason="the functions of a debugger or of coverage count as well")
@pytest.mark.parametrize("name", MOST)
def test_a_call_like_the_last_one_asks_nothing_anew(name: str) -> None:
    with torch.no_grad() if "backward" not in name else torch.enable_grad():
        call, _ = caller.calls(caller.DTYPE, CPU)[name]
        first = _functions_called(call)
        call()
        again = _functions_called(call)
        plan_cache.clear()
        anew = _functions_called(call)
    assert again <= MOST[name], again
    assert first > again and anew > again


def test_the_table_has_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    caller.main(["--device", "cpu", "--seconds", "0.01"])
    printed = capsys.readouterr().out
    tables = printed.split("\n\n")
    assert len(tables) == 1 + (importlib.util.find_spec("triton") is not None and not INTERPRETED)
    for name in MOST:
        assert re.search(rf"^{re.escape(name)} +[\d.]+ +[\d.]+ +[\d.]+$", tables[0], re.MULTILINE), name
    for table in tables[1:]:
        assert "Triton, nothing launched" in table and "top_down_pathway" in table and "neck" not in table
