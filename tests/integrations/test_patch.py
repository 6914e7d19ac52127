"""patch_model and unpatch_model: what changes, what does not, and what is refused."""

import copy
import gc
import pickle

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from nsa_fsa import NativeSparseAttention
from nsa_fsa.integrations.transformers import (
    NSALlamaConfig,
    NSALlamaForCausalLM,
    patch_model,
    unpatch_model,
)
from tests.integrations.models import (
    FAMILIES,
    PROJECTIONS,
    TINY_REACH,
    VOCAB,
    assert_same,
    attentions,
    dense_config,
    dense_model,
    open_only_the_selected_branch,
    output,
    scramble,
    snapshot,
    sparse_layers,
    sparse_model,
    tiny_nsa,
    tokens,
)

ALL_MODELS = [(family, base) for family in FAMILIES for base in (False, True)]


# --- What a patched model computes ----------------------------------------------------------------


@pytest.mark.parametrize(("family", "base"), ALL_MODELS)
def test_selected_branch_alone_is_the_dense_model(family, base):
    """Up to 96 tokens the selected branch sees every key: checks projections, norms, biases, RoPE,
    scale and head order.
    """
    model, ids = dense_model(family, base), tokens(2, TINY_REACH)
    expected = output(model, ids)
    patch_model(model, preset="tiny", verbose=False)
    open_only_the_selected_branch(model)
    # float32 through two layers.
    torch.testing.assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-4)
    longer = tokens(2, 3 * TINY_REACH)
    # Beyond, it is sparse.
    assert (output(model, longer) - output(unpatch_model(model), longer)).abs().max() > 0.1


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
     "original_max_position_embeddings": 64, "attn_factor": 1.0, "finetuned": True},
    {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0,
     "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.2, 1.3],
     "long_factor": [1.0, 2.0, 4.0, 8.0]},
    {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
], ids=lambda rope: f"{rope['rope_type']} {len(rope)}")  # fmt: skip
def test_models_with_scaled_rope(rope):
    model, ids = dense_model("llama", rope_parameters=rope), tokens(1, TINY_REACH)
    expected = output(model, ids)
    patch_model(model, preset="tiny", verbose=False)
    open_only_the_selected_branch(model)
    torch.testing.assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_rope_type_of_somebody_elses(monkeypatch, tmp_path):
    """Only the model can compute it, and it hands cos and sin to its layers."""

    def halved(config, device=None, **_):
        return 0.5 ** torch.arange(config.head_dim // 2).float(), 0.9

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "halved", halved)
    model = dense_model(rope_parameters={"rope_type": "halved", "rope_theta": 1e4})
    ids = tokens(1, TINY_REACH)
    expected = output(model, ids)
    patch_model(model, "tiny", verbose=False)
    open_only_the_selected_branch(model)
    torch.testing.assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, ids), output(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("compress_rope", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_attention_is_the_layer(family, compress_rope):
    """The attention inside a model, with that model's projections, norms and rotation,
    equals the layer that has its own.
    """
    model = sparse_model(family, nsa=dict(compress_rope=compress_rope))
    attention, seen = attentions(model)[1], []
    attention.register_forward_hook(
        lambda module, args, kwargs, result: seen.append((kwargs["hidden_states"], *result)),
        with_kwargs=True,
    )
    output(model, tokens(2, 200))
    ((hidden_states, result, weights),) = seen
    assert weights is None
    layer = NativeSparseAttention(tiny_nsa(model, compress_rope=compress_rope))
    layer.load_state_dict(attention.state_dict())
    torch.testing.assert_close(result, layer(hidden_states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [None, [0], [1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(family, side, layers):
    """Also through the layers that a partial patch leaves dense."""
    model, ids = sparse_model(family, layers=layers), tokens(3, 200)
    mask = torch.ones_like(ids)
    for b, padding in enumerate((0, 61, 190)):
        columns = slice(0, padding) if side == "left" else slice(200 - padding, 200)
        mask[b, columns] = 0
        ids[b, columns] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = output(model, ids, attention_mask=mask, position_ids=position_ids)
    # Positions counted from the left edge: RoPE is relative.
    shifted = output(model, ids, attention_mask=mask)
    for b in range(3):
        real = mask[b] == 1
        alone = output(model, ids[b : b + 1, real])[0]
        torch.testing.assert_close(logits[b, real], alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(shifted[b, real], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layers", [[0], [1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layers_of_a_partial_patch_are_dense(family, layers):
    """With the sparse layer's selected branch alone, the whole model is the dense one,
    padded or not.
    """
    model, ids = dense_model(family), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    expected, expected_padded = output(model, ids), output(model, ids, attention_mask=mask)
    patch_model(model, preset="tiny", layers=layers, verbose=False)
    assert sparse_layers(model) == layers
    attention = attentions(model)[layers[0]]
    with torch.no_grad():
        attention.gate.bias.view(-1, 3).copy_(torch.tensor([-120.0, 40.0, -120.0]))
    torch.testing.assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-4)
    padded = output(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[mask == 1], expected_padded[mask == 1], rtol=1e-4, atol=1e-4)


# --- What patching changes ------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "base"), ALL_MODELS)
def test_patching_keeps_parameters_and_adds_gates_and_compressors(family, base):
    model = dense_model(family, base)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    modules = {
        f"{i}.{name}": getattr(a, name)
        for i, a in enumerate(attentions(model))
        for name in PROJECTIONS
    }
    patch_model(model, preset="tiny", verbose=False)
    after = dict(model.named_parameters())
    for name, (parameter, address, value) in before.items():
        assert after[name] is parameter, name
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    for i, attention in enumerate(attentions(model)):
        for name in PROJECTIONS:
            assert getattr(attention, name) is modules[f"{i}.{name}"]
    new = {name.split(".self_attn.")[1] for name in after.keys() - before.keys()}
    assert new == {"gate.weight", "gate.bias", "compress_k.phi.logits", "compress_v.phi.logits"}
    assert model.config.model_type == f"nsa_{family}"
    assert type(model).__name__.startswith("NSA")
    assert isinstance(model, FAMILIES[family][2 if base else 1])


@pytest.mark.parametrize("train", [False, True])
def test_mode_dtype_and_device_are_kept(train):
    model = dense_model().to(torch.bfloat16).train(train)
    patch_model(model, preset="tiny", verbose=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training == train for module in model.modules())
    unpatch_model(model.train(not train))
    assert all(module.training != train for module in model.modules())


@pytest.mark.parametrize("layers", [None, [0], (1,)], ids=str)
@pytest.mark.parametrize(("family", "base"), ALL_MODELS)
def test_unpatching_restores_bit_for_bit(family, base, layers):
    model, ids = dense_model(family, base), tokens(2, 130)
    before, expected = snapshot(model), output(model, ids)
    patch_model(model, preset="tiny", layers=layers, verbose=False)
    assert (output(scramble(model), ids) - expected).abs().max() > 1e-3
    assert unpatch_model(model) is model
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, ids), expected)
    assert unpatch_model(model) is model  # does nothing to a dense model
    assert_same(before, snapshot(model))
    patch_model(model, preset="tiny", verbose=False)  # and again
    assert sparse_layers(model) == [0, 1]


def test_unpatching_keeps_what_was_trained():
    model = sparse_model()
    with torch.no_grad():
        attentions(model)[0].q_proj.weight.add_(1)
    trained = attentions(model)[0].q_proj.weight.detach().clone()
    attentions(model)[1].k_proj = torch.nn.Linear(64, 16, bias=False)
    replaced = attentions(model)[1].k_proj
    unpatch_model(model)
    assert torch.equal(attentions(model)[0].q_proj.weight, trained)
    assert attentions(model)[1].k_proj is replaced


@pytest.mark.parametrize("built", ["patched", "from its config"])
def test_unpatching_keeps_what_was_changed_in_the_config(built, tmp_path):
    """The embeddings have grown: an old vocab_size beside them would make the next
    checkpoint unreadable.
    """
    dense = dense_model()
    original, size = dense.config, dense.config.vocab_size
    patch_model(dense, preset="tiny", verbose=False)
    model = dense if built == "patched" else type(dense)(dense.config)
    model.resize_token_embeddings(size + 7)
    expected = unpatch_model(model).config
    assert expected.vocab_size == size + 7
    assert type(expected) is type(original)
    assert expected is not original
    assert original.vocab_size == size
    assert expected._attn_implementation != "nsa_fsa"
    assert {id(m.config) for m in model.modules() if "config" in m.__dict__} == {id(expected)}
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


def test_saving_does_not_count_as_a_change_of_the_config(tmp_path):
    model = dense_model()
    original = model.config
    patch_model(model, preset="tiny", verbose=False)
    model.save_pretrained(tmp_path)
    assert unpatch_model(model).config is original


def test_unpatching_frees_gates_and_compressors():
    model = sparse_model()
    new = {id(p) for n, p in model.named_parameters() if "gate." in n or "compress" in n}
    unpatch_model(model)
    gc.collect()
    assert not new & {id(o) for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)}


def test_other_models_in_the_process_do_not_matter():
    """One whose constructor raised, kept alive by its traceback,
    and one that the garbage collector does not look at.
    """
    half_built = NSALlamaForCausalLM.__new__(NSALlamaForCausalLM)
    assert not hasattr(half_built, "_modules")
    model = dense_model()
    gc.freeze()
    try:
        patch_model(model, "tiny", verbose=False)
    finally:
        gc.unfreeze()
    assert type(model.config) is type(model.model.config) is NSALlamaConfig
    ids = tokens(1, 20)
    assert output(model, ids).shape == (1, 20, VOCAB)
    unpatch_model(model)
    assert torch.equal(output(model, ids), output(dense_model(), ids))


def test_only_this_instance_is_patched():
    """Not the class, not its attention class, not another model,
    not even one made from the same config object.
    """
    config = dense_config()
    torch.manual_seed(0)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    ids = tokens(1, 130)
    expected, forward, before = output(second, ids), LlamaAttention.forward, snapshot(second)
    patch_model(first, preset="tiny", verbose=False)
    assert first.config is not config
    assert not hasattr(config, "nsa")
    assert config._attn_implementation != "nsa_fsa"
    assert LlamaAttention.forward is forward
    assert_same(before, snapshot(second))
    assert torch.equal(output(second, ids), expected)
    third = transformers.LlamaForCausalLM(config)
    assert type(attentions(third)[0]) is LlamaAttention


def test_all_submodules_share_one_config():
    """Of attention modules it is a copy, which names this package's attention function."""
    model = sparse_model()
    assert isinstance(model.config, NSALlamaConfig)
    assert model.config is model.model.config
    assert model.config._attn_implementation == "sdpa"
    for attention in attentions(model):
        assert attention.config._attn_implementation == "nsa_fsa"


# --- The report -----------------------------------------------------------------------------------


def test_report(capsys):
    model = dense_model(num_hidden_layers=5)
    dense_parameters = model.num_parameters()
    report = patch_model(model, preset="tiny", layers=[4, 0, 1, 1])
    assert report.model_class == "LlamaForCausalLM"
    assert report.patched_class == "NSALlamaForCausalLM" == type(model).__name__
    assert report.layers == (0, 1, 4)
    assert report.dense_layers == (2, 3)
    assert report.config == attentions(model)[0].nsa_config
    gate, compressors = 64 * 24 + 24, 2 * 2 * 16
    assert report.new_parameters == 3 * (gate + compressors)
    assert (
        report.total_parameters
        == model.num_parameters()
        == dense_parameters + report.new_parameters
    )
    assert not report.dry_run
    assert not report.already_patched
    text = str(report)
    assert capsys.readouterr().out == text + "\n"
    for part in (
        f"LlamaForCausalLM is now NSALlamaForCausalLM (transformers {transformers.__version__})",
        "NSA layers: 0-1, 4; dense: 2-3",
        "8 query, 2 KV (group size 4), head dim 8",
        "6 blocks of 16 keys = 96, the last 32, and one compressed token per 8",
        f"{report.new_parameters:,} of {report.total_parameters:,}",
        "gates: dense",
    ):
        assert part in text


def test_verbose_false_prints_nothing(capsys):
    model = dense_model()
    patch_model(model, preset="tiny", verbose=False)
    patch_model(model, preset="tiny", verbose=False)
    unpatch_model(model)
    assert capsys.readouterr().out == ""


def test_dry_run_changes_nothing():
    model = dense_model()
    before = snapshot(model)
    report = patch_model(model, preset="tiny", layers=[1], dry_run=True, verbose=False)
    assert_same(before, snapshot(model))
    assert report.dry_run
    assert "would become" in str(report)
    real = patch_model(model, preset="tiny", layers=[1], verbose=False)
    assert (real.layers, real.new_parameters, real.total_parameters) == (
        report.layers,
        report.new_parameters,
        report.total_parameters,
    )


def test_a_projection_that_is_not_trained_stays_so():
    """A layer shares its projections with the dense module, whatever mode each of them is in."""
    model = dense_model().train()
    model.model.layers[0].self_attn.q_proj.eval()

    def modes():
        return {name: module.training for name, module in model.named_modules()}

    before = modes()
    patch_model(model, "tiny", dry_run=True, verbose=False)
    assert modes() == before
    patch_model(model, "tiny", verbose=False)
    assert before.items() <= modes().items()
    assert attentions(model)[0].gate.training
    unpatch_model(model)
    assert modes() == before


def test_patching_twice_does_nothing():
    model = sparse_model(layers=[1])
    before = snapshot(model)
    for again in (dict(), dict(config=attentions(model)[1].nsa_config), dict(layers=[1])):
        report = patch_model(model, **again, verbose=False)
        assert report.already_patched
        assert report.layers == (1,)
        assert report.dense_layers == (0,)
        assert report.total_parameters == model.num_parameters()
        assert "was already" in str(report)
        assert_same(before, snapshot(model))


# --- Errors leave the model untouched -------------------------------------------------------------


def with_config(**changes):
    return lambda model: dict(config=tiny_nsa(model, **changes))


REFUSED = {
    "another head count": (with_config(num_kv_heads=4), "num_kv_heads=4 does not fit.*2.*Fix"),
    "another width": (
        with_config(hidden_size=128),
        "hidden_size=128 does not fit.*64.*Fix: leave hidden_size out",
    ),
    "another head width": (with_config(head_dim=16), "head_dim=16 does not fit.*8.*Fix"),
    "wide values": (with_config(v_head_dim=16), "v_head_dim=16 does not fit.*8.*Fix"),
    "another scale": (with_config(scale=1.0), "scale=1.0 does not fit.*Fix"),
    "kv_per_branch": (with_config(kv_per_branch=True), "kv_per_branch=True.*must be False.*Fix"),
    "unknown backend": (with_config(backend="quantum"), "backend='quantum'.*allowed are.*Fix"),
    "unknown preset": (lambda model: dict(preset="huge"), "preset='huge'.*allowed are.*tiny.*Fix"),
    "preset and config": (
        lambda model: dict(config=tiny_nsa(model), preset="tiny"),
        "preset='tiny' and config.*Fix",
    ),
    "layer past the end": (
        lambda model: dict(preset="tiny", layers=[0, 2]),
        r"layers=\[0, 2\] must be .*among 0 .. 1.*Fix",
    ),
    "layer before the first": (
        lambda model: dict(preset="tiny", layers=-3),
        r"layers=-3 must be .*among 0 .. 1.*Fix",
    ),
    "layer 7 by name": (
        lambda model: dict(config={7: "tiny"}),
        "layers=7 must be .*among 0 .. 1.*Fix: name layers that",
    ),
    "no layer": (lambda model: dict(preset="tiny", layers=[]), r"layers=\[\].*at least one"),
    "layers as text": (
        lambda model: dict(preset="tiny", layers="all"),
        r"layers='all' must be .*Fix: name layers that",
    ),
    "half a layer": (
        lambda model: dict(preset="tiny", layers=[0.5]),
        r"layers=\[0.5\] must be an index.*Fix",
    ),
    "a fraction of them": (
        lambda model: dict(preset="tiny", layers=0.5),
        r"layers=0.5 must be an index.*Fix",
    ),
    "a mask": (
        lambda model: dict(preset="tiny", layers=[True, False]),
        r"layers=\[True, False\] must be an index.*Fix",
    ),
    "a mask tensor": (
        lambda model: dict(preset="tiny", layers=torch.tensor([True, False])),
        r"layers=tensor.*must be an index",
    ),
    "misspelt preset": (
        lambda model: dict(config="tinny"),
        r"config='tinny' is neither a preset nor a file.*tiny.*Fix",
    ),
    "a list of configs": (
        lambda model: dict(config=["tiny", "tiny"]),
        r"config=\['tiny', 'tiny'\] is not allowed.*Fix",
    ),
    "misspelt override": (
        lambda model: dict(windw_size=64),
        "no field 'windw_size'; did you mean 'window_size'",
    ),
    "misspelt field": (
        lambda model: dict(config=dict(windw_size=64)),
        "no field 'windw_size'; did you mean 'window_size'",
    ),
    "two presets": (
        lambda model: dict(config="tiny", preset="tiny"),
        "preset='tiny' and config.*Fix",
    ),
    "a layer twice": (
        lambda model: dict(config={0: "tiny", (-2, 1): "tiny"}),
        r"layer 0 is named twice in \[0, \(-2, 1\)\].*Fix",
    ),
    "layers and names": (
        lambda model: dict(config={0: "tiny", "window_size": 3}),
        r"has the keys \[0\] where names.*Fix: config=\{0: ..., 1: ...\}",
    ),
    "layers in a layer": (
        lambda model: dict(config={0: {1: "tiny"}}),
        r"has the keys \[1\] where names of settings.*Fix",
    ),
    "layers twice": (
        lambda model: dict(config={0: "tiny"}, layers=[0]),
        r"layers=\[0\] and a config for each.*Fix",
    ),
    "one layer does not fit": (
        lambda model: dict(config={0: "tiny", 1: dict(num_kv_heads=4)}),
        "num_kv_heads=4 does not fit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit(name):
    make, message = REFUSED[name]
    model = dense_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, **make(model), verbose=False)
    assert_same(before, snapshot(model))


def test_attention_dropout_is_refused():
    model = dense_model(attention_dropout=0.1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*must be 0.*Fix"):
        patch_model(model, preset="tiny", verbose=False)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_stay_dense(family):
    """Unless they are named, which is refused."""
    sizes = dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)
    model = dense_model(family, **sizes)
    before = snapshot(model)
    for layers in ([1], [0, 1]):
        found = r"layers \[1\] cannot become sparse.*sliding attention.*Fix.*layers=\[0\]"
        with pytest.raises(ValueError, match=found):
            patch_model(model, preset="tiny", layers=layers, verbose=False)
    assert_same(before, snapshot(model))
    report = patch_model(model, preset="tiny", verbose=False)
    assert (report.layers, report.dense_layers) == ((0,), (1,))
    assert sparse_layers(model) == [0]


@pytest.mark.parametrize("kind", ["MistralForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_models_without_a_possible_layer(kind):
    """A window, a soft cap or sinks must never be taken for full attention."""
    cls = getattr(transformers, kind)
    sizes = {
        k: v
        for k, v in dense_config().to_dict().items()
        if k in cls.config_class.__dataclass_fields__
    }
    del sizes["rope_parameters"]
    config = cls.config_class(**{**sizes, "layer_types": None, "sliding_window": 32})
    model = cls(config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(no layer|layers \[1\]).*sparse"):
        patch_model(model, "tiny", verbose=False)
    assert_same(before, snapshot(model))


def test_what_has_no_causal_self_attention_is_refused():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for model in (
        transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)),
        torch.nn.Linear(4, 4),
    ):
        with pytest.raises(TypeError, match=rf"{type(model).__name__} cannot be patched.*Fix"):
            patch_model(model, verbose=False)


def test_tensor_parallel_models_are_refused():
    model = dense_model()
    model.config.distributed_config = DistributedConfig(tp_size=2)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"tensor-parallel.*Fix: patch_model before fully_shard.*DistributedConfig"
    ):
        patch_model(model, "tiny", verbose=False)
    assert_same(before, snapshot(model))


# --- Training -------------------------------------------------------------------------------------


def test_patching_after_gradient_checkpointing():
    ids, gradients = tokens(1, 130), []
    for first in (False, True):
        model = dense_model().train()
        if first:
            model.gradient_checkpointing_enable()
        patch_model(model, "tiny", verbose=False)
        if not first:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# --- Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("base", [False, True])
def test_output_attentions_is_refused(base, layers):
    model, ids = sparse_model(base=base, layers=layers), tokens(1, 20)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize(("family", "base"), ALL_MODELS)
def test_output_hidden_states_still_works(family, base):
    model, ids = sparse_model(family, base), tokens(1, 20)
    states = model(ids, output_hidden_states=True).hidden_states
    assert [tuple(x.shape) for x in states] == [(1, 20, 64)] * 3


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_a_patched_model(how, layers):
    model, ids = sparse_model(layers=layers), tokens(1, 130)
    copied, expected = how(model), output(model, ids)
    assert type(copied) is NSALlamaForCausalLM
    assert copied.config is not model.config
    assert copied.config is copied.model.config
    assert torch.equal(output(copied, ids), expected)
    with torch.no_grad():
        attentions(copied)[1].gate.bias.add_(1)
    assert torch.equal(output(model, ids), expected)  # shares nothing
    unpatch_model(copied)
    assert torch.equal(output(model, ids), expected)
    assert torch.equal(output(copied, ids), output(unpatch_model(model), ids))
