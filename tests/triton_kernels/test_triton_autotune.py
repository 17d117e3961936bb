"""FPN_KERNELS_AUTOTUNE: the candidates that are measured, and the file that keeps the answers, with a fake clock."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_calls import by_triton
from samples import random_map

triton = pytest.importorskip("triton", reason="Triton is not installed")

from fpn_kernels.gpu import autotune  # noqa: E402
from fpn_kernels.operators.lateral_connection import triton as lateral_connection  # noqa: E402
from fpn_kernels.operators.output_conv import tiles  # noqa: E402
from fpn_kernels.operators.upsample_add import triton as upsample_add  # noqa: E402
from fpn_kernels.operators.upsample_add import triton_backward as upsample_add_backward  # noqa: E402

CANDIDATES = ("slow", "fast", "broken")


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Autotuning is on, CPU tensors count as those of a GPU, and the cache is a file that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "_device_name", lambda tensor: "Some GPU (1)")
    _forget(monkeypatch)
    return tmp_path / "fpn_kernels" / "Some-GPU--1-.json"


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(autotune, "_answers", {})
    monkeypatch.setattr(autotune, "_warned", False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured; the clock says 2 for "slow", 1 for "fast", and that "broken" does not fit the chip."""
    runs: list[str] = []

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        if runs[-1] == "broken":
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return {"slow": 2.0, "fast": 1.0}[runs[-1]]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    return runs


def _fastest(
    runs: list[str], size: int = 1, candidates: tuple[str, ...] = CANDIDATES, dtype: torch.dtype = torch.half
) -> str:
    return autotune.fastest("op", ("nhwc", size), torch.empty(1, dtype=dtype), candidates, "slow", runs.append)


def test_the_fastest_that_runs_is_chosen_once_a_class(cache: pathlib.Path, measured: list[str]) -> None:
    assert [_fastest(measured) for _ in range(3)] == ["fast"] * 3
    assert measured == list(CANDIDATES)
    _fastest(measured, size=2)
    _fastest(measured, dtype=torch.bfloat16)
    assert len(measured) == 3 * len(CANDIDATES)


def test_a_later_process_reads_the_answer(
    cache: pathlib.Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fastest(measured)
    answers = json.loads(cache.read_text())
    ((key, answer),) = answers.items()
    assert answer == repr("fast")
    for part in ("op", "float16", "nhwc", torch.__version__, triton.__version__, autotune.__version__):
        assert part in key
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "no temporary file is left"
    _forget(monkeypatch)
    assert _fastest(measured) == "fast" and measured == list(CANDIDATES)
    # Another version of anything measures again, and so does an answer that is no candidate any more.
    monkeypatch.setattr(autotune, "__version__", "0.0.0")
    assert _fastest(measured) == "fast" and len(measured) == 2 * len(CANDIDATES)
    _forget(monkeypatch)
    assert _fastest(measured, candidates=("slow", "broken")) == "slow" and len(measured) == 2 * len(CANDIDATES) + 2


def test_answers_of_other_processes_are_kept(cache: pathlib.Path, measured: list[str]) -> None:
    _fastest(measured, size=1)
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "theirs": "x"}))
    _fastest(measured, size=2)
    assert len(json.loads(cache.read_text())) == 3 and json.loads(cache.read_text())["theirs"] == "x"


_CORRUPT = {
    "empty": b"",
    "half-written": b'{"op": "fa',
    "huge-number": b'{"a": ' + b"9" * 100_000 + b"}",
    "nan": b'{"a": NaN, "b": -Infinity}',
    "nested-list": b"[" * 1_000_000,
    "binary": bytes(range(256)) * 16,
    "too-large": b" " * (16 << 20) + b"{}",
}


@pytest.mark.parametrize("content", _CORRUPT.values(), ids=_CORRUPT)
def test_a_corrupt_cache_is_ignored_with_one_warning(content: bytes, cache: pathlib.Path, measured: list[str]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="FPN_KERNELS_AUTOTUNE: reading .* failed, it is ignored") as caught:
        assert _fastest(measured) == "fast"
        assert _fastest(measured, size=2) == "fast"
    assert len(caught) == 1
    assert len(json.loads(cache.read_text())) == 2, "and replaced by a sound one"


def test_a_cache_that_cannot_be_written_is_ignored_with_one_warning(
    cache: pathlib.Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.parent.joinpath("fpn_kernels").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="FPN_KERNELS_AUTOTUNE: .* failed, it is ignored") as caught:
        assert [_fastest(measured, size=size) for size in (1, 2, 1)] == ["fast"] * 3
    assert len(caught) == 1 and len(measured) == 2 * len(CANDIDATES)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "link to a device"])
