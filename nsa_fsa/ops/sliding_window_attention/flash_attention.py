"""FlashAttention as backends of the sliding window: what each library can do,
and the calls into them.

    flash_attn_4  the package flash-attn-4 (`flash_attn.cute`), for Hopper and newer
    torch_flash   the FlashAttention 2 in PyTorch; the package flash-attn 2 has the same kernels

One H200, 65,536 tokens, 64 heads of 128, window 512, forward / backward, ms (G = 1, 4, 16):
flash_attn_4 2.9, 2.9, 2.9 / 8.5, 9.5, 9.2; torch_flash 5.3, 5.5, 5.4 / 13.4, 14.6, 14.1.
"""

from abc import abstractmethod
from collections.abc import Callable
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.ops.common import profiler, replay, triton_backends
from nsa_fsa.ops.common.attention_operator import AttentionBackend
from nsa_fsa.ops.common.calls import NOTHING, AddTo, AttentionGradients, AttentionResult, Softmax
from nsa_fsa.ops.common.sizes import head_chunks, rows_contiguous
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.sliding_window_attention.last_keys import keys_before, over_last_keys

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# A version with a "b" in it lets pip take such versions.
INSTALL = 'pip install "flash-attn-4>=4.0.0b36"'
WIDTH_STEP = 8  # widths are whole multiples: 16 bytes
# Rows of a tile, and by so many every sequence is longer in the sums of a backward pass.
PADDING = 128
Output = tuple[Tensor, Tensor]  # o `[T, HQ, DV]` and lse `[HQ, T]`
Grads = tuple[Tensor, Tensor, Tensor]  # dq, dk and dv
MANY_SEQUENCES = 512  # of fewer, short ones take no time to speak of


