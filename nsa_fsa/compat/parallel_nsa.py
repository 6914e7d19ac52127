"""fla's `parallel_nsa`: `[B, T, H, D]` tensors, gate values, mean pooling over the selection
blocks themselves.

Shapes: B sequences of TQ queries and TK keys (TQ = TK but for decoding), HQ query heads,
HKV key/value heads, D and DV head widths, S block indices a query.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_fsa.checks import check_device, check_ints, check_positive, check_rows, check_tensor
from nsa_fsa.compat.integers import clamp_to_int32, to_int32
from nsa_fsa.ops import (
    compressed_attention,
    pool_windows,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from nsa_fsa.ops.common.backends import check_known
from nsa_fsa.ops.common.calls import check_attention, default_scale
from nsa_fsa.ops.nsa_attention import OPERATORS
from nsa_fsa.sequences import Sequences, uniform_layout


def parallel_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: int | Tensor = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    head_first: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compressed, selected and sliding window attention, mixed by gates,
    as fla's `parallel_nsa` is called.

    The gates say which branches run. Selected attention always does, over `block_indices` or,
    without them, over the blocks that compressed attention scores highest: the first block and the
    last two are always chosen, the query's own among them. Compressed attention runs if `g_cmp` is
    given, over the means of whole blocks of `block_size` keys; in terms of docs/spec.md,
    kernel_size = kernel_stride = block_size. Sliding window attention runs if `window_size > 0`.

    Args:
        q: `[B, TQ, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k, v: `[B, TK, HKV, D]` and `[B, TK, HKV, DV]` in q's dtype.
            If TQ < TK, the queries are the last positions.
        g_cmp, g_slc, g_swa: gates `[B, TQ, HQ]`, any float dtype, used as they are: a sigmoid, if
            any, is the caller's. Without `g_slc` the selected branch has gate 1. `g_swa` is not
            used if `window_size` is 0.
        block_indices: int32 or int64 `[B, TQ, HKV, S]`, block numbers local to the sequence, in any
            order; pad with any number that is negative or beyond the query's own block. Given
            together with `g_cmp`, they are what is read.
        block_counts: how many blocks a query reads. As an int it only counts where `block_indices`
            are not given. As int32 or int64 `[B, TQ, HKV]` it holds for both: so many leading
            indices, or so many of the highest-scoring blocks.
        block_size: keys per block.
        window_size: keys of the sliding branch, the query's own included; 0 for no such branch.
        scale: softmax scale; default `D ** -0.5`.
        cu_seqlens: int32 or int64 `[N + 1]`, boundaries of N sequences packed into B = 1; for
            queries that are the last positions of their sequences, a tuple of the queries' and the
            keys' boundaries.
        head_first: must be False; earlier releases took `[B, H, T, D]` with it.
        backend: which implementation runs, as in `nsa_fsa.ops`.

    Returns:
        `[B, TQ, HQ, DV]` in q's dtype, differentiable in q, k, v and the gates.
        A query that selects nothing gets 0 from the selected branch.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors,
            and for missing arguments.

    Where this differs from fla on purpose:
        - Any group size HQ / HKV, block size and count runs. `block_counts=5` selects 5 blocks,
          not the next power of two.
        - `scale` holds for the sliding branch too, which there keeps `D ** -0.5`.
        - A future block never takes a place; a duplicate index counts once;
          a query without blocks gives 0, not NaN; a tensor of counts larger than S reads S indices.
        - With fewer than three places the own block comes first, then the one before it; fla leaves
          that to ties. Its first releases forced the own block only, and ignored `block_indices` if
          `g_cmp` was given.
        - Gated sums are rounded once, to q's dtype, whatever the gates' dtype.

    Nothing is read back from the device, except the largest count where a tensor of
    `block_counts` meets a selection by score; that also takes the dense block scores, tokens
    times blocks, into memory.
    """
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    _check(q, k, v, gates, block_indices, block_counts, block_size, window_size, head_first)
    scale = default_scale(q, scale)
    check_known(backend, "parallel_nsa", *OPERATORS)
    batch_shape = q.shape[:2]
    sequences = _layout(q, k, cu_seqlens)
    starts, max_seqlen, cu_seqlens_q, _ = sequences
    options: dict[str, Any] = dict(cu_seqlens_q=cu_seqlens_q, scale=scale, backend=backend)
    # [B * TQ, HQ, D], [B * TK, HKV, D], [B * TK, HKV, DV]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    check_attention(q, k, v, sequences)  # under these names, before k becomes k_cmp
    sequences.check(q.device)
    if isinstance(block_counts, Tensor):
        block_counts = clamp_to_int32("block_counts", block_counts, k.shape[0])
        block_counts = block_counts.flatten(0, 1)  # [B * TQ, HKV]
    counts = block_counts if isinstance(block_counts, Tensor) else None
    blocks: dict[str, Any] = dict(block_counts=counts)
    if block_indices is not None:
        block_indices = clamp_to_int32("block_indices", block_indices, k.shape[0])
        blocks["block_indices"] = block_indices.flatten(0, 1)  # [B * TQ, HKV, S]

    if g_cmp is not None:
        windows: dict[str, Any] = dict(kernel_size=block_size, kernel_stride=block_size)
        pooling = windows | dict(backend=backend)
        k_cmp, v_cmp = (pool_windows(x, None, starts, max_seqlen, **pooling) for x in (k, v))
        scoring = windows | options
        o_cmp, lse = compressed_attention(
            q, k_cmp, v_cmp, starts, max_seqlen, return_lse=True, **scoring
        )
        if block_indices is None:
            scored = dict(block_size=block_size, **scoring)
            blocks |= _choose_blocks(block_counts, q, k_cmp, lse, starts, max_seqlen, scored)

    blocks |= dict(cu_seqlens=starts, max_seqlen=max_seqlen, block_size=block_size)
    o_slc = selected_attention(q, k, v, **blocks, **options)
    o = _gated(o_slc, g_slc)  # [B * TQ, HQ, DV]
    if g_cmp is not None:
        o = o + _gated(o_cmp, g_cmp)
    if window_size > 0:
        options |= dict(window_size=window_size)
        o = o + _gated(sliding_window_attention(q, k, v, starts, max_seqlen, **options), g_swa)
    return o.to(q.dtype).unflatten(0, batch_shape)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    block_indices: Tensor | None,
    block_counts: int | Tensor,
    block_size: int,
    window_size: int,
    head_first: bool,
) -> None:
    """Raises ValueError for what the operators, which see flattened tensors, would not notice."""
    if head_first:
        raise ValueError(
            f"head_first={head_first} is not supported. "
            "Fix: q.transpose(1, 2), and likewise k, v, gates and block indices."
        )

    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rows(name, x, 4, "[B, T, heads, head width]")
    if not (q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3]):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            "they must be [B, TQ, HQ, D], [B, TK, HKV, D] and [B, TK, HKV, DV]. "
            "Fix: give all three one B, and make k and v from the same tokens and heads."
        )

    check_positive(block_size=block_size)
    check_ints(0, window_size=window_size)
    for name, gate in gates.items():
        if gate is not None:
            check_tensor(name, gate, "float [B, TQ, HQ]")
            _check_shape(name, gate, "[B, TQ, HQ]", q.shape[:3])
            check_rows(name, gate, 3, "[B, TQ, HQ]")
            check_device(name, gate, q.device)

    if not (window_size == 0 or gates["g_swa"] is not None):
        raise ValueError(
            f"window_size={window_size} needs g_swa, which is None. "
            "Fix: pass g_swa (ones for no gate), or window_size=0."
        )
    if not (block_indices is not None or gates["g_cmp"] is not None):
        raise ValueError(
            "block_indices and g_cmp are both None, so nothing says which blocks to read. "
            "Fix: pass block_indices, or g_cmp "
            "to choose them by compressed attention (zeros for its choice without its output)."
        )

    if block_indices is not None:
        check_tensor("block_indices", block_indices, "int32 or int64 [B, TQ, HKV, S]")
        shape = (*q.shape[:2], k.shape[2], *block_indices.shape[-1:])
        _check_shape("block_indices", block_indices, "[B, TQ, HKV, S]", shape)
        check_device("block_indices", block_indices, q.device)

    if isinstance(block_counts, Tensor):
        shape = (*q.shape[:2], k.shape[2])
        _check_shape("block_counts", block_counts, "an int or [B, TQ, HKV]", shape)
        check_device("block_counts", block_counts, q.device)
    else:
        check_positive(block_counts=block_counts)


