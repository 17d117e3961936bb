"""The options that the commands and pytest share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAYOUTS = ("NCHW", "NHWC")


def _names(text: str, kind: str, allowed: Mapping[str, str]) -> tuple[str, ...]:
    """The comma-separated names in `text`, looked up in `allowed` without regard to case."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word.lower() not in allowed:
            known = ", ".join(dict.fromkeys(allowed.values()))
            raise argparse.ArgumentTypeError(f"{word!r} is not a {kind}; choose from {known}")
    return tuple(dict.fromkeys(allowed[word.lower()] for word in words))


def dtypes(text: str) -> tuple[str, ...]:
    return _names(text, "dtype", {**{name: name for name in DTYPES}, **{long: name for name, long in DTYPES.items()}})


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
    (
        "--device",
        {"metavar": "NAME", "default": "auto", "help": "cpu, cuda or cuda:N (default: a GPU if there is one)"},
    ),
    ("--dtype", {"metavar": "NAMES", "type": dtypes, "help": f"comma-separated, of {', '.join(DTYPES)}"}),
    ("--layout", {"metavar": "NAMES", "type": layouts, "help": f"comma-separated, of {', '.join(LAYOUTS)}"}),
    ("--batch", {"metavar": "SIZES", "type": batches, "help": "comma-separated batch sizes"}),
)


def add_options(addoption: Callable[..., Any]) -> None:
    for flag, settings in OPTIONS:
        addoption(flag, **settings)


def to_arguments(values: argparse.Namespace) -> Iterable[str]:
    """The options that `values` sets, as pytest takes them."""
    for flag, _ in OPTIONS:
        value = getattr(values, flag.removeprefix("--"))
        if value is not None:
            yield f"{flag}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
