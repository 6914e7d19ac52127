"""Block selection as an operator: which blocks of keys each query reads. Carries no gradient."""

from typing import Any, Optional

import torch
from torch import Tensor

from nsa_fsa.ops.block_selection import reference
from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.compressed_attention.operator import check_compressed_rows

MAX_SELECTED_BLOCKS = 64  # of the Triton kernel, which keeps them in registers


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
    init_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_scores: bool = False,
    backend: str = "auto",
) -> Any:
    """Chooses, for every query and KV head, the blocks of keys to attend to (NSA paper, section 3.3.2).

    A block's score is the compressed-attention weight that the heads of the group give to the windows overlapping it, each
    times the number of strides it shares with the block. The first `init_blocks` and last `local_blocks` eligible blocks
    are always chosen; the remaining places go to the highest scores, ties to the lowest block number.

    Args:
        q, k_cmp, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale: as in `compressed_attention`.
        lse: `[T, HQ]`, float32 or float64, as `compressed_attention` returns it for the same arguments.
        kernel_size, kernel_stride, block_size: window, step and selection block, in tokens.
        num_selected_blocks: T_sel, forced blocks included.
        init_blocks, local_blocks: forced blocks; `init_blocks + local_blocks <= num_selected_blocks`.
        return_scores: also return the dense scores, for inspection: their size is tokens times blocks.
        backend: which implementation runs: "triton", "reference", or "auto": the first of them that can, on a GPU.

    Returns:
        block_indices int32 `[T, HKV, T_sel]`, ascending, padded at the end with -1; query t of a sequence has
        `min(T_sel, t // block_size + 1)` valid entries. On request also the scores `[T, HKV, ceil(max_seqlen / block_size)]`
        in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or block counts.
    """
    check_blocks(kernel_size, kernel_stride, block_size, num_selected_blocks, init_blocks, local_blocks)
    checks.check_attention(q, k_cmp, k_cmp, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, kernel_stride)
    checks.check_tensor("lse", lse, "float32 or float64 [T, HQ]")
    backends.check_known(backend, "select_blocks")
    checks.require(
        lse.shape == q.shape[:2] and lse.dtype in (torch.float32, torch.float64) and lse.device == q.device,
        lambda: (
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; it must be float32 or float64 [T, HQ] = "
            f"{tuple(q.shape[:2])} on {q.device}. Fix: pass what compressed_attention(..., return_lse=True) returns for this q."
        ),
    )
    layout = (cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, checks.default_scale(q, scale))
    windows = (kernel_size, kernel_stride, block_size)
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    indices = _select(q, k_cmp, lse, *layout, *windows, num_selected_blocks, init_blocks, local_blocks, backend)
    return (indices, _scores(q, k_cmp, lse, *layout, *windows, backend)) if return_scores else indices


def check_blocks(
    kernel_size: int, kernel_stride: int, block_size: int, num_selected_blocks: int, init_blocks: int, local_blocks: int
) -> None:
    """Raises ValueError for window sizes that do not fit together, or more forced blocks than selected ones."""
    checks.check_positive(block_size=block_size, num_selected_blocks=num_selected_blocks)
    checks.check_windows(kernel_size, kernel_stride, block_size)
    checks.check_ints(0, init_blocks=init_blocks, local_blocks=local_blocks)
    checks.require(
        init_blocks + local_blocks <= num_selected_blocks,
        lambda: (
            f"init_blocks={init_blocks} and local_blocks={local_blocks} must together be at most "
            f"num_selected_blocks={num_selected_blocks}. Fix: select more, or force fewer."
        ),
    )


def _select_run(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Optional[Tensor],
    seqused_k: Optional[Tensor],
    scale: float,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    init_blocks: int,
    local_blocks: int,
    backend: str,
) -> Tensor:
    arguments: dict[str, Any] = dict(
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, scale=scale,
        kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, num_selected_blocks=num_selected_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks,
    )  # fmt: skip
    check_compressed_rows(q, k_cmp, **arguments)
    return backends.to_run("select_blocks", backend, q, k_cmp, lse, **arguments).forward(q, k_cmp, lse, **arguments)


def _select_fake(q, k_cmp, lse, *rest):
    num_selected_blocks = rest[8]
    return q.new_empty(q.shape[0], k_cmp.shape[1], num_selected_blocks, dtype=torch.int32)


def _scores_run(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Optional[Tensor],
    seqused_k: Optional[Tensor],
    scale: float,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    backend: str,
) -> Tensor:
    layout: dict[str, Any] = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k)
    check_compressed_rows(q, k_cmp, kernel_stride=kernel_stride, **layout)
    # Whoever asks for the scores wants to look at them: backends that exist to never hold them leave them to another.
    backend = backend if backend in backends.available("block_scores") else "auto"
    return backends.resolve("block_scores", backend).forward(
        q, k_cmp, lse, **layout, scale=scale, kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size
    )


def _scores_fake(
    q, k_cmp, lse, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale, kernel_size, kernel_stride, block_size, backend
):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], k_cmp.shape[1], -(-max_seqlen // block_size), dtype=dtype)


_select = define_operator("select_blocks", _select_run, _select_fake)
_scores = define_operator("block_scores", _scores_run, _scores_fake)


def _triton(*tensors: Tensor, **arguments: Any) -> Tensor:
    from nsa_fsa.ops.block_selection.triton import select_blocks

    run: Any = select_blocks
    return run(*tensors, **arguments)


def _triton_unsupported(*tensors: Tensor, num_selected_blocks: int = 1, **_: Any) -> str | None:
    if (reason := triton_backends.unsupported_tensors(*tensors[:2])) is not None:
        return reason
    if num_selected_blocks > MAX_SELECTED_BLOCKS:
        return f"num_selected_blocks={num_selected_blocks}; supported are at most {MAX_SELECTED_BLOCKS}"
    return None


backends.register(
    "select_blocks",
    backends.Backend(
        "triton", _triton, unavailable=triton_backends.unavailable, unsupported=_triton_unsupported,
        avoided=triton_backends.elsewhere,
    ),
)  # fmt: skip
backends.register("select_blocks", backends.Backend("reference", reference.select_blocks))
backends.register("block_scores", backends.Backend("reference", reference.block_scores))
