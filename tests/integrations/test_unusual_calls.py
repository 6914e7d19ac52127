"""Masks, positions, caches and configs that models may be called with, and few are: what a sparse
model makes of them is what the dense one does, or it refuses them by name."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from nsa_fsa.integrations.transformers import NSAAttention, patch_model
from nsa_fsa.integrations.transformers.decoder import _check_in_step
from tests.integrations.families import BASE, family
from tests.integrations.models import dense_model, sparse_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*gates of the NSA layers are frozen")

SMALL = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=512,
)


def open_model(name, layers=None, **settings):
    """A family, and the same with only the selected branch open, which sees all of a short text."""
    dense = name if isinstance(name, torch.nn.Module) else family(name)
    sparse = copy.deepcopy(dense)
    patch_model(sparse, "tiny", layers=layers, verbose=False, **settings)
    for module in sparse.modules():
        if isinstance(module, NSAAttention):
            torch.nn.init.zeros_(module.gate.weight)
            module.gate.bias.data.view(-1, 3).copy_(torch.tensor([-120.0, 40.0, -120.0]))
    return dense.eval(), sparse.eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Masks


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_mask_of_packed_documents_is_no_padding(compiled):
    """Of four dimensions; its last row says nothing of the first document."""
    model, ids = sparse_model(), tokens(1, 40)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 15:, :15] = False
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises((ValueError, RuntimeError), match=r"not causal with padding.*position_ids"):
        run(ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_a_mask_for_all_rows():
    model, ids = sparse_model(), tokens(2, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[:, :7] = False
    for rows in (1, 2):
        found = model(ids, attention_mask=mask.expand(rows, 1, 40, 40), use_cache=False).logits
        alone = model(ids[:, 7:], use_cache=False).logits
        close(found[:, 7:], alone)


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ({"sliding_attention": None}, r"none for \"full_attention\""),
        ([[1] * 40] * 2, r"attention_mask=.* must be a tensor"),
    ],
    ids=["a dict", "a list"],
)
def test_what_is_no_mask(mask, match):
    with pytest.raises(ValueError, match=match):
        sparse_model()(tokens(2, 40), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
@torch.no_grad()
def test_layers_that_are_not_handed_what_they_do_not_know(name):
    """Beside dense ones, whose masks they are given: packed, and with a static cache."""
    dense, sparse = open_model(name, layers=[1])
    ids = torch.randint(1, 90, (1, 60))
    positions = torch.cat((torch.arange(25), torch.arange(35)))[None]
    packed = dict(position_ids=positions, use_cache=False)
    close(sparse(ids, **packed).logits, dense(ids, **packed).logits)

    ids, found = torch.randint(1, 90, (2, 60)), []
    for model in (dense, sparse):
        cache = StaticCache(model.config, max_cache_len=70)
        first = model(ids[:, :50], past_key_values=cache).logits
        found.append(torch.cat((first, model(ids[:, 50:], past_key_values=cache).logits), dim=1))
    close(*found)
    assert not [x for x in sparse.modules() if "_batch" in x.__dict__]


@torch.no_grad()
def test_a_decoder_that_counts_positions_by_its_mask():
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, init_std=0.2
    )
    torch.manual_seed(0)
    dense, sparse = open_model(transformers.OPTForCausalLM(config))
    ids = torch.randint(2, 90, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    close(sparse(ids).logits, dense(ids).logits)
    found, expected = (x(ids, attention_mask=mask).logits[mask.bool()] for x in (sparse, dense))
    close(found, expected)


# Positions


@pytest.mark.parametrize("kind", ["weighted", "mlp"])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("positions", ["columns", "counted", "from 100 on"])
@pytest.mark.parametrize("hidden", ["left", "a hole", "nothing"])
@torch.no_grad()
def test_positions_by_which_cached_keys_were_rotated(kind, embedding, positions, hidden):
    """Keys that are turned back before they are compressed."""
    settings = dict(compress_k=kind, compress_v=kind, compress_position_embedding=embedding)
    model, ids = sparse_model(nsa=settings), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 13), "a hole": slice(20, 33), "nothing": slice(0, 0)}[hidden]] = 0
    given = torch.arange(90)[None].expand(2, -1)
    if positions == "counted":
        given = (mask.cumsum(1) - 1).clamp(min=0)
    if positions == "from 100 on":
        given = (mask.cumsum(1) + 99).clamp(min=100)
    cache, chunks = DynamicCache(), []
    for rows in (slice(0, 60), slice(60, 89), slice(89, 90)):
        arguments = dict(attention_mask=mask[:, : rows.stop], past_key_values=cache)
        if positions != "columns":
            arguments["position_ids"] = given[:, rows]
        chunks.append(model(ids[:, rows], **arguments).logits)
    # Beside a cache, so that positions bound no documents.
    whole = model(
        ids, attention_mask=mask, position_ids=given, past_key_values=DynamicCache()
    ).logits
    found = torch.cat(chunks, dim=1)
    close(found[mask.bool()], whole[mask.bool()])


# Caches


@torch.no_grad()
def test_the_cache_of_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SMALL, attn_pdrop=0.0, add_cross_attention=True)
    dense, sparse = open_model(transformers.GPT2LMHeadModel(config))
    ids, found = torch.randint(1, 90, (1, 40)), []
    states = torch.randn(1, 7, 64)
    for model in (dense, sparse):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        more = dict(past_key_values=cache, encoder_hidden_states=states)
        found.append(torch.cat([model(x, **more).logits for x in (ids[:, :30], ids[:, 30:])], 1))
    close(*found)


@torch.no_grad()
def test_layers_without_keys_do_not_count_for_the_step():
    """A cache may hold a layer of no tokens for what is no attention."""
    model, ids, cache = sparse_model(), tokens(1, 40), DynamicCache()
    model(ids, past_key_values=cache)
    cache.layers.append(type(cache.layers[0])())
    _check_in_step(cache, (0, 1))
    cache.layers[1].crop(-10)
    with pytest.raises(RuntimeError, match="layer 1 of the cache holds 30"):
        _check_in_step(cache, (0, 1))


@torch.no_grad()
def test_a_cache_whose_layers_are_out_of_step_is_refused(monkeypatch):
    model, ids, cache = sparse_model(), tokens(1, 20), DynamicCache()
    model(ids[:, :8], past_key_values=cache)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].self_attn.o_proj, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, 8:], past_key_values=cache)
    with pytest.raises(
        RuntimeError,
        match=r"layer 1 .* holds 8 .* hold 20: an earlier forward raised.*Fix: a new cache",
    ):
        model(ids[:, :1], past_key_values=cache)


# Configs and arguments


def test_attention_weights_are_refused_however_they_are_asked_for():
    model = sparse_model(layers=[1])
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True is not available"):
        model(tokens(1, 30))


def test_attention_that_is_not_causal():
    config = transformers.LlamaConfig(**BASE, is_causal=False)
    with pytest.raises(TypeError, match="no causal self-attention"):
        patch_model(transformers.LlamaForCausalLM(config), "tiny")
    with pytest.raises(ValueError, match="is_causal=False is not available"):
        sparse_model()(tokens(1, 30), is_causal=False)


@torch.no_grad()
def test_dense_layers_of_a_model_that_named_our_function():
    """They stay causal, by the model's own default."""
    model = dense_model()
    model.set_attn_implementation("nsa_fsa")
    patch_model(model, "tiny", layers=[1], verbose=False)
    assert model.config._attn_implementation == "sdpa"
    ids = tokens(1, 40)
    other = ids.clone()
    other[0, -1] = 3 if ids[0, -1] != 3 else 4
    close(model(ids).logits[:, :-1], model(other).logits[:, :-1])


