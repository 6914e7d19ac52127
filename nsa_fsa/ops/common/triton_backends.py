"""The Triton backends: what they can run, and the calls into the kernels, which are imported only for those."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.common import profiler
from nsa_fsa.ops.common.backends import Backend

BLOCK_SIZES = (16, 32, 64, 128)
NOTHING = (None, None, None)  # to add gradients to
MAX_HEAD_DIM = 256
MAX_INDICES = 128
# Not 2 GiB, which FlashAttention's padding would exceed by a thousandth at 65,536 tokens of 32 heads of 128: its backward,
# in two parts then, takes 9.5 ms instead of 7.3, and saves 5% of the memory (one H200, G = 4, the one in PyTorch).
WORKSPACE_BYTES = 9 << 28


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, which is slow and for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _missing() -> str | None:
    try:
        installed = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        installed = False
    return None if installed else "Triton is not installed (pip install triton)"


ASSUMED: ContextVar[tuple[int, int] | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(capability: tuple[int, int] | None) -> Iterator[None]:
    """Inside, what can run is said for a machine with Triton and a GPU of this compute capability; None: for this machine."""
    token = ASSUMED.set(capability)
    try:
        yield
    finally:
        ASSUMED.reset(token)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, each its own; None where there is none."""
    return ASSUMED.get() or _capability(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def too_old(device: torch.device | None, oldest: tuple[int, int], elsewhere: str = "") -> str | None:
    """Why this GPU, by default the current one, cannot run what needs compute capability `oldest` or newer, or None.

    Where the device is no GPU, none is asked: that would start CUDA, which takes memory of a GPU and keeps the process from
    forking. elsewhere: what to add for machines without a GPU.
    """
    if device is not None and device.type != "cuda" and torch.cuda.is_available():
        return f"the tensors are on {device}"
    if device is None or device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    found = capability(device)
    if found is None:
        return f"it needs a CUDA GPU{elsewhere}"
    if found >= oldest:
        return None
    return f"it needs compute capability {'.'.join(map(str, oldest))} or newer, and this GPU has {'.'.join(map(str, found))}"


def unavailable(device: torch.device | None = None) -> str | None:
    """Why Triton kernels cannot run on this GPU (default: the current one), or None."""
    if ASSUMED.get() is None and ((reason := _missing()) is not None or interpreted()):
        return reason
    return too_old(device, (8, 0), " (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)")


# `selected_attention` asks where the compiler of a model looks on: this is `torch.compiler.assume_constant_result`, which
# would import that compiler.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def elsewhere(*tensors: Tensor, **_: Any) -> str | None:
    """Why "auto" does not take Triton, or None. It does on a GPU only: the interpreter is far slower than the reference."""
    return next((f"the tensors are on {x.device}" for x in tensors if not x.is_cuda), None)


def unsupported_dtype(x: Tensor, name: str) -> str | None:
    """Why no Triton kernel of this package can take numbers like x, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{name} has dtype {x.dtype}; supported are float16, bfloat16 and float32"
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def unsupported_tensors(*tensors: Tensor, name: str = "q") -> str | None:
    """Why no Triton kernel of this package can take these rows `[T, heads, width]`, of which the first are `name`, or None."""
    first = tensors[0]
    if not first.is_cuda and not interpreted():
        return f"{name} is on {first.device}, and Triton kernels run on CUDA devices"
    if (reason := unsupported_dtype(first, name)) is not None:
        return reason
    if any(x.shape[-1] > MAX_HEAD_DIM for x in tensors):
        widths = " and ".join(str(x.shape[-1]) for x in tensors)
        return f"head widths {widths}; supported are at most {MAX_HEAD_DIM}"
    return None


def selected_unsupported(
    q: Tensor, k: Tensor, v: Tensor, *, block_indices: Tensor, block_size: int, scale: float,
    cu_seqlens_q: Tensor | None, seqused_k: Tensor | None, kv_major: bool, backward: bool = False, **_: Any,
) -> str | None:  # fmt: skip
    """Why the Triton kernels of selected attention cannot run these arguments, or None."""
    if (reason := unsupported_tensors(q, v)) is not None:
        return reason
    if block_size not in BLOCK_SIZES:
        return f"block_size={block_size}; supported are {BLOCK_SIZES}"
    if block_indices.shape[2] > MAX_INDICES:
        return f"{block_indices.shape[2]} block indices a query; supported are at most {MAX_INDICES}"
    if not scale > 0:
        return f"scale={scale}; it must be positive"
    if (kv_major or backward) and (cu_seqlens_q is not None or seqused_k is not None):
        return f"no {'gradient' if backward else 'support'} where cu_seqlens_q or seqused_k is given, as in decoding"
    return None


# What an operator passes of a block index, in the order of `kernels.BlockIndex`.
INDEX = ("index_entries", "index_first", "index_count", "num_sparse", "index_rows", "index_blocks")


def _kernels() -> Any:
    from nsa_fsa.ops.selected_attention import launch as selected_attention

    return selected_attention


def _index(arguments: dict[str, Any]) -> Any:
    """The block index that came with the call, or a new one."""
    kernels = _kernels()
    if arguments["index_entries"] is not None:
        return kernels.BlockIndex(*(arguments[name] for name in INDEX))
    return kernels.block_index(
        *(arguments[name] for name in ("block_indices", "block_counts", "cu_seqlens", "max_seqlen")),
        **{name: arguments[name] for name in ("block_size", "init_blocks", "local_blocks", "workspace_bytes")},
    )


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("block_size", "init_blocks", "local_blocks", "scale", "workspace_bytes")
    return {name: arguments[name] for name in names} | dict(num_indices=arguments["block_indices"].shape[2])


def _kv_major(q, k, v, index, config, do_o_lse, arguments, **gradients):
    kernels, options = _kernels(), _options(arguments)
    if do_o_lse is None:
        return kernels.kv_major_forward(q, k, v, index, config=config, **options)
    do, o, lse = do_o_lse
    return kernels.kv_major_backward(do, q, k, v, o, lse, index, config=config, **gradients, **options)


def _query_major(q, k, v, do_o_lse, arguments, **gradients):
    kernels, chosen = _kernels(), (arguments["block_indices"], arguments["block_counts"])
    if do_o_lse is None:
        names = ("cu_seqlens", "cu_seqlens_q", "seqused_k")
        options = {name: arguments[name] for name in ("block_size", "scale")}
        return kernels.query_major_forward(q, k, v, *chosen, *(arguments[name] for name in names), **options)
    do, o, lse = do_o_lse
    index, options = _index(arguments), _options(arguments)
    return kernels.query_major_backward(do, q, k, v, o, lse, *chosen, index, **gradients, **options)


def problem_key(operator: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], direction: str, own: str) -> str:
    """The kind of problem that the profiler remembers: tokens, sequences and KV heads count in powers of two.

    arguments: of the operator; where those are left out that any value suits, of one sequence and the default budget.
    own: what else of them matters to this operator.
    """
    num_tokens, num_heads, head_dim = q.shape
    cu_seqlens = arguments.get("cu_seqlens")
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = str(q.dtype).removeprefix("torch.")
    if q.dtype == torch.float32:
        dtype += "(tf32)" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "(ieee)"
    return (
        f"{operator} {direction} G={num_heads // k.shape[1]} HKV<={_power_of_two(k.shape[1])} D={head_dim} DV={v.shape[2]} "
        f"{dtype} {own} T<={_power_of_two(num_tokens)} B<={_power_of_two(sequences)} "
        f"workspace={arguments.get('workspace_bytes', WORKSPACE_BYTES)}"
    )


def _power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def selected_key(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], direction: str) -> str:
    own = (
        f"block={arguments['block_size']} T_sel={arguments['block_indices'].shape[2]} "
        f"forced={arguments['init_blocks']}+{arguments['local_blocks']}"
    )
    return problem_key("selected_attention", q, k, v, arguments, direction, own)


def _fastest(q, k, v, do_o_lse, arguments, *, add_to=NOTHING, **gradients):
    """Whichever loop order and tiles the profiler finds fastest; without it the KV-major default where that can run."""
    direction = "forward" if do_o_lse is None else "backward"
    ways: dict[str, Callable[..., Any]] = {}  # timed as they are; only the one that is taken may add to gradients
    if selected_unsupported(q, k, v, kv_major=True, **arguments) is None:
        index = _index(arguments)
        for name, config in _kernels().candidates(q, v, arguments["block_size"], direction).items():
            ways[name] = functools.partial(_kv_major, q, k, v, index, config, do_o_lse, arguments, **gradients)
    ways["query_major"] = functools.partial(_query_major, q, k, v, do_o_lse, arguments, **gradients)
    name = next(iter(ways))
    if len(ways) > 1 and q.is_cuda and q.numel() > 0:
        from triton.errors import TritonError

        key = selected_key(q, k, v, arguments, direction)
        name = profiler.choose(key, ways, q.device, recoverable=(RuntimeError, TritonError))
    return ways[name](add_to=add_to)


def _selected(name: str, run: Callable[..., Any], kv_major: bool) -> Backend:
    return Backend(
        name,
        lambda q, k, v, **arguments: run(q, k, v, None, arguments),
        lambda do, q, k, v, o, lse, *, delta=None, add_to=NOTHING, **arguments: run(
            q, k, v, (do, o, lse), arguments, delta=delta, add_to=add_to
        ),
        unavailable,
        functools.partial(selected_unsupported, kv_major=kv_major),
        elsewhere,
    )


# "triton" asks the profiler; the other two run their default tiles, and so the same kernels in every process.
SELECTED = (
    _selected("triton", _fastest, kv_major=False),
    _selected(
        "triton_kv_major",
        lambda q, k, v, do_o_lse, arguments, **gradients: _kv_major(
            q, k, v, _index(arguments), None, do_o_lse, arguments, **gradients
        ),
        kv_major=True,
    ),
    _selected("triton_query_major", _query_major, kv_major=False),
)
