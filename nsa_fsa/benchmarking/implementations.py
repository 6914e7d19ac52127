"""What `nsa-fsa bench selected` times: this package's backends, and every other implementation that can be imported.

Peers run with their own defaults; what only rearranges their inputs (views, index dtypes, counts) is done before the clock
starts.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.benchmarking.calls import Calls, Implementation, by_autograd
from nsa_fsa.benchmarking.check import Inputs
from nsa_fsa.benchmarking.selections import block_counts
from nsa_fsa.benchmarking.settings import Setting

# This package


def forced_blocks(setting: Setting) -> dict[str, Any]:
    return dict(block_size=setting.block_size, init_blocks=setting.init_blocks, local_blocks=setting.local_blocks)


def ours(inputs: Inputs, backend: str, **options: Any) -> Calls:
    """Forward with the block index, as a user calls it; backward by the registered operator, which gets the index."""
    from nsa_fsa.ops import selected_attention

    setting, indices, cu_seqlens = inputs.setting, inputs.block_indices, inputs.cu_seqlens
    arguments: dict[str, Any] = dict(**forced_blocks(setting), **options, backend=backend)

    def attention(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return selected_attention(q, k, v, indices, cu_seqlens, setting.num_tokens, **arguments, **more)

    calls = by_autograd(inputs, attention)
    saved: dict[str, Any] = {}

    def backward() -> tuple[Tensor, ...]:
        if not saved:
            saved.update(backward_arguments(inputs, attention, arguments))
        return torch.ops.nsa_fsa.selected_attention_backward(**saved)

    calls.backward = backward
    return calls


def backward_arguments(inputs: Inputs, attention: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What autograd would pass to the backward operator."""
    from nsa_fsa.ops.common.triton_backends import INDEX
    from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES, wants_index

    setting, indices = inputs.setting, inputs.block_indices
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    with torch.no_grad():
        o, lse = attention(q, k, v, return_lse=True)
    scale = setting.head_dim**-0.5
    index: Any = (None,) * len(INDEX)
    if wants_index(q, k, v, indices, setting.block_size, scale, None, None, arguments["backend"]):
        blocks = (setting.block_size, setting.init_blocks, setting.local_blocks)
        index = torch.ops.nsa_fsa.block_index(indices, None, inputs.cu_seqlens, setting.num_tokens, *blocks)
    return dict(
        do=inputs.do, q=q, k=k, v=v, o=o, lse=lse, cu_seqlens=inputs.cu_seqlens, max_seqlen=setting.num_tokens,
        cu_seqlens_q=None, seqused_k=None, scale=scale, block_indices=indices, block_counts=None,
        workspace_bytes=WORKSPACE_BYTES, **dict(zip(INDEX, index, strict=True)),
    ) | arguments  # fmt: skip


def chosen_by_profiler(inputs: Inputs, name: str) -> dict[str, Any]:
    """What "auto" ran in this pass, where the profiler had a choice."""
    from nsa_fsa.ops.common import profiler, triton_backends

    found = {}
    arguments = dict(**forced_blocks(inputs.setting), block_indices=inputs.block_indices)
    for direction in ("forward", "backward"):
        if direction in name and inputs.q.is_cuda:
            key = triton_backends.selected_key(inputs.q, inputs.k, inputs.v, arguments, direction)
            found[direction] = (profiler.known(key, inputs.q.device) or {}).get("choice", "the default")
    return dict(chosen=found)


def no_facts(inputs: Inputs, name: str) -> dict[str, Any]:
    return {}


def ours_unsupported(setting: Setting, backend: str) -> str | None:
    from nsa_fsa.ops.common import backends

    return None if backend == "auto" else backends.available("selected_attention")[backend]


# Full causal attention


def sdpa(inputs: Inputs, backend: str) -> Calls:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # views [1, heads, T, D]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            o = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=inputs.setting.group_size > 1
            )
        return o.transpose(1, 2)[0]

    return by_autograd(inputs, attention)


def load_flash_attn_4() -> Any:
    return importlib.import_module("flash_attn.cute").flash_attn_func


def load_flash_attn_2() -> Any:
    return importlib.import_module("flash_attn").flash_attn_func


def flash_attn(inputs: Inputs, load: Callable[[], Any]) -> Calls:
    function = load()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q[None], k[None], v[None], causal=True)
        return (result[0] if isinstance(result, tuple) else result)[0]

    return by_autograd(inputs, attention)


# Selected attention by others


def load_fla() -> Any:
    try:
        return importlib.import_module("fla.ops.nsa").parallel_nsa
    except ImportError:  # the repository it came from
        return importlib.import_module("native_sparse_attention.ops.parallel").parallel_nsa


def fla_unsupported(setting: Setting) -> str | None:
    group = setting.group_size
    return f"parallel_nsa wants groups of 16, 32, ... query heads, not {group}" if group < 16 or group & (group - 1) else None


