"""Block selection as an operator: which blocks of keys each query reads. Carries no gradient."""

from typing import Any

import torch
from torch import Tensor

from nsa_fsa.checks import check_tensor
from nsa_fsa.ops.block_selection import reference
from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import Blocks, Windows, check_attention, default_scale
from nsa_fsa.ops.common.reference_attention import compute_dtype
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors
from nsa_fsa.sequences import Sequences

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
    """Chooses, for every query and KV head, the blocks of keys to attend to (NSA paper,
    section 3.3.2).

    A block's score is the compressed-attention weight that the heads of the group give to the
    windows overlapping it, each times the number of hops it shares with the block. The first
    `init_blocks` and last `local_blocks` eligible blocks are always chosen; the remaining places go
    to the highest scores, ties to the lowest block number.

    Args:
        q, k_cmp, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale:
            as in `compressed_attention`.
        lse: `[T, HQ]`, float32 or float64, as `compressed_attention` returns it for the
            same arguments.
        kernel_size, kernel_stride, block_size: windows' length and stride, and blocks', in tokens.
        num_selected_blocks: T_sel, forced blocks included.
        init_blocks, local_blocks: forced blocks;
            `init_blocks + local_blocks <= num_selected_blocks`.
        return_scores: also return the dense scores, for inspection:
            their size is tokens times blocks.
        backend: which implementation runs: "triton", "reference", or "auto":
            the first of them that can, on a GPU.

    Returns:
        block_indices int32 `[T, HKV, T_sel]`, ascending, padded at the end with -1; query t of a
        sequence has `min(T_sel, t // block_size + 1)` block numbers. On request also the scores
        `[T, HKV, ceil(max_seqlen / block_size)]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or block counts.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    blocks = Blocks(block_size, init_blocks, local_blocks).check()
    blocks.check_selection(windows, num_selected_blocks)
    sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    check_attention(q, k_cmp, k_cmp, sequences, kernel_stride)
    sequences.check(q.device)
    check_tensor("lse", lse, "float32 or float64 [T, HQ]")
    BACKENDS.check(backend)

    if (
        lse.shape != q.shape[:2]
        or lse.dtype not in (torch.float32, torch.float64)
        or lse.device != q.device
    ):
        raise ValueError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; "
            f"it must be float32 or float64 [T, HQ] = {tuple(q.shape[:2])} on {q.device}. "
            "Fix: pass what compressed_attention(..., return_lse=True) returns for this q."
        )
    q, k_cmp, lse, scale = q.detach(), k_cmp.detach(), lse.detach(), default_scale(q, scale)
    call = SelectionCall(
        q, k_cmp, lse, sequences, scale, windows, blocks, num_selected_blocks, backend
    )
    return (SELECT(call), SCORES(call)) if return_scores else SELECT(call)


class Triton(TritonBackend[SelectionCall]):
    def refuses(self, call: SelectionCall, *, backward: bool = False) -> str | None:
        if (reason := unsupported_tensors(call.q, call.k_cmp)) is not None:
            return reason
        if call.num_selected_blocks > MAX_SELECTED_BLOCKS:
            return (
                f"num_selected_blocks={call.num_selected_blocks}; "
                f"supported are at most {MAX_SELECTED_BLOCKS}"
            )
        return None

    def forward(self, call: SelectionCall) -> Tensor:
        from nsa_fsa.ops.block_selection.triton import select_blocks

        return select_blocks(call)


def scored_by(call: SelectionCall) -> dict[str, Any]:
    """What scores the blocks, as arguments of the reference."""
    inputs = dict(q=call.q, k_cmp=call.k_cmp, lse=call.lse, scale=call.scale)
    return inputs | call.sequences._asdict() | call.windows._asdict()


class Reference(Backend[SelectionCall]):
    name = "reference"

    def forward(self, call: SelectionCall) -> Tensor:
        wanted = call.blocks._asdict() | dict(num_selected_blocks=call.num_selected_blocks)
        return reference.select_blocks(**scored_by(call), **wanted)


def _select(call: SelectionCall) -> Tensor:
    call.check_values()
    return BACKENDS.run(call)


def _select_fake(call: SelectionCall) -> Tensor:
    shape = (call.q.shape[0], call.k_cmp.shape[1], call.num_selected_blocks)
    return call.q.new_empty(shape, dtype=torch.int32)


def _scores(call: SelectionCall) -> Tensor:
    """By the reference, because the kernels exist to never hold the scores."""
    call.check_values()
    return reference.block_scores(**scored_by(call), block_size=call.blocks.block_size)


def _scores_fake(call: SelectionCall) -> Tensor:
    num_blocks = -(-call.sequences.max_seqlen // call.blocks.block_size)
    shape = (call.q.shape[0], call.k_cmp.shape[1], num_blocks)
    return call.q.new_empty(shape, dtype=compute_dtype(call.q))


BACKENDS = Backends("select_blocks", Triton(), Reference())
SELECT = define_operator("select_blocks", SelectionCall, Tensor, _select, _select_fake)
SCORES = define_operator("block_scores", SelectionCall, Tensor, _scores, _scores_fake)
