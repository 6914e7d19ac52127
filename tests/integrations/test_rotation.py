"""How a patched model's queries and keys are rotated: as the model does, or so in one kernel."""

import functools
import inspect

import pytest
import torch
import transformers
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from nsa_fsa.integrations.transformers import rotation
from nsa_fsa.integrations.transformers.attention import _sparse_attention_class
from nsa_fsa.integrations.transformers.rotation import ROTATION, with_fused_rotation
from nsa_fsa.modules.fused import quack_kernels
from tests.integrations.models import dense_model, sparse_model, tokens

ATTENTION = modeling_llama.LlamaAttention


@pytest.fixture
def calls(monkeypatch):
    """As if a kernel ran everywhere; the shapes of what it was given."""
    found = []

    def apply_rotary(x, cos, sin, original=rotation.apply_rotary):
        found.append((tuple(x.shape), tuple(cos.shape)))
        return original(x, cos, sin)

    monkeypatch.setattr(rotation, "kernels_for", lambda x: True)
    monkeypatch.setattr(rotation, "apply_rotary", apply_rotary)
    return found


def attention_of(cls, seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = transformers.LlamaConfig(**sizes, attn_implementation="eager")
    return cls(config, layer_idx=0)


def rotation_of(*shape):
    angle = torch.randn(*shape, 4).repeat_interleave(1, -1)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("rows", [1, 2])
def test_the_forward_is_the_same_but_for_its_rotation(calls, rows):
    made = with_fused_rotation(ATTENTION)
    x, pair = torch.randn(2, 5, 32), rotation_of(rows, 5)
    calls.clear()
    outputs = [attention_of(cls)(x, pair, attention_mask=None)[0] for cls in (ATTENTION, made)]
    torch.testing.assert_close(*outputs)
    assert calls == [((10, 4, 8), (10, 8)), ((10, 2, 8), (10, 8))]
    assert inspect.signature(made.forward) == inspect.signature(ATTENTION.forward)
    assert made.__name__ == ATTENTION.__name__
    # Nothing of transformers has changed.
    assert getattr(modeling_llama, ROTATION).__module__ == modeling_llama.__name__


def test_its_decorators_are_kept():
    """transformers 5.24 renames an argument in one."""
    original, names = ATTENTION.forward, {"only": "this"}
    made = rotation._rebuilt(original, names)
    while hasattr(original, "__wrapped__"):
        assert made.__code__ is original.__code__
        assert made.__wrapped__ in [cell.cell_contents for cell in made.__closure__]
        made, original = made.__wrapped__, original.__wrapped__
    assert not hasattr(made, "__wrapped__")
    assert made.__code__ is original.__code__
    assert made.__globals__ is names


@pytest.mark.parametrize("by", ["a default dtype", "a meta device"])
def test_how_the_process_is_set_up_does_not_matter(by):
    """`from_pretrained` makes models on the meta device, in the checkpoint's dtype."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta" if "meta" in by else "cpu"):
            assert with_fused_rotation(ATTENTION) is not ATTENTION
    finally:
        torch.set_default_dtype(before)


class Inherited(ATTENTION):
    """Of which no forward of its own is known."""


class Calling(ATTENTION):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Turning(ATTENTION):
    def forward(self, hidden_states, position_embeddings, **kwargs):
        turned = apply_rotary_pos_emb(hidden_states, hidden_states, *position_embeddings)
        return super().forward(hidden_states + turned[0], position_embeddings, **kwargs)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Pairs of neighbours."""
    cos, sin = (x[..., :4].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for x in (cos, sin))

    def turned(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    return turned(q), turned(k)


@pytest.mark.parametrize("cls", [modeling_cohere.CohereAttention, Calling, Turning])
def test_another_rotation_stays(cls):
    assert with_fused_rotation(cls) is cls
    assert with_fused_rotation(Inherited) is not Inherited


def test_a_kernel_that_somebody_else_has_put_there_stays(monkeypatch):
    """As Liger does, before it is patched."""

    @functools.wraps(modeling_llama.apply_rotary_pos_emb)
    def fast(*args, **kwargs):
        raise NotImplementedError

    fast.__module__ = "fast_kernels"
    monkeypatch.setattr(modeling_llama, ROTATION, fast)
    assert with_fused_rotation(ATTENTION) is ATTENTION


@torch.no_grad()
def test_a_rotation_that_is_replaced_later_is_the_one_that_runs(calls, monkeypatch):
    """As code that extends contexts does, whether a model has been patched before or not."""
    made = attention_of(with_fused_rotation(ATTENTION))
    x, (cos, sin) = torch.randn(2, 5, 32), rotation_of(1, 5)
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, ROTATION, lambda q, k, cos, sin: original(q, k, cos * 2, sin)
    )
    calls.clear()
    found = made(x, (cos, sin), attention_mask=None)[0]
    torch.testing.assert_close(
        found, attention_of(ATTENTION)(x, (cos, sin), attention_mask=None)[0]
    )
    assert calls == []


@torch.no_grad()
def test_what_else_is_replaced_later_is_seen(calls, monkeypatch):
    made = attention_of(with_fused_rotation(ATTENTION))
    ran = []

    def eager(module, q, k, v, *args, **kwargs):
        ran.append(q.shape)
        return v.new_zeros(2, 5, 4, 8), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    made(torch.randn(2, 5, 32), rotation_of(1, 5), attention_mask=None)
    assert ran == [(2, 4, 5, 8)]


class Decorator:
    """A decorator that is no function."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance, owner):
        return self if instance is None else functools.partial(self.function, instance)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def without_closure(function):
    made = functools.wraps(function)(lambda *args, **kwargs: HIDDEN[0](*args, **kwargs))
    HIDDEN[:] = [function]
    return made


HIDDEN = []


@pytest.mark.parametrize("decorate", [Decorator, without_closure, torch.compile])
def test_a_forward_that_cannot_be_rebuilt_stays(decorate):
    cls = type("Decorated", (ATTENTION,), {"forward": decorate(ATTENTION.forward)})
    assert with_fused_rotation(cls) is cls


def test_what_no_kernel_takes_is_the_models_own(calls, monkeypatch):
    """A rotation of other dtypes or widths than the heads', and what no kernel runs on."""
    own = []

    def counted(*args, original=modeling_llama.apply_rotary_pos_emb, **kwargs):
        own.append(args)
        return original(*args, **kwargs)

    turn = rotation._fused(counted)
    q, k, pair = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), rotation_of(1, 3)
    doubled = tuple(x.double() for x in pair)
    for run in (
        lambda: turn(q, k, *doubled),
        lambda: turn(*(x.transpose(1, 2) for x in (q, k)), *pair, 2),
        lambda: turn(*(x.transpose(1, 2) for x in (q, k)), *pair, unsqueeze_dim=2),
    ):
        before = len(own)
        run()
        assert len(own) == before + 1
    assert calls == []
    turn(q, k, *pair)
    assert (len(own), len(calls)) == (3, 2)
    monkeypatch.setattr(rotation, "kernels_for", lambda x: None if x.shape[1] == 2 else True)
    turn(q, k, *pair)
    assert (len(own), len(calls)) == (4, 2)


