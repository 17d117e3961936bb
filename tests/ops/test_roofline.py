"""Minimal bytes and operations, against figures worked out by hand for one 800 x 1280 image in bfloat16."""

from __future__ import annotations

import pytest
import torch

from fpn_kernels import roofline
from fpn_kernels.roofline import Cost

BF16 = torch.bfloat16
MB, GFLOP = 10**6, 10**9
SIZES = {2: (200, 320), 3: (100, 160), 4: (50, 80), 5: (25, 40)}
CHANNELS = {2: 256, 3: 512, 4: 1024, 5: 2048}
FEATURES = [(1, CHANNELS[level], *SIZES[level]) for level in SIZES]
ONE_MAP = 256 * 200 * 320 * 2  # L: the 256-channel map at C2
WEIGHTS = 2 * (256 * 256 + 512 * 256 + 1024 * 256 + 2048 * 256)
BIASES = 2 * 4 * 256


def _merged(level: int) -> tuple[int, int, int, int]:
    return (1, 256, *SIZES[level])


def test_upsample_add_moves_two_and_a_quarter_maps() -> None:
    cost = roofline.upsample_add(_merged(2), SIZES[3], BF16)
    assert cost.bytes == 9 * ONE_MAP // 4
    assert cost.bytes / MB == pytest.approx(73.7, abs=0.05)
    assert cost.flops == 256 * 200 * 320


def test_three_merges_add_up() -> None:
    total = sum((roofline.upsample_add(_merged(n), SIZES[n + 1], BF16) for n in (2, 3, 4)), start=Cost(0, 0))
    assert total.bytes / MB == pytest.approx(96.8, abs=0.05)


def test_a_gain_costs_a_multiplication_and_no_byte() -> None:
    plain = roofline.upsample_add(_merged(2), SIZES[3], BF16)
    scaled = roofline.upsample_add(_merged(2), SIZES[3], BF16, gain=0.5)
    assert (scaled.bytes, scaled.flops) == (plain.bytes, 2 * plain.flops)


def test_a_finer_top_is_not_read_whole() -> None:
    # 8 x 8 read at 2 x 2 places by nearest upsampling "to" 2 x 2: three maps of four elements.
    assert roofline.upsample_add((1, 1, 2, 2), (8, 8), torch.float32).bytes == 3 * 4 * 4


def test_upsample_add_backward_moves_one_and_a_quarter_maps() -> None:
    cost = roofline.upsample_add_backward(_merged(2), SIZES[3], BF16)
    assert cost.bytes == 5 * ONE_MAP // 4


def test_upsample_add_backward_writes_grad_lateral_only_for_a_gain() -> None:
    cost = roofline.upsample_add_backward(_merged(2), SIZES[3], BF16, gain=0.5)
    assert cost.bytes == 9 * ONE_MAP // 4


