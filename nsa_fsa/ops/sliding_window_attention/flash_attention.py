"""FlashAttention as backends of the sliding window: what each library can do, and the calls into them.

    flash_attn_4  the package flash-attn-4 (`flash_attn.cute`), for Hopper and newer
    torch_flash   the FlashAttention 2 that PyTorch carries; the package flash-attn 2 is the same kernels

One H200, 65,536 tokens, 64 heads of 128, window 512, forward / backward, ms (G = 1, 4, 16): flash_attn_4 2.9, 2.9, 2.9 / 8.5,
9.5, 9.2; torch_flash 5.3, 5.5, 5.4 / 13.4, 14.6, 14.1.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.ops.common import profiler, triton_backends
from nsa_fsa.ops.common.attention_operator import adding
from nsa_fsa.ops.common.backends import Backend

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
INSTALL = 'pip install "flash-attn-4>=4.0.0b36"'  # a version with a "b" in it lets pip take such versions
WIDTH_STEP = 8  # widths are whole multiples: 16 bytes
PADDING = 128  # rows of a tile, and by so many every sequence is longer in the sums of a backward pass
MANY_SEQUENCES = 512  # of fewer, short ones take no time to speak of


@dataclass(frozen=True)
class Library:
    """One FlashAttention. What differs between them stands here; the rest of the table, DTYPES and widths, they share.

    `forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen, scale, window_size) -> o, lse [HQ, T]` and
    `backward(do, q, k, v, o, lse, delta, cu_seqlens_q, cu_seqlens_k, max_seqlen, scale, window_size, into) -> dq, dk, dv`,
    which writes to the three tensors `into`, where given; their heads may be slices of larger tensors'. delta: sum(o * do),
    `[HQ, T]`, or None.
    """

    name: str
    capability: tuple[int, int]  # the oldest GPU
    # Whether the keys past a sequence's end can be anything. Otherwise they are read, and weighed with 0: a NaN or an infinity
    # among them shows. In a cache's unused rows there may be such; packed, it is the next sequence, which is lost itself.
    stops_at_end: bool
    max_sequences: int  # of one packed batch
    missing: Callable[[], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@functools.cache
def _flash_attn_4_missing() -> str | None:
    # The package flash-attn 2 has the same top level name, and neither tells the other's parts apart.
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else f"flash-attn-4 is not installed ({INSTALL})"


def _flash_attn_4_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen, scale, window_size):
    from flash_attn.cute.interface import _flash_attn_fwd

    o, lse, *_ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, softmax_scale=scale, window_size_left=window_size - 1, window_size_right=0, return_lse=True,
    )  # fmt: skip
    return o, lse


def output_and_dlse(do: Tensor, o: Tensor | None, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What flash-attn 4 takes as o and as gradient of lse: it subtracts sum(o * do) - dlse. So with delta, which is laid out
    as lse, o need be neither read nor there."""
    if delta is None:
        assert o is not None
        return o, None
    return do.new_zeros(do.shape[-1]).expand(do.shape), -delta


def _flash_attn_4_backward(do, q, k, v, o, lse, delta, cu_seqlens_q, cu_seqlens_k, max_seqlen, scale, window_size, into):
    from flash_attn.cute.interface import _flash_attn_bwd

    o, dlse = output_and_dlse(do, o, delta)
    dq, dk, dv = into or (x.new_empty(x.shape) for x in (q, k, v))
    _flash_attn_bwd(
        q, k, v, o, do, lse, scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, window_size_left=window_size - 1, window_size_right=0, dq=dq, dk=dk, dv=dv, dlse=dlse,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _torch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen, scale, window_size):
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen, 0.0, False, False,
        scale=scale, window_size_left=window_size - 1, window_size_right=0, seqused_k=seqused_k,
    )  # fmt: skip
    return o, lse


def _torch_backward(do, q, k, v, o, lse, delta, cu_seqlens_q, cu_seqlens_k, max_seqlen, scale, window_size, into):
    # The seed and offset of dropout, of which there is none.
    no_dropout = (torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    grads = torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen, 0.0, False, *no_dropout,
        scale=scale, window_size_left=window_size - 1, window_size_right=0,
    )  # fmt: skip
    for target, grad in zip(into or (), grads, strict=bool(into)):
        target.copy_(grad)
    return into or grads