def output_and_dlse(
    do: Tensor, o: Tensor | None, delta: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What flash-attn 4 takes as o and as gradient of lse: it subtracts sum(o * do) - dlse.
    So with delta, which is laid out as lse, o need be neither read nor there."""
    if delta is None:
        assert o is not None
        return o, None
    return do.new_zeros(do.shape[-1]).expand(do.shape), -delta


class SlidingWindow(NamedTuple):
    """Who sees what, as the libraries want it."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None
    max_seqlen: int
    scale: float
    size: int

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """Where sequences begin, and their greatest length, of queries and of keys."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen, self.max_seqlen

    @property
    def edges(self) -> dict[str, int]:
        """How far a query sees to both sides of itself."""
        return dict(window_size_left=self.size - 1, window_size_right=0)

    @property
    def named(self) -> dict[str, Any]:
        """The lengths and edges as flash-attn 4 calls them."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return dict(zip(names, self.lengths, strict=True)) | self.edges


class Inputs(NamedTuple):
    """What a library's backward reads."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor  # [HQ, T]
    delta: Tensor | None  # sum(o * do), [HQ, T]

    def of(self, heads: slice, kv_heads: slice) -> "Inputs":
        """Those of some heads, as views."""
        do, q, k, v, o, lse, delta = self
        do, q, k, v, o = do[:, heads], q[:, heads], k[:, kv_heads], v[:, kv_heads], o[:, heads]
        return Inputs(do, q, k, v, o, lse[heads], None if delta is None else delta[heads])


class FlashBackend(AttentionBackend[WindowedCall]):
    """What the backends of the libraries share."""

    def avoids(self, call: WindowedCall) -> str | None:
        """Why "auto" does not take FlashAttention where it can run, or None:
        its tiles hold rows of one sequence alone.

        One H200, 4 KV heads of 128, FlashAttention (flash-attn 4's backward) / the Triton kernel,
        forward + backward, ms: 100,000 sequences of 16 tokens, G = 4: 33.8 + 213.9 / 14.2 + 33.0,
        and 38.5 / 9.4 GiB; 20,000 of 64, G = 4: 8.3 + 51.8 / 8.0 + 24.2; 4,096 of 16, G = 16: 2.8 +
        29.3 / 1.5 + 4.9; 4,096 of 128, G = 16: 12.3 + 50.6 / 9.6 + 46.3.
        """
        if call.device.type != "cuda":
            return f"the tensors are on {call.device}"
        sequences, num_rows = call.sequences, call.q.shape[0]
        number = 0 if sequences.cu_seqlens_q is not None else sequences.cu_seqlens.shape[0] - 1
        if number < MANY_SEQUENCES or num_rows > number * PADDING:
            return None
        return (
            f"{number} sequences of {PADDING} tokens or fewer on average, "
            f"for each of which it works on {PADDING}"
        )


class Library(FlashBackend):
    """One FlashAttention. What differs between them stands here; DTYPES and widths they share."""

    name: str
    capability: tuple[int, int]  # the oldest GPU
    # Whether the keys past a sequence's end can be anything. Otherwise they are read, and weighed
    # with 0: a NaN or an infinity among them shows. In a cache's unused rows there may be such, so
    # that the keys in use are copied; packed, it is the next sequence, which is lost itself.
    stops_at_end: bool
    max_sequences: int  # of one packed batch

    def missing(self) -> str | None:
        """Why the library cannot be imported, or None."""
        return None

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, sliding: SlidingWindow) -> Output:
        """The output of attention."""

    @abstractmethod
    def differentiate(self, tensors: Inputs, sliding: SlidingWindow, into: Grads | None) -> Grads:
        """dq, dk and dv; in the tensors `into`, which may be views, where given."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        return self.missing() or triton_backends.too_old(device, self.capability)

    def refuses(self, call: WindowedCall, *, backward: bool = False) -> str | None:
        q, v, sequences = call.q, call.v, call.sequences
        if not q.is_cuda:
            return f"q is on {q.device}, and FlashAttention runs on CUDA devices"
        if q.dtype not in DTYPES:
            return f"q has dtype {q.dtype}; supported are float16 and bfloat16"
        if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
            return (
                f"head widths {q.shape[2]} and {v.shape[2]}; supported are at most {MAX_HEAD_DIM}"
            )
        if not call.scale > 0:
            return f"scale={call.scale}; it must be positive"

        if (number := sequences.cu_seqlens.shape[0] - 1) > self.max_sequences:
            return f"{number} sequences; supported are at most {self.max_sequences}"
        if sequences.seqused_k is None:
            return None
        # The libraries take the last query for that of the last used key.
        if sequences.cu_seqlens_q is None:
            return "no support where seqused_k is given without cu_seqlens_q"
        if backward:
            return "no gradient where seqused_k is given, as in decoding"
        before = keys_before(call) * number
        if not self.stops_at_end and q.shape[0] < before:
            return (
                f"{q.shape[0]} queries with up to {before} keys of a cache before them in their "
                "sliding windows: it reads past the keys in use, where there may be NaN, and so "
                "needs a copy of them, for which there must be as many queries"
            )
        return None

    def forward(self, call: WindowedCall) -> AttentionResult:
        """`run`, whatever the widths and strides."""
        q, k, v = call.q, call.k, call.v
        v_dim, width = v.shape[2], _width(q, v)
        if q.numel() == 0 or k.numel() == 0:
            lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
            return AttentionResult(q.new_zeros(*q.shape[:2], v_dim), lse)
        pads = min(q.shape[2], v_dim) < width  # which would copy the whole of a cache
        if call.sequences.seqused_k is not None and (pads or not self.stops_at_end):
            call = over_last_keys(call)
        q, k, v = (_padded(x, width) for x in (q, call.k, call.v))
        o, lse = self.run(q, k, v, _sliding_window(call))
        return AttentionResult(o[..., :v_dim].contiguous(), lse.T.contiguous())

    def gradients(self, call: WindowedCall, do: Tensor, softmax: Softmax) -> Grads:
        """`differentiate`, so many heads at a time as the workspace has room for."""
        q, k, v = call.q, call.k, call.v
        head_dim, v_dim, width = q.shape[2], v.shape[2], _width(q, v)
        if q.numel() == 0 or k.numel() == 0:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        assert softmax.o is not None
        do, q, k, v, o = (_padded(x, width) for x in (do, q, k, v, softmax.o))
        delta = None if softmax.delta is None else softmax.delta.T.contiguous()
        tensors = Inputs(do, q, k, v, o, softmax.lse.T.contiguous(), delta)
        sliding = _sliding_window(call)

        num_sequences = sliding.cu_seqlens_k.shape[0] - 1
        one_head = bytes_of_kv_head(q.shape[0], k.shape[0], call.group_size, num_sequences, width)
        chunks = list(head_chunks(k.shape[1], call.group_size, one_head, call.workspace_bytes))
        if len(chunks) == 1:
            dq, dk, dv = self.differentiate(tensors, sliding, None)
        else:
            dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
            for heads, kv_heads in chunks:
                into = (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads])
                self.differentiate(tensors.of(heads, kv_heads), sliding, into)
        dq, dk, dv = dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_dim]
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def backward(
        self, call: WindowedCall, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        return add_to.add(self.gradients(call, do, softmax))


class FlashAttn4(Library):
    name = "flash_attn_4"
    capability = (9, 0)
    stops_at_end = False
    max_sequences = 2**31 - 1

    def missing(self) -> str | None:
        # The package flash-attn 2 has the same top level name, but not this part.
        here = triton_backends.is_installed("flash_attn.cute")
        return None if here else f"flash-attn-4 is not installed ({INSTALL})"

    def run(self, q: Tensor, k: Tensor, v: Tensor, sliding: SlidingWindow) -> Output:
        from flash_attn.cute.interface import _flash_attn_fwd

        o, lse, *_ = replay.opaque(
            _flash_attn_fwd,
            *(q, k, v),
            **sliding.named,
            seqused_k=sliding.seqused_k,
            softmax_scale=sliding.scale,
            return_lse=True,
        )
        return o, lse

    def differentiate(self, tensors: Inputs, sliding: SlidingWindow, into: Grads | None) -> Grads:
        from flash_attn.cute.interface import _flash_attn_bwd

        do, q, k, v, o, lse, delta = tensors
        o, dlse = output_and_dlse(do, o, delta)
        dq, dk, dv = into or (x.new_empty(x.shape) for x in (q, k, v))
        replay.opaque(
            _flash_attn_bwd,
            *(q, k, v, o, do, lse, sliding.scale),
            **sliding.named,
            **dict(dq=dq, dk=dk, dv=dv, dlse=dlse),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class TorchFlash(Library):
    name = "torch_flash"
    capability = (8, 0)
    stops_at_end = True
    max_sequences = 2**16 - 1  # the second axis of its grid, which CUDA limits

    def run(self, q: Tensor, k: Tensor, v: Tensor, sliding: SlidingWindow) -> Output:
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, *sliding.lengths),
            0.0,  # dropout
            False,  # causal beyond the window
            False,  # a mask for debugging
            scale=sliding.scale,
            **sliding.edges,
            seqused_k=sliding.seqused_k,
        )
        return o, lse

    def differentiate(self, tensors: Inputs, sliding: SlidingWindow, into: Grads | None) -> Grads:
        do, q, k, v, o, lse, _ = tensors
        # The seed and offset of dropout, of which there is none.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty(0, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            *(do, q, k, v, o, lse, *sliding.lengths, 0.0, False, seed, offset),
            scale=sliding.scale,
            **sliding.edges,
        )
        for target, grad in zip(into or (), grads, strict=bool(into)):
            target.copy_(grad)
        return into or grads


