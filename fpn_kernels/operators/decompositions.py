"""The table of standard forms for `torch.export`: ONNX, AOTInductor, saved programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fpn_kernels.operators.operator import OPERATORS


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The forward operators of this library as standard PyTorch ones, for `ExportedProgram.run_decompositions`.

    A program exported from a fused module keeps the operators ``fpn_kernels::*``, and so the kernels behind them,
    but needs this library wherever it runs.  One line takes them out, and the program then runs in ONNX runtimes,
    in AOTInductor packages and saved programs on machines without the library.

    ``torch.onnx.export(model, (images,), "model.onnx", dynamo=True)`` of a module decomposes by itself.

    The same pixels are read at every pair of sizes, static or dynamic; the sums are PyTorch's, or the runtime's own.
    The operators of the backward are not in the table: they appear where gradients are computed, in no program that
    `torch.export.export` writes.

    Returns:
        Operator to decomposition.  Standard operators are not in it: what the program holds of them stays.

    Cost:
        Moves no bytes.  The standard operators move what eager PyTorch does, unless a compiler fuses them.

    Source:
        `torch.export.ExportedProgram.run_decompositions`; `torch.nn.functional.interpolate`, its indices written out.

    Example:
        ```python
        program = torch.export.export(fpn.eval(), (features,))
        program = program.run_decompositions(fpn_kernels.decompositions())
        torch.export.save(program, "model.pt2")
        ```
    """
    return {each.dispatched.default: each.standard for each in OPERATORS.values() if each.exported}
