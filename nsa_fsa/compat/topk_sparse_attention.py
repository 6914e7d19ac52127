"""`topk_sparse_attention`: selected attention as the first Triton NSA and FSA are called."""

from typing import Any

from torch import Tensor

from nsa_fsa.checks import check_rows, check_tensor, is_finite_number
from nsa_fsa.compat.integers import clamp_to_int32, to_int32
from nsa_fsa.ops import selected_attention


def topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Selected attention (docs/spec.md, section 5) with block indices head by head.

    Takes the arguments of `topk_sparse_attention` in XunhaoLai/native-sparse-attention-triton and
    of `FSA_topk_sparse_attention` in Relaxed-System-Lab/Flash-Sparse-Attention.

    Args:
        q: `[T, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]` in q's dtype.
        topk_idx: int32 or int64 `[HKV, T, T_sel]`, block numbers local to the sequence;
            pad with -1, or with any number beyond the query's own block. It is not modified.
        block_size: keys per block.
        cu_seqlens: int32 or int64 `[B + 1]`, boundaries of the sequences.
        softmax_scale: default `D ** -0.5`.
        backend: which implementation runs, as in `nsa_fsa.ops.selected_attention`.

    Returns:
        `[T, HQ, DV]` in q's dtype, differentiable in q, k and v.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.

    Where this differs from the originals: every block size, head width, group size and float dtype
    runs; padding may stand anywhere among the indices, and an index that appears twice counts
    once; a query that selects nothing gets 0; the longest sequence is not read back from the
    device, T bounds it.
    """
    for name, x, shape in (("q", q, "[T, HQ, D]"), ("k", k, "[T, HKV, D]")):
        check_rows(name, x, 3, shape)
    check_tensor("topk_idx", topk_idx, "int32 or int64 [HKV, T, T_sel]")
    if not (softmax_scale is None or is_finite_number(softmax_scale)):
        raise ValueError(
            f"softmax_scale={softmax_scale!r} must be a finite number. "
            "Fix: leave it out for D ** -0.5."
        )
    if not (topk_idx.ndim == 3 and topk_idx.shape[:2] == (k.shape[1], q.shape[0])):
        raise ValueError(
            f"topk_idx has shape {tuple(topk_idx.shape)}; "
            f"it must be [HKV, T, T_sel] = [{k.shape[1]}, {q.shape[0]}, T_sel]. "
            "Fix: for indices [T, HKV, T_sel], use nsa_fsa.ops.selected_attention."
        )
    num_keys = k.shape[0]
    block_indices = clamp_to_int32("topk_idx", topk_idx, num_keys)
    block_indices = block_indices.transpose(0, 1)  # [T, HKV, T_sel]
    cu_seqlens = to_int32("cu_seqlens", cu_seqlens)
    options: dict[str, Any] = dict(scale=softmax_scale, backend=backend)
    return selected_attention(
        q, k, v, block_indices, cu_seqlens, num_keys, block_size=block_size, **options
    )
