"""The calls that the Triton kernels leave to other backends unless they are forced, on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_calls import opt_in_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fpn_kernels.gpu import availability
from fpn_kernels.operators.operator import OPERATORS

# Numbers of devices that no other test has.
HOPPER, AMPERE = 96, 97


@pytest.fixture(autouse=True)
def _devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(availability, "capability", lambda index: {HOPPER: (9, 0), AMPERE: (8, 0)}[index])
    with FakeTensorMode():
        yield


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: int = HOPPER) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=f"cuda:{device}")


def test_the_3x3_serves_in_16_bits_on_measured_gpus() -> None:
    def refusal(*size: int, device: int = HOPPER, dtype: torch.dtype = torch.bfloat16) -> str:
        how = {"device": device, "dtype": dtype}
        weight, bias = _tensor(256, 256, 3, 3, **how), _tensor(256, **how)
        return str(opt_in_of("triton", "output_conv", _tensor(*size, **how), weight, bias))

    assert refusal(1, 256, 200, 320) == "None"
    assert "so small a map" in refusal(1, 256, 8, 8)
    assert "16 bits" in refusal(1, 256, 200, 320, dtype=torch.float32)
    assert "only measured on compute capability 9.0; this is 8.0" in refusal(1, 256, 200, 320, device=AMPERE)


def test_the_levels_of_a_pyramid_follow_the_largest() -> None:
    def levels(*sizes: tuple[int, int], **how: object) -> str | None:
        features = [_tensor(1, 256, *size, **how) for size in sizes]  # type: ignore[arg-type]
        weights = [_tensor(256, 256, 3, 3, **how) for _ in sizes]  # type: ignore[arg-type]
        biases = [_tensor(256) for _ in weights]
        return opt_in_of("triton", "output_conv_levels", features, weights, biases, list(range(len(sizes))))

    assert levels((200, 320), (25, 40)) is None
    assert "level 0: cuDNN is faster" in str(levels((25, 40), (13, 20)))
    assert "16 bits" in str(levels((200, 320), (100, 160), dtype=torch.float32))


def test_the_chained_pathway_where_launches_overlap() -> None:
    def pathway(**how: object) -> str | None:
        feature = _tensor(1, 256, 8, 8, **how)  # type: ignore[arg-type]
        return opt_in_of("triton", "top_down_pathway", [feature], [feature], [], [])

    assert pathway() is None
    assert "this is 8.0" in str(pathway(device=AMPERE)) and "16 bits" in str(pathway(dtype=torch.float32))


def test_the_layout_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = OPERATORS["output_conv"].backends["triton"].fastest_format
    for device, expected in ((HOPPER, torch.channels_last), (AMPERE, torch.preserve_format)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert fastest("cuda", torch.bfloat16) == expected
    assert fastest("cuda", torch.float32) == torch.preserve_format
    assert fastest("cpu", torch.bfloat16) == torch.preserve_format


def test_the_interpreter_serves_where_it_is_forced() -> None:
    feature = torch.empty(1, 128, 4, 4, dtype=torch.bfloat16)
    assert "for checking kernels" in str(opt_in_of("triton", "top_down_pathway", [feature], [feature], [], []))
    assert "for checking kernels" in str(opt_in_of("triton", "lateral_connection", feature, feature, None, None))
    assert "for checking kernels" in str(opt_in_of("triton", "upsample_add", feature, feature))
