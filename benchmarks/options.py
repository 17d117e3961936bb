"""The suite's own options, defined once for pytest (`conftest.py`) and for the runner (`__main__.py`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAYOUTS = ("NCHW", "NHWC")


def _names(text: str, kind: str, allowed: Mapping[str, str]) -> tuple[str, ...]:
    """The comma-separated names in `text`, each looked up in `allowed` without regard to case."""
    found = []
    for word in text.split(","):
        name = allowed.get(word.strip().lower())
        if name is None:
            known = ", ".join(dict.fromkeys(allowed.values()))
            raise argparse.ArgumentTypeError(f"{word.strip()!r} is not a {kind}; choose from {known}")
        if name not in found:
            found.append(name)
    return tuple(found)


def dtypes(text: str) -> tuple[str, ...]:
    short = {name: name for name in DTYPES}
    return _names(text, "dtype", {**short, **{long: name for name, long in DTYPES.items()}})


def layouts(text: str) -> tuple[str, ...]:
    allowed = {name.lower(): name for name in LAYOUTS}
    return _names(text, "layout", {**allowed, "contiguous": "NCHW", "channels_last": "NHWC"})


def batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes; write 1 or 1,8")
    return sizes


OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--full", {"action": "store_true", "help": "every shape, level, mode and provider (an hour or so on a CPU)"}),
    ("--tiny", {"action": "store_true", "help": argparse.SUPPRESS}),  # for the tests of the suite itself
    ("--device", {"metavar": "NAME", "default": "auto", "help": "cpu, cuda or cuda:N; the best one here by default"}),
    ("--dtype", {"metavar": "NAMES", "type": dtypes, "help": f"comma-separated, of {', '.join(DTYPES)}"}),
    ("--layout", {"metavar": "NAMES", "type": layouts, "help": f"comma-separated, of {', '.join(LAYOUTS)}"}),
    ("--batch", {"metavar": "SIZES", "type": batches, "help": "comma-separated batch sizes"}),
)


def add_options(addoption: Callable[..., Any]) -> None:
    for flag, settings in OPTIONS:
        addoption(flag, **settings)


def to_arguments(values: argparse.Namespace) -> Iterable[str]:
    """The command-line form of those options that `values` sets, to be handed on to pytest."""
    for flag, settings in OPTIONS:
        value = getattr(values, flag.removeprefix("--"))
        if value == settings.get("default") or value in (None, False):
            continue
        if value is True:
            yield flag
        else:
            yield f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