def test_weighted_merge_by_hand() -> None:
    # A top-down node of 2 x 4 x 6 over 1 x 2 x 3, float32: 48 elements read and written, 12 read, two factors.
    assert roofline.weighted_merge((1, 2, 4, 6), [(2, 3)], torch.float32) == Cost(4 * (2 * 48 + 12) + 8, 3 * 48)
    # A bottom-up node of three maps in bfloat16: three maps read, one written, three float32 factors.
    assert roofline.weighted_merge(_merged(2), [SIZES[2]] * 2, BF16) == Cost(4 * ONE_MAP + 12, 5 * ONE_MAP // 2)


def test_weighted_merge_backward_by_hand() -> None:
    # grad 48; maps and their gradients 48 and 12 each; two factors and their gradients.
    cost = roofline.weighted_merge_backward((1, 2, 4, 6), [(2, 3)], torch.float32)
    assert cost == Cost(4 * (48 + 2 * 48 + 2 * 12) + 16, 3 * 60 + 48)
    assert roofline.weighted_merge_backward(_merged(2), [SIZES[2]] * 2, BF16).bytes == 7 * ONE_MAP + 24


@pytest.mark.parametrize(
    ("level", "megabytes", "gflop"), [(2, 73.9, 8.4), (3, 26.9, 4.2), (4, 11.3, 2.1), (5, 5.7, 1.05)]
)
def test_lateral_connection_at_each_level(level: int, megabytes: float, gflop: float) -> None:
    top = SIZES.get(level + 1)
    cost = roofline.lateral_connection((1, CHANNELS[level], *SIZES[level]), 256, top, BF16)
    assert cost.bytes / MB == pytest.approx(megabytes, abs=0.05)
    assert cost.flops / GFLOP == pytest.approx(gflop, rel=0.01)


def test_lateral_connection_backward_by_hand() -> None:
    # 2 x 3 map, 4 -> 5 channels, top 1 x 2, float32: grad 30, feature 24 twice, weight 20 twice, bias 5, top 10.
    cost = roofline.lateral_connection_backward((1, 4, 2, 3), 5, (1, 2), torch.float32)
    assert cost == Cost(4 * (30 + 2 * 24 + 2 * 20 + 5 + 10), 2 * 2 * 6 * 4 * 5)
    # A frozen backbone: no gradient of the feature, hence no use for the weight either.
    frozen = roofline.lateral_connection_backward((1, 4, 2, 3), 5, (1, 2), torch.float32, feature_grad=False)
    assert frozen == Cost(4 * (30 + 24 + 20 + 5 + 10), 2 * 6 * 4 * 5)


def test_output_convolutions() -> None:
    costs = [roofline.output_conv(_merged(level), 256, BF16) for level in SIZES]
    assert costs[0].flops / GFLOP == pytest.approx(75.5, abs=0.05)
    assert sum(cost.flops for cost in costs) / GFLOP == pytest.approx(100.3, abs=0.05)
    assert costs[0].bytes == 2 * ONE_MAP + 2 * (9 * 256 * 256 + 256)
    backward = roofline.output_conv_backward(_merged(2), 256, BF16)
    assert backward.flops == 2 * costs[0].flops
    assert backward.bytes == 3 * ONE_MAP + 2 * (2 * 9 * 256 * 256 + 256)


def test_top_down_pathway_reads_the_features_and_writes_the_merged_maps() -> None:
    cost = roofline.top_down_pathway(FEATURES, 256, BF16)
    assert (cost.bytes - WEIGHTS - BIASES) / MB == pytest.approx(61.4 + 43.5, abs=0.1)
    assert cost.flops / GFLOP == pytest.approx(15.7, abs=0.05)


def test_top_down_pathway_backward_counts_each_map_once() -> None:
    cost = roofline.top_down_pathway_backward(FEATURES, 256, BF16)
    features = 2 * sum(c * h * w for _, c, h, w in FEATURES)
    merged = cost.bytes - 2 * features - 2 * WEIGHTS - BIASES
    assert merged == 2 * 256 * sum(h * w for h, w in SIZES.values())
    assert cost.flops == 2 * roofline.top_down_pathway(FEATURES, 256, BF16).flops


def test_the_neck_does_not_move_its_merged_maps() -> None:
    cost = roofline.neck(FEATURES, 256, BF16, pool=False)
    features = 2 * sum(c * h * w for _, c, h, w in FEATURES)
    outputs = 2 * 256 * sum(h * w for h, w in SIZES.values())
    assert cost.bytes == features + outputs + WEIGHTS + BIASES + 4 * 2 * (9 * 256 * 256 + 256)
    assert cost.flops / GFLOP == pytest.approx(15.7 + 100.3, abs=0.1)
    pooled = roofline.neck(FEATURES, 256, BF16)
    assert pooled.bytes - cost.bytes == 2 * 256 * 13 * 20


def test_a_training_step_is_forward_backward_and_the_maps_kept() -> None:
    forward = roofline.neck(FEATURES, 256, BF16)
    backward = roofline.neck_backward(FEATURES, 256, BF16)
    step = roofline.neck_forward_backward(FEATURES, 256, BF16)
    assert step.flops == forward.flops + backward.flops == 3 * forward.flops
    assert step.bytes == forward.bytes + backward.bytes + 2 * 256 * sum(h * w for h, w in SIZES.values())


def test_bytes_follow_the_dtype_and_the_batch() -> None:
    for cost in (roofline.lateral_connection, roofline.lateral_connection_backward):
        half, single = (cost((2, 8, 6, 4), 16, (3, 2), dtype) for dtype in (BF16, torch.float32))
        assert (single.bytes, single.flops) == (2 * half.bytes, half.flops)
        assert half.flops == 2 * cost((1, 8, 6, 4), 16, (3, 2), BF16).flops


def test_the_floor_is_the_larger_of_the_two() -> None:
    cost = Cost(bytes=4300 * MB, flops=79 * GFLOP)
    assert cost.floor(bandwidth=4.3e12, flop_rate=790e12) == pytest.approx(1e-3)
    assert cost.floor(bandwidth=4.3e12, flop_rate=7.9e12) == pytest.approx(1e-2)


def test_the_floors_of_the_h200() -> None:
    # 4.3 TB/s and 790 TFLOP/s: 17.2 us for a merge at C2, 96 us for its output convolution.
    assert roofline.upsample_add(_merged(2), SIZES[3], BF16).floor(4.3e12, 790e12) == pytest.approx(17.2e-6, rel=0.01)
    assert roofline.output_conv(_merged(2), 256, BF16).floor(4.3e12, 790e12) == pytest.approx(96e-6, rel=0.01)


@pytest.mark.parametrize(("bandwidth", "rate"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_floor_needs_ceilings(bandwidth: float, rate: float) -> None:
    with pytest.raises(ValueError, match="bandwidth and flop_rate must be above 0"):
        Cost(1, 1).floor(bandwidth, rate)
