"""What others compute: full attention, and attention over selected or compressed keys.

Peers run with their own defaults. What only rearranges their inputs (views, index dtypes, counts)
is done before the clock starts, on their first call. A peer that is not installed, or cannot take
a case, raises what says so; the run leaves it out with that reason.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from benchmarks.operators import PARTS, SELECTED
from nsa_fsa.benchmarking.cases import Case, Pass
from nsa_fsa.benchmarking.implementations import (
    CUDNN,
    FLASH_ATTN_4,
    SDPA_FLASH,
    Function,
    Implementation,
    full,
)


def flash_attn_2(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    function = importlib.import_module("flash_attn").flash_attn_func
    return function(q[None], k[None], v[None], causal=True)[0]


# Each of the following takes a case, and returns a function of its leaves.


def fla(case: Case) -> Function:
    """`parallel_nsa` with the blocks given and no gates; it also pools keys and values, which
    cannot be switched off."""
    group = case.config.group_size
    if group < 16 or group & (group - 1):
        raise ValueError(f"parallel_nsa wants groups of 16, 32, ... query heads, not {group}")
    try:
        function = importlib.import_module("fla.ops.nsa").parallel_nsa
    except ImportError:  # the repository it came from
        function = importlib.import_module("native_sparse_attention.ops.parallel").parallel_nsa
    indices = case["block_indices"].long()[None]
    options = dict(block_indices=indices, block_counts=(indices >= 0).sum(-1))
    parameters = inspect.signature(function).parameters
    ones = torch.ones(1, *case["q"].shape[:2], dtype=case.dtype, device=case.device)
    # Older versions multiply by gates that newer ones leave out.
    required = {name for name, x in parameters.items() if x.default is inspect.Parameter.empty}
    options |= {name: ones for name in ("g_slc", "g_swa") if name in required}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = case.config.block_size
        return function(q[None], k[None], v[None], block_size=size, **options)[0]

    return attention


def topk_sparse(case: Case, module: str, name: str) -> Function:
    """The signature that the Triton NSA and the FSA paper's code share."""
    function = getattr(importlib.import_module(module), name)
    indices = case["block_indices"].transpose(0, 1).contiguous()  # [HKV, T, T_sel]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, indices, case.config.block_size, case["cu_seqlens"])

    return attention


def cudnn_nsa(case: Case) -> Function:
    """It has no backward."""
    size = case.config.block_size
    if size not in (16, 32, 64):
        raise ValueError(f"its selection attention takes blocks of 16, 32 or 64 keys, not {size}")
    function = importlib.import_module("cudnn").NSA.selection_attention_wrapper
    counts = (case["block_indices"] >= 0).sum(-1, dtype=torch.int32)
    options: dict[str, Any] = dict(
        block_indices_tensor=case["block_indices"],
        block_counts_tensor=counts,
        block_size=size,
        scale_softmax=case.config.scale,
    )
    for x in "qk":  # they lie in the same rows
        options |= {f"cum_seqlen_{x}_tensor": case["cu_seqlens"], f"max_s_{x}": case.num_tokens}
    if "is_causal" in inspect.signature(function).parameters:
        options["is_causal"] = True

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = dict(q_tensor=q.detach(), k_tensor=k.detach(), v_tensor=v.detach())
        return function(**tensors, **options)[0]

    return attention


def flex_attention(case: Case) -> Function:
    """PyTorch's flex_attention, compiled for the case where there is a GPU; it returns no lse."""
    stride, size = case.config.kernel_stride, case.config.kernel_size
    function: Any = flex.flex_attention
    make_mask: Any = flex.create_block_mask
    if case.device == "cuda":
        torch.compiler.reset()  # so that the next case is compiled for itself, not for any length
        function, make_mask = (torch.compile(x, dynamic=False) for x in (function, make_mask))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key * stride + size - 1 <= query

    mask = make_mask(sees, None, None, case.num_tokens, case.num_windows, device=case.device)
    options = dict(enable_gqa=case.config.group_size > 1, scale=case.config.scale)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[: case.num_windows], v[: case.num_windows]
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # views [1, heads, T or N, D]
        return function(q, k, v, block_mask=mask, **options).transpose(1, 2)[0]

    return attention


class Prepared(Implementation):
    """`function` takes the case alone, and returns what is timed."""

    def passes(self, case: Case, function: Function | None = None) -> dict[str, Pass]:
        if function is not None:  # the reference's
            return super().passes(case, function)
        ready: Callable[..., Any] = self.function(case)
        return super().passes(case, lambda case, *leaves: ready(*leaves))


def prepared(like: Implementation, name: str, label: str, function: Function, distribution: str):
    shared = {x.name: getattr(like, x.name) for x in dataclasses.fields(like)}
    mine = dict(name=name, label=label, function=function, distribution=distribution)
    return Prepared(**shared | mine | dict(kind="peer"))


FULL = [
    FLASH_ATTN_4,
    CUDNN,
    SDPA_FLASH,
    full("flash_attn_2", "full: flash-attn 2", flash_attn_2, "flash-attn"),
]
PEERS = [
    prepared(SELECTED, *others)
    for others in (
        ("fla_nsa", "fla parallel_nsa", fla, "flash-linear-attention"),
        (
            "nsa_triton",
            "Triton NSA",
            partial(
                topk_sparse, module="native_sparse_attention.ops", name="topk_sparse_attention"
            ),
            "native-sparse-attention-triton",
        ),
        (
            "fsa",
            "FSA, the paper's code",
            partial(
                topk_sparse,
                module="fsa.ops.FSA_topk_sparse_attention",
                name="FSA_topk_sparse_attention",
            ),
            "fsa",
        ),
        ("cudnn_nsa", "cuDNN frontend NSA", cudnn_nsa, "nvidia-cudnn-frontend"),
    )
]
FLEX = prepared(PARTS[0], "flex_attention", "flex_attention (PyTorch)", flex_attention, "torch")
