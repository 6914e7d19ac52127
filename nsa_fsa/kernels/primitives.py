"""Pieces that several kernels share. Softmax statistics are kept in base 2: exp2 is what the hardware has."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, offsets, inside, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of DIM contiguous elements that begin at `offsets`: `[M] -> [M, PADDED_DIM]`, 0 where nothing is to be read."""
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
def store_rows(ptr, offsets, values, inside, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, STREAM: tl.constexpr = False):
    """The counterpart of load_rows. STREAM: written once and read once, so not worth a place in the cache."""
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
        # Otherwise q's factors are loaded ahead of the barrier that k waits for, and all of them, D registers, live across it.
        tl.debug_barrier()
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b, where acc sums thousands of rows over many calls."""
    if PRECISION == "ieee":
        # Without a matrix unit a product that goes on from acc is one chain of additions over all rows, each of which rounds:
        # after 120 rows dv missed its bar, with an error of 6.0e-6 instead of 5.4e-6. A product of its own keeps the chains
        # short; it is subtracted because Triton folds a sum back into the chain.
        tl.debug_barrier()  # as in dot_keys
        return acc - tl.dot(-a, b, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def online_softmax(acc, maximum, total, scores, v, PRECISION: tl.constexpr):
    """One step of attention: scores [M, N] in base 2 (-inf: not seen) and values [N, DV] join acc, maximum and total."""
    raised = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
    decay = tl.exp2(maximum - shift)
    p = tl.exp2(scores - shift[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, raised, total
