"""Sizes and strides on the host, where Triton's own functions take 7 microseconds a call."""

import math
import operator
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def padded_dim(dim: int) -> int:
    """The head width that a kernel computes with: a power of two that a matrix unit takes."""
    return max(next_power_of_2(dim), 16)


def widths(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """D, PADDED_D, DV and PADDED_DV of q `[T, HQ, D]` and v `[T, HKV, DV]`."""
    return q.shape[2], padded_dim(q.shape[2]), v.shape[2], padded_dim(v.shape[2])


def aligned_rows(number: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[number, *shape]`, uninitialised, of which every row begins at a multiple of 16 bytes: a
    kernel that is given rows apart would otherwise be compiled for each of the alignments that they
    have at one length or another. Rows never touch: torch.compile would otherwise make another
    graph for lengths at which the tensor is contiguous."""
    strides = [*accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]
    row = (math.prod(shape) // 16 + 1) * 16
    return torch.empty_strided((number, *shape), (row, *strides), dtype=dtype, device=device)


def rows_contiguous(x: Tensor, aligned: bool = False) -> Tensor:
    """x with its last axis contiguous, which is all that the kernels ask of a layout;
    the Gluon ones also that every row begins at a multiple of 16 bytes."""
    sixteen_bytes = 16 // x.element_size()
    misplaced = aligned and (
        x.data_ptr() % 16 != 0 or any(stride % sixteen_bytes for stride in x.stride()[:-1])
    )
    return x.contiguous() if x.stride(-1) != 1 or misplaced else x


def head_chunks(
    num_kv_heads: int, group_size: int, bytes_of_kv_head: int, workspace_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """Query heads and KV heads to work on at a time, for a workspace that takes bytes_of_kv_head
    for each KV head; one KV head at least. All turns have about as many heads: a small last one
    would leave the GPU half empty."""
    fitting = max(workspace_bytes // max(bytes_of_kv_head, 1), 1)
    step = cdiv(num_kv_heads, cdiv(num_kv_heads, fitting))
    for first in range(0, num_kv_heads, step):
        last = min(first + step, num_kv_heads)
        yield slice(first * group_size, last * group_size), slice(first, last)
