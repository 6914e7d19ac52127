"""Masked grouped-query attention over chunks: the core that the three branches share.

A branch is nothing but a rule for who sees what, which yields `Chunk`s: `attention` and
`attention_backward` do the rest.

Shapes: M queries of a chunk, N keys it may see, HQ query heads, HKV key/value heads,
H of these in a chunk, G = HQ / HKV, D and DV head widths.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Chunk(NamedTuple):
    # Rows of the M queries: int64 [M] where other chunks have more keys of the same queries.
    q: slice | Tensor
    k: slice  # rows of the N keys that some of them see
    visible: Tensor  # bool [M, H or 1, N]
    heads: slice = slice(None)  # the H KV heads


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums: float32, as in the kernels, and float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """x `[T, HQ, ...]` -> `[T, HKV, G, ...]`, the same memory."""
    return x.unflatten(1, (num_kv_heads, x.shape[1] // num_kv_heads))


def attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Iterable[Chunk], scale: float
) -> tuple[Tensor, Tensor]:
    """Returns o `[T, HQ, DV]` in q's dtype and the natural-log lse `[T, HQ]` in float32
    (float64 for float64 inputs).

    A query that sees no key, or that belongs to no chunk, gets 0 and -inf.
    """
    dtype = compute_dtype(q)
    q = grouped(q, k.shape[1])  # [T, HKV, G, D]
    o = torch.zeros(*q.shape[:3], v.shape[2], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for rows, keys, visible, heads in chunks:
        if visible.numel() == 0:
            continue

        s = masked_scores(q[rows, heads], k[keys, heads], visible, scale)  # [H, G, M, N]
        # The maximum only guards exp against overflow; where nothing is visible it is -inf and 0
        # serves as well.
        m = s.detach().amax(-1, keepdim=True)
        m = torch.where(m == -torch.inf, 0.0, m)
        p = s.sub_(m).exp_()
        z = p.sum(-1, keepdim=True)
        found = p.flatten(1, 2) @ _heads_first(v[keys, heads], dtype)  # [H, G*M, DV]
        found = found.unflatten(1, p.shape[1:3]) / torch.where(z == 0, 1.0, z)
        found = found.permute(2, 0, 1, 3)  # [M, H, G, DV]
        found_lse = (m + z.log()).squeeze(-1).permute(2, 0, 1)  # [M, H, G]

        if isinstance(rows, Tensor):
            before = lse[rows, heads]
            total = torch.logaddexp(before, found_lse)
            found = (
                o[rows, heads] * (before - total).exp()[..., None]
                + found * (found_lse - total).exp()[..., None]
            )
            found_lse = total
        o[rows, heads], lse[rows, heads] = found, found_lse
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).detach()


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    chunks: Iterable[Chunk],
    scale: float,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`'s o with respect to q, k and v, recomputing each chunk's weights
    from its lse.

    delta: sum of o * do over the width, `[T, HQ]`, as every query's weights leave it; default: from
    the weights, which must then add up to 1, or from o where one chunk does not have all of them.
    """
    dtype, num_kv_heads = compute_dtype(q), k.shape[1]
    do, q, lse = (grouped(x, num_kv_heads) for x in (do, q, lse))
    # They are summed over chunks, so kept wide.
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for rows, keys, visible, heads in chunks:
        if visible.numel() == 0:
            continue

        p = probabilities(q[rows, heads], k[keys, heads], lse[rows, heads], visible, scale)
        p = p.flatten(1, 2)  # [H, G*M, N]
        q_, do_ = _group_rows(q[rows, heads], dtype), _group_rows(do[rows, heads], dtype)
        k_, v_ = _heads_first(k[keys, heads], dtype), _heads_first(v[keys, heads], dtype)
        dp = do_ @ v_.mT

        if delta is not None:
            delta_ = grouped(delta, num_kv_heads)[rows, heads]  # [M, H, G]
            delta_ = _group_rows(delta_[..., None], dtype)  # [H, G*M, 1]
        elif isinstance(rows, Tensor):
            assert o is not None
            o_ = _group_rows(grouped(o, num_kv_heads)[rows, heads], dtype)
            delta_ = (do_ * o_).sum(-1, keepdim=True)
        else:
            delta_ = (p * dp).sum(-1, keepdim=True)

        dv[keys, heads] += (p.mT @ do_).transpose(0, 1)
        ds = dp.sub_(delta_).mul_(p)
        dq[rows, heads] += rearrange(ds @ k_ * scale, "h (g m) d -> m h g d", m=visible.shape[0])
        dk[keys, heads] += (ds.mT @ q_ * scale).transpose(0, 1)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def backward_of(chunks: Callable[..., Iterable[Chunk]]) -> Callable[..., Any]:
    """The backward of a branch: `attention_backward`, which takes after lse what the branch's rule
    `chunks` takes after q.
    """

    def backward(do, q, k, v, o, lse, *layout, scale, delta=None, **rule):
        walk = chunks(q, *layout, **rule)
        return attention_backward(do, q, k, v, o, lse, walk, scale, delta)

    return backward


def masked_scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scaled q k^T `[H, G, M, N]` of q `[M, H, G, D]` and k `[N, H, D]`, -inf where unseen."""
    dtype = compute_dtype(q)
    # Scaling q touches the fewest numbers.
    s = (_group_rows(q, dtype) * scale) @ _heads_first(k, dtype).mT
    s = s.unflatten(1, (q.shape[2], q.shape[0]))
    return s.masked_fill(~visible.transpose(0, 1)[:, None], -torch.inf)


def probabilities(q: Tensor, k: Tensor, lse: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax weights `[H, G, M, N]` from a known lse `[M, H, G]`; 0 where a query sees nothing."""
    s = masked_scores(q, k, visible, scale)
    lse = lse.permute(1, 2, 0)[..., None]
    return s.sub_(torch.where(lse == -torch.inf, 0.0, lse)).exp_()


def _group_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rearrange(x, "m h g d -> h (g m) d").to(dtype)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(0, 1).to(dtype)
