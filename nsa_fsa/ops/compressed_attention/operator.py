"""Compressed attention as an operator."""

from typing import Any

from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.attention_operator import define_attention, reference_backend
from nsa_fsa.ops.compressed_attention import reference
from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES

MAX_GROUP_SIZE = 64


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Any:
    """Attention of every query over the compressed tokens whose whole window lies in its past (NSA paper, section 3.3.1).

    Query t sees compressed token i iff `i * kernel_stride + kernel_size - 1 <= t`.

    Args:
        q: `[T, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k_cmp, v_cmp: compressed keys `[T // kernel_stride, HKV, D]` and values `[T // kernel_stride, HKV, DV]` in q's dtype,
            laid out as `pool_windows` does; rows that no compressed token owns are never read.
        cu_seqlens: int32 `[B + 1]`, boundaries of the sequences, in tokens.
        max_seqlen: an upper bound on the longest sequence, in tokens.
        kernel_size, kernel_stride: compression window and step, in tokens.
        scale: softmax scale; default `D ** -0.5`.
        cu_seqlens_q, seqused_k: for queries that are only the last positions of their sequences; see `Layout`.
        return_lse: also return the log-sum-exp.
        workspace_bytes: how much memory the backward may take for sums of dq, at any length: heads are differentiated in turn
            where all of them would take more. It keeps any only on Hopper, for long sequences, and where the order of additions
            is free: under deterministic algorithms it takes two passes instead of one.
        backend: which implementation runs: "triton", "reference", or "auto": the first of them that can, on a GPU.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request the natural-log lse `[T, HQ]` in float32 (float64 for float64 inputs),
        which is not differentiable. A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_positive(workspace_bytes=workspace_bytes)
    backends.check_known(backend, "compressed_attention")
    checks.check_attention(q, k_cmp, v_cmp, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, kernel_stride)
    o, lse = _operator(
        q, k_cmp, v_cmp, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, checks.default_scale(q, scale),
        kernel_size, kernel_stride, workspace_bytes, backend,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def check_compressed_rows(
    q: Tensor, k_cmp: Tensor, *, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, kernel_stride, **_
) -> None:
    """Raises ValueError for sequence descriptors whose values do not fit a branch with compressed tokens as keys."""
    if cu_seqlens.device.type != "cpu":
        return
    num_tokens = q.shape[0] if cu_seqlens_q is None else int(cu_seqlens[-1])
    checks.check_layout_values(q.shape[0], num_tokens, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    checks.check_compressed_rows(k_cmp, num_tokens, kernel_stride)


_operator = define_attention(
    "compressed_attention", "int kernel_size, int kernel_stride, int workspace_bytes", check_compressed_rows
)


def unsupported(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, scale: float, backward: bool = False, **_: Any) -> str | None:
    """Why the Triton kernels cannot run these arguments, or None."""
    group_size = q.shape[1] // k_cmp.shape[1]
    if group_size > MAX_GROUP_SIZE:
        return f"{group_size} query heads a KV head; supported are at most {MAX_GROUP_SIZE}"
    if not scale > 0:
        return f"scale={scale}; it must be positive"
    return triton_backends.unsupported_tensors(q, v_cmp)


def _forward(q, k_cmp, v_cmp, *, cu_seqlens, max_seqlen, workspace_bytes, **arguments):
    from nsa_fsa.ops.compressed_attention import triton_forward as kernels

    return kernels.compressed_attention_fwd(q, k_cmp, v_cmp, cu_seqlens, **arguments)


def _backward(do, q, k_cmp, v_cmp, o, lse, *, cu_seqlens, max_seqlen, **arguments):
    from nsa_fsa.ops.compressed_attention import triton_backward as kernels

    return kernels.compressed_attention_bwd(do, q, k_cmp, v_cmp, o, lse, cu_seqlens, max_seqlen, **arguments)


for backend in (
    backends.Backend("triton", _forward, _backward, triton_backends.unavailable, unsupported, triton_backends.elsewhere),
    reference_backend(reference.compressed_attention, reference.compressed_attention_backward, "workspace_bytes"),
):
    backends.register("compressed_attention", backend)
