"""More sequences in a packed batch than an axis of a CUDA grid counts."""

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops import backends, flash_attention

pytestmark = pytest.mark.gpu
MOST = flash_attention.TORCH_FLASH.max_sequences


def attend(num_sequences, backend):
    """Sequences of one token each, which attend to themselves: o is v."""
    q, k, v = (torch.randn(num_sequences, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device="cuda")
    o = ops.sliding_window_attention(q, k, v, cu_seqlens, 1, window_size=4, backend=backend)
    do = torch.randn_like(o)
    (dv,) = torch.autograd.grad(o, v, do)
    return o, v, dv, do


def test_as_many_as_torch_flash_takes():
    o, v, dv, do = attend(MOST, "torch_flash")
    assert torch.equal(o, v)
    assert torch.equal(dv, do)


def test_one_more_is_refused_by_name():
    with pytest.raises(ValueError, match=rf"torch_flash.*{MOST + 1} sequences; supported are at most {MOST}.*Fix"):
        attend(MOST + 1, "torch_flash")


def test_the_library_itself_fails_there():
    """Otherwise the limit is out of date."""
    q = torch.randn(MOST + 1, 2, 64, dtype=torch.bfloat16, device="cuda")
    cu_seqlens = torch.arange(MOST + 2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError):
        flash_attention.TORCH_FLASH.forward(q, q, q, cu_seqlens, cu_seqlens, None, 1, 0.125, 4)


@pytest.mark.skipif(
    backends.available("sliding_window_attention")["flash_attn_4"] is not None,
    reason=str(backends.available("sliding_window_attention")["flash_attn_4"]),
)
def test_flash_attn_4_takes_more():
    o, v, dv, do = attend(MOST + 5, "flash_attn_4")
    assert torch.equal(o, v)
    assert torch.equal(dv, do)
