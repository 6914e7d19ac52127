"""Sliding window attention as an operator."""

from typing import Any

from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.attention_operator import adding, check_token_rows, define_attention, reference_backend
from nsa_fsa.ops.compressed_attention.operator import unsupported
from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES
from nsa_fsa.ops.sliding_window_attention import flash_attention, reference


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Any:
    """Attention of every query over the last `window_size` positions, its own included (NSA paper, section 3.3.3).

    Args:
        q: `[T, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]` in q's dtype.
        cu_seqlens: int32 `[B + 1]`; sequence b is rows `cu_seqlens[b] : cu_seqlens[b + 1]`.
        max_seqlen: an upper bound on the longest sequence.
        window_size: keys that a query sees at most: positions `max(0, t - window_size + 1) .. t`.
        scale: softmax scale; default `D ** -0.5`.
        cu_seqlens_q, seqused_k: for queries that are only the last positions of their sequences; see `Layout`.
        return_lse: also return the log-sum-exp.
        workspace_bytes: how much memory FlashAttention may take for sums, at any length: heads are differentiated in turn
            where all of them would take more.
        backend: which implementation runs: "flash_attn_4", "torch_flash" (the FlashAttention in PyTorch), "flash_attention"
            (whichever of these the profiler finds faster on this GPU), "triton_window" (slower, but for hundreds of sequences
            of 128 tokens or fewer on average faster; also for what FlashAttention does not take, such as float32),
            "reference", or "auto": on a GPU "flash_attention" or "triton_window" where they can, and the reference elsewhere.
            flash-attn 4 reads past a sequence's end, and weighs with 0 what is there: a NaN or an infinity in the next
            sequence of the batch reaches the last queries of this one.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request the natural-log lse `[T, HQ]` in float32 (float64 for float64 inputs),
        which is not differentiable.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    checks.check_positive(window_size=window_size, workspace_bytes=workspace_bytes)
    backends.check_known(backend, "sliding_window_attention")
    checks.check_attention(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    scale = checks.default_scale(q, scale)
    o, lse = _operator(
        q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale, window_size, workspace_bytes, backend
    )  # fmt: skip
    return (o, lse) if return_lse else o


_operator = define_attention("sliding_window_attention", "int window_size, int workspace_bytes", check_token_rows)


# To the kernels of compressed attention each token is a window of its own.
def _forward(q, k, v, *, cu_seqlens, max_seqlen, workspace_bytes, **arguments):
    from nsa_fsa.ops.compressed_attention import triton_forward as kernels

    return kernels.compressed_attention_fwd(q, k, v, cu_seqlens, kernel_size=1, kernel_stride=1, **arguments)


def _backward(do, q, k, v, o, lse, *, cu_seqlens, max_seqlen, **arguments):
    from nsa_fsa.ops.compressed_attention import triton_backward as kernels

    tensors = (do, q, k, v, o, lse, cu_seqlens)
    return kernels.compressed_attention_bwd(*tensors, max_seqlen, kernel_size=1, kernel_stride=1, **arguments)


_triton_window = backends.Backend(
    "triton_window", _forward, adding(_backward), triton_backends.unavailable, unsupported, triton_backends.elsewhere
)


for backend in (
    *flash_attention.BACKENDS,
    _triton_window,
    reference_backend(reference.sliding_window_attention, reference.sliding_window_attention_backward, "workspace_bytes"),
):
    backends.register("sliding_window_attention", backend)
