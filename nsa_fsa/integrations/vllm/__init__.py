"""vLLM serves what `save_pretrained` of a patched model wrote: `nsa-fsa serve`, or any of vLLM's
own ways, which find this package by its entry point.

vLLM schedules, batches, caches prefixes and speaks the OpenAI API; this package brings the model
classes, the attention layer with its two paged caches, and the kernels of `nsa_fsa.decode`.
"""

import logging


def register() -> None:
    """Called by vLLM in each of its processes, whatever they serve: makes the architectures of
    sparse models known. Where that fails, other models are served all the same."""
    try:
        _register()
    except (ImportError, AttributeError) as error:  # a name of vLLM's has moved
        logging.getLogger(__name__).warning(
            "this vLLM cannot serve NSA models, and others as ever: %s. "
            "Fix: pip install 'vllm>=0.26,<0.34'.",
            error,
        )


def _register() -> None:
    """Imports nothing of the models themselves."""
    import nsa_fsa.integrations.transformers  # noqa: F401, which makes their configs known
    from nsa_fsa.integrations.vllm.limits import Checks, refuse_other_models
    from nsa_fsa.integrations.vllm.names import (
        ARCHITECTURES,
        FAMILIES,
        MODELS_CONFIG_MAP,
        OPERATOR,
        CompilationConfig,
        ModelRegistry,
    )

    # As around vLLM's own attention, the compiler cuts its graphs at ours.
    operators = CompilationConfig._attention_ops
    if OPERATOR not in operators:
        operators.append(OPERATOR)
    refuse_other_models()
    known = ModelRegistry.get_supported_archs()
    MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, Checks))
    for family in FAMILIES:
        name = f"NSA{family}ForCausalLM"
        if name not in known:
            ModelRegistry.register_model(name, f"nsa_fsa.integrations.vllm.models:{name}")
