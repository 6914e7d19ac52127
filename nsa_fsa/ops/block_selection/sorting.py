"""Lists of the best blocks, kept in registers: tuples of tensors, one for each place of a list.

All of it is elementwise minima and maxima: every element of the tensors has a list of its own. What
is sorted are sort keys, integers that hold a score and the step that it comes from.
"""

import triton
import triton.language as tl

# A sort key of 32 bits numbers so many steps; float32 inputs take 64.
NARROW_STEPS = tl.constexpr(1024)
LOW_BITS = tl.constexpr(2**31 - 1)  # These bits of a sort key of 64 number its step.
NO_BLOCK = tl.constexpr(-(2**31))  # It is below every block number whose sign has been changed.


@triton.constexpr_function
def sort_partner(n, length, in_order, distance):
    """The element that element n is compared to, n itself for none, in Batcher's odd-even merge
    sort, where runs of `in_order` elements become runs of twice as many."""
    first = distance % in_order
    partner = n + distance if (n - first) // distance % 2 == 0 else n - distance
    in_run = n // (2 * in_order) == partner // (2 * in_order)
    if min(n, partner) < first or partner >= length or not in_run:
        return n
    return partner


@triton.constexpr_function
def valley_partner(n, length, distance):
    """The same in Batcher's bitonic merge.

    Elements that are missing to a power of two would come first, and be greater than the rest.
    """
    missing = (1 << (length - 1).bit_length()) - length
    partner = n + distance if (n + missing) // distance % 2 == 0 else n - distance
    return n if partner < 0 else partner


@triton.jit
def exchange(x, n: tl.constexpr, PARTNER: tl.constexpr):
    """Element n of a tuple after it and its partner have been put in descending order."""
    if n < PARTNER:
        return tl.maximum(x[n], x[PARTNER])
    if n > PARTNER:
        return tl.minimum(x[PARTNER], x[n])
    return x[n]


@triton.jit
def sort_descending(x):
    """A tuple of tensors in descending order."""
    for i in tl.static_range((len(x) - 1).bit_length()):
        for j in tl.static_range(i + 1):
            layer: tl.tuple = ()
            for n in tl.static_range(len(x)):
                layer = layer + (exchange(x, n, sort_partner(n, len(x), 1 << i, 1 << (i - j))),)
            x = layer
    return x


@triton.jit
def sort_valley(x):
    """A tuple of tensors that descends and then ascends, in descending order."""
    LAYERS: tl.constexpr = (len(x) - 1).bit_length()
    for i in tl.static_range(LAYERS):
        layer: tl.tuple = ()
        for n in tl.static_range(len(x)):
            layer = layer + (exchange(x, n, valley_partner(n, len(x), 1 << (LAYERS - 1 - i))),)
        x = layer
    return x


@triton.jit
def sort_into(best, fresh):
    """The first len(best) of two tuples of tensors in descending order, of which best is sorted.

    One by one this takes 2 len(best) operations a tensor. Together they are put in order first, and
    then opposite to the last places: where there are 13 places, that takes 14 operations for each
    of 4 tensors, and 11 for each of 8.
    """
    K: tl.constexpr = len(best)
    if min(len(fresh), K) <= 2:
        for i in tl.static_range(len(fresh)):
            x = fresh[i]
            pushed: tl.tuple = ()
            for k in tl.static_range(K):
                pushed = pushed + (tl.maximum(best[k], x),)
                x = tl.minimum(best[k], x)
            best = pushed
        return best

    fresh = sort_descending(fresh)
    merged: tl.tuple = ()
    for k in tl.static_range(K):
        better = best[k] if k + len(fresh) < K else tl.maximum(best[k], fresh[K - 1 - k])
        merged = merged + (better,)
    return sort_valley(merged)


@triton.jit
def make_sort_key(score, step, eligible, mask, WIDE: tl.constexpr, EXACT: tl.constexpr):
    """Scores and the step they come from as integers in the order of preference.

    The key of what cannot be chosen is -1. Floats that are not negative compare as their bits do.

    A WIDE key has room for all bits of a score. Unless it is to be EXACT, it keeps to those that
    the narrow key of a shorter sequence has: what a sequence gets does not depend on how long its
    neighbours are.
    """
    bits = score.to(tl.int32, bitcast=True)
    if WIDE:
        if not EXACT:
            bits = bits & ~tl.where(mask < NARROW_STEPS, mask, 0)
        key = (bits.to(tl.int64) << 32) | (LOW_BITS - step)
    else:
        key = (bits & ~mask) | (mask - step)
    return tl.where(eligible, key, -1)


@triton.jit
def take_best(best, first_block, mask, WIDE: tl.constexpr):
    """The block `[QUERIES]` with the highest sort key at the head of any column's list,
    and the lists without it.

    Ties go to the lowest column, whose blocks come first. first_block `[1, COLUMNS]` is the
    block of step 0.
    """
    C: tl.constexpr = best[0].shape[1]
    if WIDE:
        mask = LOW_BITS
    column = tl.arange(0, C)[None, :]
    rank = (best[0] & ~mask) | (C - 1 - column)
    taken = rank == tl.max(rank, 1)[:, None]
    step = mask - (best[0] & mask).to(tl.int32)
    block = tl.sum(tl.where(taken, first_block + step, 0), 1)

    rest: tl.tuple = ()
    for k in tl.static_range(1, len(best)):
        rest = rest + (tl.where(taken, best[k], best[k - 1]),)
    return block, rest + (tl.where(taken, -1, best[len(best) - 1]),)


@triton.jit
def merge_columns(best, first_block, mask, WIDE: tl.constexpr, UNROLL: tl.constexpr):
    """The best blocks of all columns, ascending, each `[QUERIES]` with its sign changed."""
    K: tl.constexpr = len(best)
    chosen: tl.tuple = ()
    if UNROLL:
        for _ in tl.static_range(K):
            block, best = take_best(best, first_block, mask, WIDE)
            chosen = chosen + (-block,)
        chosen = sort_descending(chosen)
    else:
        for _ in tl.static_range(K):
            chosen = chosen + (tl.full([best[0].shape[0]], NO_BLOCK, tl.int32),)
        for _ in range(K):
            block, best = take_best(best, first_block, mask, WIDE)
            chosen = sort_into(chosen, (-block,))
    return chosen
