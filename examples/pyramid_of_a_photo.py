"""Run a photograph through ResNet-50 and its pyramid, fused and eager, and draw the levels.

    python examples/pyramid_of_a_photo.py [photograph] [--device cuda] [--dtype bfloat16] [--output figure.png]

Prints each level's shape and its largest difference from plain PyTorch with the same weights, then both times and the
backend that served.  Without --weights the network is random: its maps show edges and textures, not objects.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fpn_kernels
from fpn_kernels.operators.dispatch import record_calls

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LEVELS = ("p2", "p3", "p4", "p5")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NEEDS = "this example needs {}, which is not installed here: pip install 'fpn_kernels[examples]'"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("photograph", nargs="?", type=Path, help="an image file (default: scikit-learn's china.jpg)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output", type=Path, default=Path("pyramid_of_a_photo.png"), help="the figure")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each pyramid; the median is printed")
    parser.add_argument("--size", type=int, default=600, help="the photograph's shorter side in pixels")
    parser.add_argument("--weights", type=Path, help="torchvision's state_dict of a ResNet-50 (a .pth file)")
    options = parser.parse_args(argv)
    # Below 64, the coarsest map of the ResNet has one pixel, which BatchNorm cannot train on.
    for name, least in (("repeats", 1), ("size", 64)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    cuda = torch.cuda.is_available()
    try:
        options.device = torch.device(options.device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if options.device.type == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    for name in ("photograph", "weights"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"{name}: there is no file {path}")
    if not options.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.resolve().parent}")
    return options


def load_photograph(path: Path | None) -> Tensor:
    """``[1, 3, H, W]`` in [0, 1]."""
    try:
        import numpy
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise SystemExit(NEEDS.format("Pillow and NumPy")) from error
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError as error:
            raise SystemExit(NEEDS.format("scikit-learn (or the path of a photograph)")) from error
        pixels = load_sample_image("china.jpg")
    else:
        try:
            with Image.open(path) as image:
                pixels = numpy.asarray(image.convert("RGB"))
        except UnidentifiedImageError:
            raise SystemExit(f"photograph: {path} is not an image that Pillow can read") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def resized(photograph: Tensor, shorter_side: int) -> Tensor:
    height, width = photograph.shape[2:]
    ratio = shorter_side / min(height, width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return F.interpolate(photograph, size=size, mode="bilinear", antialias=True).clamp(0, 1)


def normalised(photograph: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (photograph - mean) / std


def build(options: argparse.Namespace, image: Tensor) -> fpn_kernels.ResNetFPN:
    """ResNet-50 with its pyramid, from torchvision's weights or a fixed seed."""
    torch.manual_seed(0)
    model = fpn_kernels.resnet50_fpn()
    if options.weights is not None:
        try:
            model.body.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise SystemExit(f"--weights: {options.weights} is not a ResNet-50 state_dict: {error}") from error
        return model.eval()
    # With random weights and an identity BatchNorm, the maps grow from block to block. One pass in training mode sets
    # the statistics of the norms.
    for module in model.body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.body.train()(image)
    return model.eval()


def eager_twin(model: fpn_kernels.ResNetFPN) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """The pyramid of the same weights, written in plain PyTorch."""
    neck = model.fpn
    weights = neck.state_dict()
    channels = [weights[f"inner_blocks.{level}.0.weight"].shape[1] for level in range(len(neck.inner_blocks))]
    twin = fpn_kernels.reference.FeaturePyramidNetwork(channels, neck.out_channels, mode=neck.mode)
    twin.load_state_dict(weights)
    twin = twin.to(weights["inner_blocks.0.0.weight"]).eval()

    def pyramid(features: list[Tensor]) -> tuple[Tensor, ...]:
        maps = list(twin(OrderedDict(zip(LEVELS, features, strict=True))).values())
        return (*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2))

    return pyramid


