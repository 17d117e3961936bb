"""Region proposals on a Feature Pyramid Network (arXiv 1612.03144, section 4.1), and generated training scenes.

Levels P2..P6 share one head; each level has anchors of one scale and three aspect ratios.  A scene has textured
rectangles on a mottled background, and depends on its number only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpn_kernels

STRIDES = (4, 8, 16, 32, 64)  # of P2..P6
# Half the paper's 32 to 512 pixels at these strides, because the scenes have a fifth of its 800 pixels in height.
ANCHOR_SIZES = tuple(4 * stride for stride in STRIDES)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width


def group_norm(channels: int) -> nn.Module:
    """GroupNorm: statistics per image, so the loss does not depend on how processes split the batch."""
    return nn.GroupNorm(4, channels)


class PlainPyramid(nn.Module):
    """The neck in plain PyTorch, with the parameters of `neck`."""

    def __init__(self, neck: fpn_kernels.FeaturePyramidNetwork, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.pyramid = fpn_kernels.reference.FeaturePyramidNetwork(in_channels, neck.out_channels)
        self.pyramid.load_state_dict(neck.state_dict())

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = list(self.pyramid(OrderedDict((str(level), c) for level, c in enumerate(features))).values())
        return (*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2))


class ProposalNetwork(nn.Module):
    """A small ResNet, the pyramid and the shared head: maps an image to objectness and box deltas per anchor.

    Args:
        fused: use `fpn_kernels.FeaturePyramidNetwork`, else its twin in plain PyTorch.
        width: channels of the ResNet's stem.
        channels: channels of the pyramid and the head.
        seed: of the parameters, which do not depend on `fused`.
    """

    def __init__(self, fused: bool, width: int = 8, channels: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = fpn_kernels.ResNetFPN((1, 1, 1, 1), channels, norm_layer=group_norm, width=width)
            self.body = model.body
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
            self.objectness = nn.Conv2d(channels, len(ASPECT_RATIOS), 1)
            self.deltas = nn.Conv2d(channels, 4 * len(ASPECT_RATIOS), 1)
            for layer in (self.conv, self.objectness, self.deltas):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            # Created last, because its constructor uses the random generator.
            self.neck: nn.Module = model.fpn if fused else PlainPyramid(model.fpn, model.body.out_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 3, H, W]`` to ``[N, anchors]`` and ``[N, anchors, 4]``, float32, in the order of `make_anchors`."""
        scores, deltas = [], []
        for p in self.neck(self.body(images)):
            hidden = F.relu(self.conv(p))
            scores.append(self.objectness(hidden).float().permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(hidden).float().permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
        return torch.cat(scores, 1), torch.cat(deltas, 1)


def make_anchors(height: int, width: int) -> Tensor:
    """``[anchors, 4]`` (x0, y0, x1, y1): three per pixel of each level, row by row."""
    levels = []
    for stride, size in zip(STRIDES, ANCHOR_SIZES, strict=True):
        ratios = torch.tensor(ASPECT_RATIOS)
        half = torch.stack([size / ratios.sqrt(), size * ratios.sqrt()], 1) / 2
        y, x = ((torch.arange(math.ceil(extent / stride)) + 0.5) * stride for extent in (height, width))
        centres = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1).view(-1, 1, 2)
        levels.append(torch.cat([centres - half, centres + half], -1).flatten(0, 1))
    return torch.cat(levels)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of ``[A, 4]`` and ``[B, 4]``: ``[A, B]``."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes relative to their anchors, ``[n, 4]`` each (arXiv 1506.01497, equation 2)."""
    (centre, size), (origin, unit) = _centre_and_size(boxes), _centre_and_size(anchors)
    return torch.cat([(centre - origin) / unit, (size / unit).log()], 1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`; a box is at most 64 times its anchor."""
    origin, unit = _centre_and_size(anchors)
    centre, half = origin + deltas[:, :2] * unit, unit * deltas[:, 2:].clamp(max=math.log(64)).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def assign(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Per anchor: 1 (object), 0 (background) or -1 (neither), and the index of the box that it overlaps most.

    An anchor is an object if its overlap is at least 0.7 or the largest for some box; background below 0.3.
    """
    overlaps = iou(anchors, boxes)
    best, index = overlaps.max(1)
    labels = torch.where(best >= 0.7, 1, torch.where(best < 0.3, 0, -1))
    labels[((overlaps == overlaps.amax(0)) & (overlaps > 0)).any(1)] = 1
    return labels, index


def proposal_loss(
    scores: Tensor, deltas: Tensor, anchors: Tensor, boxes: Sequence[Tensor], numbers: Sequence[int], sample: int = 256
) -> Tensor:
    """Objectness loss over `sample` anchors per image (at most half of them objects) plus box loss, mean over images.

    The box loss is the mean over the objects, not over the sample as in arXiv 1506.01497: the training is short.

    Args:
        scores: ``[N, anchors]``; `deltas`: ``[N, anchors, 4]``; `anchors`: ``[anchors, 4]``.
        boxes: those of each image, ``[n, 4]``.
        numbers: of each scene: which anchors are drawn depends on nothing else.
    """
    total = scores.new_zeros(())
    for score, delta, truth, number in zip(scores, deltas, boxes, numbers, strict=True):
        labels, index = assign(anchors, truth)
        generator = torch.Generator().manual_seed(number)
        shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
        objects, ground = (shuffled[labels[shuffled] == label] for label in (1, 0))
        objects = objects[: sample // 2]
        chosen = torch.cat([objects, ground[: sample - len(objects)]])
        total = total + F.binary_cross_entropy_with_logits(score[chosen], labels[chosen].float())
        wanted = encode(truth[index[objects]], anchors[objects])
        total = total + F.smooth_l1_loss(delta[objects], wanted, beta=1 / 9, reduction="sum") / max(1, len(objects))
    return total / len(boxes)


def propose(scores: Tensor, deltas: Tensor, anchors: Tensor, count: int, overlap: float = 0.5) -> Tensor:
    """The best boxes of one image after non-maximum suppression at `overlap`."""
    order = scores.argsort(descending=True)[: 20 * count]
    boxes = decode(deltas[order], anchors[order])
    overlaps = iou(boxes, boxes).cpu() > overlap
    left = torch.ones(len(boxes), dtype=torch.bool)
    kept: list[int] = []
    while len(kept) < count and left.any():
        best = int(left.byte().argmax())
        kept.append(best)
        left &= ~overlaps[best]
        left[best] = False
    return boxes[kept]


def scene(number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Image ``[3, height, width]`` and boxes ``[n, 4]`` of one to five rectangles; depends on `number` only."""
    generator = torch.Generator().manual_seed(number)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    coarse = torch.randn(1, 3, max(2, height // 16), max(2, width // 16), generator=generator)
    image = 0.5 * F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    image = image + 0.2 * torch.randn(3, height, width, generator=generator)
    boxes: list[tuple[int, int, int, int]] = []
    wanted = 1 + int(uniform(0, 5))
    for _ in range(8 * wanted):
        side = math.exp(uniform(math.log(14), math.log(0.6 * min(height, width))))
        ratio = math.sqrt(math.exp(uniform(-math.log(2), math.log(2))))
        h, w = (min(round(length), extent) for length, extent in ((side * ratio, height), (side / ratio, width)))
        y, x = int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1))
        box = (x, y, x + w, y + h)
        if boxes and iou(torch.tensor([box]).float(), torch.tensor(boxes).float()).max() > 0.1:
            continue
        boxes.append(box)
        colour = 3 * torch.rand(3, 1, 1, generator=generator) - 1.5
        stripes = torch.sin(torch.arange(w) * uniform(0.3, 1.5)).expand(3, h, w)
        image[:, y : y + h, x : x + w] = colour + 0.3 * stripes
        if len(boxes) == wanted:
            break
    return image, torch.tensor(boxes, dtype=torch.float32)
