"""The whole core of Native Sparse Attention: queries, keys, values and gates in, output out."""

from typing import Any, NamedTuple

from torch import Tensor

from nsa_fsa.ops.block_selection import select_blocks
from nsa_fsa.ops.compressed_attention import compressed_attention
from nsa_fsa.ops.gated_combine import gated_combine
from nsa_fsa.ops.selected_attention import selected_attention
from nsa_fsa.ops.sliding_window_attention import sliding_window_attention


class Branches(NamedTuple):
    """What happened inside `nsa_attention`, for those who want to look."""

    o_cmp: Tensor  # [T, HQ, DV]
    o_slc: Tensor  # [T, HQ, DV]
    o_swa: Tensor  # [T, HQ, DV]
    block_indices: Tensor  # int32 [T, HKV, T_sel]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gate_logits: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_branches: bool = False,
    backend: str = "auto",
) -> Any:
    """Compressed, selected and sliding window attention, mixed by gates (NSA paper, eq. 5).

    Args:
        q: `[T, HQ, D]`.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]`, of the selected branch.
        k_cmp, v_cmp: compressed keys and values, `[T // kernel_stride, HKV, D]` and `[T // kernel_stride, HKV, DV]`.
        gate_logits: `[T, HQ or 1, 3]`, before the sigmoid; branch order compressed, selected, sliding.
        k_swa, v_swa: keys and values of the sliding branch; default k and v.
        return_branches: also return the branch outputs and the block indices.
        The other arguments are those of `compressed_attention`, `select_blocks`, `selected_attention` and
        `sliding_window_attention`.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request `Branches`.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or sizes.
    """
    layout: dict[str, Any] = dict(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, scale=scale, backend=backend)
    windows: dict[str, Any] = dict(kernel_size=kernel_size, kernel_stride=kernel_stride)
    forced: dict[str, Any] = dict(init_blocks=init_blocks, local_blocks=local_blocks)

    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, cu_seqlens, max_seqlen, return_lse=True, **windows, **layout)
    block_indices = select_blocks(
        q, k_cmp, lse_cmp, cu_seqlens, max_seqlen, block_size=block_size, num_selected_blocks=num_selected_blocks,
        **forced, **windows, **layout,
    )  # fmt: skip
    o_slc = selected_attention(q, k, v, block_indices, cu_seqlens, max_seqlen, block_size=block_size, **forced, **layout)
    k_swa, v_swa = (k if k_swa is None else k_swa), (v if v_swa is None else v_swa)
    o_swa = sliding_window_attention(q, k_swa, v_swa, cu_seqlens, max_seqlen, window_size=window_size, **layout)
    o = gated_combine(gate_logits, o_cmp, o_slc, o_swa, backend=backend)
    return (o, Branches(o_cmp, o_slc, o_swa, block_indices)) if return_branches else o
