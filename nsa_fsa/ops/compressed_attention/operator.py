"""Compressed attention as an operator."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nsa_fsa.checks import check_positive
from nsa_fsa.ops.common.attention_operator import ReferenceBackend, define_attention
from nsa_fsa.ops.common.backends import Backends
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Windows, check_attention, default_scale
from nsa_fsa.ops.common.reference_attention import Chunk
from nsa_fsa.ops.common.windowed_attention.backend import TritonWindows
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.compressed_attention.reference import chunks
from nsa_fsa.sequences import Sequences


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
    """Attention of every query over the compressed tokens whose whole window lies in its past
    (NSA paper, section 3.3.1).

    Query t sees compressed token i iff `i * kernel_stride + kernel_size - 1 <= t`.

    Args:
        q, max_seqlen, scale, cu_seqlens_q, seqused_k, return_lse: as in `selected_attention`.
        k_cmp, v_cmp: compressed keys `[T // kernel_stride, HKV, D]` and values
            `[T // kernel_stride, HKV, DV]` in q's dtype, laid out as `pool_windows` does; rows that
            no compressed token owns are never read.
        cu_seqlens: int32 `[B + 1]`, boundaries of the sequences, in tokens.
        kernel_size, kernel_stride: length and stride of compression windows, in tokens.
        workspace_bytes: how much memory the backward may take for sums of dq, at any length: heads
            are differentiated in turn where all of them would take more. It keeps any only on
            Hopper, for long sequences, and where the order of additions is free: under
            deterministic algorithms it takes two passes instead of one.
        backend: which implementation runs: "triton", "reference", or "auto":
            the first of them that can, on a GPU.

    Returns:
        What `selected_attention` returns.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    check_positive(workspace_bytes=workspace_bytes)
    BACKENDS.check(backend)
    sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    check_attention(q, k_cmp, v_cmp, sequences, kernel_stride)
    sequences.check(q.device)
    call = WindowedCall(
        q, k_cmp, v_cmp, sequences, default_scale(q, scale), workspace_bytes, backend, windows, None
    )
    o, lse = OPERATOR(call)
    return (o, lse) if return_lse else o


class Reference(ReferenceBackend[WindowedCall]):
    def chunks(self, call: WindowedCall) -> Iterator[Chunk]:
        return chunks(call.q, **call.sequences._asdict(), **call.windows._asdict())


BACKENDS: Backends[WindowedCall] = Backends(
    "compressed_attention", TritonWindows("triton"), Reference()
)
OPERATOR = define_attention(BACKENDS, WindowedCall)
