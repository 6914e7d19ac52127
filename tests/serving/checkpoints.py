"""Tiny sparse checkpoints, and what transformers makes of them. Gates and compressors are random,
and attention is sharp, so that a wrong branch, block or window changes the tokens.
"""

import copy
import json
import random
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from torch.nn import functional as F

from nsa_fsa.integrations.transformers import patch_model
from tests.integrations.models import scramble
from tests.model_sizes import NO_TOKENS, model_sizes

VOCAB = 512
NEW = 32  # tokens that every prompt is continued by
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
CHANGES = {
    "mistral": dict(sliding_window=None),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
}
SIZES = model_sizes(
    *(256, 256, 2, 8, 2),
    vocab_size=VOCAB,
    head_dim=32,
    max_position_embeddings=2048,
    initializer_range=0.05,
    tie_word_embeddings=False,
    **NO_TOKENS,
)
MIXING = ("linear", "mlp", "gated")  # compressors that mix the widths of keys
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}!{% endif %}"
)


def make_checkpoint(folder, family="llama", layers=None, words=VOCAB, **nsa):
    """Saves a patched model and a tokenizer; returns the model.

    words: how many it uses; with few of them it repeats itself.
    """
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **CHANGES.get(family, {}))).float().eval()
    settings = dict(gate_init="balanced", compress_rope="after", compress_position_embedding=True)
    patch_model(model, preset="tiny", layers=layers, verbose=False, **{**settings, **nsa})
    scramble(model)
    # Compressors that mix widths make keys large. If they were sharpened, too, softmax would be all
    # or nothing, and many blocks would score alike, so that rounding would choose among them.
    sharpness = 0.4 if nsa.get("compress_k") in MIXING else 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("_proj.bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(sharpness)
        model.lm_head.weight[words:] = 0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_tokenizer():
    """A character for every token."""
    words = {chr(ord("\u4e00") + i): i for i in range(VOCAB)}
    unknown = next(iter(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)
    found.chat_template = TEMPLATE
    return found


def make_prompts():
    """From less than a window to a third of the context, among them the edges of windows, pages and
    of what is decoded instead of prefilled."""
    rng = random.Random(1)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (6, 15, 16, 17, 65, 300, 701)]


def make_shared():
    """Prompts that begin alike, some of them within a page."""
    rng = random.Random(7)
    common = [rng.randrange(3, VOCAB) for _ in range(512)]
    tails = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, 40, 129)]
    return [common + tail for tail in tails] + [common[:300] + tails[2]]


def continue_greedily(model, prompts):
    """What transformers generates."""
    found, options = [], dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


# --- What is added to a model ---------------------------------------------------------------------


def make_adapter(folder, model, targets, seed):
    """Saves a LoRA adapter of these modules; returns the model with it."""
    generator = torch.Generator().manual_seed(seed)
    tuned, tensors, rank = copy.deepcopy(model), {}, 8
    for name, module in tuned.named_modules():
        if name.rpartition(".")[2] in targets:
            rows, columns = module.weight.shape
            a = 0.05 * torch.randn(rank, columns, generator=generator)
            b = 0.1 * torch.randn(rows, rank, generator=generator)
            module.weight.data += b @ a
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=targets, bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tuned


def make_guesser(folder, method, words):
    """Saves a dense model, or a head as EAGLE's, that guesses what another one says."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.lm_head.weight.data[words:] = 0
    model.save_pretrained(folder)
    if method == "draft_model":
        return
    first = "model.layers.0."
    tensors = {
        name.removeprefix("model."): x
        for name, x in load_file(folder / "model.safetensors").items()
        if name.startswith(first) and not name.startswith(f"{first}input_layernorm")
    }
    width = SIZES["hidden_size"]
    tensors["fc.weight"] = 0.05 * torch.randn(width, 2 * width)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(num_hidden_layers=1)))


class EightBits(torch.nn.Linear):
    """Multiplies rows of 8 bits with rows of 8 bits, each of which has a scale."""

    def forward(self, x):
        (x, scale), (weight, of_rows) = in_eight_bits(x), in_eight_bits(self.weight)
        return F.linear(x, weight) * scale * of_rows[:, 0]


def in_eight_bits(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round(), scale


def quantize(folder, source, model):
    """Saves a checkpoint with its projections in 8 bits; returns what transformers makes of it."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name in [x for x in tensors if x.endswith("_proj.weight")]:
        weight, tensors[f"{name}_scale"] = in_eight_bits(tensors[name])
        tensors[name] = weight.to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    common = dict(num_bits=8, type="int", symmetric=True)
    scheme = dict(
        targets=["Linear"],
        weights=dict(strategy="channel", dynamic=False, **common),
        input_activations=dict(strategy="token", dynamic=True, **common),
    )
    quantization = dict(
        quant_method="compressed-tensors",
        format="int-quantized",
        quantization_status="compressed",
        ignore=["lm_head", r"re:.*\.gate$", r"re:.*\.compress_[kv]\..*"],
        config_groups=dict(group_0=scheme),
    )
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization}))
    quantized = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if name.endswith("_proj"):
            module.__class__ = EightBits
    return quantized
