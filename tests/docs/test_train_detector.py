"""`examples/train_detector.py`: its parts; fused and eager learn the same, in one process and in two."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from documents import ROOT

SMALL = ["--device", "cpu", "--size", "72", "100", "--batch", "4", "--steps", "16"]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, importable as a script in it sees it; without the variables of a launcher of these tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small only make a second thread wait
    yield ROOT / "examples"
    torch.set_num_threads(threads)
    for name in ("proposals", "train_detector"):
        sys.modules.pop(name, None)


@pytest.fixture
def proposals(examples: Path) -> ModuleType:
    return importlib.import_module("proposals")


@pytest.fixture
def trainer(examples: Path) -> ModuleType:
    return importlib.import_module("train_detector")


def test_anchors_are_those_of_the_predictions(proposals: ModuleType) -> None:
    height, width = 72, 100  # P2..P6: 18 x 25, 9 x 13, 5 x 7, 3 x 4, 2 x 2
    anchors = proposals.make_anchors(height, width)
    scores, deltas = proposals.ProposalNetwork(fused=True)(torch.randn(2, 3, height, width))
    assert len(anchors) == 3 * (18 * 25 + 9 * 13 + 5 * 7 + 3 * 4 + 2 * 2)
    assert scores.shape == (2, len(anchors)) and deltas.shape == (2, len(anchors), 4)
    size = anchors[:, 2:] - anchors[:, :2]
    assert size.prod(1).sqrt().round().unique().tolist() == list(proposals.ANCHOR_SIZES)
    torch.testing.assert_close((size[:, 1] / size[:, 0])[:3], torch.tensor(proposals.ASPECT_RATIOS))
    # The first row of P2 from left to right, then the second row: the order of a map [H, W] flattened.
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[[0, 3, 3 * 25]].round().tolist() == [[2, 2], [6, 2], [2, 6]]


def test_overlaps_and_boxes_relative_to_anchors(proposals: ModuleType) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [10, 10, 12, 14]])
    overlaps = proposals.iou(boxes, boxes)
    torch.testing.assert_close(overlaps, torch.tensor([[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 1]]))
    anchors = boxes[[1, 2, 0]] + torch.tensor([0.5, -1, 1.5, 2])
    torch.testing.assert_close(proposals.decode(proposals.encode(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-5)


def test_objects_are_what_overlaps_enough_or_most(proposals: ModuleType) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 5], [50, 50, 60, 60], [20, 0, 30, 4]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [80, 80, 90, 90]])
    labels, index = proposals.assign(anchors, boxes)
    # Equal; 0.8; 0.5: neither; far from all; 0.4, but nothing overlaps the second box more.
    assert labels.tolist() == [1, 1, -1, 0, 1]
    assert index[[0, 1, 4]].tolist() == [0, 0, 1]


def test_the_loss_is_small_where_the_predictions_are_right(proposals: ModuleType) -> None:
    _, boxes = proposals.scene(3, 72, 100)
    anchors = proposals.make_anchors(72, 100)
    labels, index = proposals.assign(anchors, boxes)
    scores = torch.where(labels == 1, 20.0, -20.0)[None]
    deltas = proposals.encode(boxes[index], anchors)[None]
    assert float(proposals.proposal_loss(scores, deltas, anchors, [boxes], [3])) < 1e-6
    assert float(proposals.proposal_loss(-scores, deltas, anchors, [boxes], [3])) > 10
    assert float(proposals.proposal_loss(scores, deltas + 0.1, anchors, [boxes], [3])) > 0.1
    proposed = proposals.propose(scores[0], deltas[0], anchors, count=10)
    assert (proposals.iou(boxes, proposed).amax(1) > 0.99).all()
    between = proposals.iou(proposed, proposed).fill_diagonal_(0)
    assert between.max() <= 0.5, "suppressed: no proposal overlaps another by more"


def test_a_scene_is_its_number_alone(proposals: ModuleType) -> None:
    image, boxes = proposals.scene(7, 72, 100)
    torch.manual_seed(1)
    again, same = proposals.scene(7, 72, 100)
    other, _ = proposals.scene(8, 72, 100)
    assert torch.equal(image, again) and torch.equal(boxes, same) and not torch.equal(image, other)
    for number in range(40):
        _, boxes = proposals.scene(number, 72, 100)
        assert 1 <= len(boxes) <= 5 and (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2] <= 100).all() and (boxes[:, 3] <= 72).all()
        assert (proposals.iou(boxes, boxes).fill_diagonal_(0) <= 0.1).all()


def test_both_pyramids_start_from_the_same_weights(proposals: ModuleType) -> None:
    images = torch.randn(1, 3, 72, 100)
    fused, eager = (proposals.ProposalNetwork(fused=kind, seed=3) for kind in (True, False))
    for ours, theirs in zip(fused(images), eager(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    other = proposals.ProposalNetwork(fused=True, seed=4)
    assert not torch.equal(other.conv.weight, fused.conv.weight)


@pytest.mark.nightly
def test_fused_and_eager_learn_the_same(
    trainer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the figure is drawn with matplotlib")
    image = pytest.importorskip("PIL.Image", reason="the figure is read with Pillow")
    losses, figure = tmp_path / "losses.json", tmp_path / "figure.png"
    assert trainer.main([*SMALL, "--compare", f"--losses={losses}", f"--figure={figure}"]) == 0
    curves = json.loads(losses.read_text())
    assert list(curves) == ["eager", "fused", "control"] and {len(curve) for curve in curves.values()} == {16}
    # Before the roundings have grown: the two runs compute the same.
    np.testing.assert_allclose(curves["fused"][:6], curves["eager"][:6], rtol=2e-5)
    assert curves["control"] != curves["eager"]
    for curve in curves.values():
        assert np.mean(curve[-4:]) < 0.9 * np.mean(curve[:4])
    lines = capsys.readouterr().out.splitlines()
    (fused,) = (line for line in lines if line.startswith("fused ") and "served" in line)
    assert "8 x lateral_connection by " in fused and "3 x merge_backward by " in fused
    (eager,) = (line for line in lines if line.startswith("eager ") and "served" in line)
    assert eager.endswith("served: plain PyTorch")
    assert sum(line.startswith(("fused parted from eager by", "control parted from eager by")) for line in lines) == 2
    with image.open(figure) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {(0xF2, 0xA9, 0x3B), (0xFF, 0x2D, 0x2D)} <= colours, "the curve and the proposals are drawn"


@pytest.mark.nightly
def test_a_difference_beyond_the_tolerance_fails(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    right = trainer.ProposalNetwork.forward

    def wrong(network: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, deltas = right(network, images)
        return (scores + 1 if isinstance(network.neck, trainer_neck) else scores), deltas

    trainer_neck = type(trainer.ProposalNetwork(fused=True).neck)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.ProposalNetwork, "forward", wrong)
        assert trainer.main([*SMALL, "--steps", "2", "--compare"]) == 1
    assert "error: in step 0 the fused run parts from eager as no rounding would" in capsys.readouterr().err


def test_a_difference_is_compared_with_the_control(trainer: ModuleType) -> None:
    def judged(fused: list[float], control: list[float], tolerance: float = 1e-3) -> int | None:
        curves = {"eager": [1.0, 2.0, 1.0], "fused": fused, "control": control}
        runs = {name: trainer.Run(torch.nn.Identity(), losses=losses) for name, losses in curves.items()}
        return trainer.first_difference(runs, tolerance)

    assert judged([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]) is None
    assert judged([1.0, 2.1, 1.0], [1.0, 2.0, 1.0]) == 1
    assert judged([1.0, 2.1, 1.0], [1.0, 2.0, 1.0], tolerance=0.06) is None
    assert judged([1.0, 2.0, 1.4], [1.0, 2.1, 1.0]) is None, "the control had parted by a tenth of it before"
    assert judged([1.0, 2.1, 1.0], [1.0, 2.0, 1.9]) == 1, "the control parts later than the fused run"
    assert judged([1.0, float("nan"), 1.0], [1.0, 2.0, 1.0]) == 1


@pytest.mark.nightly
def test_autocast_trains_the_same_too(trainer: ModuleType, tmp_path: Path) -> None:
    losses = tmp_path / "losses.json"
    assert trainer.main([*SMALL, "--steps", "12", "--amp", "--compare", f"--losses={losses}"]) == 0
    curve = json.loads(losses.read_text())["fused"]
    assert np.mean(curve[-4:]) < 0.9 * np.mean(curve[:4])


@pytest.mark.nightly
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_learn_what_one_does(trainer: ModuleType, tmp_path: Path) -> None:
    together, alone = tmp_path / "together.json", tmp_path / "alone.json"
    steps = ["--steps", "8"]
    assert trainer.main([*SMALL, *steps, f"--losses={alone}"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "examples" / "train_detector.py"), *SMALL, *steps, f"--losses={together}"]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [*launcher, *script],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = [line for line in run.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said[0].startswith("2 processes on CPU"), "reported once, by the first process"
    assert run.stdout.count("ms a step") == 1
    # Each has half of every batch; the mean of the two gradients is that of the whole.
    (one,), (two,) = (json.loads(path.read_text()).values() for path in (alone, together))
    np.testing.assert_allclose(two[:5], one[:5], rtol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--size", "31", "100"], "--size: expected at least 32 x 32, got 31 x 100"),
        (["--backend", "triton"], "invalid choice: 'triton'"),
        (["--device", "toaster"], "--device: expected cpu or cuda, got toaster"),
        (["--figure", "no_such_folder/figure.png"], "--figure: there is no folder"),
    ],
)
def test_bad_arguments(trainer: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer.arguments(argv)
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_named(
    trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        trainer.arguments(["--batch", "8"])
    assert "--batch: expected a multiple of the 3 processes, got 8" in capsys.readouterr().err


def test_the_figure_needs_matplotlib(trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib.*pip install 'fpn_kernels\[examples\]'"):
        trainer.draw({}, None, tmp_path / "figure.png")
