"""The requirements of an import, checked before any other file: a recent torch, and no earlier import."""

from __future__ import annotations

import importlib.metadata
import os
import re

import torch

OLDEST_TORCH = (2, 10)


def older_than(release: tuple[int, int], version: str = torch.__version__) -> bool:
    """Whether a version is older than a release; one that is not numeric (a custom build) is not."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < release


def require_torch(version: str = torch.__version__) -> None:
    """Require a torch that is not too old; a version that is not numeric (a custom build) passes.

    Raises:
        ImportError: with the version found, the version needed and the command that installs it.
    """
    if older_than(OLDEST_TORCH, version):
        needed = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"fpn_kernels needs torch {needed} or later, and this is torch {version}: `pip install 'torch>={needed}'`"
        )


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None if there is none, or its metadata cannot be read."""
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # broken metadata may raise anything
        return None


def require_first_import() -> None:
    """Require that this process has not registered the operators before: torch accepts them only once.

    Raises:
        ImportError: with the path of the first import and the remedy.
    """
    # A namespace of operators lives as long as the process, even if `sys.modules` changes.
    first = vars(torch.ops.fpn_kernels).get("_imported_from")
    if first is not None:
        raise ImportError(
            f"fpn_kernels was imported before in this process, from {first}, and torch registers its operators only "
            "once: keep that module in sys.modules, and install only one copy; or restart Python"
        )


def mark_first_import() -> None:
    """Record the path from which the operators are registered, for `require_first_import`."""
    vars(torch.ops.fpn_kernels)["_imported_from"] = os.path.dirname(__file__)


require_torch()
require_first_import()


def tf32_is_allowed() -> bool:
    """PyTorch's switch for float32 convolutions on CUDA.

    The older `torch.backends.cudnn.allow_tf32` raises where the newer switches differ for convolutions and for RNNs.
    """
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"
