"""The machine code of every Triton kernel, compiled ahead of time from real launches.  Needs no GPU.

Only machine code shows that nothing spills, that shared memory fits the chip, that matrix products run on the tensor
cores, that dense maps are moved 16 bytes at a time, and that a launch waits for the previous one before it writes.
"""

from __future__ import annotations

import collections
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import ptx
import pytest
from machine_code import dump

from fpn_kernels.gpu.availability import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compilations import CHIPS, H100, Chip, Launched, record
from compiled_calls import CALLS

from fpn_kernels.operators.channel_sums import triton as channel_sums
from fpn_kernels.operators.lateral_connection import triton as lateral_connection
from fpn_kernels.operators.output_conv import tiles as output_conv
from fpn_kernels.operators.upsample_add import triton as upsample_add
from fpn_kernels.operators.upsample_add import triton_backward as upsample_add_backward
from fpn_kernels.operators.weighted_merge import triton as weighted_merge

# On sm_90 and later, a kernel is loaded with this much shared memory on top of its own.
RESERVED = 1024

# Each kernel once, for sm_90; all other compilations are nightly.
EVERYDAY = (
    "upsample_add nhwc 256 bfloat16 doubled",
    "upsample_add nchw 256 bfloat16 doubled",
    "upsample_add_backward nhwc 256 bfloat16 doubled",
    "upsample_add_backward nhwc 256 bfloat16 area",
    "merge_backward nchw 256 bfloat16 doubled",
    "weighted_merge three nhwc 256 bfloat16 doubled",
    "weighted_merge three nchw 256 bfloat16 doubled",
    "weighted_merge_backward nhwc 256 bfloat16",
    "channel_sums nhwc 256 bfloat16",
    "lateral_connection half alone",
    "output_conv half packed",
)
EVERY_CALL = [
    (name, chip) for chip in CHIPS for name in CALLS if chip.capability >= 90 or "top_down_pathway" not in name
]


# On dense maps: the instructions that move 16 bytes each, except for so many that move one number (the weights, the
# factor, the sum of a tile).  A row of the top is read in shorter runs, or gathered.
WIDE = {
    **{"merge_channels": {"LDG": 0, "STG": 0}, "merge_planes": {"STG": 0}},
    **{name: {"LDG": 0} for name in ("gather_channels", "gather_planes", "gather_area", "sum_pixels")},
    **{"weighted_channels": {"LDG": 3, "STG": 0}, "weighted_planes": {"STG": 0}, "scale_and_sum": {"LDG": 1, "STG": 1}},
    "connect": {"LDGSTS": 0, "STG": 0},
}


def _wide(launch: Launched) -> dict[str, int]:
    windows = launch.name == "gather_planes" and launch.constants["WINDOW"] != upsample_add_backward.PAIRS
    areas = launch.name == "gather_area" and launch.constants["WALK"] == "planes"
    # Ranges of fine pixels begin anywhere in a row.
    return {} if windows or areas else WIDE.get(launch.name, {})


