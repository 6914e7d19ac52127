"""Masked grouped-query attention over chunks: the core that the three branches share.

A branch is nothing but a rule for who sees what. It yields `Chunk`s; `attention` and `attention_backward` do the rest.

Shapes: M queries of a chunk, N keys it may see, HQ query heads, HKV key/value heads, G = HQ / HKV, D and DV head widths.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Chunk(NamedTuple):
    q: slice  # rows of the chunk's M queries
    k: slice  # rows of the N keys that some of them see
    visible: Tensor  # bool [M, HKV or 1, N]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Scores and sums are kept in float32, as the kernels keep them; float64 inputs stay float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attention(q: Tensor, k: Tensor, v: Tensor, chunks: Iterable[Chunk], scale: float) -> tuple[Tensor, Tensor]:
    """Returns o `[T, HQ, DV]` in q's dtype and the natural-log lse `[T, HQ]` in float32 (float64 for float64 inputs).

    A query that sees no key, or that belongs to no chunk, gets 0 and -inf.
    """
    o = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=compute_dtype(q), device=q.device)
    for rows, keys, visible in chunks:
        if visible.numel() == 0:
            continue
        s = masked_scores(q[rows], k[keys], visible, scale)  # [HKV, G, M, N]
        # The maximum only guards exp against overflow; where nothing is visible it is -inf and 0 serves as well.
        m = s.detach().amax(-1, keepdim=True)
        m = torch.where(m == -torch.inf, 0.0, m)
        p = s.sub_(m).exp_()
        z = p.sum(-1, keepdim=True)
        o_chunk = p.flatten(1, 2) @ _heads_first(v[keys], s.dtype)  # [HKV, G*M, DV]
        o_chunk = o_chunk.unflatten(1, p.shape[1:3]) / torch.where(z == 0, 1.0, z)
        o[rows] = rearrange(o_chunk, "h g m d -> m (h g) d").to(o.dtype)
        lse[rows] = rearrange((m + z.log()).detach(), "h g m 1 -> m (h g)")
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    chunks: Iterable[Chunk],
    scale: float,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`'s o with respect to q, k and v, recomputing each chunk's weights from its lse.

    delta: sum of o * do over the width, `[T, HQ]`, as every query's weights leave it; default: from the weights, which must
    then add up to 1.
    """
    dtype = compute_dtype(q)
    dq = q.new_zeros(q.shape)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)  # summed over chunks, so kept wide
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    for rows, keys, visible in chunks:
        if visible.numel() == 0:
            continue
        p = probabilities(q[rows], k[keys], lse[rows], visible, scale).flatten(1, 2)  # [HKV, G*M, N]
        q_, do_ = _group_rows(q[rows], k.shape[1], dtype), _group_rows(do[rows], k.shape[1], dtype)
        k_, v_ = _heads_first(k[keys], dtype), _heads_first(v[keys], dtype)
        dv[keys] += rearrange(p.mT @ do_, "h n d -> n h d")
        dp = do_ @ v_.mT
        known = None if delta is None else _group_rows(delta[rows][..., None], k.shape[1], dtype)  # [HKV, G*M, 1]
        ds = dp.sub_((p * dp).sum(-1, keepdim=True) if known is None else known).mul_(p)
        dq[rows] = rearrange(ds @ k_ * scale, "h (g m) d -> m (h g) d", m=visible.shape[0]).to(dq.dtype)
        dk[keys] += rearrange(ds.mT @ q_ * scale, "h n d -> n h d")
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def masked_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scaled q k^T `[HKV, G, M, N]`, -inf where a query does not see a key."""
    dtype = compute_dtype(q)
    s = (_group_rows(q, k.shape[1], dtype) * scale) @ _heads_first(k, dtype).mT  # scaling q touches the fewest numbers
    s = rearrange(s, "h (g m) n -> h g m n", m=q.shape[0])
    return s.masked_fill(~rearrange(visible, "m h n -> h 1 m n"), -torch.inf)


def probabilities(q: Tensor, k: Tensor, lse: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax weights `[HKV, G, M, N]` from a known lse `[M, HQ]`; 0 where a query sees nothing."""
    s = masked_scores(q, k, visible, scale)
    lse = rearrange(lse, "m (h g) -> h g m 1", h=k.shape[1])
    return s.sub_(torch.where(lse == -torch.inf, 0.0, lse)).exp_()


def _group_rows(x: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    return rearrange(x, "m (h g) d -> h (g m) d", h=num_kv_heads).to(dtype)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rearrange(x, "n h d -> h n d").to(dtype)
