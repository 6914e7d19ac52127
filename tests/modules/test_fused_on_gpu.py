"""RoPE and RMSNorm in one pass against their formulas, where quack is installed."""

import pytest
import torch
from torch import nn

from nsa_fsa.modules.fused import quack_kernels
from nsa_fsa.modules.norm import normalize
from nsa_fsa.modules.rotary import apply_rotary
from tests.on_gpu import assert_rms_close, needs, record, syncs_forbidden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        quack_kernels() is None,
        reason="quack, which flash-attn 4 depends on, is not installed or not usable",
    ),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Tokens, heads, width, rotated width.
SHAPES = [(1000, 8, 128, 128), (77, 3, 96, 48), (1, 2, 64, 64), (0, 2, 64, 64)]


def branches_of(num_tokens, heads, width, dtype):
    """Three branches' keys, as kv_per_branch slices them, and the gradient of one branch's."""
    generator = torch.Generator("cuda").manual_seed(0)
    keys = (
        torch.randn(num_tokens, heads, 3, width, device="cuda", generator=generator)
        .to(dtype)
        .requires_grad_()
    )
    return keys, torch.randn(num_tokens, heads, width, device="cuda", generator=generator).to(dtype)


def rotation_of(num_tokens, rotary_dim, dtype):
    angle = 7 * torch.randn(
        num_tokens, rotary_dim // 2, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    return angle.repeat(1, 2).cos().to(dtype), angle.repeat(1, 2).sin().to(dtype)


def rms_norm(width, dtype):
    norm = nn.RMSNorm(width, eps=1e-5, device="cuda", dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator("cuda").manual_seed(2))
    return norm


def refuse(*args):
    raise AssertionError("the module itself was called")


def assert_all_close(names, found, expected, dtype):
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.shape == b.shape, name
        if not b.any():
            assert not a.any(), name
        else:
            assert_rms_close(name, a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_against_float64(shape, dtype):
    num_tokens, heads, width, rotary_dim = shape
    keys, do = branches_of(num_tokens, heads, width, dtype)
    rotation = rotation_of(num_tokens, rotary_dim, dtype)
    found = []
    for x, cos_sin, dx in (
        (keys, rotation, do),
        (keys.double(), (part.double() for part in rotation), do.double()),
    ):
        rotated = apply_rotary(x.unbind(2)[1], *cos_sin)
        found.append((rotated, *torch.autograd.grad(rotated, keys, dx)))
    assert_all_close(("rotated", "gradient"), *found, dtype)
    with syncs_forbidden():
        apply_rotary(keys.unbind(2)[1], *rotation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_against_float64(shape, dtype, monkeypatch):
    num_tokens, heads, width, _ = shape
    keys, _ = branches_of(num_tokens, heads, width, dtype)
    norm, do = rms_norm(width, dtype), torch.randn_like(keys)
    exact = nn.RMSNorm(width, eps=1e-5, device="cuda", dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    normed = normalize(exact, keys.double())
    expected = (normed, *torch.autograd.grad(normed, [keys, exact.weight], do.double()))
    monkeypatch.setattr(nn.RMSNorm, "forward", refuse)
    normed = normalize(norm, keys)
    found = (normed, *torch.autograd.grad(normed, [keys, norm.weight], do))
    assert_all_close(("normed", "gradient", "of weight"), found, expected, dtype)
    with syncs_forbidden():
        normalize(norm, keys)


def test_norm_is_the_same_in_20_runs(deterministic_only):
    keys, _ = branches_of(5000, 8, 128, torch.bfloat16)
    norm, do = rms_norm(128, torch.bfloat16), torch.randn_like(keys)

    def run():
        normed = normalize(norm, keys)
        return normed, *torch.autograd.grad(normed, [keys, norm.weight], do)

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_norm_of_qwen3():
    """transformers' module, whose forward is not called but where somebody listens to it."""
    Qwen3RMSNorm = pytest.importorskip("transformers.models.qwen3.modeling_qwen3").Qwen3RMSNorm
    keys, _ = branches_of(100, 4, 128, torch.bfloat16)
    norm = Qwen3RMSNorm(128, eps=1e-3).cuda().bfloat16()
    with torch.no_grad():
        norm.weight.copy_(rms_norm(128, torch.bfloat16).weight)
    exact = Qwen3RMSNorm(128, eps=1e-3).cuda()
    exact.load_state_dict(norm.state_dict())
    assert_rms_close("normed", normalize(norm, keys), exact(keys.float()), torch.bfloat16)
    calls = []
    hook = norm.register_forward_hook(lambda *_: calls.append(1))
    normalize(norm, keys)
    assert calls
    hook.remove()
    norm.forward = lambda x: x
    assert normalize(norm, keys) is keys


def test_in_a_graph():
    keys, _ = branches_of(100, 4, 128, torch.bfloat16)
    norm, rotation = rms_norm(128, torch.bfloat16), rotation_of(100, 128, torch.bfloat16)

    def run():
        return apply_rotary(normalize(norm, keys).unbind(2)[0], *rotation).detach()

    expected = run().clone()
    with torch.no_grad():
        graph, found = record(run)
    graph.replay()
    assert torch.equal(found, expected)


@needs(30)
def test_beyond_32_bits():
    """More than 2**31 numbers; the last rows equal the same rows alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(
        2**20, 17, 128, dtype=torch.bfloat16, device="cuda", generator=generator
    ).requires_grad_()
    do = torch.randn_like(x)
    norm, rotation = rms_norm(128, torch.bfloat16), rotation_of(2**20, 128, torch.bfloat16)
    last = x[-9:].detach().requires_grad_()
    for run in (
        lambda x: normalize(norm, x),
        lambda x: apply_rotary(x, *(part[-x.shape[0] :] for part in rotation)),
    ):
        found, expected = run(x), run(last)
        assert torch.equal(found[-9:], expected)
        dx = torch.autograd.grad(found, x, do)[0]
        expected_dx = torch.autograd.grad(expected, last, do[-9:])[0]
        assert torch.equal(dx[-9:], expected_dx)
        del found, dx
