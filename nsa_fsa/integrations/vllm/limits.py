"""What is refused when an engine is about to start, each thing by its name and with a way out."""

from collections.abc import Iterator
from typing import Any

from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.transformers.settings import COMPRESSORS, settings_of
from nsa_fsa.integrations.vllm.models import settings_by_layer
from nsa_fsa.integrations.vllm.names import (
    VerifyAndUpdateConfig,
    VllmConfig,
    init_logger,
    version_of_vllm,
    why_untested,
)
from nsa_fsa.modules.rotary import BY_POSITION

logger = init_logger(__name__)


class Checks(VerifyAndUpdateConfig):
    """Called by vLLM with the settings of an engine that has NSA layers."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError for what cannot be served."""
        if (warning := why_untested(version_of_vllm())) is not None:
            logger.warning(warning)
        if refused := [*refusals(vllm_config)]:
            raise ValueError("; ".join(refused))


def refusals(vllm_config: Any) -> Iterator[str]:
    """Why an engine cannot start with NSA layers."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtypes = ("auto", str(model.dtype).removeprefix("torch."))
    if cache.cache_dtype not in dtypes:
        yield (
            f"--kv-cache-dtype={cache.cache_dtype} is not available with NSA layers, whose caches "
            f"have the model's dtype: it must be one of {dtypes}. Fix: leave it out"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield (
                f"{name}={getattr(parallel, name)} is not available with NSA layers, which read "
                "keys from anywhere in a sequence: it must be 1. Fix: tensor_parallel_size"
            )
    if getattr(parallel, "enable_dbo", False):
        yield "enable_dbo is not available with NSA layers. Fix: leave it out"
    if vllm_config.kv_transfer_config is not None:
        yield (
            "kv_transfer_config is not available with NSA layers: nobody has tried to move their "
            "compressed tokens. Fix: leave it out"
        )
    speculative = vllm_config.speculative_config
    number = getattr(speculative, "num_speculative_tokens", None) or 0
    if number >= MOST_NEW:
        yield (
            f"num_speculative_tokens={number} is not available with NSA layers, which decode "
            f"{MOST_NEW} tokens of a sequence at a time: it must be at most {MOST_NEW - 1}. "
            f"Fix: {MOST_NEW - 1} or less"
        )
    yield from _refusals_of_model(model.hf_config)


def _refusals_of_model(hf_config: Any) -> Iterator[str]:
    """Why a checkpoint cannot be served."""
    for name in ("llama_4_scaling", "dual_chunk_attention_config"):
        if getattr(hf_config, name, None) is not None:
            yield f"{name} in the model's config is not available with NSA layers. Fix: none"
    kinds = getattr(hf_config, "layer_types", None)
    slides = getattr(hf_config, "sliding_window", None) is not None
    if "sliding_attention" in kinds if kinds else slides:
        yield (
            f"sliding_window={hf_config.sliding_window} of dense layers is not available beside "
            "NSA layers: nobody has tried their caches together. Fix: model.generate"
        )
    named = settings_of(hf_config, hf_config.nsa)
    for i, values in named.items():
        for name in COMPRESSORS:
            if values.get(name) is not None:
                yield (
                    f"layer {i} was saved with a {name} of its own, {values[name]}, which vLLM "
                    "cannot make. Fix: one of the kinds that NSAConfig names, or model.generate"
                )
    rope = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type", "default")
    for i, config in settings_by_layer(hf_config).items():
        if config.kv_per_branch:
            yield (
                f"kv_per_branch=True of layer {i} is not available: pages have one key and one "
                "value of a token. Fix: a model that shares them"
            )
        if config.compress_rope == "after" and rope not in BY_POSITION:
            yield (
                f'compress_rope="after" of layer {i} is not available with rope_type={rope!r}, '
                f"whose angles change with the length: it must be one of {BY_POSITION}. "
                "Fix: model.generate"
            )