FLASH_ATTN_4 = Library(
    "flash_attn_4", (9, 0), False, 2**31 - 1, _flash_attn_4_missing, _flash_attn_4_forward, _flash_attn_4_backward
)
# Sequences are the second axis of its grid, which CUDA limits.
TORCH_FLASH = Library("torch_flash", (8, 0), True, 2**16 - 1, lambda: None, _torch_forward, _torch_backward)
LIBRARIES = (FLASH_ATTN_4, TORCH_FLASH)


def unavailable(library: Library, device: torch.device | None = None) -> str | None:
    """Why a library cannot run on this GPU (default: the current one), or None."""
    return library.missing() or triton_backends.too_old(device, library.capability)


def none_available(device: torch.device | None = None) -> str | None:
    reasons = {library.name: unavailable(library, device) for library in LIBRARIES}
    return None if None in reasons.values() else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def unsupported(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> str | None:
    """Why the library cannot run these arguments, or None."""
    if not q.is_cuda:
        return f"q is on {q.device}, and FlashAttention runs on CUDA devices"
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}; supported are float16 and bfloat16"
    if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
        return f"head widths {q.shape[2]} and {v.shape[2]}; supported are at most {MAX_HEAD_DIM}"
    if not scale > 0:
        return f"scale={scale}; it must be positive"
    if cu_seqlens is not None and (sequences := cu_seqlens.shape[0] - 1) > library.max_sequences:
        return f"{sequences} sequences; supported are at most {library.max_sequences}"
    if seqused_k is not None and cu_seqlens_q is None:  # the libraries take the last query for that of the last used key
        return "no support where seqused_k is given without cu_seqlens_q"
    if seqused_k is not None and not library.stops_at_end:
        return "no support where seqused_k is given: it reads past the keys in use, where there may be NaN"
    if backward and seqused_k is not None:
        return "no gradient where seqused_k is given, as in decoding"
    return None


