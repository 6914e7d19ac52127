"""Sliding window attention as an operator."""

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
from nsa_fsa.ops.sliding_window_attention.flash_attention import LIBRARIES, Fastest
from nsa_fsa.ops.sliding_window_attention.reference import chunks
from nsa_fsa.sequences import Sequences


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
    """Attention of every query over the last `window_size` positions,
    its own included (NSA paper, section 3.3.3).

    Args:
        window_size: keys that a query sees at most: positions `max(0, t - window_size + 1) .. t`.
        workspace_bytes: how much memory FlashAttention may take for sums, at any length:
            heads are differentiated in turn where all of them would take more.
        backend: which implementation runs: "flash_attn_4", "torch_flash" (the FlashAttention in
            PyTorch), "flash_attention" (whichever of these the profiler finds faster on this GPU),
            "triton_window" (slower, but for hundreds of sequences of 128 tokens or fewer on
            average faster; also for what FlashAttention does not take, such as float32),
            "reference", or "auto": on a GPU "flash_attention" or "triton_window" where they can,
            and the reference elsewhere. flash-attn 4 reads past a sequence's end, and weighs with
            0 what is there: a NaN or an infinity in the next sequence of the batch reaches the
            last queries of this one. Where seqused_k is given it therefore runs over a copy of the
            keys that the queries see, which workspace_bytes does not count, and only where there
            are as many queries as there can be cached keys before them in their windows.
        The other arguments are those of `selected_attention`.

    Returns:
        What `selected_attention` returns.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    check_positive(window_size=window_size, workspace_bytes=workspace_bytes)
    BACKENDS.check(backend)
    sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    check_attention(q, k, v, sequences)
    sequences.check(q.device)
    scale, windows = default_scale(q, scale), Windows(1, 1)
    o, lse = OPERATOR(
        WindowedCall(q, k, v, sequences, scale, workspace_bytes, backend, windows, window_size)
    )
    return (o, lse) if return_lse else o


class Reference(ReferenceBackend[WindowedCall]):
    def chunks(self, call: WindowedCall) -> Iterator[Chunk]:
        assert call.window_size is not None
        return chunks(call.q, **call.sequences._asdict(), window_size=call.window_size)


BACKENDS: Backends[WindowedCall] = Backends(
    "sliding_window_attention", Fastest(), *LIBRARIES, TritonWindows("triton_window"), Reference()
)
OPERATOR = define_attention(BACKENDS, WindowedCall)
