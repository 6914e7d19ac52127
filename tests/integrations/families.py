"""Tiny models of many families of transformers, each built anew from the same seed.

`python -m tests.integrations.families` writes docs/families.md.
"""

from pathlib import Path

import torch
import transformers

from nsa_fsa.integrations.transformers import explain_model, patch_model
from tests.model_sizes import NO_TOKENS, model_sizes

VOCAB = 96
BASE = model_sizes(
    *(64, 96, 2, 8, 2),
    vocab_size=VOCAB,
    max_position_embeddings=4096,
    initializer_range=0.2,  # 0.02 would leave attention and logits almost flat
    **NO_TOKENS,
)
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=32)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
QWEN_NEXT = dict(
    head_dim=16,
    **EXPERTS,
    shared_expert_intermediate_size=32,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
LATENT = dict(
    num_key_value_heads=8,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    **ROUTED,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
VISION = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64)

# Of causal language models: what their configs are called, without "Config", and what they need.
LANGUAGE_MODELS = {
    "Arcee": {},
    "Cohere": {},
    "Cohere2": MIXED,
    "DeepseekV3": LATENT,
    "Ernie4_5": dict(head_dim=8),
    "Exaone4": MIXED,
    "Gemma": dict(head_dim=16),
    "Gemma2": dict(head_dim=16, attn_logit_softcapping=None, **MIXED),
    "Gemma3": dict(head_dim=16, **MIXED),
    "Glm": dict(head_dim=16),
    "Glm4": dict(head_dim=16),
    "Glm4Moe": dict(head_dim=16, **ROUTED),
    "Granite": {},
    "Helium": dict(head_dim=8),
    "HunYuanDenseV1": dict(head_dim=8),
    "Llama": {},
    "Llama4": dict(
        head_dim=8,
        intermediate_size_mlp=96,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "Ministral3": {},
    "Mistral": dict(sliding_window=None),
    "Mixtral": dict(num_local_experts=4),
    "Nemotron": {},
    "Olmo2": {},
    "Olmo3": MIXED,
    "Phi": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen2Moe": dict(shared_expert_intermediate_size=32, **EXPERTS),
    "Qwen3": dict(head_dim=16),
    "Qwen3Moe": dict(head_dim=16, **EXPERTS),
    "Qwen3Next": QWEN_NEXT,
    "SeedOss": dict(head_dim=8, attention_dropout=0.0, residual_dropout=0.0),
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {},
}
CONFIGS = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}  # where they are called otherwise


class OwnLlama(transformers.LlamaForCausalLM):
    """A class of a user's own."""


def language_model(name):
    def make(model="ForCausalLM", **changes):
        config = getattr(transformers, f"{CONFIGS.get(name, name)}Config")
        settings = {**BASE, **LANGUAGE_MODELS[name], **changes}
        return getattr(transformers, name + model)(config(**settings))

    return make


def _of(model, config, **settings):
    return lambda: model(config(**settings))


def _with_vision(model, config, vision, **text):
    return lambda: model(config(text_config={**BASE, **text}, vision_config=vision))


def clip_vision(width, image_size, patch_size):
    """A tiny vision tower's config, for a Llava."""
    sizes = dict(hidden_size=width, intermediate_size=width, num_hidden_layers=1)
    image = dict(image_size=image_size, patch_size=patch_size)
    return transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, **image)


def _llava():
    vision = clip_vision(32, 28, 14)
    text = transformers.LlamaConfig(**BASE)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


def _rope(*section):
    return dict(rope_type="default", rope_theta=1e4, mrope_section=list(section))


_llama, _qwen2, _qwen3 = (language_model(name) for name in ("Llama", "Qwen2", "Qwen3"))
FAMILIES = {
    **{name: language_model(name) for name in LANGUAGE_MODELS},
    "Cohere2, full": lambda: language_model("Cohere2")(layer_types=["full_attention"] * 2),
    "Exaone4, full": lambda: language_model("Exaone4")(layer_types=["full_attention"] * 2),
    "Gemma3, full": lambda: language_model("Gemma3")(layer_types=["full_attention"] * 2),
    "GPT2": _of(
        transformers.GPT2LMHeadModel, transformers.GPT2Config, vocab_size=VOCAB, n_embd=64,
        n_layer=2, n_head=8, n_positions=512, initializer_range=0.2, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
    "GPTNeoX": _of(
        transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig,
        **{**BASE, "num_key_value_heads": 8},
    ),
    "Llama, biases": lambda: _llama(attention_bias=True),
    "Llama, tied": lambda: _llama(tie_word_embeddings=True),
    "Llama, base": lambda: _llama("Model"),
    "Llama, own class": lambda: OwnLlama(transformers.LlamaConfig(**BASE)),
    "Llama, sequences": lambda: _llama("ForSequenceClassification"),
    "Llama, tokens": lambda: _llama("ForTokenClassification"),
    "Llama, answers": lambda: _llama("ForQuestionAnswering"),
    "Llava": _llava,
    "Olmo3, full": lambda: language_model("Olmo3")(layer_types=["full_attention"] * 2),
    "Qwen2, mixed": lambda: _qwen2(use_sliding_window=True, **MIXED),
    "Qwen2, sequences": lambda: _qwen2("ForSequenceClassification"),
    "Qwen3, sequences": lambda: _qwen3("ForSequenceClassification"),
    "Qwen2.5-VL": _with_vision(
        transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig, VISION,
        rope_parameters=_rope(1, 1, 2),
    ),
    "Qwen3-VL": _with_vision(
        transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig,
        {**VISION, "deepstack_visual_indexes": [0]}, head_dim=16, rope_parameters=_rope(2, 3, 3),
    ),
}  # fmt: skip
# What cannot be patched as it is.
REFUSED = {
    "Falcon": _of(
        transformers.FalconForCausalLM,
        transformers.FalconConfig,
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
    ),
    "Gemma2, soft cap": lambda: language_model("Gemma2")(attn_logit_softcapping=50.0),
    "GptOss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**BASE, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Mistral, sliding": lambda: language_model("Mistral")(sliding_window=32),
}
# Those with a router, where a small difference may send a token to other experts.
ROUTED_FAMILIES = (
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Qwen3Next",
    "Glm4Moe",
    "DeepseekV3",
    "Llama4",
)


def family(name, seed=0):
    """The model, dense, with biases and norms that matter."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "norm.weight")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape, seed=0):
    """Never 0, which is padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Families

What `patch_model` does with models of transformers, as tiny ones of the tests say;
`explain_model(model)` says it of yours. A family that is not here is no worse: attention is
recognised by what it is. Written by `python -m tests.integrations.families`.

| model | layers that become sparse | why others stay as they are |
|---|---|---|
"""


def table():
    """The page, from what happens to every model here."""
    lines = set()
    for name in (*FAMILIES, *REFUSED):
        model = {**FAMILIES, **REFUSED}[name]()
        # A class of the user's own is no family.
        if not type(model).__module__.startswith("transformers."):
            continue
        reasons = sorted({why for _, _, why in explain_model(model).layers if why})
        try:
            report = patch_model(model, "tiny", verbose=False)
            sparse = "all" if not report.dense_layers else "those with full attention"
            others = "; ".join(reasons) or ("linear attention" if report.dense_layers else "")
            lines.add(f"| {type(model).dense_class.__name__} | {sparse} | {others} |")
        except (TypeError, ValueError):
            why = "; ".join(reasons) or "it does not call transformers' attention interface"
            lines.add(f"| {type(model).__name__} | none | {why} |")
    return HEAD + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
