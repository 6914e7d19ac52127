"""Arguments of kernels that belong together: Triton takes a NamedTuple apart, and puts it together again in the kernel.

Triton specialises every member of a bundle, whatever `primitives.specialisation` says of the other arguments. So a bundle
holds what is alike at every length: pointers, strides and constants. A number of rows or blocks is an argument by itself.
"""

from typing import Any, NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """A tensor `[T, H, D]` whose rows are contiguous, in a kernel."""

    ptr: Any
    stride_t: Any
    stride_h: Any


def heads(x: Tensor) -> Heads:
    """What a kernel is given of a tensor `[T, H, D]`."""
    return Heads(x, x.stride(0), x.stride(1))
