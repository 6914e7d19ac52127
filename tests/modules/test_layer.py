"""What NativeSparseAttention computes: against spec.md read plainly, padded against alone,
packed against separate.
"""

import copy
import inspect

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nsa_fsa.cache import NSACache
from nsa_fsa.config import COMPRESSION_KINDS, NSAConfig
from nsa_fsa.distributed import ContextParallel
from nsa_fsa.modules import Compressor, NativeSparseAttention
from nsa_fsa.modules.compression import MLPPhi
from nsa_fsa.modules.native_sparse_attention import PROJECTIONS
from nsa_fsa.modules.rotary import RotaryEmbedding
from nsa_fsa.ops.nsa_attention import OPERATORS
from nsa_fsa.sequences import uniform_layout
from tests.cases import BACKENDS, prefer
from tests.modules.layers import (
    VARIANTS,
    FirstPlusTanhOfLast,
    expected_output,
    make_layer,
    make_variant,
    randn,
    rms,
    rms_ratio,
    small_config,
)
from tests.wrong_values import assert_refused, instead_of_int, instead_of_tensor

# Float64 on both sides, with sums of some dozen terms in another order.
CLOSE = dict(rtol=1e-10, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_specification(variant):
    layer, x, records = make_variant(variant), randn(45, 24), []
    layer.recorder = records.append
    output = layer(x[None])[0]
    expected, chosen = expected_output(layer, x)
    assert torch.equal(records[0].block_indices, chosen)
    torch.testing.assert_close(output, expected, **CLOSE)


@torch.no_grad()
def test_every_part_of_the_specification_shows_in_the_output():
    """That test_forward_is_the_specification can tell: no two variants of one choice give the
    same output.
    """
    x = randn(1, 45, 24)

    def output(**changes):
        return make_layer(small_config(**{"compress_k": "mean", "compress_v": "mean", **changes}))(
            x
        )

    plain = output()
    for changes in (
        dict(compress_rope="before"),
        dict(rope_parameters=None),
        dict(rope_parameters={"rope_theta": 9000.0}),
        dict(window_size=7),
        dict(num_selected_blocks=4),
        dict(local_blocks=2),
        dict(scale=0.3),
        dict(kernel_size=4),
    ):
        assert rms_ratio(output(**changes), plain) > 1e-3, changes


# --- Padded and packed batches --------------------------------------------------------------------

# One without a token, shorter than a window, one window, block boundaries.
LENGTHS = [41, 0, 5, 33, 8, 1, 16]


def padded(x_rows, sides, width):
    """Rows of different lengths to `[B, width, E]` and a mask; padding holds garbage that must not
    be looked at.
    """
    batch = torch.full((len(x_rows), width, x_rows[0].shape[-1]), 1e4, dtype=x_rows[0].dtype)
    mask = torch.zeros(len(x_rows), width, dtype=torch.int64)
    for b, (row, side) in enumerate(zip(x_rows, sides, strict=True)):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        batch[b, columns], mask[b, columns] = row, 1
    return batch, mask


@torch.no_grad()
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sides",
    [["left"] * 7, ["right"] * 7, ["left", "right"] * 3 + ["left"]],
    ids=["left", "right", "both"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_rows_equal_rows_alone(variant, sides, mask_dtype):
    layer = make_variant(variant)
    rows = [randn(n, 24, seed=n) for n in LENGTHS]
    batch, mask = padded(rows, sides, 44)
    output = layer(batch, attention_mask=mask.to(mask_dtype))
    assert (output[mask == 0] == 0).all()
    for b, row in enumerate(rows):
        torch.testing.assert_close(output[b, mask[b] == 1], layer(row[None])[0], **CLOSE)


@torch.no_grad()
def test_a_batch_without_padding_equals_its_rows():
    layer, x = make_variant("default"), randn(3, 45, 24)
    output = layer(x)
    for b in range(3):
        torch.testing.assert_close(output[b], layer(x[b : b + 1])[0], **CLOSE)
    torch.testing.assert_close(layer(x, attention_mask=torch.ones(3, 45)), output, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("max_seqlen", [None, 41, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_separate(variant, max_seqlen):
    layer = make_variant(variant)
    rows = [randn(n, 24, seed=n) for n in LENGTHS]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output = layer(torch.cat(rows)[None], cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    expected = torch.cat([layer(row[None])[0] for row in rows])
    torch.testing.assert_close(output[0], expected, **CLOSE)


# --- Positions ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["default", "before-mlp", "wide-values"])
def test_positions_may_be_given(variant):
    """position_ids and position_embeddings that say what the layer would have counted itself
    change nothing.
    """
    layer, x = make_variant(variant), randn(2, 40, 24)
    expected = layer(x)
    positions = torch.arange(40)
    cos, sin = (y[None] for y in RotaryEmbedding(layer.config)(positions, 40, torch.float64))
    assert torch.equal(layer(x, position_ids=positions[None]), expected)
    assert torch.equal(layer(x, position_ids=positions.expand(2, 40)), expected)
    assert torch.equal(layer(x, position_embeddings=(cos, sin)), expected)
    assert torch.equal(
        layer(x, position_embeddings=(cos.expand(2, -1, -1), sin.expand(2, -1, -1))), expected
    )

    # RoPE is relative: a common shift of all positions changes nothing but rounding.
    # A stretch does.
    if layer.config.compress_rope == "before":  # an MLP of rotated keys is not relative
        return
    torch.testing.assert_close(
        layer(x, position_ids=positions[None] + 1000), expected, rtol=1e-8, atol=1e-8
    )
    assert rms_ratio(layer(x, position_ids=2 * positions[None]), expected) > 1e-3


@torch.no_grad()
def test_given_positions_in_a_padded_batch():
    layer = make_variant("default")
    rows = [randn(n, 24, seed=n) for n in (40, 23)]
    batch, mask = padded(rows, ["left", "left"], 40)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cos, sin = RotaryEmbedding(layer.config)(positions.flatten(), 40, torch.float64)
    embeddings = cos.view(2, 40, -1), sin.view(2, 40, -1)
    expected = layer(batch, attention_mask=mask)
    assert torch.equal(layer(batch, attention_mask=mask, position_ids=positions), expected)
    assert torch.equal(layer(batch, attention_mask=mask, position_embeddings=embeddings), expected)


@torch.no_grad()
def test_a_layer_without_rope_uses_given_positions():
    """rope_parameters=None rotates nothing, unless position_embeddings are given."""
    bare, rotating = (
        make_layer(small_config(rope_parameters=rope)) for rope in (None, {"rope_theta": 10000.0})
    )
    x = randn(1, 40, 24)
    cos, sin = RotaryEmbedding(rotating.config)(torch.arange(40), 40, torch.float64)
    assert rms_ratio(bare(x), rotating(x)) > 1e-3
    assert torch.equal(bare(x, position_embeddings=(cos[None], sin[None])), rotating(x))


# --- Sizes and dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_in_nothing_out(variant, shape):
    layer = make_variant(variant)
    x = torch.zeros(*shape, 24, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == x.shape
    assert layer(x, attention_mask=torch.ones(shape)).shape == x.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_padding(variant):
    layer, x = make_variant(variant), randn(2, 9, 24).requires_grad_()
    output = layer(x, attention_mask=torch.zeros(2, 9, dtype=torch.bool))
    output.sum().backward()
    assert torch.equal(output, torch.zeros_like(x))
    assert torch.equal(x.grad, torch.zeros_like(x))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token(variant):
    """A single token attends to itself in the selected and sliding branches and sees no
    compressed token.
    """
    layer, x = make_variant(variant), randn(1, 1, 24)
    torch.testing.assert_close(layer(x)[0], expected_output(layer, x[0])[0], **CLOSE)


def gradients(layer, x, do, **arguments):
    """Output, and gradients by name; `x` is the input's."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    output = layer(x, **arguments)
    output.backward(do.to(output.dtype))
    return output.detach(), {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def gradient_errors(grads, expected):
    """RMS error by name, relative to the gradient's size, or to the typical one for a gradient that
    cancels to nothing.
    """
    typical = torch.cat([g.double().flatten() for g in expected.values()]).pow(2).mean().sqrt()
    return {
        name: (
            (grads[name].double() - g.double()).pow(2).mean().sqrt() / max(rms(g), 0.1 * typical)
        ).item()
        for name, g in expected.items()
    }


# Row 1 of the bars allows an operator an RMS error of 0.005 (16-bit) or 1e-5 (float32), and 3
# against 2 for gradients. A layer rounds about four times as often as an operator (projections,
# norm and rotation, compression, output), and independent errors add up in quadrature: twice the
# bar. All blocks are selected here, so that rounding cannot change the selection, and gain 1 keeps
# softmax weights from amplifying errors.
BAR = {torch.bfloat16: 2 * 0.005, torch.float16: 2 * 0.005, torch.float32: 2 * 1e-5}
UNSELECTIVE = dict(num_selected_blocks=6, gain=1.0)


@pytest.mark.parametrize("dtype", BAR, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant, dtype):
    """Output and gradients have the input's dtype and float64's values."""
    layer, wide = (make_variant(variant, t, **UNSELECTIVE) for t in (dtype, torch.float64))
    wide.load_state_dict(layer.state_dict())  # float64 from the rounded values
    x, do = randn(2, 45, 24, dtype=dtype), randn(2, 45, 24, dtype=dtype, seed=1)
    output, grads = gradients(layer, x, do)
    expected, expected_grads = gradients(wide, x.double(), do)
    assert output.dtype == dtype
    assert {g.dtype for g in grads.values()} == {dtype}
    assert rms_ratio(output, expected) <= BAR[dtype]
    for name, error in gradient_errors(grads, expected_grads).items():
        assert error <= 1.5 * BAR[dtype], name


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant, padding):
    """Float32 parameters and input under bfloat16 autocast: runs, and gradients are float32.

    The error is that of the layer wholly in bfloat16 (see test_dtypes) times row 1's factors: 2 for
    outputs, 3 for gradients. Parameters and inputs are bfloat16 values here, so that casting them
    costs nothing.
    """
    low = make_variant(variant, torch.bfloat16, **UNSELECTIVE)
    layer = make_variant(variant, torch.bfloat16, **UNSELECTIVE).float()
    x, do = (randn(2, 45, 24, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    arguments = {}
    if padding:
        arguments["attention_mask"] = torch.ones(2, 45)
        arguments["attention_mask"][0, :11] = 0
    output_low, grads_low = gradients(low, x, do, **arguments)
    expected, expected_grads = gradients(layer, x.float(), do, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = gradients(layer, x.float(), do, **arguments)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert 0 < rms_ratio(output, expected) <= 2 * rms_ratio(output_low, expected)
    # The worst parameter's: the error of one of a few numbers is a matter of luck.
    bar = 3 * max(gradient_errors(grads_low, expected_grads).values())
    for name, error in gradient_errors(grads, expected_grads).items():
        assert error <= bar, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_position_embeddings_in_another_dtype(dtype):
    """transformers gives cos and sin in the hidden states' dtype;
    a float32 pair must not change the layer's dtype.
    """
    layer, x = make_variant("default", dtype), randn(1, 40, 24, dtype=dtype)
    cos, sin = (y[None] for y in RotaryEmbedding(layer.config)(torch.arange(40), 40, torch.float32))
    output = layer(x, position_embeddings=(cos, sin))
    assert output.dtype == dtype
    wide = make_variant("default")
    wide.load_state_dict(layer.state_dict())
    # Selections may differ here: only grossly wrong rotations show.
    assert rms_ratio(output, wide(x.double())) <= 0.05


# --- Parameters -----------------------------------------------------------------------------------


def test_parameter_names_are_hugging_faces():
    layer = NativeSparseAttention(
        small_config(qk_norm=True, qkv_bias=True, o_bias=True, compress_k="mean", compress_v="mean")
    )
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": (32, 24),
        "q_proj.bias": (32,),
        "k_proj.weight": (16, 24),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 24),
        "v_proj.bias": (16,),
        "o_proj.weight": (24, 32),
        "o_proj.bias": (24,),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
        "gate.weight": (12, 24),
        "gate.bias": (12,),
    }
    assert list(layer.buffers()) == []


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        (
            dict(kv_per_branch=True, v_head_dim=5),
            {"k_proj": (48, 24), "v_proj": (30, 24), "o_proj": (24, 20)},
        ),
        (dict(gate="per_token"), {"gate": (3, 24), "k_proj": (16, 24)}),
        (dict(gate="per_head"), {"gate": (12, 24)}),
    ],
    ids=str,
)
def test_projection_shapes(changes, shapes):
    layer = NativeSparseAttention(small_config(**changes))
    for name, shape in shapes.items():
        assert layer.get_submodule(name).weight.shape == shape


COMPRESSOR_PARAMETERS = {
    "mean": {},
    "weighted": {"phi.logits": (2, 8)},
    "linear": {"phi.weight": (2, 8 * 6, 6)},
    "mlp": {"phi.up": (2, 8 * 6, 9), "phi.down": (2, 9, 6)},
    "gated": {"phi.value_map.weight": (2, 8 * 6, 6), "phi.gate_map.weight": (2, 8 * 6, 6)},
}


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("kind", COMPRESSOR_PARAMETERS)
def test_compressor_parameters_and_start(kind, embedding):
    config = small_config(compress_hidden_size=9, compress_position_embedding=embedding)
    compressor = Compressor(config, kind, 6)
    expected = COMPRESSOR_PARAMETERS[kind] | (
        {"position_embedding": (2, 8, 6)} if embedding else {}
    )
    assert {name: tuple(p.shape) for name, p in compressor.named_parameters()} == expected
    if kind == "mlp":
        return
    # Every other kind starts out as the mean over the window.
    x = randn(20, 2, 6, dtype=torch.float32)
    means = torch.stack([x[4 * i : 4 * i + 8].mean(0) for i in range(4)])
    torch.testing.assert_close(compressor(x, uniform_layout(1, 20, x.device))[:4], means)


def test_each_side_has_its_own_compressor():
    layer = NativeSparseAttention(
        small_config(compress_k="linear", compress_v="gated", v_head_dim=6)
    )
    assert layer.compress_k.phi.weight.shape == (2, 64, 8)
    assert layer.compress_v.phi.value_map.weight.shape == (2, 48, 6)


def test_own_compressors_are_used_and_trained():
    """A module of the user's own replaces phi, is called with windows `[N, HKV, l, D]`,
    and receives gradients.
    """
    shapes = []

    class Spy(FirstPlusTanhOfLast):
        def forward(self, windows):
            shapes.append(tuple(windows.shape))
            return super().forward(windows)

    phi_k, phi_v = Spy(), Spy()
    layer = NativeSparseAttention(
        small_config(v_head_dim=6), compressor_k=phi_k, compressor_v=phi_v
    )
    layer(randn(1, 40, 24, dtype=torch.float32)).sum().backward()
    assert shapes == [(10, 2, 8, 8), (10, 2, 8, 6)]
    assert phi_k.strength.grad != 0
    assert phi_v.strength.grad != 0
    assert {"compress_k.phi.strength", "compress_v.phi.strength"} <= set(layer.state_dict())


class Direction(torch.nn.Module):
    """The mean's direction: undefined for a window of zeros unless `smallest` is more."""

    def __init__(self, smallest=0.0):
        super().__init__()
        self.length = torch.nn.Parameter(torch.tensor(2.0))
        self.smallest = smallest

    def forward(self, windows):
        mean = windows.mean(2)
        return self.length * mean / mean.norm(dim=-1, keepdim=True).clamp(min=self.smallest)


@pytest.mark.parametrize("lengths", [[40], [5], [3], [11, 2, 30, 7], [0, 12]], ids=str)
def test_own_compressors_see_no_windows_of_zeros(lengths):
    """Windows that no sequence owns hold real tokens: a phi that divides by their norm makes no
    NaN, changes nothing.
    """
    x = randn(1, sum(lengths), 24)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def run(smallest):
        own = dict(compressor_k=Direction(smallest), compressor_v=Direction(smallest))
        layer = make_layer(small_config(compress_position_embedding=len(lengths) == 2), **own)
        return gradients(layer, x, torch.ones_like(x), cu_seqlens=cu_seqlens)

    (output, grads), (expected, expected_grads) = run(0.0), run(1e-300)
    torch.testing.assert_close(output, expected, **CLOSE)
    for name, gradient in expected_grads.items():
        assert torch.isfinite(grads[name]).all(), name
        torch.testing.assert_close(grads[name], gradient, **CLOSE)


@torch.no_grad()
def test_own_compressors_that_divide_by_a_norm_and_a_cache():
    layer = make_layer(small_config(), compressor_k=Direction(), compressor_v=Direction())
    x, cache = randn(2, 40, 24), NSACache(layer.config)
    parts = [layer(part, cache=cache) for part in x.split((3, 14, 1, 1, 21), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), **CLOSE)


@torch.no_grad()
def test_a_phi_put_in_place_by_hand():
    layer = make_variant("own-modules", compress_k="weighted", compress_v="mlp")
    x = randn(1, 45, 24)
    expected = layer(x)
    by_hand = NativeSparseAttention(layer.config).double()
    by_hand.compress_k.phi, by_hand.compress_v.phi = FirstPlusTanhOfLast(), FirstPlusTanhOfLast()
    by_hand.load_state_dict(layer.state_dict())
    assert by_hand.compress_k.is_own
    assert torch.equal(by_hand(x), expected)


class PlusMean(torch.nn.Module):
    """A phi of the user's own around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, windows):
        return self.inner(windows) + windows.mean(2)


class MinusMean(MLPPhi):
    """A phi of the user's own that extends a built-in one."""

    def forward(self, windows):
        return super().forward(windows) - windows.mean(2)


@torch.no_grad()
@pytest.mark.parametrize("kind", COMPRESSION_KINDS)
def test_a_phi_with_a_built_in_inside_is_own(kind):
    """No config can describe it, so that a checkpoint must ask for it;
    and it gets windows, as every own phi does.
    """
    assert not Compressor(small_config(), kind, 8).is_own
    config = small_config(compress_k=kind)
    layer, x = make_layer(config), randn(40, 2, 8)
    inside = layer.compress_k.phi
    windows = torch.stack([x[i : i + 8] for i in range(0, 33, 4)]).transpose(1, 2)  # [9, H, l, D]
    expected = layer.compress_k(x, uniform_layout(1, 40, x.device))[:9] + windows.mean(2)
    layer.compress_k.phi = PlusMean(inside)
    for compressor in (layer.compress_k, Compressor(config, PlusMean(inside), 8)):
        assert compressor.is_own
        torch.testing.assert_close(
            compressor(x, uniform_layout(1, 40, x.device))[:9], expected, **CLOSE
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", COMPRESSION_KINDS)
def test_a_phi_of_another_compressor(kind):
    """Handed over as a module, or put in place by hand: own, where it is not what the kind asked
    for would make.
    """
    layout, x = uniform_layout(1, 40, torch.device("cpu")), randn(40, 2, 8)
    made, by_hand = (
        Compressor(small_config(), name, 8, dtype=torch.float64) for name in (kind, "weighted")
    )
    by_hand.phi = made.phi
    given = Compressor(small_config(), made.phi, 8)
    assert given.is_own
    assert by_hand.is_own == (kind != "weighted")
    for compressor in (given, by_hand):
        torch.testing.assert_close(compressor(x, layout)[:9], made(x, layout)[:9], **CLOSE)


@torch.no_grad()
def test_a_phi_that_extends_a_built_in_is_own():
    phi, x = MinusMean(2, 8, 8, 16, dtype=torch.float64), randn(40, 2, 8)
    compressor = Compressor(small_config(), phi, 8)
    assert compressor.is_own
    window = x[None, 12:20].transpose(1, 2)
    torch.testing.assert_close(
        compressor(x, uniform_layout(1, 40, x.device))[3:4], phi(window), **CLOSE
    )


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["torch.compile", "checkpoint_wrapper", "parametrize"])
def test_a_wrapped_phi_stays_what_it_was(wrap):
    """Tools wrap a built-in phi, or give it a class of their own:
    it is called as before, and not the user's own.
    """

    def wrapped(phi):
        if wrap == "torch.compile":
            return torch.compile(phi, backend="eager")
        if wrap == "checkpoint_wrapper":
            return checkpoint_wrapper(phi)
        for name, _ in [*phi.named_parameters(recurse=False)]:
            torch.nn.utils.parametrize.register_parametrization(phi, name, torch.nn.Identity())
        return phi

    for variant in ["default"] if wrap == "torch.compile" else VARIANTS:
        layer, x = make_variant(variant), randn(1, 45, 24)
        expected = layer(x)
        layer.compress_k.phi, layer.compress_v.phi = (
            wrapped(layer.compress_k.phi),
            wrapped(layer.compress_v.phi),
        )
        assert torch.equal(layer(x), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert (
            layer.compress_k.is_own
            == copy.deepcopy(layer).compress_k.is_own
            == (variant == "own-modules")
        )


def test_repr_shows_what_is_read():
    text = repr(
        NativeSparseAttention(small_config(compress_v="mlp"), compressor_k=FirstPlusTanhOfLast())
    )
    for part in (
        "block_size=8, num_selected_blocks=3, init_blocks=1, local_blocks=1, window_size=6",
        (
            "(compress_k): "
            "Compressor(\n    kernel_size=8, kernel_stride=4\n    (phi): FirstPlusTanhOfLast()"
        ),
        "(phi): MLPPhi()",
    ):
        assert part in text
    assert "(phi): PoolPhi(learned=True)" in repr(NativeSparseAttention(small_config()))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["per_head", "per_token"])
@pytest.mark.parametrize(
    ("init", "values"), [("balanced", (0.5, 0.5, 0.5)), ("dense", (0.0025, 0.9975, 0.0025))]
)
def test_gates_start(gate, init, values):
    """Whatever the input is: balanced gates are exactly one half,
    dense ones open the selected branch alone.
    """
    layer, records = NativeSparseAttention(small_config(gate=gate, gate_init=init)), []
    layer.recorder = records.append
    layer(100 * randn(2, 20, 24, dtype=torch.float32))
    gates = records[0].gates
    assert gates.shape == (40, 4 if gate == "per_head" else 1, 3)
    if init == "balanced":
        assert (gates == 0.5).all()
    # 1 / (1 + exp(6)) = 0.00247
    torch.testing.assert_close(gates, torch.tensor(values).expand_as(gates), rtol=0, atol=5e-5)


def test_device_and_dtype_arguments():
    layer = NativeSparseAttention(
        small_config(compress_k="gated", compress_position_embedding=True), dtype=torch.bfloat16
    )
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    meta = NativeSparseAttention(small_config(compress_k="mlp", compress_v="linear"), device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@torch.no_grad()
def test_state_dict_round_trip():
    first, second = make_variant("branches-gated", seed=1), make_variant("branches-gated", seed=2)
    x = randn(1, 40, 24)
    assert rms_ratio(second(x), first(x)) > 0.1
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))


# --- The recorder ---------------------------------------------------------------------------------


@torch.no_grad()
def test_recorder():
    layer, records = make_layer(small_config(), layer_idx=3), []
    batch, mask = padded([randn(n, 24) for n in (30, 12)], ["left", "right"], 30)
    before = layer(batch, attention_mask=mask)  # None: nothing is recorded
    layer.recorder = records.append
    assert torch.equal(layer(batch, attention_mask=mask), before)
    layer(batch[:1])
    layer.recorder = None
    layer(batch[:1])
    assert len(records) == 2
    padded_record, single = records
    assert padded_record.layer_idx == single.layer_idx == 3
    assert padded_record.block_indices.shape == (42, 2, 3)
    assert padded_record.block_indices.dtype == torch.int32
    assert padded_record.gates.shape == (42, 4, 3)
    assert padded_record.layout.cu_seqlens.tolist() == [0, 30, 42]
    assert single.layout.cu_seqlens.tolist() == [0, 30]
    torch.testing.assert_close(single.gates, torch.sigmoid(layer.gate(batch[0])).view(30, 4, 3))
    assert torch.equal(padded_record.block_indices[:30], single.block_indices)


@torch.no_grad()
def test_recorder_with_a_cache():
    layer, records, x = make_layer(small_config()), [], randn(1, 40, 24)
    layer.recorder = records.append
    layer(x)
    cache = NSACache(layer.config)
    layer(x[:, :39], cache=cache)
    layer(x[:, 39:], cache=cache)
    full, prefill, step = records
    assert torch.equal(torch.cat((prefill.block_indices, step.block_indices)), full.block_indices)
    torch.testing.assert_close(torch.cat((prefill.gates, step.gates)), full.gates)
    assert step.layout.cu_seqlens_q.tolist() == [0, 1]
    assert step.layout.seqused_k.tolist() == [40]


# --- Errors ---------------------------------------------------------------------------------------

ERRORS = {
    "no batch axis": (
        lambda: dict(hidden_states=randn(40, 24)),
        r"shape \(40, 24\).*must be \[B, S, 24\].*Fix",
    ),
    "wrong width": (
        lambda: dict(hidden_states=randn(1, 40, 23)),
        r"\(1, 40, 23\).*\[B, S, 24\].*Fix",
    ),
    "4D mask": (
        lambda: dict(hidden_states=randn(2, 9, 24), attention_mask=torch.ones(2, 1, 9, 9)),
        r"\(2, 1, 9, 9\).*must be \[B, S\] = \(2, 9\).*Fix",
    ),
    "mask of another length": (
        lambda: dict(hidden_states=randn(2, 9, 24), attention_mask=torch.ones(2, 8)),
        r"\(2, 8\).*\(2, 9\).*Fix",
    ),
    "packed with two rows": (
        lambda: dict(
            hidden_states=randn(2, 9, 24), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)
        ),
        r"2 rows.*Fix",
    ),
    "packed with a mask": (
        lambda: dict(
            hidden_states=randn(1, 9, 24),
            cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
            attention_mask=torch.ones(1, 9),
        ),
        r"attention_mask is not None.*Fix",
    ),
    "packed with a cache": (
        lambda: dict(
            hidden_states=randn(1, 9, 24),
            cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
            cache=NSACache(small_config()),
        ),
        r"cache is not None.*Fix",
    ),
    "boundaries that do not fit": (
        lambda: dict(
            hidden_states=randn(1, 9, 24), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)
        ),
        r"cu_seqlens=\[0, 8\] must rise from 0 to the number of key rows, 9",
    ),
    "boundaries of another dtype": (
        lambda: dict(hidden_states=randn(1, 9, 24), cu_seqlens=torch.tensor([0, 9])),
        r"cu_seqlens has dtype torch.int64.*int32.*Fix",
    ),
    "max_seqlen too small": (
        lambda: dict(
            hidden_states=randn(1, 9, 24),
            cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
            max_seqlen=8,
        ),
        r"max_seqlen=8 is less than the longest sequence, 9.*Fix",
    ),
    "cache of another config": (
        lambda: dict(hidden_states=randn(1, 9, 24), cache=NSACache(small_config(window_size=7))),
        r"other settings: window_size=7 \(layer: 6\)\. Fix: .*NSACache\(attn.config\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_value_and_fix(name):
    arguments, message = ERRORS[name]
    layer = make_variant("default")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        layer(**arguments())


def wrong_arguments():
    x, cos = randn(2, 9, 24), randn(1, 9, 8)
    boundaries, ids = torch.tensor([0, 4, 9], dtype=torch.int32), torch.arange(9)[None]

    def misshapen(x):
        """Of instead_of_tensor: what is no tensor, of other axes, or elsewhere; kinds aside."""
        values = instead_of_tensor(x, optional=True)
        return [y for y in values if not isinstance(y, torch.Tensor) or y.dtype == x.dtype]

    pairs = [cos, (cos,), (cos, cos, cos), (cos, None), (cos, 3.0), 3, "text", True, {"cos": cos}]
    pairs += [(cos, y) for y in (cos[..., :4], cos[:, :5], cos[0], cos.int(), cos.to("meta"))]
    pairs += [
        (y, y)
        for y in (
            cos[..., :7],
            randn(1, 9, 10),
            randn(3, 9, 8),
            randn(1, 8, 8),
            cos[..., :0],
            cos.to("meta"),
        )
    ]
    return {
        # A tensor on another device than the parameters is torch's to refuse:
        # only it knows where those are.
        "hidden_states": (
            dict(),
            [y for y in instead_of_tensor(x) if not (isinstance(y, torch.Tensor) and y.is_meta)],
        ),
        "position_embeddings": (dict(), pairs),
        "attention_mask": (
            dict(),
            [*misshapen(torch.ones(2, 9)), torch.ones(2, 8), torch.ones(1, 9)],
        ),
        "cu_seqlens": (
            dict(hidden_states=x[:1]),
            [*instead_of_tensor(boundaries, optional=True), boundaries.long()],
        ),
        "max_seqlen": (
            dict(hidden_states=x[:1], cu_seqlens=boundaries),
            instead_of_int(5, optional=True),
        ),
        "position_ids": (
            dict(),
            [*misshapen(ids), ids.float(), ids.bool(), ids[:, :8], ids.expand(3, 9)],
        ),
        "cache": (dict(), [3, "text", True, {}, NSACache, transformers.DynamicCache(), x]),
        "context_parallel": (dict(), [3, "text", True, {}, ContextParallel, x]),
    }


@pytest.mark.parametrize("name", [*inspect.signature(NativeSparseAttention.forward).parameters][1:])
def test_no_argument_fails_from_inside(name):
    layer = make_variant("default")
    good, values = wrong_arguments()[name]
    for value in values:
        arguments = {"hidden_states": randn(2, 9, 24), **good, name: value}
        assert_refused(lambda arguments=arguments: layer(**arguments), name, value)
    layer(**{"hidden_states": randn(2, 9, 24), **good})


def test_a_tensor_in_place_of_a_pair_is_named_not_shown():
    with pytest.raises(
        ValueError,
        match=r"position_embeddings is Tensor; it must be a pair.*Fix: pass \(cos, sin\)",
    ):
        make_variant("default")(randn(2, 9, 24), position_embeddings=randn(2, 9, 8))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "config": [None, {}, "tiny", NSAConfig],
        "compressor_k": ["median", 3, torch.nn.Identity, []],
        "projections": [
            [],
            {},
            "text",
            dict(q_proj=torch.nn.Linear(2, 2)),
            dict.fromkeys(PROJECTIONS, 3),
        ],
    }.items(),
)
def test_no_argument_of_the_constructor_fails_from_inside(name, values):
    for value in values:
        assert_refused(
            lambda value=value: NativeSparseAttention(**{"config": small_config(), name: value}),
            name,
            value,
        )


class WrongShape(torch.nn.Module):
    def forward(self, windows):
        return windows[:, :, :, :-1].mean(2)


def test_a_compressor_that_returns_no_tensor_is_named():
    layer = NativeSparseAttention(
        small_config(), compressor_v=torch.nn.LSTM(8, 8, batch_first=True)
    )
    layer.compress_v.phi.forward = lambda windows: (windows, None)
    with pytest.raises(
        ValueError, match=r"compressor LSTM turned windows .* into tuple; it must .*Fix"
    ):
        layer(randn(1, 40, 24, dtype=torch.float32))


@pytest.mark.parametrize("length", [3, 40])  # also without a window
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_compressor_of_a_wrong_shape_is_named(side, length):
    layer = NativeSparseAttention(
        small_config(v_head_dim=6), **{f"compressor_{side}": WrongShape()}
    )
    width = 8 if side == "k" else 6
    n = length // 4
    message = (
        r"compressor WrongShape "
        rf".*windows \({n}, 2, 8, {width}\) .*\({n}, 2, {width - 1}\).*must .*Fix"
    )
    with pytest.raises(ValueError, match=message):
        layer(randn(1, length, 24, dtype=torch.float32))


@pytest.mark.parametrize(
    "value", ["median", WrongShape, torch.mean, 3], ids=["text", "class", "function", "number"]
)
def test_a_compressor_that_is_no_module_is_refused(value):
    with pytest.raises(ValueError, match=r"compressor_v=.* must be an nn.Module.*Fix"):
        NativeSparseAttention(small_config(), compressor_v=value)


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"backend='quantum'.*allowed are.*'auto'.*'reference'.*Fix"
    ):
        NativeSparseAttention(small_config(backend="quantum"))


@torch.no_grad()
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.operator)
def test_a_layer_takes_every_backend_of_every_operator(operator):
    """As nsa_attention does: a name goes to the operators that have it.
    One that cannot run here is refused at once.
    """
    for name, reason in operator.available().items():
        config = small_config(backend=name)
        if reason is None:
            NativeSparseAttention(config)
        else:
            with pytest.raises(
                RuntimeError, match=f"backend='{name}' of {operator.operator} cannot run here"
            ):
                NativeSparseAttention(config)


@torch.no_grad()
def test_a_backend_of_one_branch_runs_there(monkeypatch):
    reference = BACKENDS["sliding_window_attention"].by_name["reference"]
    counted = []

    class OwnWindow(type(reference)):
        name = "own_window"

        def forward(self, call):
            counted.append(call.window_size)
            return super().forward(call)

    prefer(monkeypatch, "sliding_window_attention", OwnWindow())
    x = randn(1, 20, 24)
    assert torch.equal(
        make_layer(small_config(backend="own_window"))(x),
        make_layer(small_config(backend="reference"))(x),
    )
    assert counted == [small_config().window_size]
