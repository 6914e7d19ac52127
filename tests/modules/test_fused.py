"""Which fused kernels a layer takes, as far as that shows without a GPU."""

import sys

import pytest
import torch
from torch import nn

from nsa_fsa.modules import fused
from nsa_fsa.modules.norm import normalize
from nsa_fsa.modules.rotary import apply_rotary


def test_a_quack_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    """One that is not installed is no news; a broken one costs time that somebody will
    wonder about.
    """
    monkeypatch.delitem(sys.modules, "quack", raising=False)
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "__init__.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(
        UserWarning, match="quack is installed but cannot be imported .*a_package_that_it_needs"
    ):
        assert fused.quack_kernels.__wrapped__() is None


def test_the_norm_is_called_as_quack_takes_it(tmp_path, monkeypatch):
    """With a stand-in of quack, whose kernels need a GPU: the weight by position,
    epsilon by name.
    """
    for name in ("quack", "quack.rotary"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "__init__.py").write_text(
        "def rmsnorm(x, weight=None, bias=None, *, eps): return x * weight + eps"
    )
    (tmp_path / "quack" / "rotary.py").write_text("apply_rotary_emb = None")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "nsa_fsa.modules.norm.kernels_for", lambda x: fused.quack_kernels.__wrapped__()
    )
    norm, x = nn.RMSNorm(8, eps=0.5), torch.randn(5, 2, 8)
    assert torch.equal(normalize(norm, x), x * norm.weight + 0.5)


@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("num_tokens", [0, 7, 8, 20])
def test_rotary_in_launches_that_fit(num_tokens, rotary_dim, monkeypatch):
    """As the formula, forward and backward, whatever number of tokens a launch may have;
    channels beyond cos are kept.
    """
    launches = []

    def rotary(x, cos, sin):
        launches.append(x.shape[1])
        first, second, rest = x.split(
            (rotary_dim // 2, rotary_dim // 2, x.shape[3] - rotary_dim), dim=-1
        )
        cos, sin = cos[None, :, None], sin[None, :, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    x = torch.randn(num_tokens, 2, 16, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(num_tokens, rotary_dim // 2, dtype=torch.float64).repeat(1, 2)
    rotation, do = (angle.cos(), angle.sin()), torch.randn_like(x)
    expected = apply_rotary(x, *rotation)
    monkeypatch.setattr("nsa_fsa.modules.rotary.kernels_for", lambda x: fused.Kernels(rotary, None))
    monkeypatch.setattr("nsa_fsa.modules.rotary.MOST_TOKENS", 7)
    found = apply_rotary(x, *rotation)
    assert launches == {0: [0], 7: [7], 8: [7, 1], 20: [7, 7, 6]}[num_tokens]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, do)[0] for y in (found, expected)))


def qwen3_norm():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    return Qwen3RMSNorm(8, eps=1e-3)


def hooked():
    norm = nn.RMSNorm(8, eps=1e-3)
    norm.register_forward_pre_hook(lambda *_: None)
    return norm


def replaced():
    norm = qwen3_norm()
    norm.forward = lambda x: x
    return norm


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.RMSNorm(8, eps=1e-3), dim=None)


@pytest.mark.parametrize(
    ("make", "takes"),
    [
        (lambda: nn.RMSNorm(8, eps=1e-3), True),
        (qwen3_norm, True),
        (lambda: nn.RMSNorm(8), False),  # its epsilon follows from the dtype
        (lambda: nn.RMSNorm(8, eps=1e-3, elementwise_affine=False), False),
        (lambda: nn.LayerNorm(8), False),
        (nn.Identity, False),
        (hooked, False),
        (replaced, False),
        (parametrized, False),
    ],
    ids=[
        "RMSNorm",
        "Qwen3",
        "no epsilon",
        "no weight",
        "LayerNorm",
        "Identity",
        "hooked",
        "replaced",
        "parametrized",
    ],
)
def test_norms_that_are_fused(make, takes, monkeypatch):
    """Only what the kernel computes is given to it; everything else runs as the module says."""
    given = []

    def rms_norm(x, weight, eps):
        given.append((weight, eps))
        return x

    monkeypatch.setattr("nsa_fsa.modules.norm.kernels_for", lambda x: fused.Kernels(None, rms_norm))
    norm, x = make(), torch.randn(5, 2, 8)
    found = normalize(norm, x)
    if takes:
        assert given == [(norm.weight, 1e-3)]
    else:
        assert not given
        assert torch.equal(found, norm(x))
