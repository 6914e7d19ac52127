"""More sequences in a packed batch than an axis of a CUDA grid counts."""

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops.sliding_window_attention.flash_attention import TORCH_FLASH
from tests.on_gpu import assert_rms_close

pytestmark = pytest.mark.gpu
MOST = TORCH_FLASH.max_sequences
LENGTH = 4


def attend(num_sequences, backend):
    """Output and gradients of sequences that are shorter than the window,
    and what a dense softmax gives in float32.
    """
    shape = (num_sequences * LENGTH, 2, 64)
    tensors = [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for _ in range(3)
    ]
    cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device="cuda") * LENGTH
    o = ops.sliding_window_attention(
        *tensors, cu_seqlens, LENGTH, window_size=LENGTH, backend=backend
    )
    do = torch.randn_like(o)
    found = [o, *torch.autograd.grad(o, tensors, do)]
    wide = [x.detach().float().requires_grad_() for x in tensors]
    q, k, v = (x.view(num_sequences, LENGTH, 2, 64).transpose(1, 2) for x in wide)  # [B, H, S, D]
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").triu(1)
    weights = (q @ k.mT / 8).masked_fill(future, -torch.inf).softmax(-1)
    o = (weights @ v).transpose(1, 2).reshape(shape)
    return found, [o, *torch.autograd.grad(o, wide, do.float())]


@pytest.mark.parametrize(
    ("num_sequences", "backend"), [(MOST, "torch_flash"), (MOST, "auto"), (MOST + 1, "auto")]
)
def test_as_many_as_there_are(num_sequences, backend):
    for name, found, expected in zip(
        ("o", "dq", "dk", "dv"), *attend(num_sequences, backend), strict=True
    ):
        assert_rms_close(name, found, expected)


def test_too_many_for_torch_flash_are_refused_by_name():
    with pytest.raises(
        ValueError, match=rf"torch_flash.*{MOST + 1} sequences; supported are at most {MOST}.*Fix"
    ):
        attend(MOST + 1, "torch_flash")
