"""The compiled library: loads it once, and says why where there is none.

`csrc/` is built into one shared library beside this package, which registers kernels of its own through the
LibTorch stable ABI.  Nothing is loaded before the first question about it, and a library that is there but will
not load keeps its first error, for `python -m fpn_kernels` to show.
"""

from __future__ import annotations

import functools
import pathlib

import torch

from fpn_kernels.backends.selection import Backend, Implementation

LIBRARY = pathlib.Path(__file__).resolve().parent.parent / "_native.so"


@functools.cache
def load_error() -> str | None:
    """Loads the library; why it cannot be used, or None."""
    if not LIBRARY.is_file():
        return "the compiled library was not built"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library would not load: {error}"
    return None


_IMPLEMENTATIONS: dict[str, Implementation] = {}

BACKEND = Backend(name="native", unavailable=load_error, implementations=_IMPLEMENTATIONS)
