"""Hugging Face transformers: patching Llama, Qwen2 and Qwen3, and the registered `nsa_*`
model classes.

Importing this package registers the attention name "nsa_fsa" and the model types "nsa_llama",
"nsa_qwen2" and "nsa_qwen3" with transformers, so that `AutoModelForCausalLM.from_pretrained` loads
what a patched model saved.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the Hugging Face integration needs transformers, which is not installed. "
        'Fix: pip install "nsa-fsa[transformers]".'
    ) from error

from nsa_fsa.integrations.transformers.attention import NSAAttention
from nsa_fsa.integrations.transformers.cache import NSACacheLayer
from nsa_fsa.integrations.transformers.models import (
    NSALlamaConfig,
    NSALlamaForCausalLM,
    NSALlamaModel,
    NSAQwen2Config,
    NSAQwen2ForCausalLM,
    NSAQwen2Model,
    NSAQwen3Config,
    NSAQwen3ForCausalLM,
    NSAQwen3Model,
    supported_models,
)
from nsa_fsa.integrations.transformers.patch import PatchReport, patch_model, unpatch_model

__all__ = [
    "NSAAttention",
    "NSACacheLayer",
    "NSALlamaConfig",
    "NSALlamaForCausalLM",
    "NSALlamaModel",
    "NSAQwen2Config",
    "NSAQwen2ForCausalLM",
    "NSAQwen2Model",
    "NSAQwen3Config",
    "NSAQwen3ForCausalLM",
    "NSAQwen3Model",
    "PatchReport",
    "patch_model",
    "supported_models",
    "unpatch_model",
]
