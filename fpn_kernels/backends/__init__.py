"""Who computes an operator, and how: one module a backend, and the selection between them.

The order of registration is the order of preference: compiled code first (its launches cost least), then Triton,
then plain PyTorch, which serves every call.
"""

from fpn_kernels.backends import eager, native, selection
from fpn_kernels.backends import triton as _triton

for _backend in (native.BACKEND, _triton.BACKEND, eager.BACKEND):
    selection.register(_backend)
