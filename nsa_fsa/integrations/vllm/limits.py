"""What is refused when an engine is about to start, each thing by its name and with a way out."""

import functools
from collections.abc import Iterator
from typing import Any

from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.transformers.settings import COMPRESSORS, settings_of
from nsa_fsa.integrations.vllm.models import settings_by_layer
from nsa_fsa.integrations.vllm.names import (
    ARCHITECTURES,
    FAMILIES,
    ModelRegistry,
    VerifyAndUpdateConfig,
    VllmConfig,
    init_logger,
    version_of_vllm,
    why_untested,
)
from nsa_fsa.modules.rotary import BY_POSITION

logger = init_logger(__name__)
GUESSERS = ("ngram", "draft_model", "eagle")  # of tokens; other ones nobody has tried


def refuse_other_models() -> None:
    """Has vLLM's registry refuse what is sparse and not served as such. It is asked for the class
    of every model, and would name all that it knows instead, or take that of another library."""
    if "inspect_model_cls" in vars(ModelRegistry):  # done
        return
    inspect = ModelRegistry.inspect_model_cls

    @functools.wraps(inspect)
    def inspect_model_cls(architectures: Any, model_config: Any) -> Any:
        if str(model_config.hf_config.model_type).startswith("nsa_"):
            names = [architectures] if isinstance(architectures, str) else architectures
            if refused := [*refusals_of_class(names, model_config)]:
                raise ValueError("; ".join(refused))
        return inspect(architectures, model_config)

    ModelRegistry.inspect_model_cls = inspect_model_cls


def refusals_of_class(architectures: list[str], model_config: Any) -> Iterator[str]:
    """Why a sparse model has no class here."""
    for name in architectures:
        if name not in ARCHITECTURES:
            yield (
                f"{name} is not available: the models that can be served with NSA layers are "
                f"language models of the families {', '.join(FAMILIES)}. Fix: model.generate"
            )
    if model_config.model_impl not in ("auto", "vllm"):
        yield (
            f"--model-impl={model_config.model_impl} is not available with NSA layers, which have "
            "caches in pages only in vLLM's own classes: it must be auto or vllm. "
            "Fix: leave it out"
        )
    if model_config.runner == "draft":
        yield (
            f"{model_config.model}, whose layers are NSA, is not available as the model that "
            "guesses tokens. Fix: a dense one"
        )


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
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} is not available with NSA "
            "layers: nobody has tried it. Fix: tensor_parallel_size"
        )

    if model.enable_sleep_mode:
        yield (
            "enable_sleep_mode is not available with NSA layers: nobody has tried whether they "
            "wake up with all that they had. Fix: leave it out"
        )
    if getattr(parallel, "enable_dbo", False):
        yield "enable_dbo is not available with NSA layers. Fix: leave it out"
    if vllm_config.kv_transfer_config is not None:
        yield (
            "kv_transfer_config is not available with NSA layers: nobody has tried to move their "
            "compressed tokens. Fix: leave it out"
        )

    speculative = vllm_config.speculative_config
    method = getattr(speculative, "method", None)
    if method is not None and method not in GUESSERS:
        yield (
            f"tokens guessed by {method!r} are not available with NSA layers: nobody has tried it, "
            f"and the method must be one of {GUESSERS}. Fix: ngram"
        )

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