@functools.cache
def _read(compiled: Any) -> tuple[str, str]:
    """Resource usage and machine code; many calls compile the same kernel."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        return dump("-res-usage", cubin), dump("--dump-sass", cubin)


def _check(launch: Launched, dense: bool) -> None:
    compiled, chip, constants = launch.compile(), launch.chip, launch.constants
    usage, code = _read(compiled)
    about = f"{launch.name} {constants}: {usage}"
    assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", usage), about
    assert not re.findall(r"\b(?:LDL|STL)\b", code), f"spills: {about}"
    assert compiled.metadata.shared + RESERVED <= chip.shared_memory, about
    if launch.name in ("connect", "convolve") and constants["ARITHMETIC"] != "ieee":
        assert re.search(chip.tensor_cores, code), f"the product is not on the tensor cores: {about}"
    if launch.name == "convolve":
        copies = re.search(r"\bUTMALDG\b", code)
        assert bool(copies) == (chip.capability >= 90), f"bulk copies (TMA), where the chip has them: {about}"
    _check_overlap(launch, compiled.asm["ptx"])
    for instruction, single in (_wide(launch) if dense else {}).items():
        moves = re.findall(rf"\b{instruction}\.[\w.]+", code)
        narrow = [move for move in moves if not move.endswith(".128")]
        assert len(moves) > len(narrow), f"no wide {instruction}: {about}"
        assert len(narrow) <= single, f"narrow accesses {sorted(set(narrow))}: {about}"


def _check_overlap(launch: Launched, code: str) -> None:
    """A launch writes, and reads the top, only after the wait, on every path through the control flow of the PTX."""
    follows, leads = (launch.constants.get(name, False) for name in ("FOLLOWS", "LEADS"))
    assert ("griddepcontrol.wait" in code, "griddepcontrol.launch_dependents" in code) == (follows, leads)
    if not follows:
        return
    before = ptx.before_the_wait(code)
    assert leads == any("griddepcontrol.launch_dependents" in instruction for instruction in before)
    # Without the wait, the same analysis finds the writes and the reads.
    everything = ptx.before_the_wait(code.replace("griddepcontrol.wait", "// griddepcontrol.wait"))
    assert ptx.writes(everything) and not ptx.writes(before)
    if launch.name == "connect":
        top = launch.kernel.arg_names.index("top")
        assert ptx.reads_through(everything, top) and not ptx.reads_through(before, top)


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        pytest.param(name, chip, marks=() if name in EVERYDAY and chip is H100 else pytest.mark.nightly)
        for name, chip in EVERY_CALL
    ],
    ids=str,
)
def test_machine_code(name: str, chip: Chip, request: pytest.FixtureRequest) -> None:
    if (name, chip) == ("output_conv_levels ieee tiny", CHIPS[0]):
        reason = "4x8x32x16 spills 8 bytes on sm_80 with four levels; no GPU below sm_90 serves it by default"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    launches = record(CALLS[name], chip)
    assert launches
    for launch in launches:
        _check(launch, CALLS[name].dense)


def _row(launch: Launched) -> tuple[Any, ...]:
    """The table of a launch's tile, and its key there (of the matrix products, the arithmetic alone)."""
    constants = launch.constants
    if launch.name in ("connect", "convolve"):
        return launch.name, (constants["ARITHMETIC"],)
    kernel, _, walk = launch.name.partition("_")
    nearest = "pairs" if constants.get("PAIRS") else "nearest"
    reading = {
        "merge": ["bilinear" if constants.get("MODE") == "bilinear" else nearest],
        "gather": [constants.get("WINDOW", upsample_add_backward.AREA)],
        "weighted": [constants.get("READING")],
    }
    return kernel, (constants.get("WALK", walk), *reading.get(kernel, []), launch.arguments[0].element_size())


def _has(launch: Launched, tile: Any) -> bool:
    """Whether the launch has the tile; `tiles.fitting` doubles the warps where accesses are narrow."""
    numbers = {name: value for name, value in vars(tile).items() if name != "num_warps"}
    return launch.constants["num_warps"] in (tile.num_warps, 2 * tile.num_warps) and all(
        launch.constants.get(name if name == "num_stages" else name.upper(), value) == value
        for name, value in numbers.items()
    )


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_every_tile_of_every_table_is_compiled(chip: Chip) -> None:
    rows: dict[Any, list[Launched]] = collections.defaultdict(list)
    for name, on in EVERY_CALL:
        for launch in record(CALLS[name], chip) if on is chip else ():
            if launch.name not in ("pack", "sum_partials"):
                rows[_row(launch)].append(launch)
    in_bulk = chip.capability >= 90
    expected: list[tuple[str, Any, Any]] = [
        *(("merge", *row) for row in upsample_add.TABLE.items()),
        *(("gather", *row) for row in upsample_add_backward.TABLE.items()),
        *(("weighted", *row) for row in weighted_merge.TABLE.items()),
        *(("scale", *row) for row in weighted_merge.BACKWARD_TABLE.items()),
        *(("sum", ("pixels", size), tiles) for size, tiles in channel_sums.TABLE.items()),
        *(("connect", key[:1], [tile]) for key, tile in lateral_connection.TABLE.items()),
        *(
            ("convolve", key[:1], [output_conv.on_chip(each, in_bulk) for each in (tile, tile.transposed)])
            for key, tile in output_conv.TABLE.items()
        ),
    ]
    for kernel, key, tiles in expected:
        for tile in tiles:
            assert any(_has(launch, tile) for launch in rows[kernel, key]), (kernel, key, tile)
