"""`examples/pyramid_of_a_photo.py`: the table, the figure, and the errors for missing files and packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from documents import ROOT

import fpn_kernels

pytest.importorskip("matplotlib", reason="the example draws with matplotlib: pip install 'fpn_kernels[examples]'")
pytest.importorskip("PIL", reason="the example reads images with Pillow: pip install 'fpn_kernels[examples]'")

from PIL import Image


@pytest.fixture
def example() -> ModuleType:
    path = ROOT / "examples" / "pyramid_of_a_photo.py"
    spec = importlib.util.spec_from_file_location("pyramid_of_a_photo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A gradient with a bright square, 80 x 120."""
    pixels = torch.linspace(0, 150, 120).expand(3, 80, 120).clone()
    pixels[:, 20:50, 30:70] = 250
    path = tmp_path / "photograph.png"
    Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()).save(path)
    return path


def test_prints_the_table_and_writes_the_figure(
    example: ModuleType, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "figure.png"
    example.main([str(photograph), "--device", "cpu", "--size", "75", "--repeats", "1", "--output", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    shapes = {"p2": "19 x 28", "p3": "10 x 14", "p4": "5 x 7", "p5": "3 x 4", "p6": "2 x 2"}  # of 75 x 112
    for level, shape in shapes.items():
        (line,) = (line for line in lines if line.startswith(level))
        assert f"1 x 256 x {shape} " in line
        difference, largest = map(float, line.split()[-2:])
        assert difference <= 1e-4 * largest and largest > 0
    assert sum(line.startswith(("eager", "fused ")) and line.endswith(" ms") for line in lines) == 2
    (served,) = (line for line in lines if line.startswith("served: "))
    assert "4 x lateral_connection by " in served
    with Image.open(figure) as image:
        assert image.size[0] > 1000 and image.size[1] > 500
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 500, "the maps are drawn, not blank"


def test_published_weights(example: ModuleType, photograph: Path, tmp_path: Path) -> None:
    weights = tmp_path / "resnet50.pth"
    source = fpn_kernels.resnet50_fpn().body
    torch.save({**source.state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, weights)
    options = example.arguments([str(photograph), "--weights", str(weights)])
    model = example.build(options, torch.zeros(1, 3, 64, 64))
    for name, value in source.state_dict().items():
        assert torch.equal(model.body.state_dict()[name], value), name
    torch.save({"conv1.weight": torch.zeros(1)}, weights)
    with pytest.raises(SystemExit, match="--weights: .*resnet50.pth is not a ResNet-50 state_dict"):
        example.build(options, torch.zeros(1, 3, 64, 64))


def test_the_photograph_inside_scikit_learn(example: ModuleType) -> None:
    pytest.importorskip("sklearn", reason="the default photograph ships inside scikit-learn")
    photograph = example.load_photograph(None)
    assert photograph.shape == (1, 3, 427, 640) and 0 <= photograph.min() < 0.1 and 0.9 < photograph.max() <= 1
    assert example.resized(photograph, 600).shape == (1, 3, 600, 899)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_file.jpg"], "photograph: there is no file no_such_file.jpg"),
        (["--weights", "no_such_file.pth"], "weights: there is no file no_such_file.pth"),
        (["--size", "63"], "--size: expected at least 64, got 63"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "toaster"], "--device: "),
        (["--output", "no_such_folder/figure.png"], "--output: there is no folder"),
    ],
)
def test_bad_arguments(example: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.arguments(argv)
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_image(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not an image")
    with pytest.raises(SystemExit, match="photograph: .*notes.txt is not an image"):
        example.load_photograph(path)


@pytest.mark.parametrize("missing", ["matplotlib", "PIL", "sklearn.datasets"])
def test_missing_packages_are_named_with_their_cure(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"needs .*pip install 'fpn_kernels\[examples\]'"):
        photograph = torch.zeros(1, 3, 64, 64) if missing == "matplotlib" else example.load_photograph(None)
        example.draw(photograph, {}, None, tmp_path / "figure.png")
