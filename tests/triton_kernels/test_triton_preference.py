"""What the Triton kernels leave to others unless they are forced: on GPUs that this machine need not have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fpn_kernels.backends import selection
from fpn_kernels.backends.triton import eligibility, preference

# Numbers of devices that no other test has.
HOPPER, AMPERE = 96, 97


@pytest.fixture(autouse=True)
def _devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eligibility, "capability", lambda index: {HOPPER: (9, 0), AMPERE: (8, 0)}[index])
    with FakeTensorMode():
        yield


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: int = HOPPER) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=f"cuda:{device}")


def _output_conv(
    size: tuple[int, ...] = (1, 256, 200, 320), cout: int = 256, bias: bool = True, **how: object
) -> str | None:
    feature, weight = _tensor(*size, **how), _tensor(cout, size[1], 3, 3, **how)  # type: ignore[arg-type]
    return preference.output_conv(feature, weight, _tensor(cout, **how) if bias else None, None)  # type: ignore[arg-type]


def test_the_3x3_where_it_was_measured_faster() -> None:
    assert _output_conv() is None and _output_conv(dtype=torch.float16) is None
    assert _output_conv((1, 256, 50, 80)) is None and _output_conv((8, 256, 25, 40)) is None
    assert "so small a map, of 1000 pixels" in str(_output_conv((1, 256, 25, 40)))
    assert "no bias" in str(_output_conv(bias=False))
    assert "16 bits" in str(_output_conv(dtype=torch.float32))
    assert str(_output_conv(device=AMPERE)) == "only measured on compute capability 9.0; this is 8.0"
    assert "256 channels; these are 128 to 256" in str(_output_conv((1, 128, 200, 320)))
    assert "256 channels; these are 256 to 255" in str(_output_conv(cout=255))


def test_the_levels_of_a_pyramid_where_the_largest_is() -> None:
    def levels(*sizes: tuple[int, int], **how: object) -> str | None:
        features = [_tensor(1, 256, *size, **how) for size in sizes]  # type: ignore[arg-type]
        weights = [_tensor(256, 256, 3, 3, **how) for _ in sizes]  # type: ignore[arg-type]
        return preference.output_conv_levels(features, weights, [_tensor(256) for _ in weights], None)

    assert levels((200, 320), (25, 40)) is None
    assert "level 0: cuDNN is faster" in str(levels((25, 40), (13, 20)))
    assert "16 bits" in str(levels((200, 320), (100, 160), dtype=torch.float32))


def test_the_chained_pathway_where_launches_overlap() -> None:
    def pathway(**how: object) -> str | None:
        feature = _tensor(1, 256, 8, 8, **how)  # type: ignore[arg-type]
        return preference.top_down_pathway([feature], [feature], [None], "nearest", 1.0, None)

    assert pathway() is None
    assert "this is 8.0" in str(pathway(device=AMPERE)) and "16 bits" in str(pathway(dtype=torch.float32))


def test_the_layout_of_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, expected in ((HOPPER, torch.channels_last), (AMPERE, torch.preserve_format)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert preference.output_conv_format("cuda", torch.bfloat16) == expected
    assert preference.output_conv_format("cuda", torch.float32) == torch.preserve_format
    assert preference.output_conv_format("cpu", torch.bfloat16) == torch.preserve_format


def test_selection_asks() -> None:
    backend = {each.name: each for each in selection.backends()}["triton"]
    asked = {name: each.only_forced for name, each in backend.implementations.items()}
    chosen = {name for name, predicate in asked.items() if predicate is not preference.memory_bound}
    products = {"lateral_connection", "output_conv", "output_conv_levels", "top_down_pathway"}
    assert chosen == {*products, "channel_sums"}
    assert all(getattr(preference, name) is asked[name] for name in chosen)
    optional = {name for name, each in backend.implementations.items() if each.optional}
    assert optional == chosen - {"lateral_connection"}


def test_the_interpreter_serves_where_it_is_forced() -> None:
    feature = torch.empty(1, 128, 4, 4, dtype=torch.bfloat16)
    assert "to check kernels" in str(preference.top_down_pathway([feature], [feature], [None], "nearest", 1.0, None))
    assert "to check kernels" in str(preference.lateral_connection(feature, feature, None, None, "nearest", 1.0, None))
    assert "to check kernels" in str(preference.memory_bound(feature, feature, "nearest", 1.0))
