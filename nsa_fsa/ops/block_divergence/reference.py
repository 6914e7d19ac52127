"""Where dense attention's mass lies by block, and how far compressed attention is from it.

Everything is worked out for the queries of one chunk and one KV head at a time, so that nothing is
larger than the caller allows, and worked out again in the backward.

Shapes: M queries of a chunk, the N keys and n compressed tokens that some of them see, J blocks of
these keys, G heads of the group, C = u + w - 1 windows that overlap a block of u hops.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.ops.block_divergence.call import Divergence, DivergenceCall, DivergenceGradients
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.ops.common.reference_attention import (
    compute_dtype,
    grouped,
    masked_scores,
    probabilities,
)
from nsa_fsa.ops.common.reference_chunks import chunk_size, query_chunks, sequences_of
from nsa_fsa.ops.compression.reference import num_windows
from nsa_fsa.sequences import Sequences


class _Part(NamedTuple):
    """The queries of a chunk, with one KV head."""

    rows: slice  # of the M queries
    head: slice  # the one KV head
    keys: slice  # rows of the N keys
    tokens: slice  # rows of the n compressed tokens
    t: Tensor  # int64 [M], the queries' positions


def _parts(
    q: Tensor,
    num_kv_heads: int,
    layout: Sequences,
    windows: Windows,
    block_size: int,
    workspace_bytes: int,
) -> Iterator[_Part]:
    """Every query with every KV head once, in parts that take at most `workspace_bytes`, or are a
    single query."""
    group_size = q.shape[1] // num_kv_heads
    for sequence in sequences_of(layout):
        num_keys, n = sequence.length, num_windows(sequence.length, *windows)
        w, u = _hops(n, windows, block_size)
        # Of one query: its scores of keys twice, or of windows, by block and all in all, while
        # those of the queries before it are still there.
        scored = group_size * (n + -(-n // u) * (u + w - 1))
        numbers = scored + max((2 * group_size + 3) * num_keys, 4 * scored)
        bytes_per_query = numbers * compute_dtype(q).itemsize
        size = chunk_size(q[:, :group_size], num_keys)
        size = max(1, min(size, workspace_bytes // max(1, bytes_per_query)))
        first_token = sequence.k.start // windows.kernel_stride
        for head in range(num_kv_heads):
            for rows, first, stop in query_chunks(sequence, size):
                yield _Part(
                    rows,
                    slice(head, head + 1),
                    slice(sequence.k.start, sequence.k.start + stop),
                    slice(first_token, first_token + num_windows(stop, *windows)),
                    torch.arange(first, stop, device=q.device),
                )


def _hops(n: int, windows: Windows, block_size: int) -> tuple[int, int]:
    """The hops of a window, w, and of a block, u: no more of these than n windows have with one to
    spare."""
    w = windows.kernel_size // windows.kernel_stride
    return w, min(block_size // windows.kernel_stride, n + w)


def _dense_mass(
    part: _Part, q: Tensor, k: Tensor, lse: Tensor, block_size: int, scale: float
) -> Tensor:
    """The share of dense attention's mass in each block, `[M, J]`, over the heads of the group."""
    k = k[part.keys, part.head]
    num_keys = k.shape[0]
    visible = (torch.arange(num_keys, device=q.device) <= part.t[:, None])[:, None]  # [M, 1, N]
    q, lse = q[part.rows, part.head], lse[part.rows, part.head]
    p = probabilities(q, k, lse, visible, scale).mean(1).squeeze(0)  # [M, N]
    block_size = min(block_size, num_keys)
    p = pad(p, (0, -num_keys % block_size))
    return p.unflatten(1, (-1, block_size)).sum(-1)


class _Scored(NamedTuple):
    """What compressed attention gives to windows and blocks, as logarithms."""

    windows: Tensor  # [G, M, n], of softmax weights; -inf for a window that is not seen
    overlaps: Tensor  # [G, M, J, C], of weights times shared hops
    blocks: Tensor  # [M, J], of block scores; -inf where nothing is seen


