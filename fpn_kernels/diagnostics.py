"""Versions and devices of this machine, which backend serves which operator, and why the others do not."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fpn_kernels import compatibility, functional
from fpn_kernels.operators import dispatch
from fpn_kernels.operators.dispatch import Explanation
from fpn_kernels.operators.operator import OPERATORS
from fpn_kernels.version import __version__

# Public functions whose arguments differ from their operator's.
_PUBLIC = ("lateral_connection", "output_conv", "output_conv_levels", "top_down_pathway", "weighted_merge")


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Explain which backend serves a call with these arguments, by which kernel, and why each one before it does not.

    The call passes checks, autocast, selection and planning, and ends before the launch: nothing is computed.  Where a
    gradient would be recorded, `gradient` says by which autograd.

    Args:
        operator: the name of an operator, such as ``"upsample_add"``, or the public function itself.
        *args: the call's arguments.
        **kwargs: the call's keyword arguments.

    Returns:
        An `Explanation` with `operator`, `backend`, `refusals`, `forced`, `evidence`, `kernel`, `layout` and
        `gradient`; ``print`` it.

    Raises:
        ValueError: there is no such operator; or the arguments, or a forced backend, do not fit (as the call would).
        TypeError: as the call would.

    Cost:
        Moves no bytes and launches nothing; calls of other threads are not affected.

    Example:
        ```python
        print(fpn_kernels.explain("upsample_add", top, lateral))
        ```
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", None)
    if name not in OPERATORS:
        raise ValueError(f"operator: expected one of {tuple(OPERATORS)}, got {operator!r}")
    call: Any = getattr(functional, name) if name in _PUBLIC else OPERATORS[name].dispatched.default
    if name not in _PUBLIC:
        for argument in call._schema.arguments[len(args) :]:
            if isinstance(argument.type, torch.OptionalType) and not argument.has_default_value():
                kwargs.setdefault(argument.name, None)
    try:
        with dispatch.explaining(), torch.no_grad():
            call(*args, **kwargs)
    except dispatch.Explained as answer:
        return answer.explanation
    except RuntimeError as error:
        raise TypeError(f"{name}: the arguments do not fit its schema: {error}") from error
    return Explanation(name, "nothing to launch: the result is empty, or the tensors hold no data", {})


def _samples(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and keyword arguments of one call per operator."""
    top = torch.zeros(1, 8, 2, 2, device=device, dtype=dtype)
    fine = torch.zeros(1, 8, 4, 4, device=device, dtype=dtype)
    weight = torch.zeros(8, 8, device=device, dtype=dtype)
    taps = torch.zeros(8, 8, 3, 3, device=device, dtype=dtype)
    return {
        "upsample_add": ((top, fine), {}),
        "upsample_add_backward": ((fine, (2, 2)), {}),
        "lateral_connection": ((fine, weight, None, top), {}),
        "merge_backward": ((fine, (2, 2), None), {}),
        "top_down_pathway": (((fine, top), (weight, weight)), {}),
        "weighted_merge": (((fine, top), torch.ones(2, device=device, dtype=torch.float32)), {}),
        "weighted_merge_backward": ((fine, fine, torch.ones((), device=device, dtype=torch.float32)), {}),
        "output_conv": ((fine, taps), {}),
        "output_conv_levels": (((fine, top), (taps, taps)), {}),
        "output_conv_backward_weight": ((fine, fine), {}),
        "reorder": ((fine,), {"memory_format": torch.channels_last}),
        "channel_sums": ((fine,), {}),
    }


def _who_serves(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[str]:
    try:
        return str(explain(name, *arguments, **keywords)).splitlines()
    except dispatch.BackendUnavailableError as error:
        return str(error).splitlines()


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [*(torch.device("cuda", index) for index in range(count)), torch.device("cpu")]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, sm_{properties.major}{properties.minor}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{device}: {platform.machine()}, {instructions}, {torch.get_num_threads()} threads"


def report() -> str:
    """Versions, devices, backends, and which backend serves which operator on each device, as text."""
    versions = {
        "fpn_kernels": __version__,
        "torch": torch.__version__,
        "triton": compatibility.version_of("triton") or "not installed",
        "python": platform.python_version(),
    }
    lines = [f"{name:<12} {version}" for name, version in versions.items()] + [""]
    forced = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    if forced:
        lines += [f"{dispatch.ENVIRONMENT_VARIABLE}={forced} forces a backend", ""]
    lines.append("backends, in order of preference")
    for name, unavailable in dispatch.BACKENDS.items():
        lines.append(f"  {name:<8} {unavailable() or 'available'}")
    for device in _devices():
        lines += ["", _device_name(device)]
        for dtype in (torch.bfloat16, torch.float32):
            lines.append(f"  {str(dtype).removeprefix('torch.')}")
            for name, (arguments, keywords) in _samples(device, dtype).items():
                lines += [f"    {line}" for line in _who_serves(name, arguments, keywords)]
    return "\n".join(lines)
