"""A checkpoint by its name, of which the config and the tokenizer are known before any weight is
loaded."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GGUF = ".gguf"
BYTES_END = 0  # what ends a document where tokens are bytes


@dataclass(frozen=True)
class Checkpoint:
    """A language model that `from_pretrained` opens, not yet loaded."""

    name: str  # a folder, a name on the hub, or a file that ends in .gguf
    config: Any  # of transformers
    tokenizer: Any  # None: tokens are bytes

    @classmethod
    def of(cls, name: str) -> "Checkpoint":
        """Reads the config and the tokenizer; a folder without one has bytes for tokens.

        Raises:
            OSError, ValueError: where transformers finds no checkpoint by that name.
            ImportError: for a GGUF file without the package that reads it.
        """
        place, options = _place_of(name)
        config = AutoConfig.from_pretrained(place, **options)
        folder, tokenizer = Path(place), None
        if options or not folder.is_dir() or any(folder.glob("*token*")):
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        return cls(name, config, tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def ends(self) -> list[int]:
        """Tokens that end a document."""
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            return [self.tokenizer.eos_token_id]
        found = self.config.get_text_config().eos_token_id
        if found is None:
            return [BYTES_END]
        return found if isinstance(found, list) else [found]

    @property
    def longest(self) -> int | None:
        """How many positions the model was made for, where its config says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def skeleton(self) -> Any:
        """The model without weights.

        Raises:
            ValueError: for a config of which transformers knows no causal language model.
        """
        config = copy.deepcopy(self.config)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(
                f"{self.name} is a {type(config).__name__}, of which transformers knows no causal "
                "language model. Fix: a checkpoint that AutoModelForCausalLM opens."
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model, on the CPU. What was quantized in a GGUF file is so no more, and is saved as
        any other model is."""
        place, options = _place_of(self.name)
        if options and (kind := getattr(transformers, "GgufConfig", None)) is not None:
            options["quantization_config"] = kind(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
        if options and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)
        return model


def _place_of(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a folder or a name on the hub, and which file there."""
    if not name.endswith(GGUF):
        return name, {}
    folder, _, file = name.rpartition("/")
    return folder or ".", dict(gguf_file=file)
