"""The cache on a GPU: row 11 of reliability.md."""

import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSACache, NSAConfig
from tests.on_gpu import syncs_forbidden

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_layer_with_a_cache():
    """Prefill, a chunk, single tokens with growing buffers, and what generation does to a cache."""
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64)
    layer = NativeSparseAttention(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 900, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([1, 1], device="cuda")

    def generate():
        cache = NSACache(config)
        layer(x[:, :500], cache=cache)
        layer(x[:, 500:850], cache=cache)
        cache.crop(20)
        cache.crop(300)
        cache.reorder(index)
        for i in range(850, 900):
            layer(x[:, i : i + 1], cache=cache)

    generate()
    with syncs_forbidden():
        generate()
