"""The operators as one would first write them: dense masks, every step in the inputs' own dtype,
gradients by autograd.

What a low-precision implementation is measured against: it should be no worse than this.
In float64 it serves as a second opinion on nsa_fsa.reference, with which it shares no code.
"""

from itertools import pairwise

import torch


def sequence_and_position(cu_seqlens):
    """The sequence and the position in it of every token, `[T]` each."""
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=cu_seqlens.device), lengths
    )
    return sequence, torch.arange(len(sequence), device=cu_seqlens.device) - cu_seqlens.long()[
        sequence
    ]


def naive_attention(q, k, v, visible, scale):
    """q `[T, HQ, D]`, k `[N, HKV, D]`, v `[N, HKV, DV]`, visible `[T, HKV or 1, N]` ->
    `[T, HQ, DV]`.
    """
    group_size = q.shape[1] // k.shape[1]
    # NaN: rows that no token owns.
    k, v = (x.nan_to_num(0).repeat_interleave(group_size, dim=1) for x in (k, v))
    visible = (
        visible.expand(-1, k.shape[1] // group_size, -1)
        .repeat_interleave(group_size, dim=1)
        .transpose(0, 1)
    )
    s = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale  # [HQ, T, N]
    seen = visible.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~visible & seen, -torch.inf), dim=-1) * seen
    return (p @ v.transpose(0, 1)).transpose(0, 1)


def visible_compressed(cu_seqlens, num_rows, *, kernel_size, kernel_stride):
    """`[T, 1, num_rows]`."""
    sequence, t = sequence_and_position(cu_seqlens)
    i = (
        torch.arange(num_rows, device=cu_seqlens.device)
        - (cu_seqlens.long() // kernel_stride)[sequence][:, None]
    )
    return ((i >= 0) & (i * kernel_stride + kernel_size - 1 <= t[:, None]))[:, None]


def visible_selected(cu_seqlens, block_indices, *, block_size):
    """`[T, HKV, T]`."""
    sequence, t = sequence_and_position(cu_seqlens)
    causal = (sequence == sequence[:, None]) & (t <= t[:, None])
    chosen = torch.zeros(*block_indices.shape[:2], len(t), dtype=torch.bool, device=t.device)
    for slot in block_indices.long().unbind(-1):
        chosen |= slot[..., None] == t // block_size
    return causal[:, None] & chosen


def visible_sliding(cu_seqlens, *, window_size):
    """`[T, 1, T]`."""
    sequence, t = sequence_and_position(cu_seqlens)
    return ((sequence == sequence[:, None]) & (t <= t[:, None]) & (t > t[:, None] - window_size))[
        :, None
    ]


def naive_gated(gate_logits, o_cmp, o_slc, o_swa):
    g = torch.sigmoid(gate_logits)
    return g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_swa


def naive_windows(x, cu_seqlens, *, kernel_size, kernel_stride):
    """`[T // s, HKV, l, D]`, 0 where there is no token."""
    windows = x.new_zeros(x.shape[0] // kernel_stride, x.shape[1], kernel_size, x.shape[2])
    starts = cu_seqlens.tolist()
    for start, stop in pairwise(starts):
        if stop - start >= kernel_size:
            unfolded = x[start:stop].unfold(0, kernel_size, kernel_stride)  # [n, HKV, D, l]
            first = start // kernel_stride
            windows[first : first + len(unfolded)] = unfolded.transpose(2, 3)
    return windows


def naive_call(operator, case, x, block_indices=None):
    """The output of `cases.call`, without lse. `block_indices`: the selection for nsa_attention."""
    if operator == "compressed_attention":
        visible = visible_compressed(x.cu_seqlens, x.k_cmp.shape[0], **case.windows)
        return naive_attention(x.q, x.k_cmp, x.v_cmp, visible, case.scale)
    if operator == "selected_attention":
        visible = visible_selected(x.cu_seqlens, x.block_indices, block_size=case.block_size)
        return naive_attention(x.q, x.k, x.v, visible, case.scale)
    if operator == "sliding_window_attention":
        return naive_attention(
            x.q, x.k, x.v, visible_sliding(x.cu_seqlens, window_size=case.window_size), case.scale
        )
    if operator == "gated_combine":
        return naive_gated(x.gate_logits, x.o_cmp, x.o_slc, x.o_swa)
    if operator == "pool_windows":
        return torch.einsum(
            "nhld,hl->nhd", naive_windows(x.k, x.cu_seqlens, **case.windows), x.pool_weight
        )
    if operator == "gather_windows":
        return naive_windows(x.k, x.cu_seqlens, **case.windows)
    if operator == "nsa_attention":
        x = x.replace(block_indices=block_indices)
        return naive_gated(
            x.gate_logits, *(naive_call(f"{branch}_attention", case, x) for branch in BRANCHES)
        )
    raise ValueError(operator)


BRANCHES = ("compressed", "selected", "sliding_window")


def gradient_floors(operator, case, x, do, largest_lse=0.0):
    """What float32 inside an attention may cost its gradients where the exact ones are a small rest
    of large terms, by name.

    dS = P * (dP - sum(P * dP)) subtracts two dot products dP = do . v, each rounded at eps * |do| .
    |v|: a query that sees a single key has gradient 0, and gets that. And P is recomputed from an
    lse that is float32 by contract, which makes a query's whole row of it wrong by a fraction of
    eps * |lse|, and so the sums over the queries that attend to a key as well. x and do in float64.
    """
    if operator == "nsa_attention":
        floors = [
            gradient_floors(f"{branch}_attention", case, x, do, largest_lse) for branch in BRANCHES
        ]
        return {
            name: sum(floor.get(name, 0) for floor in floors)
            for name in ("q", "k", "v", "k_cmp", "v_cmp")
        }
    if not operator.endswith("_attention") or do.numel() == 0:
        return {}
    names = ("q", "k_cmp", "v_cmp") if operator == "compressed_attention" else ("q", "k", "v")
    q, k, v = (getattr(x, name).detach().nan_to_num(0) for name in names)
    if k.numel() == 0:
        return {}
    # The most attention that one key gets from all queries together: its gradient where do is 1.
    received = 1.0
    if largest_lse:
        received = torch.autograd.grad(naive_call(operator, case, x).sum(), getattr(x, names[2]))[
            0
        ].max()
    dp = torch.einsum(
        "thd,nhd->htn", do.abs(), v.abs().repeat_interleave(case.group_size, dim=1)
    ).max()
    floors = (dp * k.abs().max() * case.scale, dp * q.abs().max() * case.scale, do.abs().max())
    return {
        name: torch.finfo(torch.float32).eps * max(1.0, float(largest_lse * queries)) * floor
        for name, queries, floor in zip(names, (1.0, received, received), floors, strict=True)
    }
