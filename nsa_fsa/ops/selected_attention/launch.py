"""Selected attention by Triton, as the operator calls it: either loop order, what each can do, and how it is put together."""

from typing import Any

from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.gradients import NOTHING, AddTo
from nsa_fsa.ops.common.locate import Rows, locate_blocks, locate_rows
from nsa_fsa.ops.common.softmax_statistics import statistics
from nsa_fsa.ops.common.tuning import Config, candidates, dot_precision
from nsa_fsa.ops.selected_attention.block_index import BITMAP_BYTES, BlockIndex, build_block_index
from nsa_fsa.ops.selected_attention.kv_major_backward import selected_attention_bwd
from nsa_fsa.ops.selected_attention.kv_major_forward import rows_contiguous, selected_attention_fwd
from nsa_fsa.ops.selected_attention.query_major import selected_attention_query_major_bwd_dq, selected_attention_query_major_fwd

__all__ = [
    "BlockIndex",
    "block_index",
    "candidates",
    "kv_major_backward",
    "kv_major_forward",
    "query_major_backward",
    "query_major_forward",
]


def block_index(
    block_indices: Tensor,
    block_counts: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    workspace_bytes: int = BITMAP_BYTES,
) -> BlockIndex:
    """For every KV head and block the queries that chose it; queries and keys share their rows."""
    num_rows = block_indices.shape[0]
    return build_block_index(
        block_indices, block_counts,
        locate_rows(num_rows, cu_seqlens, block_size), locate_blocks(num_rows, cu_seqlens, block_size),
        max_seqlen=max_seqlen, block_size=block_size, init_blocks=init_blocks, local_blocks=local_blocks,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip


def kv_major_forward(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, config: Config | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """o and lse; options: num_indices, block_size, init_blocks, local_blocks, scale, workspace_bytes."""
    return selected_attention_fwd(q, k, v, index, precision=dot_precision(q.dtype), config=config, **options)


def kv_major_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None, lse: Tensor, index: BlockIndex,
    *, delta: Tensor | None = None, config: Config | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; delta as in `statistics`; options as for the forward, and add_to as in `selected_attention_bwd`."""
    do, precision = rows_contiguous(do), dot_precision(q.dtype)
    sums = statistics(do, o, lse, options["scale"], delta=delta)
    return selected_attention_bwd(do, q, k, v, *sums, index, precision=precision, config=config, **options)


def query_major_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor | None, cu_seqlens: Tensor,
    cu_seqlens_q: Tensor | None, seqused_k: Tensor | None, *, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse; also for queries that are only the last positions of their sequences."""
    rows = Rows(*locate_rows(q.shape[0], cu_seqlens, block_size, cu_seqlens_q, seqused_k))
    return selected_attention_query_major_fwd(
        q, k, v, block_indices, block_counts, rows,
        block_size=block_size, scale=scale, precision=dot_precision(q.dtype),
    )  # fmt: skip


def query_major_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None, lse: Tensor, block_indices: Tensor,
    block_counts: Tensor | None, index: BlockIndex,
    *, delta: Tensor | None = None, add_to: AddTo = NOTHING, config: Config | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq query by query; dk and dv by the blocks' programs, as in every NSA implementation."""
    block_size, scale = options["block_size"], options["scale"]
    precision = dot_precision(q.dtype)
    do = rows_contiguous(do)
    config = config or tuning.plain_config(q, v, block_size)
    sums = statistics(do, o, lse, scale, delta=delta)
    dq, dk, dv = selected_attention_bwd(
        do, q, k, v, *sums, index, precision=precision, config=config, store_dq=False, add_to=add_to, **options
    )
    if q.numel():
        selected_attention_query_major_bwd_dq(
            do, q, k, v, *sums, block_indices, block_counts, Rows(*index.rows), dq,
            block_size=block_size, scale=scale, precision=precision, accumulate=add_to[0] is not None,
        )  # fmt: skip
    return dq, dk, dv
