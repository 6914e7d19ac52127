"""Models with random weights, of known shapes: what the scripts run where there is no checkpoint.

The attention of each is that of a file in configs/, which has all that an NSA layer needs to know;
the rest of the model is here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nsa_fsa import NSAConfig

CONFIGS = Path(__file__).parents[1] / "configs"


class Shape(NamedTuple):
    """What a model is beside its attention."""

    family: type[PreTrainedConfig]
    vocab_size: int
    intermediate_size: int
    num_hidden_layers: int


SHAPES = {
    "llama3-8b": Shape(LlamaConfig, 128256, 14336, 32),
    "qwen2.5-32b": Shape(Qwen2Config, 152064, 27648, 64),
    "qwen3-14b": Shape(Qwen3Config, 151936, 17408, 40),
    "tiny-demo": Shape(LlamaConfig, 256, 352, 2),
}
ALLOWED = f"{', '.join(SHAPES)}, as configs/ has files of, or a folder with a config.json"


def layer_file(name: str) -> Path | None:
    """The file of one of SHAPES, by the shape's name or its own; None of anything else."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    return path if path.stem in SHAPES and path.is_file() else None


def shape_config(name: str) -> Any:
    """The config of transformers for one of SHAPES, by its name or its file in configs/, or that of
    a folder.

    Raises:
        ValueError: for anything else.
    """
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name)
    path = layer_file(name)
    if path is None:
        raise ValueError(f"{name!r} is not known: allowed are {ALLOWED}.")
    layer = NSAConfig.from_yaml(path)
    family, vocab_size, intermediate_size, num_hidden_layers = SHAPES[path.stem]
    return family(
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        hidden_size=layer.hidden_size,
        num_attention_heads=layer.num_heads,
        num_key_value_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        rope_parameters=layer.rope_parameters,
        max_position_embeddings=layer.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(
    config: Any, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> PreTrainedModel:
    """The dense model of a config, with random weights that are made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