def _score(
    part: _Part,
    q: Tensor,
    k_cmp: Tensor,
    lse_cmp: Tensor,
    windows: Windows,
    block_size: int,
    num_blocks: int,
    scale: float,
) -> _Scored:
    """The block scores of docs/spec.md, section 3, as logarithms: none is so small that it is 0."""
    k_cmp = k_cmp[part.tokens, part.head]
    n = k_cmp.shape[0]
    w, u = _hops(n, windows, block_size)
    end = torch.arange(n, device=q.device) * windows.kernel_stride + windows.kernel_size - 1
    visible = (end <= part.t[:, None])[:, None]  # [M, 1, n]
    lse = lse_cmp[part.rows, part.head].permute(1, 2, 0)[0, ..., None]  # [G, M, 1]
    weights = masked_scores(q[part.rows, part.head], k_cmp, visible, scale).squeeze(0)
    weights = weights.sub_(torch.where(lse == -torch.inf, 0.0, lse))  # [G, M, n]

    start = torch.arange(1 - w, u, device=q.device)  # of a window, from the block's
    shared = (torch.clamp(start + w, max=u) - start.clamp(min=0)).to(weights.dtype)  # [C]
    padded = pad(weights, (w - 1, num_blocks * u - n), value=-torch.inf)
    overlaps = padded.unfold(-1, u + w - 1, u) + shared.log()  # [G, M, J, C]
    return _Scored(weights, overlaps, overlaps.logsumexp((0, 3)))


