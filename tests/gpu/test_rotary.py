"""The rotary embedding in one pass against its formula, where quack is installed."""

import pytest
import torch

from nsa_fsa.modules.rotary import apply_rotary, quack_rotary
from tests.gpu.problems import assert_rms_close
from tests.gpu.test_host_syncs import syncs_forbidden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(quack_rotary() is None, reason="quack, which flash-attn 4 depends on, is not installed or not usable"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1000, 8, 128, 128), (77, 3, 96, 48), (1, 2, 64, 64), (0, 2, 64, 64)], ids=str)
def test_against_float64(shape, dtype):
    """Tokens, heads, width, rotated width. x is one of three branches' keys, as kv_per_branch slices them."""
    num_tokens, heads, width, rotary_dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    angle = 7 * torch.randn(num_tokens, rotary_dim // 2, device="cuda", generator=generator)
    cos, sin = angle.repeat(1, 2).cos().to(dtype), angle.repeat(1, 2).sin().to(dtype)
    branches = torch.randn(num_tokens, heads, 3, width, device="cuda", generator=generator).to(dtype).requires_grad_()
    do = torch.randn(num_tokens, heads, width, device="cuda", generator=generator).to(dtype)
    found = []
    for x, rotation, dx in ((branches, (cos, sin), do), (branches.double(), (cos.double(), sin.double()), do.double())):
        rotated = apply_rotary(x.unbind(2)[1], *rotation)
        found.append((rotated, *torch.autograd.grad(rotated, branches, dx)))
    for name, a, b in zip(("rotated", "gradient"), *found, strict=True):
        assert a.shape == b.shape
        if num_tokens:
            assert_rms_close(name, a, b, dtype)
    with syncs_forbidden():
        apply_rotary(branches.unbind(2)[1], cos, sin)