def median_seconds(calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """The median time of each call including the device, after two warm-up rounds.

    The calls alternate, so that a slow moment of the machine slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def as_colours(level: Tensor, guide: Tensor) -> Tensor:
    """The first three principal components of a map ``[C, H, W]`` as red, green and blue ``[H, W, 3]``.

    The sign of a principal component is arbitrary. Each one is flipped to correlate with the brightness of the
    photograph, so that the levels can be compared.
    """
    channels, height, width = level.shape
    pixels = level.double().flatten(1).T
    pixels = pixels - pixels.mean(0)
    _, directions = torch.linalg.eigh(pixels.T @ pixels)
    components = pixels @ directions[:, -min(3, channels) :].flip(1)
    brightness = F.interpolate(guide.mean(0)[None, None].double(), size=(height, width), mode="area").flatten()
    components = components * torch.where((brightness - brightness.mean()) @ components < 0, -1.0, 1.0)
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    colours: Tensor = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours.view(height, width, -1)


def draw(photograph: Tensor, maps: dict[str, Tensor], weights: Path | None, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(NEEDS.format("matplotlib")) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height, width = photograph.shape[2:]
    figure, axes = pyplot.subplots(
        2, 3, figsize=(13.5, 9.0 * height / width + 1.3), layout="constrained", facecolor="white"
    )
    panels = [("photograph", photograph[0].permute(1, 2, 0), f"{height} x {width}")]
    for name, level in maps.items():
        _, channels, h, w = level.shape
        stride = 2 ** int(name[1:])
        panels.append(
            (name.upper(), as_colours(level[0].cpu(), photograph[0]), f"stride {stride}: {channels} x {h} x {w}")
        )
    for axis, (title, picture, note) in zip(axes.flat, panels, strict=True):
        axis.imshow(picture.numpy(), interpolation="nearest", extent=(0, width, height, 0))
        axis.set_title(f"{title}   ({note})", fontsize=11)
        axis.set_axis_off()
    source = f"weights: {weights.name}" if weights else "random weights: structure, not semantics"
    title = f"Feature pyramid of a photograph, three main components of each level as RGB\n{source}"
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(
    fused: tuple[Tensor, ...], eager: tuple[Tensor, ...], seconds: dict[str, float], served: list[tuple[str, str]]
) -> None:
    print(f"{'level':<6} {'shape':<20} {'largest difference':>18} {'largest value':>14}")
    for index, (ours, theirs) in enumerate(zip(fused, eager, strict=True), start=2):
        shape = " x ".join(str(size) for size in ours.shape)
        difference, value = (float(m.double().abs().max()) for m in (ours.double() - theirs.double(), theirs))
        print(f"p{index:<5} {shape:<20} {difference:>18.3e} {value:>14.3e}")
    print()
    for name, value in seconds.items():
        print(f"{name:<6} {1e3 * value:9.2f} ms")
    print(f"fused / eager: {seconds['eager'] / seconds['fused']:.2f} times as fast (pyramid only, forward, median)")
    counts = [f"{served.count(pair)} x {pair[0]} by {pair[1]}" for pair in dict.fromkeys(served)]
    print("served: " + ", ".join(counts))
    if {backend for _, backend in served} == {"eager"}:
        print("no fused kernel is on this machine for this call: both are plain PyTorch, the ratio is noise")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    photograph = resized(load_photograph(options.photograph), options.size)
    model = build(options, normalised(photograph)).to(options.device, DTYPES[options.dtype])
    image = normalised(photograph).to(options.device, DTYPES[options.dtype])
    where = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    print(f"ResNet-50 and its pyramid on {where}, {options.dtype}, image {tuple(image.shape)}\n")

    with torch.no_grad():
        features = list(model.body(image))
        eager_pyramid = eager_twin(model)
        with record_calls() as served:
            fused = model.fpn(features)
        eager = eager_pyramid(features)
        calls = {"eager": lambda: eager_pyramid(features), "fused": lambda: model.fpn(features)}
        seconds = median_seconds(calls, options.device, options.repeats)
    report(fused, eager, seconds, served)
    maps = {f"p{level}": m.float() for level, m in enumerate(fused, start=2)}
    draw(photograph, maps, options.weights, options.output)
    print(f"figure: {options.output}")


if __name__ == "__main__":
    main()
