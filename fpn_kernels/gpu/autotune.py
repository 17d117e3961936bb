"""FPN_KERNELS_AUTOTUNE=1: measure the candidates of each table once, and keep the fastest on disk.

Without the variable, and where nothing can be measured (a CPU tensor, a stream under capture), the heuristics decide.
With it, the first call of a class (operator, dtype, layouts, channels, size rounded up to a power of two, device) runs
every candidate on the tensors of that call, into separate results, and waits for the device.  Later calls, and later
processes, use the answer.

There is one JSON file per device in `directory`; its keys contain the versions of the library, of torch and of Triton.
A file that cannot be read or written is ignored, with one warning, and replaced if possible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fpn_kernels.version import __version__

ENVIRONMENT_VARIABLE = "FPN_KERNELS_AUTOTUNE"

# Read once, because each plan checks it before it collects the arguments of `fastest`.
ENABLED = os.environ.get(ENVIRONMENT_VARIABLE, "").lower() in ("1", "true", "on")

Candidate = TypeVar("Candidate")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measurement of one class of calls.

    Attributes:
        operator, call: the class, as passed to `fastest`.
        default: the choice of the heuristics, a candidate's `repr`.
        milliseconds: the time of each candidate that runs, by its `repr`.
    """

    operator: str
    call: str
    default: str
    milliseconds: Mapping[str, float]


# An answer is some 200 bytes.
_MAX_FILE = 16 << 20

# Of this process, in order; the benchmarks read them.
measurements: list[Measurement] = []

_lock = threading.RLock()
_answers: dict[pathlib.Path, dict[str, str]] = {}
_warned = False


def directory() -> pathlib.Path | None:
    """`$XDG_CACHE_HOME/fpn_kernels`, or `~/.cache/fpn_kernels`; None for a user without a home.

    Relative paths are ignored, as the XDG specification requires: another user may own the current folder.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = pathlib.Path.home() / ".cache"
        except RuntimeError:  # a container's user number without an entry in the password file
            return None
    return cache / "fpn_kernels" if cache.is_absolute() else None


def milliseconds(run: Callable[[], None]) -> float:
    """The median time of a launch on the device, with L2 flushed before each."""
    import triton.testing  # here: `triton.py` of every operator imports this file, and must not import Triton

    median: float = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return median


def size_class(*sizes: int) -> tuple[int, ...]:
    """Each size rounded up to a power of two: images of about one size share an answer."""
    return tuple(1 << (size - 1).bit_length() for size in sizes)


def _device_name(tensor: Tensor) -> str | None:
    """The device name in the path of the answers; None where nothing can be measured."""
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_device_name(tensor.device)


def put_off() -> bool:
    """Whether autotuning is on but cannot run now; the choice of the heuristics is then not cached."""
    return ENABLED and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def planned(plan: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any], Callable[[Any], Any]]:
    """`dispatch.Implementation.plan`, of a plan that is not cached where a measurement was put off."""

    def mark(call: Any) -> Callable[[Any], Any]:
        run = plan(call)
        if put_off():
            run.transient = True  # type: ignore[attr-defined]
        return run

    return mark


def _warn(doing: str, path: pathlib.Path, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{ENVIRONMENT_VARIABLE}: {doing} {path} failed, it is ignored: {error}", stacklevel=4)


def _read(path: pathlib.Path) -> dict[str, str]:
    try:
        # Reading a folder, a pipe or a device would fail late, or never end.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
            raise ValueError(f"expected a file of at most {_MAX_FILE} bytes")
        answers = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
            raise ValueError("expected an object of strings")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn("reading", path, error)
        return {}
    return answers


def _write(path: pathlib.Path, key: str, answer: str) -> None:
    """Add an answer to those that other processes have written; a reader sees the old or the new file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = {**_read(path), key: answer}
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(answers, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _warn("writing", path, error)


def _times(candidates: Sequence[Candidate], run: Callable[[Candidate], None]) -> dict[str, float]:
    """Milliseconds per candidate, by its `repr`, for those that fit the chip and that this Triton compiles."""
    import triton

    times: dict[str, float] = {}
    for candidate in candidates:
        try:
            times[repr(candidate)] = milliseconds(lambda candidate=candidate: run(candidate))  # type: ignore[misc]
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
    return times


def fastest(
    operator: str,
    call: Sequence[Any],
    tensor: Tensor,
    candidates: Sequence[Candidate],
    default: Candidate,
    run: Callable[[Candidate], None],
) -> Candidate:
    """The fastest candidate for a class of calls; `default` without the variable.

    Args:
        operator: its name.
        call: the rest of the class, apart from dtype and device: layouts, channels, `size_class`.
        tensor: gives dtype and device.
        candidates: configurations; the file stores the `repr` of the fastest.
        default: the choice of the heuristics.
        run: launches the operator with a candidate, into a result that is not read.
    """
    device = _device_name(tensor) if ENABLED and len(candidates) > 1 else None
    if device is None:
        return default
    import triton

    versions = (__version__, torch.__version__, triton.__version__)
    key = " ".join(map(str, (operator, tensor.dtype, *call, *versions)))
    folder = directory()
    path = pathlib.Path(folder or "", "".join(c if c.isalnum() else "-" for c in device) + ".json")
    with _lock:
        if path not in _answers:
            _answers[path] = {} if folder is None else _read(path)
        known = {repr(candidate): candidate for candidate in candidates}
        answer = _answers[path].get(key)
        if answer not in known:
            times = _times(candidates, run)
            measurements.append(Measurement(operator, " ".join(map(str, call)), repr(default), times))
            known.setdefault(repr(default), default)
            answer = _answers[path][key] = min(times, key=times.__getitem__) if times else repr(default)
            if folder is not None:
                _write(path, key, answer)
        return known[answer]