def _forced(part: _Part, num_blocks: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Which blocks are eligible, and which of them forced, bool `[M, J]`."""
    block_size, init_blocks, local_blocks = blocks
    own = (part.t // block_size)[:, None]
    block = torch.arange(num_blocks, device=part.t.device)
    eligible = block <= own
    return eligible, eligible & ((block < init_blocks) | (block > own - local_blocks))


def _compare(mass: Tensor, log_scores: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """The mass and the scores, both made distributions over the blocks that scores know anything
    of, `[M, J]`: the first as it is, and 0 for others, the second as logarithms, and -inf."""
    compared = (log_scores > -torch.inf) & ~left_out
    target = mass * compared
    total = target.sum(-1, keepdim=True)
    target = target / torch.where(total == 0, 1.0, total)
    log_scores = log_scores.masked_fill(~compared, -torch.inf)
    total = log_scores.logsumexp(-1, keepdim=True)
    return target, log_scores - torch.where(total == -torch.inf, 0.0, total)


def _choice(
    indices: Tensor, mass: Tensor, eligible: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of the mass `[M, J]` in the chosen blocks `[M, T_sel]`, and the block recall."""
    num_blocks = mass.shape[1]
    index = indices.long()
    index = index.where(index >= 0, num_blocks)
    chosen = torch.zeros(len(index), num_blocks + 1, dtype=torch.bool, device=mass.device)
    chosen = chosen.scatter_(1, index, True)[:, :num_blocks]
    held = (mass * chosen).sum(-1)

    free = eligible & ~forced
    places = (chosen & free).sum(-1)
    order = mass.masked_fill(~free, -1.0).sort(dim=-1, descending=True, stable=True).indices
    best = torch.arange(num_blocks, device=mass.device) < places[:, None]
    found = (chosen.gather(1, order) & best).sum(-1)
    has_choice = (places > 0) & (free.sum(-1) > places)
    return held, torch.where(has_choice, found / places.to(mass.dtype), torch.nan)


class _Examined(NamedTuple):
    """What there is to know of the queries of a part."""

    part: _Part
    mass: Tensor  # [M, J], of dense attention
    scored: _Scored
    eligible: Tensor  # bool [M, J]
    forced: Tensor  # bool [M, J]
    target: Tensor  # [M, J], the mass among the compared blocks
    log_student: Tensor  # [M, J], of the scores among them; -inf for the others


def _examine(call: DivergenceCall) -> Iterator[_Examined]:
    k, windows, blocks, scale = call.k, call.windows, call.blocks, call.scale
    block_size, most = blocks.block_size, call.workspace_bytes
    walk = _parts(call.q, k.shape[1], call.sequences, windows, block_size, most)
    q, lse, lse_cmp = (grouped(x, k.shape[1]) for x in (call.q, call.lse, call.lse_cmp))

    for part in walk:
        mass = _dense_mass(part, q, k, lse, block_size, scale)
        num_blocks = mass.shape[1]
        scored = _score(part, q, call.k_cmp, lse_cmp, windows, block_size, num_blocks, scale)
        eligible, forced = _forced(part, num_blocks, blocks)
        compared = _compare(mass, scored.blocks, forced & bool(call.free_only))
        yield _Examined(part, mass, scored, eligible, forced, *compared)


def block_divergence(call: DivergenceCall) -> Divergence:
    """Divergence, mass and recall, each `[Tq, HKV]`."""
    q, k = call.q, call.k
    shape, dtype = (q.shape[0], k.shape[1]), compute_dtype(q)
    divergence, held = (torch.zeros(shape, dtype=dtype, device=q.device) for _ in range(2))
    recall = torch.full(shape, torch.nan, dtype=dtype, device=q.device)
    for found in _examine(call):
        target, log_student = found.target, found.log_student
        # Where this is -inf the target is 0, and so is what they add.
        log_student = log_student.masked_fill(log_student == -torch.inf, 0.0)
        at = found.part.rows, found.part.head.start
        divergence[at] = (torch.xlogy(target, target) - target * log_student).sum(-1)
        chosen = (call.block_indices[at], found.mass, found.eligible, found.forced)
        held[at], recall[at] = _choice(*chosen)
    return Divergence(divergence, held, recall)


def block_divergence_backward(call: DivergenceCall, do: Tensor) -> DivergenceGradients:
    """Gradients of the divergence with respect to q and k_cmp, from do `[Tq, HKV]`: as if lse_cmp
    were worked out here."""
    q, k_cmp, num_kv_heads, dtype = call.q, call.k_cmp, call.k.shape[1], compute_dtype(call.q)
    # They are summed over chunks, so kept wide.
    dq, dk_cmp = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k_cmp))
    q_heads, dq_heads = grouped(q, num_kv_heads), grouped(dq, num_kv_heads)
    for found in _examine(call):
        (weights, overlaps, log_scores), target = found.scored, found.target
        rows, tokens, head = found.part.rows, found.part.tokens, found.part.head.start
        # Of the logarithm of each block's score; windows get it by what they share in that.
        d_log = found.log_student.exp() * target.sum(-1, keepdim=True) - target  # [M, J]
        d_log = d_log * do[rows, head, None]
        log_scores = torch.where(log_scores == -torch.inf, 0.0, log_scores)
        overlaps = overlaps.sub_(log_scores[..., None]).exp_().mul_(d_log[..., None])
        ds = _fold(overlaps, call.windows, weights.shape[2])  # [G, M, n], of logarithms of weights
        ds = ds - weights.exp_().mul_(ds.sum(-1, keepdim=True))  # of scores

        q_, k_ = q_heads[rows, head].to(dtype), k_cmp[tokens, head].to(dtype)
        dq_heads[rows, head] = (ds @ k_).transpose(0, 1) * call.scale
        dk_cmp[tokens, head] += torch.einsum("gmn,mgd->nd", ds, q_) * call.scale
    return DivergenceGradients(dq.to(q.dtype), dk_cmp.to(k_cmp.dtype))


def _fold(x: Tensor, windows: Windows, n: int) -> Tensor:
    """The transpose of how windows were laid out by block: `[..., J, C]` -> `[..., n]`."""
    w = windows.kernel_size // windows.kernel_stride
    u = x.shape[-1] - (w - 1)
    num_blocks = x.shape[-2]
    total = pad(x[..., :u].flatten(-2), (0, w - 1))  # from window 1 - w on
    # The last w - 1 of every block's windows are the first of the next one's.
    for i in range(w - 1):
        total[..., u + i :: u][..., :num_blocks] += x[..., u + i]
    return total[..., w - 1 : w - 1 + n]
