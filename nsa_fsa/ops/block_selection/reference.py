"""Block scores and block selection (docs/spec.md, sections 3 and 4)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.reference_attention import compute_dtype, grouped, probabilities
from nsa_fsa.ops.common.reference_chunks import sequences_of
from nsa_fsa.ops.compressed_attention import reference as compressed_attention
from nsa_fsa.sequences import Sequences


def block_sums(p: Tensor, num_blocks: int, windows: Windows, block_size: int) -> Tensor:
    """p `[..., N]`, of windows -> `[..., num_blocks]`: the sum over those that overlap a block,
    each times the hops shared.

    A block of u hops is overlapped by the windows that begin in it and by the w - 1 before it, if
    windows have w hops.
    """
    kernel_size, kernel_stride = windows
    num_windows = p.shape[-1]
    w = kernel_size // kernel_stride
    # No larger than what there is, or padding would be.
    u = min(block_size // kernel_stride, num_windows + w)
    overlapped = min(num_blocks, -(-(num_windows + w - 1) // u))
    start = torch.arange(1 - w, u, device=p.device)  # of a window, from the block's
    shared = (torch.clamp(start + w, max=u) - start.clamp(min=0)).to(p.dtype)
    p = pad(p, (w - 1, max(0, overlapped * u - num_windows)))
    sums = p.unfold(-1, u + w - 1, u)[..., :overlapped, :] @ shared
    return pad(sums, (0, num_blocks - overlapped))


def _scored_chunks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    layout: Sequences,
    windows: Windows,
    num_blocks: int,
    block_size: int,
    scale: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows of M queries, their scores `[M, HKV, num_blocks]`)."""
    walk = compressed_attention.chunks(q, **layout._asdict(), **windows._asdict())
    for rows, keys, visible, _ in walk:
        assert isinstance(rows, slice)
        if visible.numel() == 0:
            shape = (visible.shape[0], k_cmp.shape[1], num_blocks)
            yield rows, torch.zeros(shape, dtype=compute_dtype(q), device=q.device)
            continue

        q_, lse_ = (grouped(x[rows], k_cmp.shape[1]) for x in (q, lse))
        p = probabilities(q_, k_cmp[keys], lse_, visible, scale)  # [HKV, G, M, N]
        p = p.sum(1)  # [HKV, M, N], all heads of the group
        scores = block_sums(p, num_blocks, windows, block_size)
        yield rows, scores.transpose(0, 1)


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Scores `[Tq, HKV, ceil(max_seqlen / block_size)]` of every block for every query and KV head.

    A block's score is the softmax mass that all heads of the group give to the compressed tokens
    overlapping it, each weighted by the number of hops it shares with the block. Future blocks
    score 0.
    """
    num_blocks = -(-max_seqlen // block_size)
    scores = torch.zeros(
        q.shape[0], k_cmp.shape[1], num_blocks, dtype=compute_dtype(q), device=q.device
    )
    layout = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    sizes = (Windows(kernel_size, kernel_stride), num_blocks, block_size)
    for rows, chunk in _scored_chunks(q, k_cmp, lse, layout, *sizes, scale):
        scores[rows] = chunk
    return scores


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Block indices int32 `[Tq, HKV, num_selected_blocks]`, ascending, padded with -1."""

    # Wide enough to always take num_selected_blocks.
    num_blocks = max(num_selected_blocks, -(-max_seqlen // block_size))
    # -1: a row that no sequence owns selects nothing.
    own = torch.full((q.shape[0],), -1, device=q.device)
    layout = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    for sequence in sequences_of(layout):
        positions = torch.arange(sequence.offset, sequence.length, device=q.device)
        own[sequence.q] = positions // block_size
    block = torch.arange(num_blocks, device=q.device)

    indices = torch.full(
        (q.shape[0], k_cmp.shape[1], num_selected_blocks), -1, dtype=torch.int32, device=q.device
    )
    sizes = (Windows(kernel_size, kernel_stride), num_blocks, block_size)
    for rows, scores in _scored_chunks(q, k_cmp, lse, layout, *sizes, scale):
        own_chunk = own[rows, None, None]
        eligible = block <= own_chunk
        forced = eligible & ((block < init_blocks) | (block > own_chunk - local_blocks))
        scores = scores.masked_fill(forced, torch.inf).masked_fill(~eligible, -torch.inf)
        # A stable sort keeps the lower block number first among equals.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected_blocks]
        best = best.masked_fill(best > own_chunk, num_blocks).sort(dim=-1).values
        indices[rows] = best.masked_fill(best == num_blocks, -1).int()
    return indices
