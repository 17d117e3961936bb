"""Every configuration of every Triton kernel, compiled ahead of time and read back as machine code.  Needs no GPU.

What shows only in machine code: that nothing spills, that shared memory fits the chip, that matrix products run on the
tensor cores and that dense maps are moved sixteen bytes at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine_code import compile_for, dump, is_gluon, source_of
from targets import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from fpn_kernels import resampling  # noqa: E402
from fpn_kernels.backends.triton import (  # noqa: E402
    channel_sums,
    geometry,
    lateral_connection,
    lateral_connection_stationary,
    merge_backward,
    output_conv,
    upsample_add,
    upsample_add_backward,
    weighted_merge,
    weighted_merge_backward,
)
from fpn_kernels.backends.triton.compiled import Variant, all_variants  # noqa: E402
from fpn_kernels.backends.triton.launching import ALONE  # noqa: E402

VARIANTS = {variant.description: variant for variant in all_variants()}

# Compute capability -> bytes of shared memory that a block may have, and the instruction of its tensor cores.
CHIPS = {
    80: (163 * 1024, r"\bHMMA\."),
    90: (227 * 1024, r"\bHGMMA\."),
    100: (227 * 1024, r"\bUTC\w*MMA\b"),
}
# A kernel is loaded with this much more shared memory than it asks for on sm_90 and later (`-res-usage` counts it).
RESERVED = 1024


def _machine_code(compiled: Any, capability: int, directory: Path) -> str:
    """The instructions of a compiled kernel, after the checks that hold for every one."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage, code = dump("-res-usage", cubin), dump("--dump-sass", cubin)
    assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", usage), usage
    assert not re.findall(r"\b(?:LDL|STL)\b", code), f"spills: {usage}"
    assert compiled.metadata.shared + RESERVED <= CHIPS[capability][0]
    return code