FLASH_ATTN_4, TORCH_FLASH = LIBRARIES = (FlashAttn4(), TorchFlash())


def obstacles(call: WindowedCall, *, backward: bool = False) -> dict[str, str | None]:
    """Why each library cannot run the call here, by its name (None: it can)."""
    return {
        x.name: x.unavailable(call.device) or x.refuses(call, backward=backward) for x in LIBRARIES
    }


class Fastest(FlashBackend):
    """Whichever library the profiler finds fastest; without it the first that is here."""

    name = "flash_attention"

    def unavailable(self, device: torch.device | None = None) -> str | None:
        reasons = {library.name: library.unavailable(device) for library in LIBRARIES}
        if None in reasons.values():
            return None
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

    def refuses(self, call: WindowedCall, *, backward: bool = False) -> str | None:
        here = [library for library in LIBRARIES if library.unavailable(call.device) is None]
        reasons = [library.refuses(call, backward=backward) for library in here]
        return None if not reasons or None in reasons else reasons[-1]

    def forward(self, call: WindowedCall) -> AttentionResult:
        return self._choose("forward", call, methodcaller("forward", call)).forward(call)

    def backward(
        self, call: WindowedCall, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        run = methodcaller("gradients", call, do, softmax)
        return self._choose("backward", call, run).backward(call, do, softmax, add_to)

    @staticmethod
    def _choose(direction: str, call: WindowedCall, run: Callable[[Library], Any]) -> Library:
        reasons = obstacles(call, backward=direction == "backward")
        able = {library.name: library for library in LIBRARIES if reasons[library.name] is None}
        name = next(iter(able))
        if len(able) > 1 and call.q.numel() > 0:
            key = window_key(call, direction)
            name = profiler.choose(key, able, run, call.device, recoverable=(Exception,))
        return able[name]


def window_key(call: WindowedCall, direction: str) -> str:
    """The kind of problem that the profiler remembers."""
    return profiler.problem_key(
        "sliding_window_attention", direction, call, f"window={call.window_size}"
    )


def _padded(x: Tensor, width: int) -> Tensor:
    """x `[T, heads, D]` as the libraries read it, with zeros appended to its rows up to `width`."""
    return pad(x, (0, width - x.shape[2])) if x.shape[2] < width else rows_contiguous(x, True)


def _width(q: Tensor, v: Tensor) -> int:
    """One width for keys and values, because not every library and pass can do two."""
    return -(-max(q.shape[2], v.shape[2]) // WIDTH_STEP) * WIDTH_STEP


def _sliding_window(call: WindowedCall) -> SlidingWindow:
    cu_seqlens, max_seqlen, _, seqused_k = call.sequences
    assert call.window_size is not None
    return SlidingWindow(
        call.sequences.of_queries, cu_seqlens, seqused_k, max_seqlen, call.scale, call.window_size
    )


def bytes_of_kv_head(
    num_queries: int, num_keys: int, group_size: int, num_sequences: int, width: int
) -> int:
    """What the libraries take at most in backward for a KV head: float32 sums of dq, and
    where it has several query heads sums of dk and dv, or a copy of these for each of them;
    all are padded."""
    padding = PADDING * num_sequences
    num_rows = (num_queries + padding) * group_size
    of_keys = 2 * max(num_keys + padding, num_rows // 2) if group_size > 1 else 0
    return 4 * width * (num_rows + of_keys)
