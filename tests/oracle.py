"""The operators once more, as slowly and as plainly as spec.md can be read:
one query, one head, one list of keys at a time.

Shares no code with nsa_fsa. Everything is built from torch operations on tiny vectors,
so autograd gives its gradients. For small sizes only. Section numbers are spec.md's.
"""

import torch


def queries(cu_seqlens, cu_seqlens_q=None, seqused_k=None):
    """Yields (row of the query, row of its sequence's first key, its position in the sequence)."""
    starts = [int(x) for x in cu_seqlens]
    for b in range(len(starts) - 1):
        length = starts[b + 1] - starts[b] if seqused_k is None else int(seqused_k[b])
        if cu_seqlens_q is None:
            first_row, num_queries = starts[b], length
        else:
            first_row = int(cu_seqlens_q[b])
            num_queries = int(cu_seqlens_q[b + 1]) - int(cu_seqlens_q[b])
        for n in range(num_queries):
            yield first_row + n, starts[b], length - num_queries + n


def windows(cu_seqlens, kernel_size, kernel_stride, seqused_k=None):
    """Section 1: a dict from the packed row of every compressed token to the list of key
    rows it covers.
    """
    starts = [int(x) for x in cu_seqlens]
    covered = {}
    for b in range(len(starts) - 1):
        length = starts[b + 1] - starts[b] if seqused_k is None else int(seqused_k[b])
        i = 0
        while i * kernel_stride + kernel_size <= length:
            covered[starts[b] // kernel_stride + i] = [
                starts[b] + i * kernel_stride + x for x in range(kernel_size)
            ]
            i += 1
    return covered


def attend(q, keys, values, scale):
    """One query vector over a list of keys: output and log-sum-exp."""
    scores = torch.stack([scale * (q * key).sum() for key in keys])
    weights = torch.exp(scores - scores.max())
    lse = scores.max() + torch.log(weights.sum())
    return sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)), lse


def attention(q, k, v, scale, visible_rows, **layout):
    """Every query over the key rows `visible_rows(row, kv_head, first_key_row, t)`; o and lse."""
    num_heads, group_size = q.shape[1], q.shape[1] // k.shape[1]
    o = [[q.new_zeros(v.shape[2]) for _ in range(num_heads)] for _ in range(q.shape[0])]
    lse = [[q.new_tensor(-torch.inf) for _ in range(num_heads)] for _ in range(q.shape[0])]
    for row, first_key_row, t in queries(**layout):
        for h in range(num_heads):
            kv = h // group_size
            rows = visible_rows(row, kv, first_key_row, t)
            if rows:
                o[row][h], lse[row][h] = attend(
                    q[row, h], [k[r, kv] for r in rows], [v[r, kv] for r in rows], scale
                )
    if q.shape[0] == 0:
        return q.new_zeros(0, num_heads, v.shape[2]), q.new_zeros(0, num_heads)
    return torch.stack([torch.stack(x) for x in o]), torch.stack([torch.stack(x) for x in lse])


def compressed_tokens(t, kernel_size, kernel_stride):
    """Section 2: the compressed tokens that position t sees."""
    return [i for i in range(t + 1) if i * kernel_stride + kernel_size - 1 <= t]


def oracle_compressed(q, k_cmp, v_cmp, *, kernel_size, kernel_stride, scale, **layout):
    def visible_rows(row, kv, first_key_row, t):
        return [
            first_key_row // kernel_stride + i
            for i in compressed_tokens(t, kernel_size, kernel_stride)
        ]

    return attention(q, k_cmp, v_cmp, scale, visible_rows, **layout)


