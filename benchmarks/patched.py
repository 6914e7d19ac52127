"""A layer inside a model of transformers that `patch_model` made sparse, beside the same layer by
itself."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from nsa_fsa import patch_model
from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.implementations import NSA_LAYER, Layer, layer


class PatchedAttention(nn.Module):
    """The attention of a Llama, called as its decoder layer does."""

    def __init__(self, case: Case, backend: str | None = None) -> None:
        super().__init__()
        c = case.config
        torch.manual_seed(case.seed)
        sizes: dict[str, Any] = dict(vocab_size=8, intermediate_size=8, num_hidden_layers=1)
        heads: dict[str, Any] = dict(num_attention_heads=c.num_heads, head_dim=c.head_dim)
        heads["num_key_value_heads"] = c.num_kv_heads
        config = LlamaConfig(**sizes, **heads, hidden_size=c.hidden_size)
        with torch.device(case.device):
            model: Any = LlamaModel(config)
        model.to(case.dtype)
        names = ("kernel_size", "kernel_stride", "window_size", "compress_rope", "gate_init")
        settings = case.blocks | {name: getattr(c, name) for name in names}
        patch_model(model, **settings, backend=backend or c.backend, verbose=False)
        self.attention = model.layers[0].self_attn
        position = torch.arange(case.num_tokens, device=case.device)[None]
        with torch.no_grad():
            self.rotation = model.rotary_emb(case["x"], position_ids=position)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, position_embeddings=self.rotation, attention_mask=None)
        return y


def rotated_first(case: Case, backend: str | None = None) -> nn.Module:
    """The layer by itself, which compresses rotated keys as a patched one does."""
    config = dataclasses.replace(case.config, compress_rope="before")
    return layer(dataclasses.replace(case, config=config), backend)


def patched(case: Case, backend: str | None = None) -> nn.Module:
    config = dataclasses.replace(case.config, compress_rope="before")
    return PatchedAttention(dataclasses.replace(case, config=config), backend)


PATCHED = [
    dataclasses.replace(
        NSA_LAYER, function=rotated_first, reference=partial(rotated_first, backend="reference")
    ),
    Layer.of("patched_layer", "nsa_fsa, layer of a patched model", patched),
]
