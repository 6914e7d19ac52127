"""Arguments of kernels that belong together, as NamedTuples.

Triton specialises every member of a bundle, whatever `primitives.specialisation` says of the other
arguments. So a bundle holds what is alike at every length: pointers, strides and constants. A
number of rows or blocks is an argument by itself.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

Bundle = TypeVar("Bundle", bound=Hashable)


class Heads(NamedTuple):
    """A tensor `[T, H, D]` whose rows are contiguous, in a kernel."""

    ptr: Any
    stride_t: Any
    stride_h: Any


class Pairs(NamedTuple):
    """Some queries, each with one of its heads, in a kernel."""

    query: Any  # row of the query, int64
    head: Any
    inside: Any  # whether there is such a pair


def heads(x: Tensor) -> Heads:
    """What a kernel is given of a tensor `[T, H, D]`."""
    return Heads(x, x.stride(0), x.stride(1))


def constants(bundle: Bundle) -> Bundle:
    """The bundle for a parameter annotated `tl.constexpr`: the same object for the same values."""
    return _constants(type(bundle), bundle)


@functools.cache
def _constants(kind: Any, bundle: Any) -> Any:
    # Each member is a constexpr by itself, because the compiler takes a plain number from a
    # NamedTuple for one that is known only when the kernel runs. The interpreter wants the number.
    return bundle if triton.knobs.runtime.interpret else kind(*map(tl.constexpr, bundle))
