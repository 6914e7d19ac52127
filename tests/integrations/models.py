"""Tiny Llama, Qwen2 and Qwen3 models, and ways to look at them."""

import torch
import transformers

from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import NSAAttention, patch_model, sparse_attention
from tests.integrations import independent
from tests.integrations.families import BASE

VOCAB = 97
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, transformers.LlamaModel),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, transformers.Qwen2Model),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, transformers.Qwen3Model),
}
# Keys that a query of the preset "tiny" selects: longer sequences are really sparse.
TINY_REACH = 96
# Settings of a layer of its own, which a patched one leaves to the dense module it was.
LEFT_TO_DENSE = {
    name: getattr(NSAConfig(hidden_size=64, num_heads=8, rope_parameters=None), name)
    for name in (
        "rope_parameters",
        "max_position_embeddings",
        "qk_norm",
        "qk_norm_eps",
        "qkv_bias",
        "o_bias",
    )
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def dense_config(family="llama", **changes):
    settings = dict(BASE, vocab_size=VOCAB, head_dim=8, max_position_embeddings=512)
    if family == "qwen2":
        del settings["head_dim"]
    return FAMILIES[family][0](**{**settings, **changes})


def dense_model(family="llama", base=False, seed=0, **changes):
    torch.manual_seed(seed)
    model = FAMILIES[family][2 if base else 1](dense_config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, they would be zeros and ones.
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def errors_of_layers(monkeypatch):
    """A list to which every forward of a sparse layer adds how far it is from another NSA."""
    errors = []

    def both(*args, **kwargs):
        found, _ = sparse_attention(*args, **kwargs)
        expected, _ = independent.attention(*args, **kwargs)
        errors.append((found - expected).abs().max() / expected.abs().max())
        return found, None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "nsa_fsa", both)
    return errors


def scramble(model, seed=1):
    """Random gates and compressors in place of gates that leave one branch open and compressors
    that are means.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".gate.", ".compress_k.", ".compress_v.")):
                parameter.add_(
                    0.5 * torch.randn(parameter.shape, generator=generator).to(parameter)
                )
    return model


def sparse_model(family="llama", base=False, seed=0, layers=None, nsa=None, **changes):
    """A patched model all of whose branches matter. It turns keys back before it compresses them,
    which takes more than to leave them as they are, as in the models of test_families.py.
    """
    model = dense_model(family, base, seed, **changes)
    start = dict(gate_init="balanced", compress_rope="after")
    config = NSAConfig.from_pretrained_config(model.config, "tiny", **{**start, **(nsa or {})})
    patch_model(model, config, layers=layers, verbose=False)
    return scramble(model)


def tokens(*shape, seed=0):
    """Never 0, which is padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def attentions(model):
    return [layer.self_attn for layer in model.base_model.layers]


def sparse_layers(model):
    return [
        i for i, attention in enumerate(attentions(model)) if isinstance(attention, NSAAttention)
    ]


def snapshot(model):
    """Everything that a failed or undone patch must leave as it was."""
    return dict(
        cls=type(model),
        config=id(model.config),
        config_values=model.config.to_dict(),
        attention_name=model.config._attn_implementation,
        modules={name: id(module) for name, module in model.named_modules()},
        classes={name: type(module) for name, module in model.named_modules()},
        configs={
            name: id(module.__dict__["config"])
            for name, module in model.named_modules()
            if "config" in module.__dict__
        },
        parameters={name: (id(p), p.data_ptr()) for name, p in model.named_parameters()},
        values={name: value.clone() for name, value in model.state_dict().items()},
        attributes={name: set(module.__dict__) for name, module in model.named_modules()},
    )


def assert_same(before, after):
    for key in before:
        if key == "values":
            assert list(before[key]) == list(after[key])
            for name, value in before[key].items():
                assert torch.equal(value, after[key][name]), name
        else:
            assert before[key] == after[key], key


@torch.no_grad()
def greedy(model, input_ids, steps, attention_mask=None):
    """The continuation by full forwards without any cache: what every way of
    generating must give.
    """
    for _ in range(steps):
        logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits[:, -1]
        input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat(
                (attention_mask, attention_mask.new_ones(len(attention_mask), 1)), dim=1
            )
    return input_ids


def output(model, ids, **arguments):
    """The first output without a cache: logits, or a base model's hidden states."""
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments)[0]


def open_only_the_selected_branch(model):
    """Gates of exactly 0, 1, 0: sigmoid(40) is 1 in float32."""
    for attention in attentions(model):
        if not isinstance(attention, NSAAttention):
            continue
        torch.nn.init.zeros_(attention.gate.weight)
        with torch.no_grad():
            attention.gate.bias.view(-1, 3).copy_(torch.tensor([-120.0, 40.0, -120.0]))


def tiny_nsa(model, **changes):
    """The preset "tiny", for a layer of its own in the place of one of the model's."""
    family = model.config.model_type.removeprefix("nsa_")
    return NSAConfig.from_pretrained_config(dense_config(family), "tiny", **changes)


def patched_nsa(model, **changes):
    """What patch_model makes of `tiny_nsa`."""
    return tiny_nsa(model, **LEFT_TO_DENSE, **changes)