def oracle_selected(q, k, v, block_indices, *, block_size, scale, block_counts=None, **layout):
    """Section 5. `block_counts`: None, an int or a tensor `[T, HKV]`."""

    def visible_rows(row, kv, first_key_row, t):
        chosen = block_indices[row, kv].tolist()
        if block_counts is not None:
            count = block_counts if isinstance(block_counts, int) else int(block_counts[row, kv])
            chosen = chosen[: max(0, count)]
        return [first_key_row + p for p in range(t + 1) if p // block_size in chosen]

    return attention(q, k, v, scale, visible_rows, **layout)


def oracle_sliding(q, k, v, *, window_size, scale, **layout):
    """Section 6."""

    def visible_rows(row, kv, first_key_row, t):
        return [first_key_row + p for p in range(max(0, t - window_size + 1), t + 1)]

    return attention(q, k, v, scale, visible_rows, **layout)


def oracle_dense(q, k, v, *, scale, **layout):
    """Section 12, as if all queries were dense."""

    def visible_rows(row, kv, first_key_row, t):
        return [first_key_row + p for p in range(t + 1)]

    return attention(q, k, v, scale, visible_rows, **layout)


def overlap(i, j, kernel_size, kernel_stride, block_size):
    """Section 3: stride units shared by window i and block j, by counting positions."""
    window = set(range(i * kernel_stride, i * kernel_stride + kernel_size))
    block = set(range(j * block_size, (j + 1) * block_size))
    return len(window & block) // kernel_stride


def oracle_block_scores(
    q, k_cmp, max_seqlen, *, kernel_size, kernel_stride, block_size, scale, **layout
):
    """Section 3, `[Tq, HKV, ceil(max_seqlen / block_size)]`."""
    num_blocks = (max_seqlen + block_size - 1) // block_size
    group_size = q.shape[1] // k_cmp.shape[1]
    scores = torch.zeros(q.shape[0], k_cmp.shape[1], num_blocks, dtype=q.dtype)
    for row, first_key_row, t in queries(**layout):
        tokens = compressed_tokens(t, kernel_size, kernel_stride)
        if not tokens:
            continue
        shared = torch.tensor(
            [
                [overlap(i, j, kernel_size, kernel_stride, block_size) for j in range(num_blocks)]
                for i in tokens
            ],
            dtype=q.dtype,
        )
        for h in range(q.shape[1]):
            kv = h // group_size
            weights = torch.softmax(
                torch.stack(
                    [
                        scale * (q[row, h] * k_cmp[first_key_row // kernel_stride + i, kv]).sum()
                        for i in tokens
                    ]
                ),
                0,
            )
            scores[row, kv] += weights @ shared
    return scores


def forced_blocks(own, init_blocks, local_blocks):
    """Section 4: the first init_blocks and the last local_blocks of the eligible
    blocks 0 .. own.
    """
    eligible = list(range(own + 1))
    return set(eligible[:init_blocks]) | set(eligible[max(0, len(eligible) - local_blocks) :])


def oracle_select(scores, *, block_size, num_selected_blocks, init_blocks, local_blocks, **layout):
    """Section 4, from the scores of section 3."""
    indices = torch.full((*scores.shape[:2], num_selected_blocks), -1, dtype=torch.int32)
    for row, _, t in queries(**layout):
        own = t // block_size
        forced = forced_blocks(own, init_blocks, local_blocks)
        for kv in range(scores.shape[1]):
            score = scores[row, kv].tolist()
            others = sorted(set(range(own + 1)) - forced, key=lambda j: (-score[j], j))
            chosen = sorted([*forced, *others[: num_selected_blocks - len(forced)]])
            indices[row, kv, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices


def oracle_gather(x, cu_seqlens, *, kernel_size, kernel_stride, seqused_k=None):
    """Section 1, the windows themselves `[T // s, HKV, l, D]`; 0 where there is no token."""
    covered = windows(cu_seqlens, kernel_size, kernel_stride, seqused_k)
    num_rows = x.shape[0] // kernel_stride
    if num_rows == 0:
        return x.new_zeros(0, x.shape[1], kernel_size, x.shape[2])
    nothing = x.new_zeros(x.shape[1], kernel_size, x.shape[2])
    return torch.stack(
        [
            torch.stack([x[r] for r in covered[n]], dim=1) if n in covered else nothing
            for n in range(num_rows)
        ]
    )


def oracle_pool(x, weight, cu_seqlens, *, kernel_size, kernel_stride, seqused_k=None):
    """Section 1, mean (weight None) or weighted by `weight [HKV, l]`; 0 where there is no token."""
    covered = windows(cu_seqlens, kernel_size, kernel_stride, seqused_k)
    num_rows = x.shape[0] // kernel_stride
    if num_rows == 0:
        return x.new_zeros(0, *x.shape[1:])
    if weight is None:
        weight = x.new_ones(x.shape[1], kernel_size) / kernel_size
    pooled = [x.new_zeros(x.shape[1:]) for _ in range(num_rows)]
    for n, rows in covered.items():
        pooled[n] = sum(weight[:, m, None] * x[r] for m, r in enumerate(rows))
    return torch.stack(pooled)


def oracle_gated(gate_logits, o_cmp, o_slc, o_swa):
    """Section 7."""
    if o_cmp.shape[0] == 0:
        return torch.zeros_like(o_cmp)
    rows = []
    for t in range(o_cmp.shape[0]):
        heads = []
        for h in range(o_cmp.shape[1]):
            g = 1 / (1 + torch.exp(-gate_logits[t, h if gate_logits.shape[1] > 1 else 0]))
            heads.append(g[0] * o_cmp[t, h] + g[1] * o_slc[t, h] + g[2] * o_swa[t, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows)
