"""`resampling.py` against scalar arithmetic and against eager PyTorch itself."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from fpn_kernels import resampling

UNEVEN = [(30, 58), (98, 194), (116, 230), (2, 141), (2, 218), (19, 38), (113, 225), (7, 3), (1, 9), (9, 1)]


@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_source_index_is_the_scalar_float32_formula(mode: str) -> None:
    pairs = [(i, o) for i in range(1, 70, 3) for o in range(1, 140, 7)] + UNEVEN
    for i, o in pairs:
        assert resampling.source_index(i, o, mode).tolist() == oracle.nearest_index(i, o, mode), (i, o)


def _eager_index(in_size: int, out_size: int, mode: str, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    values = torch.arange(in_size, dtype=dtype).view(1, 1, 1, -1).expand(1, 2, 2, -1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return F.interpolate(values.contiguous(memory_format=layout), size=(2, out_size), mode=mode)[0, 0, 0].long()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_eager_reads_the_same_pixels_where_indices_agree_says_so(
    mode: str, dtype: torch.dtype, channels_last: bool
) -> None:
    pairs = [(i, o) for i in range(1, 200, 3) for o in range(1, 400, 13)] + UNEVEN
    unsure = 0
    for i, o in pairs:
        if not resampling.indices_agree(i, o, mode, dtype):
            unsure += 1
            continue
        eager = _eager_index(i, o, mode, dtype, channels_last)
        assert torch.equal(eager, resampling.source_index(i, o, mode)), (i, o)
    # A third of these pairs has a whole position in nearest-exact; `F.interpolate` serves the rest.
    assert unsure <= (0.4 if mode == "nearest-exact" else 0.05) * len(pairs)
    if mode == "nearest" and dtype == torch.float32:
        assert unsure == 0


def test_large_contiguous_float64_maps_are_where_eager_reads_other_pixels() -> None:
    """Should this fail, eager has become consistent, and `indices_agree` can go."""
    assert not resampling.indices_agree(2, 218, "nearest", torch.float64)
    eager = _eager_index(2, 218, "nearest", torch.float64, channels_last=False)
    assert not torch.equal(eager, resampling.source_index(2, 218))


def test_the_float32_index_is_not_the_rational_one_at_1619_pairs() -> None:
    differing = 0
    for out in range(1, 400):
        destination = torch.arange(out)
        for i in range(1, 200):
            differing += not torch.equal(resampling.source_index(i, out), destination * i // out)
    assert differing == 1619


@pytest.mark.parametrize("mode", resampling.NEAREST_MODES)
def test_source_ranges_invert_the_source_index(mode: str) -> None:
    for i, o in [(i, o) for i in range(1, 40, 3) for o in range(1, 90, 7)] + UNEVEN:
        source = resampling.source_index(i, o, mode)
        start, stop = resampling.source_ranges(source, i)
        for pixel in range(i):
            readers = (source == pixel).nonzero().flatten().tolist()
            assert readers == list(range(int(start[pixel]), int(stop[pixel]))), (i, o, pixel)
        assert int((stop - start).max()) <= resampling.longest_range(i, o), (i, o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bilinear_weights_resize_as_eager_does(dtype: torch.dtype) -> None:
    for i, o in [(5, 10), (3, 10), (10, 3), (1, 4), (57, 113), (4, 4)]:
        values = torch.randn(i, dtype=dtype)
        lower, upper, weight = resampling.bilinear_weights(i, o, dtype)
        ours = values[lower] * (1 - weight) + values[upper] * weight
        eager = F.interpolate(values.view(1, 1, 1, i), size=(1, o), mode="bilinear").flatten()
        # The position is rounded at its own size, up to that of the source axis.
        torch.testing.assert_close(ours, eager, rtol=0, atol=4 * i * torch.finfo(dtype).eps)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: .*'bilinear'"):
        resampling.source_index(2, 4, "bilinear")