@torch.no_grad()
def test_patched_layers_alone_rotate_so(calls):
    """Beside one that stays dense."""
    _sparse_attention_class.cache_clear()
    ids, dense, patched = tokens(2, 40), dense_model(), sparse_model(layers=[1])
    calls.clear()
    dense(ids)
    assert calls == []
    patched(ids)
    assert calls[:2] == [((80, 8, 8), (80, 8)), ((80, 2, 8), (80, 8))]
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.skipif(quack_kernels() is None, reason="needs quack")
def test_quack_rotates_like_the_model():
    torch.manual_seed(0)
    q, k = (torch.randn(2, 300, h, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2))
    q, k = (x.transpose(1, 2).requires_grad_() for x in (q, k))
    angle = torch.randn(2, 300, 32, device="cuda").repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    found = rotation._fused(modeling_llama.apply_rotary_pos_emb)(q, k, cos, sin)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    expected = modeling_llama.apply_rotary_pos_emb(*wide, cos.double(), sin.double())
    do = [torch.randn_like(x) for x in found]
    gradients = torch.autograd.grad(found, (q, k), do)
    wanted = torch.autograd.grad(expected, wide, [x.double() for x in do])
    for x, y in zip((*found, *gradients), (*expected, *wanted), strict=True):
        assert x.stride() == q.stride() or x.shape == k.shape
        assert (x.double() - y).norm() <= 0.005 * y.norm()
