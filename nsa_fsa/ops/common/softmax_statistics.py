"""What every backward needs of the forward's softmax, per query and head."""

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.calls import Softmax
from nsa_fsa.ops.common.primitives import kernel, load_rows
from nsa_fsa.ops.common.sizes import aligned_rows, cdiv, padded_dim


@kernel
def statistics_kernel(
    o_ptr, do_ptr, lse_ptr, known_ptr, shift_ptr, delta_ptr, stride_do_t, stride_do_h, scale, num_heads, num_tokens, total,
    GROUP_HEADS: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of [T * HQ]
    inside = row < total
    token, head = row // num_heads, row % num_heads
    if known_ptr is None:
        o = load_rows(o_ptr, row * DV, inside, DV, PADDED_DV, True).to(tl.float32)
        do = load_rows(do_ptr, token * stride_do_t + head * stride_do_h, inside, DV, PADDED_DV, True).to(tl.float32)
        delta = tl.sum(o * do, 1)
    else:
        delta = tl.load(known_ptr + row, mask=inside, other=0.0)
    target = row
    if GROUP_HEADS > 0:
        target = (head // GROUP_HEADS * num_tokens + token) * GROUP_HEADS + head % GROUP_HEADS
    tl.store(delta_ptr + target, -delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    tl.store(shift_ptr + target, tl.where(lse == float("-inf"), float("-inf"), -lse / scale), mask=inside)


def statistics(do: Tensor, softmax: Softmax, scale: float, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """shift = -lse / scale, so that p = exp((q k + shift) * scale), and -sum(o * do), float32 `[T, HQ]`.

    The shift of a query that saw nothing is -inf, which makes its p 0. With a group_size G the result is `[HKV, T, G]`: the
    (query, head) rows of a KV head lie together, so that a tile of them is read whole.
    """
    o, lse, delta = softmax
    num_tokens, num_heads, v_dim = do.shape
    shape = (num_heads // group_size, num_tokens, group_size) if group_size else (num_tokens, num_heads)
    shift, minus_delta = aligned_rows(2, *shape, dtype=torch.float32, device=do.device)
    rows = 64
    if do.numel():
        statistics_kernel[(cdiv(num_tokens * num_heads, rows),)](
            o, do, lse, delta, shift, minus_delta, *do.stride()[:2], scale, num_heads, num_tokens, num_tokens * num_heads,
            GROUP_HEADS=group_size, DV=v_dim, PADDED_DV=padded_dim(v_dim), ROWS=rows,
        )  # fmt: skip
    return shift, minus_delta
