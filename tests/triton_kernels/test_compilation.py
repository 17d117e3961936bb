"""The machine code of every Triton kernel, compiled ahead of time from real launches.  Needs no GPU.

Only machine code shows that nothing spills, that shared memory fits the chip, that matrix products run on the tensor
cores, that dense maps are moved 16 bytes at a time, and that a launch waits for the previous one before it writes.
"""

from __future__ import annotations

import re
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

# Each kernel once, on sm_90; all other compilations are nightly.
EVERYDAY = (
    "upsample_add nhwc 256 bfloat16 doubled",
    "upsample_add nchw 256 bfloat16 doubled",
    "upsample_add_backward nhwc 256 bfloat16 doubled",
    "merge_backward nchw 256 bfloat16 doubled",
    "upsample_add_backward nhwc 256 bfloat16 area",
    "weighted_merge three nhwc 256 bfloat16 doubled",
    "weighted_merge three nchw 256 bfloat16 doubled",
    "weighted_merge_backward nhwc 256 bfloat16",
    "channel_sums nhwc 256 bfloat16",
    "lateral_connection half alone",
    "output_conv half packed",
)
EVERY_CALL = [
    pytest.param(
        name, chip, id=f"{name}, {chip}", marks=() if chip is H100 and name in EVERYDAY else pytest.mark.nightly
    )
    for chip in CHIPS
    for name, call in CALLS.items()
    if chip in call.chips
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


def _check(launch: Launched, dense: bool, directory: Path) -> None:
    compiled, chip, constants = launch.compile(), launch.chip, launch.constants
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage, code = dump("-res-usage", cubin), dump("--dump-sass", cubin)
    about = f"{launch.name} {constants}: {usage}"
    assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", usage), about
    assert not re.findall(r"\b(?:LDL|STL)\b", code), f"spills: {about}"
    assert compiled.metadata.shared + RESERVED <= chip.shared_memory, about
    if launch.name in ("connect", "convolve") and constants["ARITHMETIC"] != "ieee":
        assert re.search(chip.tensor_cores, code), f"the product is not on the tensor cores: {about}"
    if launch.name == "convolve":
        copies = re.search(r"\bUTMALDG\b", code)
        assert bool(copies) == (chip.capability >= 90), f"bulk copies (TMA), where the chip has them: {about}"
    for constant, instruction in (("FOLLOWS", "wait"), ("LEADS", "launch_dependents")):
        overlaps = f"griddepcontrol.{instruction}" in compiled.asm["ptx"]
        assert overlaps == constants.get(constant, False), about
    for instruction, single in (_wide(launch) if dense else {}).items():
        moves = re.findall(rf"\b{instruction}\.[\w.]+", code)
        narrow = [move for move in moves if not move.endswith(".128")]
        assert len(moves) > len(narrow), f"no wide {instruction}: {about}"
        assert len(narrow) <= single, f"narrow accesses {sorted(set(narrow))}: {about}"


@pytest.mark.parametrize(("name", "chip"), EVERY_CALL)
def test_machine_code(name: str, chip: Chip, tmp_path: Path) -> None:
    launches = record(CALLS[name], chip)
    assert launches
    for launch in launches:
        _check(launch, CALLS[name].dense, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("top_down_pathway") or "paper" in name])
def test_a_launch_writes_and_reads_the_top_only_after_the_wait(name: str) -> None:
    """On every path through the control flow of the PTX, whatever the order in the source."""
    followers = [launch for launch in record(CALLS[name], H100) if launch.constants.get("FOLLOWS")]
    assert followers or "output_conv" in name  # in float32 one launch has all levels
    for launch in followers:
        code = launch.compile().asm["ptx"]
        everything, before = ptx.instructions_of(code), ptx.before_the_wait(code)
        assert ptx.writes(everything) and not ptx.writes(before)
        leads = any("griddepcontrol.launch_dependents" in instruction for instruction in before)
        assert leads == launch.constants["LEADS"]
        if launch.name == "connect":
            top = launch.kernel.arg_names.index("top")
            assert ptx.reads_through(everything, top) and not ptx.reads_through(before, top)


@pytest.mark.nightly
def test_the_analysis_finds_early_writes_and_reads() -> None:
    last = record(CALLS["top_down_pathway half nhwc"], H100)[-1]
    code = last.compile().asm["ptx"].replace("griddepcontrol.wait", "// griddepcontrol.wait")
    assert ptx.writes(ptx.before_the_wait(code))
    assert ptx.reads_through(ptx.before_the_wait(code), last.kernel.arg_names.index("top"))


def _row(launch: Launched) -> tuple[Any, ...]:
    """The table and the key of a launch's tile, as in `_rows`."""
    constants, size = launch.constants, launch.arguments[0].element_size()
    kernel, _, walk = launch.name.partition("_")
    walk = constants.get("WALK", walk)
    if kernel == "merge":
        reading = "pairs" if constants["PAIRS"] else "bilinear" if constants["MODE"] == "bilinear" else "nearest"
        return kernel, (walk, reading, size)
    if kernel == "gather":
        return kernel, (walk, constants.get("WINDOW", upsample_add_backward.AREA), size)
    if kernel == "weighted":
        return kernel, (walk, constants["READING"], size)
    return kernel, (walk, size) if kernel == "scale" else size


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_every_tile_of_every_table_is_compiled(chip: Chip) -> None:
    launches = [launch for call in CALLS.values() if chip in call.chips for launch in record(call, chip)]
    reached = {
        (*_row(launch), launch.constants["ROWS"], launch.constants["COLUMNS"])
        for launch in launches
        if launch.name not in ("connect", "convolve", "pack", "sum_partials")
    }
    for kernel, table in (
        ("merge", upsample_add.TABLE),
        ("gather", upsample_add_backward.TABLE),
        ("weighted", weighted_merge.TABLE),
        ("scale", weighted_merge.BACKWARD_TABLE),
        ("sum", channel_sums.TABLE),
    ):
        for key, tiles in table.items():
            for tile in tiles:
                assert (kernel, key, tile.rows, tile.columns) in reached, (kernel, key, tile)
    fields = ("ROWS", "COLUMNS", "PIXELS", "CHANNELS", "DEPTH", "num_warps", "num_stages")
    products = {
        (launch.constants["ARITHMETIC"], *(launch.constants.get(field) for field in fields))
        for launch in launches
        if launch.name in ("connect", "convolve")
    }
    for (arithmetic, _), tile in lateral_connection.TABLE.items():
        numbers = (tile.pixels, tile.channels, tile.depth, tile.num_warps, tile.num_stages)
        assert (arithmetic, None, None, *numbers) in products, tile
    for (arithmetic, _), box in output_conv.TABLE.items():
        for tile in (output_conv.on_chip(each, chip.capability >= 90) for each in (box, box.transposed)):
            numbers = (tile.channels, tile.depth, tile.num_warps, tile.num_stages)
            assert (arithmetic, tile.rows, tile.columns, None, *numbers) in products, tile
