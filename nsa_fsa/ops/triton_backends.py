"""The Triton backends: what they can run, and the calls into `nsa_fsa.kernels`, which is imported only for those."""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.backends import Backend

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_INDICES = 128


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, which is slow and for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or newer, and this GPU has {torch.cuda.get_device_capability()}"
    return None


def on_gpu(*tensors: Tensor) -> bool:
    """ "auto" takes Triton on a GPU only: on a CPU the interpreter is far slower than the reference."""
    return all(x.is_cuda for x in tensors)


def selected_unsupported(
    q: Tensor, k: Tensor, v: Tensor, *, block_indices: Tensor, block_size: int, scale: float,
    cu_seqlens_q: Tensor | None, seqused_k: Tensor | None, kv_major: bool, **_: Any,
) -> str | None:  # fmt: skip
    """Why the Triton kernels of selected attention cannot run these arguments, or None."""
    if not q.is_cuda and not interpreted():
        return f"q is on {q.device}, and Triton kernels run on CUDA devices"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q has dtype {q.dtype}; supported are float16, bfloat16 and float32"
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return "Triton's interpreter computes bfloat16 wrongly"
    if block_size not in BLOCK_SIZES:
        return f"block_size={block_size}; supported are {BLOCK_SIZES}"
    if q.shape[2] > MAX_HEAD_DIM or v.shape[2] > MAX_HEAD_DIM:
        return f"head widths {q.shape[2]} and {v.shape[2]}; supported are at most {MAX_HEAD_DIM}"
    if block_indices.shape[2] > MAX_INDICES:
        return f"{block_indices.shape[2]} block indices a query; supported are at most {MAX_INDICES}"
    if not scale > 0:
        return f"scale={scale}; it must be positive"
    if kv_major and (cu_seqlens_q is not None or seqused_k is not None):
        return "queries are not the rows of the keys (cu_seqlens_q or seqused_k is given)"
    return None


def _kernels() -> Any:
    from nsa_fsa.kernels import selected_attention

    return selected_attention


def _index(arguments: dict[str, Any]) -> Any:
    """The block index that came with the call, or a new one."""
    kernels = _kernels()
    names = ("index_entries", "index_first", "index_count", "num_sparse")
    if arguments["index_entries"] is not None:
        return kernels.BlockIndex(*(arguments[name] for name in names))
    return kernels.block_index(
        *(arguments[name] for name in ("block_indices", "block_counts", "cu_seqlens", "max_seqlen")),
        **{name: arguments[name] for name in ("block_size", "init_blocks", "local_blocks")},
    )


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("block_size", "init_blocks", "local_blocks", "scale", "workspace_bytes")
    return {name: arguments[name] for name in names} | dict(num_indices=arguments["block_indices"].shape[2])


def _kv_major_forward(q, k, v, **arguments):
    return _kernels().kv_major_forward(q, k, v, _index(arguments), arguments["cu_seqlens"], **_options(arguments))


def _kv_major_backward(do, q, k, v, o, lse, **arguments):
    options = _options(arguments)
    return _kernels().kv_major_backward(do, q, k, v, o, lse, _index(arguments), arguments["cu_seqlens"], **options)


def _query_major_forward(q, k, v, **arguments):
    names = ("block_indices", "block_counts", "cu_seqlens", "cu_seqlens_q", "seqused_k")
    options = {name: arguments[name] for name in ("block_size", "scale")}
    return _kernels().query_major_forward(q, k, v, *(arguments[name] for name in names), **options)


def _query_major_backward(do, q, k, v, o, lse, **arguments):
    if arguments["cu_seqlens_q"] is not None or arguments["seqused_k"] is not None:
        raise NotImplementedError(
            "the Triton kernels have no gradient for queries that are only the last positions of their sequences. "
            'Fix: use backend="reference", or torch.no_grad() for decoding.'
        )
    return _kernels().query_major_backward(
        do, q, k, v, o, lse, arguments["block_indices"], arguments["block_counts"], _index(arguments), arguments["cu_seqlens"],
        **_options(arguments),
    )  # fmt: skip


SELECTED_KV_MAJOR = Backend(
    "triton_kv_major",
    _kv_major_forward,
    _kv_major_backward,
    unavailable,
    functools.partial(selected_unsupported, kv_major=True),
    on_gpu,
)
SELECTED_QUERY_MAJOR = Backend(
    "triton_query_major",
    _query_major_forward,
    _query_major_backward,
    unavailable,
    functools.partial(selected_unsupported, kv_major=False),
    on_gpu,
)