def fla(inputs: Inputs) -> Calls:
    function = load_fla()
    indices, counts = inputs.block_indices.long()[None], block_counts(inputs.block_indices).long()[None]
    required = {name for name, x in inspect.signature(function).parameters.items() if x.default is inspect.Parameter.empty}
    # Older versions multiply by gates that newer ones leave out.
    ones = torch.ones(1, *inputs.q.shape[:2], dtype=inputs.q.dtype, device=inputs.q.device)
    gates = {name: ones for name in ("g_slc", "g_swa") if name in required}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = inputs.setting.block_size
        return function(q[None], k[None], v[None], block_indices=indices, block_counts=counts, block_size=size, **gates)[0]

    return by_autograd(inputs, attention)


def load_nsa_triton() -> Any:
    return importlib.import_module("native_sparse_attention.ops").topk_sparse_attention


def load_fsa() -> Any:
    return importlib.import_module("fsa.ops.FSA_topk_sparse_attention").FSA_topk_sparse_attention


def topk_sparse(inputs: Inputs, load: Callable[[], Any]) -> Calls:
    """The signature that the Triton NSA and the FSA paper's code share."""
    function, indices = load(), inputs.block_indices.transpose(0, 1).contiguous()  # [HKV, T, T_sel]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, indices, inputs.setting.block_size, inputs.cu_seqlens)

    return by_autograd(inputs, attention)


def load_cudnn() -> Any:
    return importlib.import_module("cudnn").NSA.selection_attention_wrapper


def cudnn_unsupported(setting: Setting) -> str | None:
    size = setting.block_size
    return None if size in (16, 32, 64) else f"its selection attention takes blocks of 16, 32 or 64 keys, not {size}"


def cudnn(inputs: Inputs) -> Calls:
    function, setting, counts = load_cudnn(), inputs.setting, block_counts(inputs.block_indices)
    arguments: dict[str, Any] = dict(
        block_indices_tensor=inputs.block_indices, block_counts_tensor=counts, cum_seqlen_q_tensor=inputs.cu_seqlens,
        cum_seqlen_k_tensor=inputs.cu_seqlens, block_size=setting.block_size, scale_softmax=setting.head_dim**-0.5,
        max_s_q=setting.num_tokens, max_s_k=setting.num_tokens,
    )  # fmt: skip
    if "is_causal" in inspect.signature(function).parameters:
        arguments["is_causal"] = True
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))

    def forward() -> Tensor:
        return function(q_tensor=q, k_tensor=k, v_tensor=v, **arguments)[0]

    reason = "cuDNN frontend has no backward of selection attention"
    return Calls(forward, not_timed={"backward": reason, "forward_backward": reason})


def _sdpa_backend(name: str, label: str, backend: str) -> Implementation:
    return Implementation(name, label, "full", functools.partial(sdpa, backend=backend), distribution="torch")


OURS = [
    Implementation(
        backend, f"nsa_fsa {backend}", "ours", functools.partial(ours, backend=backend),
        unsupported=functools.partial(ours_unsupported, backend=backend), distribution="nsa-fsa",
        notes="forward: with the block index; backward: the registered operator, the index given",
        facts=chosen_by_profiler if backend == "auto" else no_facts,
    )
    for backend in ("auto", "triton_kv_major", "triton_query_major")
]  # fmt: skip
PEERS = [
    _sdpa_backend("sdpa_cudnn", "full: cuDNN (SDPA)", "CUDNN_ATTENTION"),
    _sdpa_backend("sdpa_flash", "full: FA2 (SDPA)", "FLASH_ATTENTION"),
    Implementation(
        "flash_attn_4", "full: flash-attn 4", "full", functools.partial(flash_attn, load=load_flash_attn_4), load_flash_attn_4,
        distribution="flash-attn-4",
    ),
    Implementation(
        "flash_attn_2", "full: flash-attn 2", "full", functools.partial(flash_attn, load=load_flash_attn_2), load_flash_attn_2,
        distribution="flash-attn",
    ),
    Implementation(
        "fla_nsa", "fla parallel_nsa", "selected", fla, load_fla, fla_unsupported, "flash-linear-attention",
        notes="parallel_nsa with block_indices given and no gates; it also pools keys and values, which cannot be switched off",
    ),
    Implementation(
        "nsa_triton", "Triton NSA", "selected", functools.partial(topk_sparse, load=load_nsa_triton), load_nsa_triton,
        distribution="native-sparse-attention-triton",
        notes="topk_sparse_attention of github.com/XunhaoLai",
    ),
    Implementation(
        "fsa", "FSA, the paper's code", "selected", functools.partial(topk_sparse, load=load_fsa), load_fsa,
        distribution="fsa", notes="FSA_topk_sparse_attention of Relaxed-System-Lab/Flash-Sparse-Attention",
    ),
    Implementation(
        "cudnn_nsa", "cuDNN frontend NSA", "selected", cudnn, load_cudnn, cudnn_unsupported, "nvidia-cudnn-frontend",
        notes="cudnn.NSA.selection_attention_wrapper",
    ),
]  # fmt: skip
IMPLEMENTATIONS = {implementation.name: implementation for implementation in [*OURS, *PEERS]}
