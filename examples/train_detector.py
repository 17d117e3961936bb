"""Train region proposals on a fused pyramid and on plain PyTorch, and compare their losses.

    python examples/train_detector.py --compare                      # both, and a control
    python examples/train_detector.py --backend eager                # one of them
    torchrun --nproc-per-node 2 examples/train_detector.py --compare # the batch split among processes

The model is a small ResNet, `fpn_kernels.FeaturePyramidNetwork` with P6, and one head shared by all levels (arXiv
1612.03144, section 4.1).  The scenes are generated, so nothing is downloaded.

--compare also trains a control: plain PyTorch, from weights that differ by one float32 rounding.  Training from scratch
amplifies such a difference by orders of magnitude within fifty steps, so all curves diverge in the end.  The command
fails if the fused run differs from eager by more than --tolerance and by more than ten times the control's difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from proposals import ProposalNetwork, iou, make_anchors, proposal_loss, propose, scene
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_kernels.operators.dispatch import record_calls

POINTS = (5, 10, 20, 50, 100, 200, 500, 1000)  # steps whose difference from eager is printed
HELD_OUT = 10**6  # the first scene that no training run reaches
NEEDS_MATPLOTLIB = "figure: needs matplotlib, which is not installed here: pip install 'fpn_kernels[examples]'"


@dataclass
class Run:
    """One training: loss and seconds per step, the backends that served, and the recall."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    served: list[tuple[str, str]] = field(default_factory=list)
    recall: float = 0.0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--backend", choices=("fused", "eager"), default="fused", help="the pyramid to train with")
    parser.add_argument("--compare", action="store_true", help="train with both, and a control")
    parser.add_argument("--tolerance", type=float, help="relative difference allowed (default: 1e-3; with --amp, 0.01)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="scenes per step, over all processes")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 216), metavar=("H", "W"), help="size of a scene")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate (SGD, momentum 0.9)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="draw the loss curves and two scenes to this PNG")
    parser.add_argument("--losses", type=Path, help="write each step's loss to this JSON file")
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("seed", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.tolerance is None:
        options.tolerance = 0.01 if options.amp else 1e-3
    if min(options.size) < 32:
        parser.error(f"--size: expected at least 32 x 32, got {options.size[0]} x {options.size[1]}")
    for name in ("figure", "losses"):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name}: there is no folder {path.resolve().parent}")
    cuda = torch.cuda.is_available()
    options.device = options.device or ("cuda" if cuda else "cpu")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch % world:
        parser.error(f"--batch: expected a multiple of the {world} processes, got {options.batch}")
    return options


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every weight to the next float32 number."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))


def batch_of(numbers: Sequence[int], size: Sequence[int], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    images, boxes = zip(*(scene(number, *size) for number in numbers), strict=True)
    return torch.stack(images).to(device), [each.to(device) for each in boxes]


def train(runs: Mapping[str, Run], options: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    """Train all runs on the same scenes, step by step in turns, so that a slow moment slows all of them."""
    anchors = make_anchors(*options.size).to(device)
    optimizers = {
        name: torch.optim.SGD(run.model.parameters(), lr=options.rate, momentum=0.9, weight_decay=1e-4)
        for name, run in runs.items()
    }
    share, warm = options.batch // world, min(20, max(1, options.steps // 4))
    for step in range(options.steps):
        first = step * options.batch + rank * share
        numbers = range(first, first + share)
        images, boxes = batch_of(numbers, options.size, device)
        for name, run in runs.items():
            optimizer = optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min(1.0, (step + 1) / warm)
            start = time.perf_counter()
            with record_calls() as calls:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                    scores, deltas = run.model(images)
                loss = proposal_loss(scores, deltas, anchors, boxes, numbers)
                loss.backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                optimizer.step()
            loss = loss.detach()
            if world > 1:
                dist.all_reduce(loss)
            run.losses.append(float(loss) / world)  # synchronises with the device
            run.seconds.append(time.perf_counter() - start)
            run.served = calls


@torch.no_grad()
def found(model: nn.Module, numbers: Sequence[int], size: Sequence[int], device: torch.device) -> tuple[float, Any]:
    """The recall (share of boxes that one of the best 50 proposals overlaps by at least 0.5), and the proposals."""
    anchors = make_anchors(*size).to(device)
    images, boxes = batch_of(numbers, size, device)
    outputs = zip(*model(images), strict=True)
    proposals = [propose(scores, deltas, anchors, 50) for scores, deltas in outputs]
    hits = [iou(truth, boxed).amax(1) >= 0.5 for truth, boxed in zip(boxes, proposals, strict=True)]
    return float(torch.cat(hits).float().mean()), (images.cpu(), boxes, proposals)


def parted(runs: Mapping[str, Run], name: str) -> list[float]:
    """Per step, the largest relative difference from eager's loss so far."""

    def worse(so_far: float, here: float) -> float:
        return here if not (math.isnan(so_far) or here <= so_far) else so_far  # NaN counts as the largest

    pairs = zip(runs["eager"].losses, runs[name].losses, strict=True)
    return list(itertools.accumulate((abs(eager - other) / eager for eager, other in pairs), worse))


def first_difference(runs: Mapping[str, Run], tolerance: float) -> int | None:
    """The first step whose difference from eager exceeds rounding, or None."""
    pairs = enumerate(zip(parted(runs, "fused"), parted(runs, "control"), strict=True))
    # `not <=` instead of `>`: NaN fails.
    return next((step for step, (fused, control) in pairs if not fused <= max(tolerance, 10 * control)), None)


def show(runs: Mapping[str, Run], options: argparse.Namespace) -> None:
    print(f"{'step':>6}" + "".join(f"{name + ' loss':>14}" for name in runs) + "   difference" * (len(runs) - 1))
    shown = sorted({0, *range(0, options.steps, max(1, options.steps // 10)), options.steps - 1})
    for step in shown:
        first, *others = values = [run.losses[step] for run in runs.values()]
        cells = [f"{value:14.4f}" for value in values] + [f"{abs(first - other) / first:13.1e}" for other in others]
        print(f"{step:>6}" + "".join(cells))
    print()
    for name, run in runs.items():
        counts = [f"{run.served.count(pair)} x {pair[0]} by {pair[1]}" for pair in dict.fromkeys(run.served)]
        print(
            f"{name:<7} {1e3 * statistics.median(run.seconds):8.1f} ms a step, recall {run.recall:.0%}"
            f" of held-out boxes; served: {', '.join(counts) or 'plain PyTorch'}"
        )
    for name in list(runs)[1:]:
        steps = {step: f"{value:.0e}" for step, value in enumerate(parted(runs, name), start=1)}
        print(
            f"{name} parted from eager by " + ", ".join(f"{steps[n]} in {n}" for n in steps if n in POINTS) + " steps"
        )


def draw(runs: Mapping[str, Run], scenes: Any, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(NEEDS_MATPLOTLIB) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained", facecolor="white")
    for (name, run), colour, thickness in zip(
        runs.items(), ("#f2a93b", "#1f4e9c", "#7a7a7a"), (3, 1.2, 0.8), strict=False
    ):
        axes[0].plot(run.losses, label=f"{name} (recall {run.recall:.0%})", color=colour, linewidth=thickness)
    axes[0].set(xlabel="step", ylabel="loss", title="training loss", ylim=(0, None))
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    for axis, image, boxes, proposals in zip(axes[1:], *scenes, strict=False):
        axis.imshow(((image + 2) / 4).clamp(0, 1).permute(1, 2, 0).numpy())
        best = iou(boxes, proposals).argmax(1)  # one proposal per box: fifty would hide the scene
        for each, colour, width in ((boxes, "white", 3.0), (proposals[best], "#ff2d2d", 1.5)):
            for x0, y0, x1, y1 in each.tolist():
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width))
        axis.set_title("held-out scene: boxes (white), nearest of 50 proposals (red)", fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        runs = {}
        for name in ("eager", "fused", "control") if options.compare else (options.backend,):
            model: nn.Module = ProposalNetwork(name == "fused", seed=options.seed).to(device)
            if name == "control":
                nudge(model)
            if world > 1:
                ids = [device.index] if device.type == "cuda" else None
                model = DistributedDataParallel(model, device_ids=ids)
            runs[name] = Run(model)
        train(runs, options, rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if rank:
        return 0
    return finish(runs, options, world, device)


def finish(runs: Mapping[str, Run], options: argparse.Namespace, world: int, device: torch.device) -> int:
    """Print and draw the results in the first process; return 1 if the losses differ too much."""
    scenes = None
    for run in runs.values():
        model = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
        run.recall, scenes = found(model, range(HELD_OUT, HELD_OUT + 16), options.size, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = "bfloat16 autocast" if options.amp else "float32"
    print(f"{world} process{'es' if world > 1 else ''} on {where}, {dtype}, {options.batch} scenes a step\n")
    show(runs, options)
    if options.losses is not None:
        options.losses.write_text(json.dumps({name: run.losses for name, run in runs.items()}))
    if options.figure is not None:
        draw(runs, scenes, options.figure)
        print(f"figure: {options.figure}")
    step = first_difference(runs, options.tolerance) if options.compare else None
    if step is not None:
        print(f"error: in step {step} the fused run parts from eager as no rounding would", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
