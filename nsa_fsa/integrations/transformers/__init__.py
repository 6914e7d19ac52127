"""Hugging Face transformers: one patch for every causal attention, and the `nsa_*` model classes.

Importing this package registers the attention function "nsa_fsa" and the model types "nsa_llama",
"nsa_mistral" and so on with transformers, so that `AutoModelForCausalLM.from_pretrained` and its
siblings load what a patched model saved. `NSALlamaForCausalLM`, `NSAMistralConfig` and so on, "NSA"
before the name of any class of transformers, are made when they are asked for.
"""

from typing import Any

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the Hugging Face integration needs transformers, which is not installed. "
        'Fix: pip install "nsa-fsa[transformers]".'
    ) from error

from nsa_fsa.integrations.transformers.attention import NSAAttention, sparse_attention
from nsa_fsa.integrations.transformers.context_parallel import NSAContextParallel
from nsa_fsa.integrations.transformers.layers import (
    ModelExplanation,
    explain_model,
    register_attention,
)
from nsa_fsa.integrations.transformers.loss import chunk_loss
from nsa_fsa.integrations.transformers.memory import checkpoint_layers, chunk_mlp
from nsa_fsa.integrations.transformers.models import class_named
from nsa_fsa.integrations.transformers.patch import patch_model, unpatch_model
from nsa_fsa.integrations.transformers.report import PatchReport

__all__ = [
    "ModelExplanation",
    "NSAAttention",
    "NSAContextParallel",
    "PatchReport",
    "checkpoint_layers",
    "chunk_loss",
    "chunk_mlp",
    "explain_model",
    "patch_model",
    "register_attention",
    "sparse_attention",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    return class_named(name)
