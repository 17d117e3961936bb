"""The layout that a tensor's strides say is the one that PyTorch says."""

from __future__ import annotations

import random

import torch
from torch._prims_common import suggest_memory_format

from fpn_kernels.operators.layouts import result_format


def _map(choose: random.Random) -> torch.Tensor:
    """Any strides, or a slice of a dense map, permuted, expanded: sizes of 0 and 1 among them."""
    shape = [choose.choice((0, 1, 1, 2, 3, 5)) for _ in range(4)]
    kind = choose.randrange(4)
    if kind == 0:
        return torch.empty_strided(shape, [choose.choice((0, 1, 2, 3, 4, 6, 12, 30, 60)) for _ in range(4)])
    whole = torch.empty([size + choose.randrange(2) for size in shape])
    whole = whole.contiguous(memory_format=choose.choice((torch.contiguous_format, torch.channels_last)))
    part = whole[tuple(slice(size) for size in shape)]
    if kind == 2:
        part = part.permute(choose.sample(range(4), 4))
    if kind == 3 and part.shape[1]:
        part = part[:, :1].expand(-1, 3, -1, -1)
    return part


def test_the_layout_is_the_one_that_pytorch_says() -> None:
    choose = random.Random(0)
    maps = [_map(choose) for _ in range(5000)]
    formats = [suggest_memory_format(each) for each in maps]
    assert [result_format(each) for each in maps] == formats
    assert [result_format(torch.nn.Parameter(each)) for each in maps] == formats
    assert min(formats.count(each) for each in (torch.contiguous_format, torch.channels_last)) > 100
