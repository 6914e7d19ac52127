"""How the plain kernels of all branches read keys, values and statistics, and write their results.

A SHAPE is a bundle of constants with the widths of heads: D and DV, and PADDED_D and PADDED_DV,
which are powers of two.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.ops.common.bundles import Heads
from nsa_fsa.ops.common.primitives import LN_2, LOG2_E, load_rows, store_rows
from nsa_fsa.ops.common.softmax_statistics import Statistics


class ScaledStatistics(NamedTuple):
    """What turns scores into p and ds, in a kernel."""

    shift: Any  # of `Statistics`, as delta
    delta: Any
    scale2: Any  # the scale of base 2
    scale: Any


def scaled(statistics: Statistics, scale: float) -> ScaledStatistics:
    """The statistics with the softmax scale."""
    return ScaledStatistics(*statistics, scale * LOG2_E, scale)


@triton.jit
def of_head(x, head):
    """One head of x, which is `Heads`; its rows are read without the head's number."""
    return Heads(x.ptr + head.to(tl.int64) * x.stride_h, x.stride_t, x.stride_h)


@triton.jit
def load_keys(k, v, row, exists, SHAPE: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows of the keys and of the values of one head: `[N, PADDED_D]` and `[N, PADDED_DV]`."""
    row = row.to(tl.int64)
    k_tile = load_rows(k.ptr, row * k.stride_t, exists, SHAPE.D, SHAPE.PADDED_D, MASKED)
    v_tile = load_rows(v.ptr, row * v.stride_t, exists, SHAPE.DV, SHAPE.PADDED_DV, MASKED)
    return k_tile, v_tile


@triton.jit
def load_statistics(statistics, at, inside):
    """shift and delta of pairs; p of those that are not inside becomes 0."""
    shift = tl.load(statistics.shift + at, mask=inside, other=float("-inf"))
    delta = tl.load(statistics.delta + at, mask=inside, other=0.0)
    return shift, delta


@triton.jit
def store_attended(
    o_ptr, lse_ptr, query, head, num_heads, inside, acc, maximum, total, SHAPE: tl.constexpr
):
    """Writes o `[T, HQ, DV]` and lse `[T, HQ]` of pairs from an online softmax."""
    seen_any = total > 0
    acc = acc * (1.0 / tl.where(seen_any, total, 1.0))[:, None]  # acc is 0 where nothing was seen
    target = query * num_heads + head
    store_rows(o_ptr, target * SHAPE.DV, acc, inside, SHAPE.DV, SHAPE.PADDED_DV)
    lse_ptr += target
    lse = tl.where(seen_any, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse_ptr, lse, mask=inside)


@triton.jit
def store_or_add(
    ptr, offsets, values, inside, ADD: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr
):
    """Writes rows of a gradient, as `store_rows`, or adds to them."""
    if ADD:
        values += load_rows(ptr, offsets, inside, D, PADDED_D, True).to(tl.float32)
    store_rows(ptr, offsets, values, inside, D, PADDED_D)
