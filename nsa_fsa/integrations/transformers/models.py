"""Registered model classes: `nsa_llama`, `nsa_qwen2` and `nsa_qwen3`.

They are the transformers classes with NSA attention installed at the end of the constructor. Their own `model_type` makes
`save_pretrained` / `from_pretrained` round-trip exactly, and makes a transformers that does not know this package refuse
the checkpoint instead of loading it dense.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from nsa_fsa.modules.compression import Compressor, LinearPhi, MLPPhi, PoolPhi
from nsa_fsa.modules.gating import BranchGate


class NSALlamaConfig(LlamaConfig):
    """A Llama config with a field `nsa`: the fields of `NSAConfig`, and `layers`, the patched ones (None: all)."""

    model_type = "nsa_llama"
    nsa: dict[str, Any] | None = None


class NSAQwen2Config(Qwen2Config):
    """A Qwen2 config with a field `nsa`: the fields of `NSAConfig`, and `layers`, the patched ones (None: all)."""

    model_type = "nsa_qwen2"
    nsa: dict[str, Any] | None = None


class NSAQwen3Config(Qwen3Config):
    """A Qwen3 config with a field `nsa`: the fields of `NSAConfig`, and `layers`, the patched ones (None: all)."""

    model_type = "nsa_qwen3"
    nsa: dict[str, Any] | None = None


class _NSAModel:
    """Mixed in before a transformers model class: installs NSA attention, and initialises what it adds."""

    _supports_context_parallel = False  # sharding the sequence would cut blocks and windows
    _can_compile_fullgraph = False

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `generate` compiles decoding by itself: not here, where the cache counts its tokens on the host."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        from nsa_fsa.integrations.transformers.patch import install

        install(self)  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Initialises what NSA adds and no checkpoint brought, before transformers would do it as for any Linear."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, (BranchGate, Compressor, LinearPhi, MLPPhi, PoolPhi)):
                if not all(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
                    module.reset_parameters()
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()  # type: ignore[misc]


class NSALlamaModel(_NSAModel, LlamaModel):
    config_class = NSALlamaConfig


class NSALlamaForCausalLM(_NSAModel, LlamaForCausalLM):
    config_class = NSALlamaConfig


class NSAQwen2Model(_NSAModel, Qwen2Model):
    config_class = NSAQwen2Config


class NSAQwen2ForCausalLM(_NSAModel, Qwen2ForCausalLM):
    config_class = NSAQwen2Config


class NSAQwen3Model(_NSAModel, Qwen3Model):
    config_class = NSAQwen3Config


class NSAQwen3ForCausalLM(_NSAModel, Qwen3ForCausalLM):
    config_class = NSAQwen3Config


SPARSE_CLASS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    LlamaModel: NSALlamaModel,
    LlamaForCausalLM: NSALlamaForCausalLM,
    Qwen2Model: NSAQwen2Model,
    Qwen2ForCausalLM: NSAQwen2ForCausalLM,
    Qwen3Model: NSAQwen3Model,
    Qwen3ForCausalLM: NSAQwen3ForCausalLM,
}
DENSE_CLASS = {sparse: dense for dense, sparse in SPARSE_CLASS.items()}

for _dense, _sparse in SPARSE_CLASS.items():
    _config: Any = _sparse.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto = AutoModelForCausalLM if _dense.__name__.endswith("ForCausalLM") else AutoModel
    _auto.register(_config, _sparse, exist_ok=True)
    # transformers notes in a constructor which outputs a class can record; patched instances never ran that of their class.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(_sparse), _sparse._can_record_outputs)


def supported_models() -> tuple[str, ...]:
    """Names of the transformers classes that `patch_model` can patch."""
    return tuple(cls.__name__ for cls in SPARSE_CLASS)