def _check_shape(name: str, x: Tensor, axes: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be {axes}, here {tuple(shape)}."
        )


def _layout(q: Tensor, k: Tensor, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None) -> Sequences:
    """Where the sequences lie once B and T are one axis; TK bounds their lengths without a sync."""
    (batch_size, num_queries), num_keys = q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        if num_queries > num_keys:
            raise ValueError(
                f"q has {num_queries} positions and k has {num_keys}, but queries are the "
                "last positions of their sequence. Fix: give keys and values of the whole sequence."
            )
        of_keys = uniform_layout(batch_size, num_keys, k.device).cu_seqlens
        if num_queries == num_keys:
            return Sequences(of_keys, num_keys)
        of_queries = uniform_layout(batch_size, num_queries, q.device).cu_seqlens
        return Sequences(of_keys, num_keys, of_queries)

    # Sequences that cu_seqlens bounds are packed into one row.
    if batch_size != 1:
        raise ValueError(
            f"cu_seqlens needs B = 1, but q has B = {batch_size}. "
            "Fix: x.flatten(0, 1)[None] for each input."
        )

    if isinstance(cu_seqlens, Tensor):
        if num_queries != num_keys:
            raise ValueError(
                f"q has {num_queries} positions and k has {num_keys}, which "
                "one cu_seqlens cannot both describe. Fix: cu_seqlens=(cu_seqlens_q, cu_seqlens_k)."
            )
        return Sequences(to_int32("cu_seqlens", cu_seqlens), num_keys)

    if not (isinstance(cu_seqlens, (tuple, list)) and len(cu_seqlens) == 2):
        raise ValueError(
            f"cu_seqlens={cu_seqlens!r:.100} must be an int32 or int64 tensor [N + 1], "
            "or two of them in a tuple. "
            "Fix: torch.as_tensor(..., dtype=torch.int32), or (cu_seqlens_q, cu_seqlens_k)."
        )
    cu_seqlens_q, cu_seqlens_k = (to_int32("cu_seqlens", x) for x in cu_seqlens)
    return Sequences(cu_seqlens_k, num_keys, cu_seqlens_q)


