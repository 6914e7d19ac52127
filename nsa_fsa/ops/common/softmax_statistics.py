"""What every backward needs of the forward's softmax, per query and head."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import Pairs, heads
from nsa_fsa.ops.common.calls import Softmax
from nsa_fsa.ops.common.primitives import kernel, load_pairs, load_rows
from nsa_fsa.ops.common.sizes import aligned_rows, cdiv, padded_dim


class Statistics(NamedTuple):
    """What `statistics` computes, float32 `[T, HQ]` or `[HKV, T, G]`; in a kernel, pointers."""

    # -lse / scale: p = exp((q k + shift) * scale). -inf, which makes p 0, where nothing is seen.
    shift: Tensor
    delta: Tensor  # -sum(o * do)


@kernel
def statistics_kernel(
    o_ptr,
    do,
    lse_ptr,
    known_ptr,
    shift_ptr,
    delta_ptr,
    scale,
    num_heads,
    num_tokens,
    total,
    GROUP_HEADS: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Of PAIRS pairs of `[T * HQ]`; known_ptr has sum(o * do), or is None."""

    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < total
    query, head = pair // num_heads, pair % num_heads
    if known_ptr is None:
        o = load_rows(o_ptr, pair * DV, inside, DV, PADDED_DV, True).to(tl.float32)
        grad = load_pairs(do, Pairs(query, head, inside), DV, PADDED_DV)
        delta = tl.sum(o * grad.to(tl.float32), 1)
    else:
        delta = tl.load(known_ptr + pair, mask=inside, other=0.0)

    target = pair
    if GROUP_HEADS > 0:
        target = (head // GROUP_HEADS * num_tokens + query) * GROUP_HEADS + head % GROUP_HEADS
    tl.store(delta_ptr + target, -delta, mask=inside)
    lse = tl.load(lse_ptr + pair, mask=inside, other=0.0)
    shift = tl.where(lse == float("-inf"), float("-inf"), -lse / scale)
    tl.store(shift_ptr + target, shift, mask=inside)


def statistics(do: Tensor, softmax: Softmax, scale: float, group_size: int = 0) -> Statistics:
    """The statistics of a branch, `[T, HQ]`; with a group_size G `[HKV, T, G]`.

    The pairs of a KV head lie together in the latter, so that a tile of them is read whole.
    """
    o, lse, delta = softmax
    num_tokens, num_heads, v_dim = do.shape
    shape = [num_tokens, num_heads]
    if group_size:
        shape = [num_heads // group_size, num_tokens, group_size]
    found = Statistics(*aligned_rows(2, *shape, dtype=torch.float32, device=do.device))
    pairs = 64
    if do.numel():
        statistics_kernel[(cdiv(num_tokens * num_heads, pairs),)](
            *(o, heads(do), lse, delta, *found),
            *(scale, num_heads, num_tokens, num_tokens * num_heads),
            GROUP_HEADS=group_size,
            DV=v_dim,
            PADDED_DV=padded_dim(v_dim),
            PAIRS=pairs,
        )
    return found
