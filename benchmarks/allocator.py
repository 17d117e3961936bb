"""Keep the CPU allocator from handing pages back between two rounds.

glibc maps every block of 32 MB or more afresh and unmaps it when it is freed, so that a large result pays for
page faults in every round. On a C2 map that costs more than the work that is measured, and hides the difference
between two providers. A network that runs over and over meets neither in its steady state with a caching
allocator, and the setting is the same for every provider.
"""

from __future__ import annotations

import ctypes

# From <malloc.h>. M_MMAP_THRESHOLD cannot do it: glibc caps it at 32 MB on 64-bit machines.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> str:
    """Ask glibc to keep freed pages, for this process. Returns what was done, for the report's header."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        version = libc.gnu_get_libc_version().decode()
        kept = libc.mallopt(_M_MMAP_MAX, 0) == 1 and libc.mallopt(_M_TRIM_THRESHOLD, -1) == 1
    except (AttributeError, OSError, TypeError):
        return "as found (not glibc): large CPU results may include page faults"
    if not kept:
        return f"as found (glibc {version} refused mallopt): large CPU results may include page faults"
    return f"glibc {version}, freed pages kept"
