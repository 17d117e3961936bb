"""The torch that this library needs, asked for before anything of it is imported that an older one does not have."""

from __future__ import annotations

import re

import torch

OLDEST_TORCH = (2, 10)


def older_than(release: tuple[int, int], version: str = torch.__version__) -> bool:
    """Whether torch is; a version that is not numbers (a build of one's own) is not."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < release


def require_torch(version: str = torch.__version__) -> None:
    """Raises where torch is too old; a version that is not numbers (a build of one's own) is let through.

    Raises:
        ImportError: with the version found, the version needed and the command that installs it.
    """
    if older_than(OLDEST_TORCH, version):
        needed = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"fpn_kernels needs torch {needed} or later, and this is torch {version}: `pip install 'torch>={needed}'`"
        )


require_torch()
