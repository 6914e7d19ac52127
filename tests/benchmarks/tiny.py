"""A model that is small enough to be served on a CPU."""

import torch

from benchmarks import serving
from tests.model_sizes import model_sizes


def tiny_model(sizes, vocab_size, positions, spread):
    """sizes: as `model_sizes` takes them. positions, spread: how many there are, and the standard
    deviation of weights."""
    shape = model_sizes(
        *sizes,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        initializer_range=spread,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )
    return serving.Model(shape, "tiny", torch.float32, "cpu")