@pytest.mark.sampled(32)
@pytest.mark.parametrize("capability", CHIPS, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("description", VARIANTS)
def test_machine_code(description: str, capability: int, tmp_path: Path) -> None:
    variant: Variant = VARIANTS[description]
    if capability < 90 and variant.link != ALONE:
        pytest.skip("launches overlap on compute capability 9.0 and later")
    if variant.capabilities and capability not in variant.capabilities:
        pytest.skip("other chips have this one")
    code = _machine_code(compile_for(variant, capability), capability, tmp_path)
    if variant.matrix_product:
        assert re.search(CHIPS[capability][1], code), "the matrix product is not on the tensor cores"
    if variant.descriptors:
        copies = re.findall(r"\bUTMALDG\b", code)
        assert bool(copies) == (capability >= 90), "maps are read by bulk tensor copies where the chip has them"
    for instruction, single_numbers in variant.wide.items():
        if variant.descriptors and capability >= 90:
            continue  # nothing is left to threads
        moves = re.findall(rf"\b{instruction}\.[\w.]+", code)
        narrow = [move for move in moves if not move.endswith(".128")]
        assert len(moves) > len(narrow), f"no wide {instruction} at all"
        assert len(narrow) <= single_numbers, f"narrow accesses: {sorted(set(narrow))}"


class _Hopper:
    """Stands in for Triton's driver, so that its launcher compiles for sm_90 where there is no GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 1000  # the launcher remembers what it compiled by device: not one that a later launch may mean

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every launch inside the test compiled; nothing runs."""
    kernels: list[Any] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            assert all(0 < programs < 2**31 for programs in grid)
            kernels.append(kernel.run(*arguments, grid=grid, warmup=True, **options))

        return launch

    monkeypatch.setattr(triton.runtime.driver, "_active", _Hopper())
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", launcher)
    return kernels


def _launch_everything(dtype: torch.dtype, layout: torch.memory_format, channels: int, sizes: Any, mode: str) -> None:
    top_size, size = sizes
    top, lateral = (torch.empty(2, channels, *s, dtype=dtype).to(memory_format=layout) for s in (top_size, size))
    weight, factors = torch.empty(channels, channels, dtype=dtype), torch.empty(3)
    upsample_add.upsample_add(top, lateral, mode, 0.5)
    upsample_add_backward.upsample_add_backward(lateral, top_size, mode, 0.5)
    merge_backward.merge_backward(lateral, top_size, None, mode, 0.5)
    lateral_connection.lateral_connection(lateral, weight, weight[0], top, mode, 0.5, None)
    weighted_merge.weighted_merge(lateral, top, None, factors, mode)
    weighted_merge.weighted_merge(lateral, top, lateral, factors, mode)
    weighted_merge.weighted_merge(lateral, lateral, lateral, factors, "nearest")
    weighted_merge_backward.weighted_merge_backward(lateral, top.new_empty(()).expand_as(lateral), factors[0])
    lateral_connection.lateral_connection(lateral, weight.t(), None, None, "nearest", 1.0, None)
    if geometry.inner_axis(lateral) == "channels":
        kernel = torch.empty(channels, channels, 3, 3, dtype=dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            output_conv.output_conv(lateral, kernel, weight[0], memory_format)
        output_conv.output_conv_levels([lateral, top], [kernel, kernel], [None, None], None)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("mode", resampling.MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "channels", "sizes"),
    [
        pytest.param(torch.bfloat16, 256, ((25, 40), (50, 80)), id="the-paper's-C5-to-C4"),
        pytest.param(torch.float16, 256, ((38, 57), (75, 113)), id="odd-sizes"),
        pytest.param(torch.float32, 10, ((2, 3), (6, 14)), id="few-channels"),
        pytest.param(torch.bfloat16, 257, ((1, 1), (9, 10)), id="a-tail-and-a-1x1-top"),
    ],
)
def test_a_launch_compiles(
    dtype: torch.dtype,
    channels: int,
    sizes: Any,
    layout: torch.memory_format,
    mode: str,
    launched: list[Any],
    tmp_path: Path,
) -> None:
    """Through Triton's own launcher, whatever alignments the sizes leave: it binds, compiles and does not spill."""
    _launch_everything(dtype, layout, channels, sizes, mode)
    assert len(launched) >= 10
    for compiled in launched:
        _machine_code(compiled, 90, tmp_path)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_variants_are_what_a_launch_compiles(layout: torch.memory_format, launched: list[Any]) -> None:
    """On dense maps whose every count 16 divides: signature, constants, alignments and options."""

    def identity(source: Any, options: Any) -> tuple[Any, ...]:
        constants = sorted(source.constants.items())
        attrs = sorted((place, str(attr)) for place, attr in source.attrs.items() if attr)
        return source.fn.__name__, tuple(source.signature.items()), tuple(constants), tuple(attrs), options

    known = set()
    for variant in VARIANTS.values():
        # A kernel whose warps are given groups of their own has those on top: four that multiply, up to four that load.
        groups = 8 if is_gluon(variant) else 0
        known.add(identity(source_of(variant), variant.options["num_warps"] + groups))
    top, fine = (torch.empty(2, 256, *s, dtype=torch.bfloat16).to(memory_format=layout) for s in ((16, 32), (32, 64)))
    for mode in ("nearest", "bilinear"):
        upsample_add.upsample_add(top, fine, mode, 1.0)
        upsample_add_backward.upsample_add_backward(fine, (16, 32), mode, 1.0)
        for middle in (None, fine):
            # Twice the size in every mode but the bilinear one; and 4 and 2 times.
            for coarse in (top, top[:, :, :8].clone(memory_format=layout)):
                last = (coarse, None) if middle is None else (middle, coarse)
                weighted_merge.weighted_merge(fine, *last, torch.empty(3), mode)
    weighted_merge.weighted_merge(fine, fine, None, torch.empty(2), "nearest")
    # Weights of 8 bits are widened before they are handed over.
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        weighted_merge.weighted_merge(fine, fine, fine, torch.empty(3, dtype=dtype), "nearest", "softmax")
    weighted_merge_backward.weighted_merge_backward(fine, fine, torch.empty(()))
    merge_backward.merge_backward(fine, (16, 32), None, "nearest", 1.0)
    if layout == torch.channels_last:
        channel_sums.channel_sums(fine)
    lateral_connection.lateral_connection(
        fine, torch.empty(256, 256, dtype=fine.dtype), fine[0, :, 0, 0].clone(), top, "nearest", 1.0, None
    )
    if layout == torch.channels_last:
        config, wide = lateral_connection_stationary.TABLE["medium"], torch.empty(256, 512, dtype=fine.dtype)
        feature, bias = fine.repeat(1, 2, 1, 1).contiguous(memory_format=layout), wide[:, 0].clone()
        for coarse in (top, None):
            call = (feature, wide, bias, coarse, fine)
            lateral_connection_stationary.plan(config, *call, "nearest")(*call, 1.0)
        kernel = torch.empty(256, 256, 3, 3, dtype=fine.dtype)
        bias = fine[0, :, 0, 0].clone()
        for memory_format in (torch.channels_last, torch.contiguous_format):
            output_conv.output_conv(fine, kernel, bias, memory_format)
        # The weights packed, then P2 alone, P3 alone, P4 and P5 together.
        pyramid = [torch.empty(1, 256, *size, dtype=fine.dtype, memory_format=layout) for size in output_conv._PYRAMID]
        output_conv.output_conv_levels(pyramid, [kernel] * 4, [bias] * 4, None)
    formats = {"channels": torch.channels_last, "pixels": torch.contiguous_format}
    for axis in ("channels", "pixels") if layout == torch.contiguous_format else ("channels",):
        config = lateral_connection_stationary.FLAT_TABLE[axis, "medium"]
        maps = [each.contiguous(memory_format=formats[axis]) for each in (top, fine)]
        call = (fine, torch.empty(256, 256, dtype=fine.dtype), fine[0, :, 0, 0].clone(), *maps)
        lateral_connection_stationary.plan(config, *call, "nearest")(*call, 1.0)
    assert len(launched) == {torch.contiguous_format: 24, torch.channels_last: 35}[layout]
    for compiled in launched:
        # The gathers take a pointer to partial sums that the plain backward does not use: there it is the result's.
        found = identity(compiled.src, compiled.metadata.num_warps)
        renamed = tuple((n, "*fp32" if n == "partials" else t) for n, t in found[1])
        assert (found[0], renamed, *found[2:]) in known


def test_every_table_is_compiled() -> None:
    """A tile added to a table cannot be left out here."""
    for name, module in (
        ("upsample_add-", upsample_add),
        ("upsample_add_backward-", upsample_add_backward),
        ("merge_backward-", upsample_add_backward),
        ("channel_sums-", channel_sums),
        ("weighted_merge-", weighted_merge),
        ("weighted_merge_backward-", weighted_merge_backward),
    ):
        tiles = {(tile.rows, tile.columns) for tiles in module.TABLE.values() for tile in tiles}
        described = [description for description in VARIANTS if description.startswith(name)]
        assert len(described) >= sum(map(len, module.TABLE.values()))
        for rows, columns in tiles:
            assert any(f"-{rows}x{columns}-" in description for description in described)
    for (arithmetic, _), tile in output_conv.TABLE.items():
        for on_chip in (output_conv.on_chip(tile, copies_in_bulk) for copies_in_bulk in (True, False)):
            assert sum(d.startswith("output_conv-") and d.endswith(f"-{arithmetic}-{on_chip}") for d in VARIANTS) >= 3
    stationary = lateral_connection_stationary
    for tile in (*stationary.TABLE.values(), *stationary.FLAT_TABLE.values()):
        assert any(d.startswith("lateral_connection_stationary-") and d.endswith(f"to{tile}") for d in VARIANTS)
    for (arithmetic, _), tile in lateral_connection.TABLE.items():
        ending = f"{arithmetic}-{tile.pixels}x{tile.channels}x{tile.depth}"
        assert any(description.endswith(ending) for description in VARIANTS)
