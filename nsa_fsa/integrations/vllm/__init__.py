"""vLLM serves what `save_pretrained` of a patched model wrote: `nsa-fsa serve`, or any of vLLM's
own ways, which find this package by its entry point.

vLLM schedules, batches, caches prefixes and speaks the OpenAI API; this package brings the model
classes, the attention layer with its two paged caches, and the kernels of `nsa_fsa.decode`.
"""

import logging


def register() -> None:
    """Called by vLLM in each of its processes, whatever they serve: makes the architectures of
    sparse models known, and imports nothing of the models themselves."""
    try:
        from nsa_fsa.integrations.vllm.names import (
            FAMILIES,
            MODELS_CONFIG_MAP,
            OPERATOR,
            CompilationConfig,
            ModelRegistry,
        )
    except ImportError as error:
        from importlib.metadata import version

        logging.getLogger(__name__).warning(
            "this version of vLLM cannot serve NSA models (nsa_fsa %s: %s). Fix: "
            "pip install 'vllm>=0.26,<0.34'. Other models are not affected.",
            version("nsa-fsa"),
            error,
        )
        return
    import nsa_fsa.integrations.transformers  # noqa: F401, which makes their configs known
    from nsa_fsa.integrations.vllm.limits import Checks

    # As around vLLM's own attention, the compiler cuts its graphs at ours.
    operators = CompilationConfig._attention_ops
    if OPERATOR not in operators:
        operators.append(OPERATOR)
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES:
        name = f"NSA{family}ForCausalLM"
        MODELS_CONFIG_MAP[name] = Checks
        if name not in known:
            ModelRegistry.register_model(name, f"nsa_fsa.integrations.vllm.models:{name}")