def obstacles(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> dict[str, str | None]:
    """Why each library cannot run these arguments here, by its name (None: it can)."""
    return {x.name: unavailable(x, q.device) or unsupported(x, q, k, v, **arguments) for x in LIBRARIES}


def none_supports(*tensors: Tensor, **arguments: Any) -> str | None:
    """Why none of the libraries on this machine can run these arguments, or None."""
    here = [library for library in LIBRARIES if unavailable(library, tensors[0].device) is None]
    reasons = [unsupported(library, *tensors, **arguments) for library in here]
    return None if not reasons or None in reasons else reasons[-1]


def avoided(*tensors: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_q: Tensor | None = None, **_: Any) -> str | None:
    """Why "auto" does not take FlashAttention where it can run, or None: its tiles hold rows of one sequence alone.

    One H200, 4 KV heads of 128, FlashAttention (flash-attn 4's backward) / the Triton kernel, forward and then backward, ms:
    100,000 sequences of 16 tokens, G = 4: 33.8 + 213.9 / 14.2 + 33.0, and 38.5 / 9.4 GiB; 20,000 of 64, G = 4: 8.3 + 51.8 /
    8.0 + 24.2; 4,096 of 16, G = 16: 2.8 + 29.3 / 1.5 + 4.9; 4,096 of 128, G = 16: 12.3 + 50.6 / 9.6 + 46.3.
    """
    if (reason := triton_backends.elsewhere(*tensors)) is not None:
        return reason
    num_sequences = 0 if cu_seqlens is None or cu_seqlens_q is not None else cu_seqlens.shape[0] - 1
    if num_sequences < MANY_SEQUENCES or tensors[0].shape[0] > num_sequences * PADDING:
        return None
    return f"{num_sequences} sequences of {PADDING} tokens or fewer on average, for each of which it works on {PADDING}"


def _padded(x: Tensor, width: int) -> Tensor:
    """x `[T, heads, D]`, zeros appended to its rows up to `width`, and as the libraries read it: rows of whole 16 bytes."""
    if x.shape[2] < width:
        return pad(x, (0, width - x.shape[2]))
    aligned = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(stride % WIDTH_STEP == 0 for stride in x.stride()[:2])
    return x if aligned else x.contiguous()


def _width(q: Tensor, v: Tensor) -> int:
    """One width for keys and values: not every library and pass can do two, and zeros change neither scores nor sums."""
    return -(-max(q.shape[2], v.shape[2]) // WIDTH_STEP) * WIDTH_STEP


def _forward(
    library: Library, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_q: Tensor | None,
    seqused_k: Tensor | None, scale: float, window_size: int, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    v_dim, width = v.shape[2], _width(q, v)
    if q.numel() == 0 or k.numel() == 0:
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        return q.new_zeros(*q.shape[:2], v_dim), lse
    starts = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    q, k, v = (_padded(x, width) for x in (q, k, v))
    o, lse = library.forward(q, k, v, starts, cu_seqlens, seqused_k, max_seqlen, scale, window_size)
    return o[..., :v_dim].contiguous(), lse.T.contiguous()


def bytes_of_kv_head(num_queries: int, num_keys: int, group_size: int, num_sequences: int, width: int) -> int:
    """What the libraries take at most in backward for a KV head: float32 sums of dq, and where it has several query heads sums
    of dk and dv, or a copy of these for each of them; all are padded."""
    padding = PADDING * num_sequences
    num_rows = (num_queries + padding) * group_size
    of_keys = 2 * max(num_keys + padding, num_rows // 2) if group_size > 1 else 0
    return 4 * width * (num_rows + of_keys)


def _backward(
    library: Library, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, cu_seqlens: Tensor,
    max_seqlen: int, cu_seqlens_q: Tensor | None, seqused_k: Tensor | None, scale: float, window_size: int,
    workspace_bytes: int, delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from nsa_fsa.ops.common.sizes import head_chunks

    head_dim, v_dim, width = q.shape[2], v.shape[2], _width(q, v)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    starts = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    do, q, k, v, o = (_padded(x, width) for x in (do, q, k, v, o))
    lse, delta = lse.T.contiguous(), None if delta is None else delta.T.contiguous()
    where = (starts, cu_seqlens, max_seqlen, scale, window_size)
    group_size = q.shape[1] // k.shape[1]
    one_head = bytes_of_kv_head(q.shape[0], k.shape[0], group_size, cu_seqlens.shape[0] - 1, width)
    chunks = list(head_chunks(k.shape[1], group_size, one_head, workspace_bytes))
    if len(chunks) == 1:
        grads = library.backward(do, q, k, v, o, lse, delta, *where, None)
    else:
        grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
        for heads, kv_heads in chunks:
            into = (grads[0][:, heads], grads[1][:, kv_heads], grads[2][:, kv_heads])
            tensors = (do[:, heads], q[:, heads], k[:, kv_heads], v[:, kv_heads], o[:, heads], lse[heads])
            library.backward(*tensors, None if delta is None else delta[heads], *where, into)
    dq, dk, dv = grads
    return dq[..., :head_dim].contiguous(), dk[..., :head_dim].contiguous(), dv[..., :v_dim].contiguous()


def window_key(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], direction: str) -> str:
    own = f"window={arguments['window_size']}"
    return triton_backends.problem_key("sliding_window_attention", q, k, v, arguments, direction, own)


def _fastest(run: Callable[..., Any], direction: str, *tensors: Tensor, **arguments: Any) -> Any:
    """Whichever library the profiler finds fastest; without it the first that is here."""
    q, k, v = tensors[:3] if direction == "forward" else tensors[1:4]
    reasons = obstacles(q, k, v, **arguments)
    ways = {x.name: functools.partial(run, x, *tensors, **arguments) for x in LIBRARIES if reasons[x.name] is None}
    name = next(iter(ways))
    if len(ways) > 1 and q.numel() > 0:
        name = profiler.choose(window_key(q, k, v, arguments, direction), ways, q.device, recoverable=(Exception,))
    return ways[name]()


# "flash_attention" asks the profiler; the others run the library they are named after.
BACKENDS = (
    Backend(
        "flash_attention",
        functools.partial(_fastest, _forward, "forward"),
        adding(functools.partial(_fastest, _backward, "backward")),
        none_available,
        none_supports,
        avoided,
    ),
    *(
        Backend(
            library.name,
            functools.partial(_forward, library),
            adding(functools.partial(_backward, library)),
            functools.partial(unavailable, library),
            functools.partial(unsupported, library),
            avoided,
        )
        for library in LIBRARIES
    ),
)