def _choose_blocks(
    block_counts: int | Tensor,
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Selection by score, as arguments of `selected_attention`: block_indices int32 `[Tq, HKV, S]`,
    and what they promise.

    block_counts: an int, or int32 `[Tq, HKV]`; then the indices come best first,
    so that the leading ones are the best.
    options: further arguments of `select_blocks`.
    """
    if isinstance(block_counts, int):
        num_blocks = block_counts
    else:
        most = int(block_counts.max()) if block_counts.numel() else 1
        num_blocks = max(1, min(most, -(-max_seqlen // options["block_size"])))
    # With fewer than three places: the own block, then the one before it.
    local_blocks = min(2, num_blocks)
    forced = dict(init_blocks=min(1, num_blocks - local_blocks), local_blocks=local_blocks)
    options = dict(num_selected_blocks=num_blocks, **forced, **options)
    if isinstance(block_counts, int):
        indices = select_blocks(q, k_cmp, lse, cu_seqlens, max_seqlen, **options)
        return dict(block_indices=indices, **forced)

    options = options | dict(return_scores=True)
    indices, scores = select_blocks(q, k_cmp, lse, cu_seqlens, max_seqlen, **options)
    score = scores.gather(-1, indices.clamp(min=0).long())  # [Tq, HKV, S]
    own = indices.amax(-1, keepdim=True)
    # No score is higher: each head of the group gives a block at most 1.
    group_size = q.shape[1] // k_cmp.shape[1]
    for rank, forced_block in enumerate((torch.zeros_like(own), own - 1, own), start=1):
        score = torch.where(indices == forced_block, group_size + rank, score)
    best_first = score.masked_fill(indices < 0, -1).argsort(dim=-1, descending=True, stable=True)
    return dict(block_indices=indices.gather(-1, best_first))


def _gated(o: Tensor, gate: Tensor | None) -> Tensor:
    """o `[B * T, HQ, DV]` times its gate `[B, T, HQ]`, if any, in float32 or float64."""
    wide = torch.promote_types(o.dtype, torch.float32)
    return o if gate is None else o.to(wide) * gate.to(wide).flatten(0, 1)[..., None]