def test_a_config_without_use_cache():
    """A class of one's own need not have the field."""
    model = sparse_model()
    del model.config.__dict__["use_cache"]
    model.model(tokens(1, 30))


@pytest.mark.parametrize(
    ("config", "model", "name"),
    [
        ("GPT2Config", "GPT2LMHeadModel", "attn_pdrop"),
        ("LlamaConfig", "LlamaForCausalLM", "attention_dropout"),
        ("BertConfig", "BertLMHeadModel", "attention_probs_dropout_prob"),
    ],
)
def test_dropout_by_any_name(config, model, name):
    made = getattr(transformers, config)(**BASE, **{name: 0.1}, is_decoder=True)
    with pytest.raises(ValueError, match=f"{name}=0.1 is not available.*config.{name} = 0.0"):
        patch_model(getattr(transformers, model)(made), "tiny")


@torch.no_grad()
def test_a_window_that_only_the_decoders_mask_has():
    config = transformers.PhimoeConfig(
        **BASE, sliding_window=32, num_local_experts=2, num_experts_per_tok=1
    )
    with pytest.raises(ValueError, match="sliding window of 32"):
        patch_model(transformers.PhimoeForCausalLM(config), "tiny")


def test_a_whole_model_shares_its_language_models_config():
    model = family("Llava")
    patch_model(model, "tiny", verbose=False)
    assert model.config.get_text_config() is model.model.language_model.config


@torch.no_grad()
def test_an_offloaded_model_turns_keys_back():
    accelerate = pytest.importorskip("accelerate")
    model, ids = sparse_model().eval(), tokens(1, 40)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    accelerate.cpu_offload(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
