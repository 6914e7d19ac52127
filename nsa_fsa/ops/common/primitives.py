"""Functions that several kernels share.

Softmax statistics are kept in base 2, because exp2 is what the hardware has.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from nsa_fsa.ops.common.launcher import Launcher

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def specialisation(function: Callable[..., Any]) -> dict[str, list[str]]:
    """Which integers of a kernel Triton is not to specialise, as its decorators take it.

    Triton compiles a kernel anew for every integer that is 1, or a multiple of 16, where that of an
    earlier launch was not: 67 to 80 kernels in 40 training steps of varying lengths, instead of 23,
    and a minute of stalls. So it may know strides, which say how rows are aligned, what is the same
    at every length, and whether there is but one sequence. What else a kernel wants to know of a
    count it takes as a constant. The integers of a bundle are always specialised.
    """
    parameters = inspect.signature(function).parameters.items()
    names = [name for name, x in parameters if "constexpr" not in str(x.annotation)]
    known = ("num_heads", "part_rows")
    one_or_more = ("num_sequences", "num_steps")
    counts = [x for x in names if not x.startswith("stride_") and not x.endswith(("_ptr", "_desc"))]
    return dict(
        do_not_specialize=[name for name in counts if name not in (*known, *one_or_more)],
        do_not_specialize_on_alignment=[name for name in counts if name in one_or_more],
    )


def kernel(function: Callable[..., Any]) -> Any:
    """triton.jit for what the host launches, whatever its sizes."""
    return Launcher(triton.jit(function, **specialisation(function)))


@triton.jit
def load_rows(
    ptr, offsets, inside, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of DIM contiguous elements that begin at `offsets`: `[M] -> [M, PADDED_DIM]`.

    What lies behind DIM is 0. MASKED: so are rows that are not `inside`, which are not read.
    """
    column = tl.arange(0, PADDED_DIM)
    at = ptr + offsets[:, None] + column[None, :]
    if DIM != PADDED_DIM:
        if MASKED:
            return tl.load(at, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
        return tl.load(at, mask=(column < DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def load_pairs(x, pairs, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """The rows of x, which is `Heads`, that belong to some `Pairs`: `[M, PADDED_DIM]`."""
    at = pairs.query * x.stride_t + pairs.head * x.stride_h
    return load_rows(x.ptr, at, pairs.inside, DIM, PADDED_DIM, True)


@triton.jit
def store_rows(
    ptr,
    offsets,
    values,
    inside,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STREAM: tl.constexpr = False,
):
    """The counterpart of load_rows.

    STREAM: the rows are read only once after this, so that they are not worth a place in L2.
    """
    column = tl.arange(0, PADDED_DIM)
    mask = inside[:, None] if DIM == PADDED_DIM else inside[:, None] & (column < DIM)[None, :]
    at = ptr + offsets[:, None] + column[None, :]
    if STREAM:
        tl.store(at, values.to(ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")
    else:
        tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_keys(q, k, PRECISION: tl.constexpr):
    """q k^T: `[M, D], [N, D] -> [M, N]`."""
    if q.dtype == tl.float32:
        # Otherwise q's factors are loaded ahead of the barrier that k waits for, and all of them,
        # which are D registers, live across it.
        tl.debug_barrier()
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b, where acc sums thousands of rows over many calls."""
    if PRECISION == "ieee":
        # Without a matrix unit a product that goes on from acc is one chain of additions over all
        # rows, each of which rounds: after 120 rows dv missed its bar, with an error of 6.0e-6
        # instead of 5.4e-6. A product of its own keeps the chains short; it is subtracted because
        # Triton folds a sum back into the chain.
        tl.debug_barrier()  # as in dot_keys
        return acc - tl.dot(-a, b, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def softmax_of(scores, shift, scale2, PRECISION: tl.constexpr):
    """exp((scores + shift) * scale) of a product and of what `statistics` gives.

    scale2 is the scale of base 2.
    """
    if PRECISION == "ieee":
        # Triton folds a sum into the product, which then is one chain of additions that begins at
        # shift, some five times as large as a score, and rounds there with every one of them: 2.4,
        # 4.0 and 5.1 times the error of p for heads of 16, 64 and 128, emulated. A multiple is not
        # folded. 2 ulp of the hardware's exp2 add 1 to 4% to what is left.
        return tl.exp2(scores * scale2 + shift * scale2)
    return tl.exp2((scores + shift) * scale2)


@triton.jit
def online_softmax(acc, maximum, total, scores, v, PRECISION: tl.constexpr):
    """One step of attention: some scores and values join acc, maximum and total.

    scores: `[M, N]` in base 2, -inf where nothing is seen. v: `[N, DV]`.
    """
    raised = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
    decay = tl.exp2(maximum - shift)
    p = tl.exp2(scores - shift[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, raised, total
