"""Rotary position embedding, in the half-split convention of Llama and Qwen."""

from typing import Any

import torch
from torch import Tensor

from nsa_fsa.config import NSAConfig
from nsa_fsa.modules.fused import kernels_for

# A token's angles are its position times frequencies that depend on nothing else.
BY_POSITION = ("default", "linear", "llama3", "yarn")
# Those that depend on the longest position of a batch, too.
BY_LENGTH = ("dynamic", "longrope")

# A launch of quack's kernel has at most 65,535 programs along the sequence,
# each of eight tokens or more.
MOST_TOKENS = 65_535 * 8


class RotaryEmbedding:
    """Positions to cos and sin. Holds no tensors, so that neither a cast of the model nor a meta
    device can spoil it.

    The types "default" and "linear" are computed here, all others by transformers' own functions.

    Raises:
        ImportError: for one of the latter when transformers is not installed.
    """

    def __init__(self, config: NSAConfig) -> None:
        assert config.rope_parameters is not None
        self.rope = config.rope_parameters
        self.rotary_dim = int(config.head_dim * self.rope.get("partial_rotary_factor", 1.0))
        unscaled = self.rope["rope_type"] in ("default", "linear")
        self.scaled = None if unscaled else _ScaledRope(config)

    @property
    def is_by_position(self) -> bool:
        """Whether a token's angles depend on its position alone."""
        return self.rope["rope_type"] in BY_POSITION

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As the call gives them, of a type that `is_by_position`."""
        return self(positions, 0, dtype)

    def __call__(
        self, positions: Tensor, max_position: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """positions `[T]` -> cos and sin, `[T, rotary_dim]` in `dtype`.
        "dynamic" and "longrope" look at `max_position`.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scaling = 1.0
        if self.scaled is None:
            channel = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=wide)
            exponent = channel / self.rotary_dim
            factor = self.rope["factor"] if self.rope["rope_type"] == "linear" else 1.0
            frequency = self.rope["rope_theta"] ** -exponent / factor
        else:
            frequency, scaling = self.scaled(positions.device, max_position)
        angle = positions[:, None].to(wide) * frequency.to(wide)
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


class _ScaledRope:
    """Frequencies of the scaled types, from transformers."""

    def __init__(self, config: NSAConfig) -> None:
        assert config.rope_parameters is not None
        try:
            from transformers import LlamaConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        except ImportError as error:
            raise ImportError(
                f"rope_type={config.rope_parameters['rope_type']!r} is computed by transformers, "
                "which is not installed. "
                'Fix: pip install "nsa-fsa[transformers]", or use rope_type "default" or "linear".'
            ) from error
        self.function: Any = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        self.config = LlamaConfig(
            hidden_size=config.num_heads * config.head_dim,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )

    def __call__(self, device: torch.device, max_position: int) -> tuple[Tensor, float]:
        return self.function(self.config, device, seq_len=max_position)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `cos.shape[-1]` channels of x `[T, H, D]` by cos and sin `[T, rotary_dim]`,
    whose halves are equal.

    In one pass where `nsa_fsa.modules.fused` has a kernel. One H100, 65,536 tokens, 32 heads of
    128, forward / with backward, ms: 0.37 / 1.26; operation by operation 3.14 / 6.27, and that
    compiled by itself 1.23 / 2.58.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim % 8 == 0 and (kernels := kernels_for(x)) is not None:
        if x.shape[0] > MOST_TOKENS:
            parts = zip(*(y.split(MOST_TOKENS) for y in (x, cos, sin)), strict=True)
            return torch.cat([apply_rotary(*part) for part in parts])
        return kernels.rotary(x[None], cos[:, : rotary_dim // 2], sin[:, : rotary_dim // 2])[0]
    if rotary_dim < x.shape[-1]:
        return torch.cat((apply_rotary(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