def test_what_is_no_file_is_ignored_with_one_warning(kind: str, cache: pathlib.Path, measured: list[str]) -> None:
    """A pipe, opened, would wait for a writer; a device would never end."""
    cache.parent.mkdir(parents=True)
    make: dict[str, Callable[[], None]] = {
        "folder": cache.mkdir,
        "pipe": lambda: os.mkfifo(cache),
        "link to itself": lambda: cache.symlink_to(cache),
        "link to a device": lambda: cache.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.warns(UserWarning, match="FPN_KERNELS_AUTOTUNE: .* failed, it is ignored") as caught:
        assert [_fastest(measured, size=size) for size in (1, 2, 1)] == ["fast"] * 3
    assert len(caught) == 1 and len(measured) == 2 * len(CANDIDATES)
    assert kind == "folder" or len(json.loads(cache.read_text())) == 2, "replaced by a sound one"
    assert list(cache.parent.iterdir()) == [cache]


def test_writers_at_once_leave_a_whole_file(cache: pathlib.Path) -> None:
    """As processes do, which share no lock: an answer may be lost, and is measured again; the file never is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for each in [threads.submit(autotune._write, cache, f"key {i}", "answer") for i in range(64)]:
                each.result()
        answers = autotune._read(cache)
    assert answers and set(answers) <= {f"key {i}" for i in range(64)}
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.usefixtures("cache")
def test_other_errors_are_not_swallowed(measured: list[str]) -> None:
    def fails(candidate: str) -> None:
        raise RuntimeError("a wrong launch")

    with pytest.raises(RuntimeError, match="a wrong launch"):
        autotune.fastest("op", (), torch.empty(1), CANDIDATES, "slow", fails)


def test_nothing_is_measured_by_default(
    tmp_path: pathlib.Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for enabled in (False, True):  # the second time, because the tensor is the CPU's
        monkeypatch.setattr(autotune, "ENABLED", enabled)
        assert _fastest(measured) == "slow"
    monkeypatch.setattr(autotune, "_device_name", lambda tensor: "Some GPU")
    assert _fastest(measured, candidates=("slow",)) == "slow"
    assert not measured and not list(tmp_path.iterdir())


def test_the_variable() -> None:
    """In another process, with a reload per value: the modules of this process stay as they are."""
    expected = {"": False, "0": False, "1": True, "on": True}
    code = (
        "import importlib, os, sys\n"
        "from fpn_kernels.gpu import autotune\n"
        "print(autotune.ENABLED)\n"
        "for value in sys.argv[1:]:\n"
        "    os.environ[autotune.ENVIRONMENT_VARIABLE] = value\n"
        "    print(importlib.reload(autotune).ENABLED)\n"
    )
    environment = {name: text for name, text in os.environ.items() if name != autotune.ENVIRONMENT_VARIABLE}
    command = [sys.executable, "-c", code, *expected]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(enabled) for enabled in (False, *expected.values())]


def test_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert autotune.directory() == pathlib.Path("/somewhere/fpn_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    at_home = pathlib.Path.home() / ".cache" / "fpn_kernels"
    assert autotune.directory() == at_home
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert autotune.directory() == at_home, "relative paths are invalid, says the specification"
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("here"))
    assert autotune.directory() is None


def test_without_a_home_answers_are_the_processs(
    cache: pathlib.Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read from a folder that everybody may write to, and nothing is written there."""

    def unknown() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", unknown)
    for name in ("_read", "_write"):
        monkeypatch.setattr(autotune, name, lambda *arguments: pytest.fail("a file was used"))
    assert autotune.directory() is None
    assert [_fastest(measured) for _ in range(2)] == ["fast"] * 2 and measured == list(CANDIDATES)
    monkeypatch.setattr(autotune, "_device_name", lambda tensor: "Another GPU")
    assert _fastest(measured) == "fast" and len(measured) == 2 * len(CANDIDATES), "an answer is that of one device"


# ------------------------------------------------------------------------------------------------ the kernels' tables


def _calls() -> dict[str, Callable[[], Any]]:
    top, fine = (random_map((1, 64, *size), torch.half, layout="nhwc") for size in ((4, 4), (8, 8)))
    weight, taps = torch.randn(64, 64).half() / 8, torch.randn(68, 64, 3, 3).half() / 24
    return {
        "upsample_add": lambda: by_triton("upsample_add", top, fine),
        "upsample_add_backward": lambda: by_triton("upsample_add_backward", fine, (4, 4)),
        "merge_backward": lambda: by_triton("merge_backward", fine, (4, 4), None)[0],
        "lateral_connection": lambda: by_triton("lateral_connection", fine, weight, None, top),
        "bilinear": lambda: by_triton("lateral_connection", fine, weight, None, top, "bilinear"),
        "output_conv": lambda: by_triton("output_conv", fine, taps, None),
    }


@pytest.mark.nightly
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["upsample_add", "upsample_add_backward", "merge_backward", "lateral_connection", "bilinear", "output_conv"]
)
def test_each_candidate_is_measured_once_and_gives_the_same_result(
    name: str, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock prefers the last candidate, whose result is compared with that of the heuristics."""
    call = _calls()[name]
    times: list[float] = []

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        times.append(1000.0 - len(times))
        return times[-1]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    results = [call(), call()]
    measured = len(times)
    monkeypatch.setattr(autotune, "ENABLED", False)
    expected = call()
    assert measured == len(times) >= 2
    for result in results:
        torch.testing.assert_close(result, expected, rtol=2**-9, atol=2**-9)
    assert json.loads(cache.read_text())


def test_answers_are_told_apart_by_every_field() -> None:
    """`repr` finds a candidate again: two that differ in anything must not share one."""
    tables = (upsample_add.TABLE, upsample_add_backward.TABLE, lateral_connection.TABLE, tiles.TABLE)
    for table in tables:
        for tile in table.values():
            for config in tile if isinstance(tile, tuple) else (tile,):
                assert dataclasses.is_dataclass(config)
                assert repr(config) != repr(dataclasses.replace(config, num_warps=config.num_warps * 2))


@pytest.mark.gpu
def test_a_captured_stream_is_not_measured() -> None:
    tensor = torch.empty(1, device="cuda")
    assert autotune._device_name(tensor) == torch.cuda.get_device_name(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert autotune._device_name(tensor) is None
        tensor.add_(1)
