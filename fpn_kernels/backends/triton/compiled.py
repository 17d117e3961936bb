"""Every configuration of every kernel, described so that it can be compiled ahead of time, without a GPU.

A kernel's run-time integers are not specialised on (`do_not_specialize`); strides of 1 and alignments reach it as
constexprs.  What is described here is therefore what a launch compiles, and a launch compiles nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from fpn_kernels.backends.triton.launching import ALONE, Link

POINTER_TYPES = {2: "*bf16", 4: "*fp32"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument name to type ("*bf16", "i32", "fp32", "constexpr"), or to a tuple of them.
        constexprs: values of the constexpr arguments.
        attrs: Triton's argument attributes: base pointers are 16-byte aligned where the tensors are dense.
        options: num_warps and the like.
        description: what it serves; a test's name.
        wide: instructions (LDG, STG, LDGSTS) that are all expected to move 16 bytes, and how many of each may move
            a single number instead.
        matrix_product: tensor-core instructions are expected.
        descriptors: bulk tensor copies (TMA) are expected where the chip has them.
        link: whether it overlaps the launches before and after it, which chips before 9.0 cannot.
        capabilities: the compute capabilities that it is compiled for, times ten; empty: 8.0 and later.
    """

    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    options: Mapping[str, Any]
    description: str
    wide: Mapping[str, int] = dataclasses.field(default_factory=dict)
    matrix_product: bool = False
    descriptors: bool = False
    link: Link = ALONE
    capabilities: tuple[int, ...] = ()


def variant(
    kernel: Any,
    pointers: Mapping[str, str],
    floats: tuple[str, ...],
    constexprs: Mapping[str, Any],
    options: Mapping[str, Any],
    description: str,
    *,
    aligned: bool,
    wide: Mapping[str, int] | tuple[str, ...] = (),
    matrix_product: bool = False,
    link: Link = ALONE,
) -> Variant:
    """Describes one compilation: what is neither a pointer, a float nor a constexpr is an i32."""
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            if aligned:
                attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in floats else "i32"
    allowed = wide if isinstance(wide, Mapping) else dict.fromkeys(wide, 0)
    return Variant(
        *(kernel, signature, dict(constexprs), attrs, dict(options), description, allowed, matrix_product), link=link
    )


def all_variants() -> Iterator[Variant]:
    """Every configuration of every table, on dense aligned maps, and once a kernel on strided ones."""
    from fpn_kernels.backends.triton import (
        channel_sums,
        lateral_connection,
        lateral_connection_descriptors,
        lateral_connection_stationary,
        merge_backward,
        output_conv,
        top_down_pathway,
        upsample_add,
        upsample_add_backward,
        weighted_merge,
        weighted_merge_backward,
    )

    merges = (
        upsample_add,
        upsample_add_backward,
        merge_backward,
        weighted_merge,
        weighted_merge_backward,
        channel_sums,
    )
    matrix_products = (
        lateral_connection,
        lateral_connection_descriptors,
        lateral_connection_stationary,
        top_down_pathway,
        output_conv,
    )
    for module in (*merges, *matrix_products):
        yield from module.variants()
