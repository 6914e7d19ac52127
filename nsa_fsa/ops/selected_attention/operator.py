"""Selected attention as an operator.

`block_index` inverts the selection once; the KV-major kernels use it forward and backward, so it is an operator of its own,
whose result autograd saves like any other input.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.attention_operator import check_token_rows, define_attention, reference_backend
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.common.triton_backends import WORKSPACE_BYTES
from nsa_fsa.ops.selected_attention import reference


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    block_counts: int | Tensor | None = None,
    init_blocks: int = 0,
    local_blocks: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Any:
    """Attention of every query over the keys of the blocks it selected (NSA paper, section 3.3.2; FSA paper, section 3).

    Query t of a group sees position p iff `p // block_size` is among its block indices and `p <= t`.

    Args:
        q: `[T, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]` in q's dtype.
        block_indices: int32 `[T, HKV, T_sel]`, block numbers local to the sequence, in any order. An index that is negative
            or beyond the query's own block selects nothing; one that appears twice counts once.
        cu_seqlens: int32 `[B + 1]`; sequence b is rows `cu_seqlens[b] : cu_seqlens[b + 1]`.
        max_seqlen: an upper bound on the longest sequence.
        block_size: keys per block.
        block_counts: how many leading entries of block_indices count: an int, or int32 `[T, HKV]`; default all.
        init_blocks, local_blocks: the caller's promise that the first / last so many eligible blocks are among the indices
            of every query, as `select_blocks` guarantees; faster backends then treat them as dense.
        scale: softmax scale; default `D ** -0.5`.
        cu_seqlens_q, seqused_k: for queries that are only the last positions of their sequences; see `Layout`.
        return_lse: also return the log-sum-exp.
        workspace_bytes: how much memory the KV-major kernels may take for partial results and, to make the block index, for
            a bitmap, at any length. Not counted are the index, which the backward needs again, and what grows with the number
            of rows or blocks alone: 8 bytes a query and query head, 36 a block and KV head, 2 to 4 a chosen block of every
            query and KV head while the index is made, and, of the sums of one head's dk and dv that a workspace needs in
            which its partial results do not fit, what is more than half of it.
        backend: which implementation runs: "triton_kv_major" (the loop order of FSA), "triton_query_major" (that of NSA),
            "triton" (whichever of their variants the profiler finds fastest on this GPU), "reference", or "auto": "triton"
            on a GPU that can, and the reference elsewhere.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request the natural-log lse `[T, HQ]` in float32 (float64 for float64 inputs),
        which is not differentiable. A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    checks.check_positive(block_size=block_size, workspace_bytes=workspace_bytes)
    checks.check_attention(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    checks.check_tensor("block_indices", block_indices, "int32 [T, HKV, T_sel]")
    backends.check_known(backend, "selected_attention")
    checks.require(
        block_indices.ndim == 3
        and block_indices.shape[:2] == (q.shape[0], k.shape[1])
        and block_indices.dtype == torch.int32
        and block_indices.device == q.device,
        lambda: (
            f"block_indices is {block_indices.dtype} {tuple(block_indices.shape)} on {block_indices.device}; it must be int32 "
            f"[T, HKV, T_sel] = [{q.shape[0]}, {k.shape[1]}, T_sel] on {q.device}. "
            "Fix: pass what select_blocks returns for this q."
        ),
    )
    if isinstance(block_counts, int):
        checks.check_ints(0, block_counts=block_counts)
        block_indices, block_counts = block_indices[..., :block_counts], None
    if block_counts is not None:
        checks.check_tensor("block_counts", block_counts, "int32 [T, HKV], or an int")
        checks.require(
            block_counts.shape == block_indices.shape[:2]
            and block_counts.dtype == torch.int32
            and block_counts.device == q.device,
            lambda: (
                f"block_counts is {block_counts.dtype} {tuple(block_counts.shape)} on {block_counts.device}; it must be an "
                f"int, or int32 [T, HKV] = {tuple(block_indices.shape[:2])} on {q.device}."
            ),
        )
    checks.check_ints(0, init_blocks=init_blocks, local_blocks=local_blocks)
    blocks = (block_size, init_blocks, local_blocks)
    scale = checks.default_scale(q, scale)
    index: tuple[Tensor | None, ...] = (None,) * len(triton_backends.INDEX)
    if wants_index(q, k, v, block_indices, block_size, scale, cu_seqlens_q, seqused_k, backend):
        index = _block_index(block_indices, block_counts, cu_seqlens, max_seqlen, *blocks, workspace_bytes)
    o, lse = _operator(
        q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale,
        block_indices, block_counts, *index, *blocks, workspace_bytes, backend,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def wants_index(q, k, v, block_indices, block_size, scale, cu_seqlens_q, seqused_k, backend: str) -> bool:
    """Whether the backend will use a block index, as far as that can be told without running anything.

    "triton_query_major" would in backward, but has none to read forward, and makes its own.
    """
    if backend not in ("triton", "triton_kv_major") and not (backend == "auto" and q.is_cuda):
        return False
    if triton_backends.unavailable(q.device) is not None:
        return False
    return triton_backends.selected_unsupported(
        q, k, v, block_indices=block_indices, block_size=block_size, scale=scale, cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k, kv_major=True,
    ) is None  # fmt: skip


def block_index_run(
    block_indices: Tensor,
    block_counts: Optional[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = block_indices.shape[0]
    checks.check_layout_values(num_rows, num_rows, cu_seqlens, max_seqlen, None, None)
    from nsa_fsa.ops.selected_attention import launch as kernels

    index = kernels.block_index(
        block_indices, block_counts, cu_seqlens, max_seqlen,
        block_size=block_size, init_blocks=init_blocks, local_blocks=local_blocks, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return tuple(index)  # type: ignore[return-value]


def block_index_fake(
    block_indices, block_counts, cu_seqlens, max_seqlen, block_size, init_blocks, local_blocks, workspace_bytes=None
):
    from nsa_fsa.ops.common.sizes import aligned_rows

    num_rows, num_heads, num_indices = block_indices.shape
    num_blocks = num_rows // block_size + cu_seqlens.shape[0] - 1
    num_slots = max(num_indices - init_blocks - local_blocks, 0)
    return (
        block_indices.new_empty(num_heads, num_rows * num_slots),
        block_indices.new_empty(num_heads, num_blocks),
        block_indices.new_empty(num_heads, num_blocks),
        block_indices.new_empty(num_heads, num_rows),
        aligned_rows(3, num_rows, dtype=torch.int32, device=block_indices.device),
        aligned_rows(4, num_blocks, dtype=torch.int32, device=block_indices.device),
    )


_block_index = define_operator("block_index", block_index_run, block_index_fake)
_operator = define_attention(
    "selected_attention",
    "Tensor block_indices, Tensor? block_counts, Tensor? index_entries, Tensor? index_first, Tensor? index_count, "
    "Tensor? num_sparse, Tensor? index_rows, Tensor? index_blocks, "
    "int block_size, int init_blocks, int local_blocks, int workspace_bytes",
    check_token_rows,
)


UNUSED = ("workspace_bytes", *triton_backends.INDEX)  # by the reference
for backend in (
    *triton_backends.SELECTED,
    reference_backend(reference.selected_attention, reference.selected_attention_backward, *UNUSED),
):
    backends.register("selected_attention", backend)
