"""The model classes that vLLM finds by the architecture in a checkpoint: "NSA" before the name of
the dense one. They are vLLM's own, whose attention is made sparse at the end of the constructor.
"""

import functools
import importlib
from typing import Any

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.settings import settings_of
from nsa_fsa.integrations.vllm.attention import sparse_attention_class
from nsa_fsa.integrations.vllm.batch import rows_of
from nsa_fsa.integrations.vllm.names import FAMILIES, PPMissingLayer, VllmConfig


def settings_by_layer(hf_config: Any) -> dict[int, NSAConfig]:
    """The settings of the layers that are sparse."""
    layers = settings_of(hf_config, hf_config.nsa)
    return {i: NSAConfig.from_pretrained_config(hf_config, layer=i) for i in layers}


def make_sparse(model: Any, vllm_config: VllmConfig) -> None:
    """Makes the attention of a dense model sparse where the config says so."""
    settings = settings_by_layer(vllm_config.model_config.hf_config)
    rows = rows_of([config.block_size for config in settings.values()])
    for i, config in settings.items():
        layer = model.model.layers[i]
        if isinstance(layer, PPMissingLayer):  # of another rank of the pipeline
            continue
        attention, dense_class = layer.self_attn, layer.self_attn.__class__
        attention.__class__ = sparse_attention_class(dense_class)
        attention.become_sparse(i, config, rows, vllm_config)


class SparseModel:
    """Mixed in before a model class of vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        make_sparse(self, vllm_config)


@functools.cache
def sparse_model_class(family: str) -> Any:
    """`NSALlamaForCausalLM` of "Llama", and so on."""
    dense = getattr(importlib.import_module(FAMILIES[family].module), f"{family}ForCausalLM")
    return type(f"NSA{dense.__name__}", (SparseModel, dense), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    family = name.removeprefix("NSA").removesuffix("ForCausalLM")
    if family not in FAMILIES or name != f"NSA{family}ForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sparse_model_class(family)
