"""Checks that a shared library's file is complete before it is loaded.

The loader maps the sizes in the file's header.  If the file is shorter (an interrupted copy, a full disk), the first
access past its end kills the process with SIGBUS, which `except` cannot catch.
"""

from __future__ import annotations

import pathlib
import struct

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian: every Linux that torch is built for
_HEADER = struct.Struct("<16x HHI QQQ I HHHHHH")
_SEGMENT = struct.Struct("<II QQQQQQ")
_LOAD = 1


def fault(path: pathlib.Path) -> str | None:
    """The defect of the file, or None: it is no library for 64-bit Linux, or shorter than its header says.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC[: len(header)]):
            return "it is no shared library of 64-bit Linux"
        if len(header) < _HEADER.size:
            return f"it is cut short: {size:,} bytes"
        _, _, _, _, segments_at, sections_at, _, _, segment_size, segments, section_size, sections, _ = _HEADER.unpack(
            header
        )
        ends = [segments_at + segments * segment_size, sections_at + sections * section_size]
        file.seek(segments_at)
        table = file.read(segments * segment_size)
    if len(table) == segments * segment_size and segment_size >= _SEGMENT.size:
        for number in range(segments):
            kind, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(table, number * segment_size)
            if kind == _LOAD:
                ends.append(offset + in_file)
    if size < max(ends):
        return f"it is cut short: {size:,} bytes of {max(ends):,}"
    return None
