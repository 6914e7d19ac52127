"""Block divergence as an operator: what compressed attention can learn of dense attention."""

import torch
from torch import Tensor

from nsa_fsa.checks import check_positive, check_tensor
from nsa_fsa.ops.block_divergence import reference
from nsa_fsa.ops.block_divergence.call import Divergence, DivergenceCall, DivergenceGradients
from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import (
    WORKSPACE_BYTES,
    Blocks,
    Windows,
    check_attention,
    default_scale,
)
from nsa_fsa.ops.common.reference_attention import compute_dtype
from nsa_fsa.ops.common.registration import define_operator, gradient_of_call
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors
from nsa_fsa.sequences import Sequences

MAX_GROUP_SIZE = 64  # of the Triton kernels, whose tiles have whole groups


def block_divergence(
    q: Tensor,
    k: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    lse_cmp: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    free_only: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Divergence:
    """How far the block scores of compressed attention are from where dense attention's mass lies,
    for every query t and KV head.

    Let P be the softmax weights of dense attention, in which query t sees the keys up to t. The
    mass of block j is `mass[j] = sum over h in group, p in block j: P[t, h, p] / G`, and its score
    is the one of docs/spec.md, section 3, by which blocks are chosen. Both are divided by their
    sums over the compared blocks: those that a window seen by t overlaps, or with `free_only` the
    free ones of these. The divergence is then Kullback's and Leibler's,
    `sum over j: mass[j] * log(mass[j] / score[j])`, and 0 where no block is compared.

    Gradients go to q and k_cmp through the scores. The mass is what is to be learned, and none go
    through it.

    Args:
        q, k: `[T, HQ, D]` and `[T, HKV, D]`, as dense attention would have them, rotated.
        k_cmp: compressed keys, as in `compressed_attention`.
        lse: `[T, HQ]`, of dense attention over k, natural log.
        lse_cmp: `[T, HQ]`, of compressed attention.
        block_indices: int32 `[T, HKV, T_sel]`, the choice that mass and recall are about.
        init_blocks, local_blocks: which blocks are forced.
        free_only: whether to compare free blocks alone, which a choice is made from.
        workspace_bytes: how much memory it may take beside inputs, outputs and gradients, and the
            keys of one KV head in float32; what does not fit is done in turn, down to 16 queries
            (in the reference to one query and its group of heads).
        backend: which implementation runs: "triton", "reference", or "auto": the first of them that
            can, on a GPU.
        The other arguments are those of `select_blocks`.

    Returns:
        `Divergence`, in float32 (float64 for float64 inputs). Its recall counts, of the free blocks
        with the most mass, as many as were chosen, how many of these were: its share.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or sizes.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    blocks = Blocks(block_size, init_blocks, local_blocks).check()
    check_positive(workspace_bytes=workspace_bytes)

    sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    check_attention(q, k, k, sequences)
    check_attention(q, k_cmp, k_cmp, sequences, kernel_stride)
    sequences.check(q.device)

    for name, x in (("lse", lse), ("lse_cmp", lse_cmp)):
        check_tensor(name, x, "float32 or float64 [T, HQ]")
        is_wide = x.dtype in (torch.float32, torch.float64)
        if x.shape != q.shape[:2] or x.device != q.device or not is_wide:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
                f"it must be float32 or float64 [T, HQ] = {tuple(q.shape[:2])} on {q.device}. "
                "Fix: pass what the attention of this q returns with return_lse=True."
            )

    check_tensor("block_indices", block_indices, "int32 [T, HKV, T_sel]")
    whose = (q.shape[0], k.shape[1])
    is_choice = block_indices.ndim == 3 and block_indices.shape[:2] == whose
    if not is_choice or block_indices.dtype != torch.int32 or block_indices.device != q.device:
        raise ValueError(
            f"block_indices is {block_indices.dtype} {tuple(block_indices.shape)} on "
            f"{block_indices.device}; it must be int32 [T, HKV, T_sel], here "
            f"[{q.shape[0]}, {k.shape[1]}, T_sel], on {q.device}. "
            "Fix: pass what select_blocks returns for this q."
        )

    blocks.check_selection(windows, block_indices.shape[2])
    BACKENDS.check(backend)
    tensors = (q, k.detach(), k_cmp, lse.detach(), lse_cmp.detach(), block_indices)
    scale = default_scale(q, scale)
    return OPERATOR(
        DivergenceCall(
            *tensors, sequences, scale, windows, blocks, int(free_only), workspace_bytes, backend
        )
    )


class Triton(TritonBackend[DivergenceCall]):
    def refuses(self, call: DivergenceCall, *, backward: bool = False) -> str | None:
        if call.group_size > MAX_GROUP_SIZE:
            return (
                f"{call.group_size} query heads a KV head; supported are at most {MAX_GROUP_SIZE}"
            )
        return unsupported_tensors(call.q)

    def forward(self, call: DivergenceCall) -> Divergence:
        from nsa_fsa.ops.block_divergence.launch import block_divergence

        return block_divergence(call)

    def backward(self, call: DivergenceCall, do: Tensor) -> DivergenceGradients:
        from nsa_fsa.ops.block_divergence.launch import block_divergence_backward

        return block_divergence_backward(call, do)


class Reference(Backend[DivergenceCall]):
    name = "reference"

    def forward(self, call: DivergenceCall) -> Divergence:
        return reference.block_divergence(call)

    def backward(self, call: DivergenceCall, do: Tensor) -> DivergenceGradients:
        return reference.block_divergence_backward(call, do)


def _forward(call: DivergenceCall) -> Divergence:
    call.check_values()
    return BACKENDS.run(call)


def _fake(call: DivergenceCall) -> Divergence:
    shape, dtype = (call.q.shape[0], call.k.shape[1]), compute_dtype(call.q)
    return Divergence(*(call.q.new_empty(shape, dtype=dtype) for _ in range(3)))


BACKENDS: Backends[DivergenceCall] = Backends("block_divergence", Triton(), Reference())
_GRADIENT = gradient_of_call(DivergenceGradients, BACKENDS.differentiate)
OPERATOR = define_operator(
    "block_divergence", DivergenceCall, Divergence, _forward, _fake, _GRADIENT
)
