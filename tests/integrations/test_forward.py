"""What a forward of a patched model is given beside tokens: masks, positions, boundaries;
and how often it looks at them.
"""

import copy
import functools
import inspect
import warnings

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache

from nsa_fsa.integrations.transformers import batch, patch_model, unpatch_model
from tests.integrations.models import (
    FAMILIES,
    TINY_REACH,
    dense_model,
    open_only_the_selected_branch,
    sparse_layers,
    sparse_model,
    tokens,
)

PARTIAL = [None, [1], [0]]
LENGTHS = [60, 1, 50, 29]


def documents(lengths, seed=0):
    return [tokens(n, seed=seed + i) for i, n in enumerate(lengths)]


def packed_row(parts):
    """Token ids and positions of documents laid end to end, each `[1, T]`."""
    return torch.cat(parts)[None], torch.cat([torch.arange(len(part)) for part in parts])[None]


@torch.no_grad()
def separately(model, parts):
    return torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])


def close(actual, expected):
    # float32 through two layers; logits of size 10.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32],
    ids=str,
)
@torch.no_grad()
def test_masks_of_every_dtype(dtype):
    """Floating masks of 0 and 1 included: PEFT's prompt tuning makes them."""
    model, ids = sparse_model(layers=[1]), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    expected = model(ids[:1, 7:], use_cache=False).logits
    close(model(ids, attention_mask=mask.to(dtype), use_cache=False).logits[:1, 7:], expected)


def additive(mask, kind):
    if kind == "int":
        return (mask - 1) * 10000
    if kind == "no padding":
        return torch.zeros(mask.shape)
    return torch.where(
        mask == 0, -torch.inf if kind == "inf" else torch.finfo(torch.float32).min, 0.0
    )


@pytest.mark.parametrize("kind", ["inf", "min", "int", "no padding"])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_additive_masks_are_refused(layers, kind):
    """Read as a padding mask, they would hide what is real and show the padding."""
    model, ids = sparse_model(layers=layers), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for cache in (False, True):
        with pytest.raises(ValueError, match=r"negative values.*Fix: attention_mask == 0"):
            model(ids, attention_mask=additive(mask, kind), use_cache=cache)
    with torch.no_grad():
        fixed = model(ids, attention_mask=additive(mask, kind) == 0, use_cache=False).logits
        shown = torch.ones_like(mask) if kind == "no padding" else mask
        close(fixed, model(ids, attention_mask=shown, use_cache=False).logits)


@pytest.mark.parametrize("width", [39, 41])
def test_masks_of_another_width_are_refused(width):
    with pytest.raises(ValueError, match=r"\(2, 40\).*Fix: a column for every token so far"):
        sparse_model()(tokens(2, 40), attention_mask=torch.ones(2, width))


@pytest.mark.parametrize("layers", PARTIAL, ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_padded_batch_in_chunks(layers, static):
    """Masks `[B, past + S]` beside either cache: every chunk gives what a forward of all
    of it gives.
    """
    model, ids = sparse_model(layers=layers), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    cache = StaticCache(config=model.config, max_cache_len=120) if static else DynamicCache()
    found, past = [], 0
    for size in (50, 1, 1, 30, 8):
        columns = slice(past, past + size)
        found.append(
            model(
                ids[:, columns], attention_mask=mask[:, : past + size], past_key_values=cache
            ).logits
        )
        past += size
    for row, start in ((0, 37), (1, 0)):
        expected = model(ids[row : row + 1, start:], use_cache=False).logits[0]
        close(torch.cat(found, dim=1)[row, start:], expected)


@torch.no_grad()
def test_a_mask_that_shows_padding_of_the_past():
    """What a chunk's mask hid is in the cache, and a later mask may show it.

    One layer alone, because the second layer's keys depend on what the first one saw.
    """
    model, ids, cache = sparse_model(num_hidden_layers=1), tokens(2, 40), DynamicCache()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
    logits = model(ids[:, 30:], attention_mask=torch.ones_like(ids), past_key_values=cache).logits
    close(logits, model(ids, use_cache=False).logits[:, 30:])


@torch.no_grad()
def test_masks_of_four_dimensions():
    """One that says what causal attention and a padding mask say is read as that."""
    model, ids = sparse_model(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    visible = torch.ones(40, 40, dtype=torch.bool).tril() & mask[:, None, None]
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    lowest = torch.finfo(torch.float32).min
    for whole in (visible, torch.where(visible, 0.0, lowest)):
        logits = model(ids, attention_mask=whole, use_cache=False).logits
        assert torch.equal(logits[mask], expected[mask])
    visible[1, 0, 30, 5] = False
    for wrong in (visible, torch.ones_like(visible), visible.expand(-1, 8, -1, -1)):
        with pytest.raises(ValueError, match=r"is not causal.*Fix: pass the 2D mask"):
            model(ids, attention_mask=wrong, use_cache=False)


@torch.no_grad()
def test_masks_of_four_dimensions_beside_a_cache():
    """Where they hide cached tokens, whose keys are turned back by the positions of real ones."""
    model, ids, cache, found = sparse_model(), tokens(2, 40), DynamicCache(), []
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    visible = torch.ones(40, 40, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    for start, stop in ((0, 25), (25, 28), (28, 29), (29, 40)):
        new = slice(start, stop)
        arguments = dict(attention_mask=visible[:, :, new, :stop], position_ids=positions[:, new])
        found.append(model(ids[:, new], past_key_values=cache, **arguments).logits)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    real = mask.bool()
    close(torch.cat(found, dim=1)[real], whole[real])


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_other_attention_implementations(name, padded):
    """They are the dense layers', which have masks of their own."""
    ids = tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for layers in (None, [1]):
        model = sparse_model(layers=layers)
        assert model.config._attn_implementation == "sdpa"
        expected = model(ids, attention_mask=mask if padded else None).logits
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits = model(ids, attention_mask=mask if padded else None).logits
        if layers is None:
            assert torch.equal(logits, expected)
        else:
            close(logits[mask.bool()], expected[mask.bool()])


# --- Packed batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "both", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_positions_beside_a_mask(family, side):
    """Documents are told apart by the positions of real tokens, wherever there is padding."""
    model, parts = sparse_model(family), documents(LENGTHS)
    ids, position_ids = packed_row(parts)
    pads = {"right": (0, 11), "left": (11, 0), "both": (5, 9), "none": (0, 0)}[side]
    pad = lambda x: torch.nn.functional.pad(x, pads)  # noqa: E731
    logits = model(
        pad(ids),
        attention_mask=pad(torch.ones_like(ids)),
        position_ids=pad(position_ids),
        use_cache=False,
    ).logits
    close(logits[0, pads[0] : pads[0] + ids.shape[1]], separately(model, parts))


@pytest.mark.parametrize("counted", [True, False], ids=["hidden tokens counted", "not counted"])
@torch.no_grad()
def test_hidden_tokens_do_not_end_a_sequence(counted):
    """Positions that go on after a hole in the mask, whether they count the tokens in it or not:
    one sequence.
    """
    model, ids = sparse_model(), tokens(1, 50)
    mask = torch.ones_like(ids)
    mask[0, 20:26] = 0
    position_ids = torch.arange(50)[None] if counted else mask.cumsum(1) - 1
    logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    expected = model(
        ids[mask.bool()][None], position_ids=position_ids[mask.bool()][None], use_cache=False
    )
    assert torch.equal(
        logits[mask.bool()],
        model(ids, attention_mask=mask, position_ids=position_ids[:1]).logits[mask.bool()],
    )
    if not counted:
        close(logits[mask.bool()], expected.logits[0])


@torch.no_grad()
def test_rows_of_different_documents_and_padding():
    model = sparse_model()
    rows = [documents([60, 30]), documents([40], seed=3), documents([20, 20, 37], seed=5)]
    ids, mask, position_ids = torch.zeros(3, 3, 100, dtype=torch.long).unbind(0)
    for b, parts in enumerate(rows):
        row, positions = packed_row(parts)
        ids[b, : row.shape[1]], mask[b, : row.shape[1]], position_ids[b, : row.shape[1]] = (
            row,
            1,
            positions,
        )
    logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for b, parts in enumerate(rows):
        close(logits[b, : int(mask[b].sum())], separately(model, parts))


@torch.no_grad()
def test_one_row_of_positions_for_the_batch():
    """`[1, S]` beside two rows of tokens: plain positions change nothing, packed ones pack both."""
    model, ids = sparse_model(), tokens(2, 60)
    plain = model(ids, use_cache=False).logits
    assert torch.equal(
        model(ids, position_ids=torch.arange(60)[None], use_cache=False).logits, plain
    )
    packed = model(
        ids, position_ids=torch.cat((torch.arange(25), torch.arange(35)))[None], use_cache=False
    ).logits
    for b in range(2):
        close(packed[b], separately(model, [ids[b, :25], ids[b, 25:]]))


@pytest.mark.parametrize("train", [True, False])
def test_a_cache_that_nobody_asked_for(train):
    """use_cache is on by default: a packed batch leaves the cache out, as it cannot be read."""
    model = sparse_model().train(train)
    ids, position_ids = packed_row(documents(LENGTHS))
    output = model(ids, position_ids=position_ids, labels=ids)
    expected = model(ids, position_ids=position_ids, labels=ids, use_cache=False)
    assert torch.equal(output.loss, expected.loss)
    output.loss.backward()
    assert output.get("cache") is None
    assert output.get("past_key_values") is None


# --- How often a forward looks --------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """Counts the calls of the functions that read masks and positions back from the device,
    which still do their work.
    """
    calls = []

    def count(module, name, looks):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            calls.extend([1] * looks(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    count(batch, "pack_batch", lambda *args: args[3] is not None or args[4] is not None)
    count(transformers.masking_utils, "find_packed_sequence_indices", lambda _: True)
    return calls


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("base", [False, True], ids=["causal lm", "base"])
def test_one_look_a_forward(looks, layers, base):
    """Whatever the number of layers: none for a plain batch or given boundaries,
    one for a mask or positions. Dense layers look as often as those of a dense model.
    """
    dense = dense_model(base=base)
    model = sparse_model(layers=layers, base=base, num_hidden_layers=4 if layers is None else 2)
    ids, mask = tokens(2, 40), torch.ones(2, 40)
    row, position_ids = packed_row(documents([25, 15]))
    packed = dict(input_ids=row, position_ids=position_ids, use_cache=False)
    boundaries = dict(cu_seq_lens_q=torch.tensor([0, 25, 40], dtype=torch.int32), max_length_q=25)
    embeds = model.get_input_embeddings()(ids)
    for expected, arguments in (
        (0, dict(input_ids=ids, use_cache=False)),
        (0, dict(input_ids=ids)),
        (0, dict(inputs_embeds=embeds)),
        (1, dict(input_ids=ids, attention_mask=mask)),
        (1, dict(input_ids=ids, position_ids=torch.arange(40)[None])),
        (1, packed),
        (1, dict(**packed, attention_mask=mask[:1])),
        (0, dict(**packed, **boundaries)),
    ):
        looks.clear()
        if layers is not None:
            dense(**arguments)
        expected += len(looks)
        looks.clear()
        model(**arguments)
        assert len(looks) == expected, arguments


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_do_not_look_again(looks, use_reentrant):
    model, ids = sparse_model(layers=[1]).train(), tokens(2, 40)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert len(looks) == 1


def test_one_look_a_step_of_generation(looks):
    model, ids = sparse_model(), tokens(2, 40)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert len(looks) <= 5  # the prompt, and four of the five tokens are fed back


def test_a_layer_past_the_hook_looks_for_itself(looks):
    """PEFT calls the forward of a base model directly, which runs no hooks:
    padding must not be lost there.
    """
    model, ids = sparse_model(base=True), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask, use_cache=False)[0]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    )
    assert torch.equal(adapted(input_ids=ids, attention_mask=mask, use_cache=False)[0], expected)
    row, position_ids = packed_row(documents(LENGTHS))
    expected = sparse_model(base=True)(row, position_ids=position_ids, use_cache=False)[0]
    torch.testing.assert_close(
        adapted(input_ids=row, position_ids=position_ids, use_cache=False)[0], expected
    )


def test_unpatching_leaves_no_hook(looks):
    model = unpatch_model(sparse_model())
    model(tokens(1, 20), attention_mask=torch.ones(1, 20))
    assert not looks
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_pre_hooks_with_kwargs


# --- Tracing --------------------------------------------------------------------------------------


def arguments_of(kind):
    parts = documents(LENGTHS)
    ids, position_ids = packed_row(parts)
    if kind == "packed, boundaries given":
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        return dict(
            input_ids=ids, position_ids=position_ids, cu_seq_lens_q=ends, max_length_q=max(LENGTHS)
        )
    if kind == "packed by positions":
        return dict(input_ids=ids, position_ids=position_ids)
    ids = tokens(2, 140)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :37] = mask[1, 120:] = 0
        return dict(input_ids=ids, attention_mask=mask)
    return dict(input_ids=ids)


KINDS = ["plain", "padded", "packed, boundaries given", "packed by positions"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_model_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    model, arguments = sparse_model(layers=[1]).train(), arguments_of(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(**arguments, use_cache=False)
        real = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
        output.logits[real].square().mean().backward()
        results.append([output.logits[real], *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
        )


@torch.no_grad()
def test_a_compiled_model_generates():
    """`generate` passes positions beside the cache that the prompt fills:
    they bound no documents there.
    """
    torch._dynamo.reset()
    model, ids = sparse_model(num_hidden_layers=1), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    settings = dict(attention_mask=mask, max_new_tokens=2, do_sample=False)
    expected = model.generate(ids, **settings)
    model.compile(backend="eager")
    assert torch.equal(model.generate(ids, **settings), expected)


@torch.no_grad()
@pytest.mark.parametrize("hooked", [True, False])
def test_a_compiled_prompt_beside_positions_fills_a_cache(hooked):
    """Positions of the caller's, or past the hook those that the model counts for its layers."""
    torch._dynamo.reset()
    model, ids = sparse_model(base=True), tokens(1, 41)
    expected = model(ids, use_cache=False)[0]
    compiled = torch.compile(model if hooked else model.forward, fullgraph=True, backend="eager")
    output = compiled(
        ids[:, :40], position_ids=torch.arange(40)[None] if hooked else None, use_cache=True
    )
    close(output[0], expected[:, :40])
    close(model(ids[:, 40:], past_key_values=output.past_key_values)[0], expected[:, 40:])


def exported(model):
    length = torch.export.Dim("length", min=8, max=400)  # 8: a compression window of this model
    shapes = {"input_ids": {1: length}, "use_cache": None}
    given = dict(input_ids=tokens(2, 40), use_cache=False)
    return torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@torch.no_grad()
def test_a_patched_model_exports_with_a_dynamic_length(layers):
    if layers is not None:
        try:
            exported(dense_model())
        except torch._dynamo.exc.UserError:  # PyTorch 2.11
            pytest.skip("the dense model cannot be exported with a dynamic length either")
    model = sparse_model(layers=layers)
    program = exported(model)
    for size in (40, TINY_REACH + 30):
        ids = tokens(2, size, seed=size)
        close(
            program(input_ids=ids, use_cache=False).logits,
            model(input_ids=ids, use_cache=False).logits,
        )


# --- Layers left dense ----------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return output


def largest(model, **arguments):
    with LargestTensor() as mode:
        model(**arguments, logits_to_keep=1)
    return mode.size


LONG = 2048


def long_batch(kind):
    ids, mask = tokens(1, LONG), torch.ones(1, LONG)
    if kind == "packed by positions":
        return dict(input_ids=ids, position_ids=torch.arange(LONG // 2).repeat(2)[None])
    if kind == "packed, boundaries given":
        return dict(
            input_ids=ids,
            cu_seq_lens_q=torch.tensor([0, 1000, LONG], dtype=torch.int32),
            max_length_q=1048,
        )
    if kind == "plain":
        return dict(input_ids=ids)
    mask[:, -100:] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dense_layers_make_no_square_mask(kind, cached):
    """One of two layers is dense, and the other's blocks and windows are small:
    nothing is near S x S.
    """
    if cached and "packed" in kind:
        pytest.skip("packed batches fill no cache")
    model = sparse_model(layers=[1])
    dense_attention = AttentionInterface()["nsa_fsa"]
    sizes = []

    def measured(*args, **kwargs):
        with LargestTensor() as mode:
            output = dense_attention(*args, **kwargs)
        sizes.append(mode.size)
        return output

    AttentionInterface.register("nsa_fsa", measured)
    try:
        model(**long_batch(kind), use_cache=cached, logits_to_keep=1)
    finally:
        AttentionInterface.register("nsa_fsa", dense_attention)
    assert len(sizes) == 1
    assert sizes[0] <= LONG * 64 * 2  # q is S x 64
    # as before patching.
    assert largest(dense_model(), **long_batch("plain"), use_cache=cached) < LONG * LONG


# --- Other tools ----------------------------------------------------------------------------------


@torch.no_grad()
def test_prompt_tuning():
    """Virtual tokens are embeddings before the prompt: what a forward of all of them gives."""
    model, ids = sparse_model(layers=[1]), tokens(2, 60)
    adapted = peft.get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    )
    virtual = adapted.get_prompt(batch_size=2)
    embeds = torch.cat((virtual, model.get_input_embeddings()(ids)), dim=1)
    expected = model(inputs_embeds=embeds, use_cache=False).logits
    mask = torch.ones_like(ids)
    close(adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)
    generated = adapted.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(generated[:, 60], expected[:, -1].argmax(-1))


@pytest.mark.parametrize("layers", PARTIAL, ids=str)
@torch.no_grad()
def test_prefix_tuning(layers):
    """Keys and values that are learned stand in the cache before the prompt.

    They and the prompt are within reach of the selected branch, so it sees what a dense layer does.
    """
    settings = peft.PrefixTuningConfig(
        num_virtual_tokens=12,
        task_type="CAUSAL_LM",
        num_layers=2,
        token_dim=16,
        num_attention_heads=2,
    )
    ids, found = tokens(2, 40), []
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    # PEFT 0.21 calls the cache past_key_values, where later versions of transformers use
    # `cache` in generate and drop the learned one.
    generates = "cache" not in inspect.signature(transformers.LlamaModel.forward).parameters
    for model in (dense_model(), sparse_model(layers=layers)):
        if model.config.model_type != "llama":
            open_only_the_selected_branch(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, copy.deepcopy(settings))
        arguments = dict(input_ids=ids, attention_mask=mask)
        found.append([adapted(input_ids=ids).logits, adapted(**arguments).logits[mask.bool()]])
        if generates:
            found[-1].append(adapted.generate(**arguments, max_new_tokens=9, do_sample=False))
    for expected, actual in zip(*found, strict=True):
        close(actual, expected)


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [
        str(x.message) for x in caught if "gates of the NSA layers are frozen" in str(x.message)
    ]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("base", [False, True], ids=["causal lm", "base"])
def test_adapters_beside_frozen_gates_are_said_once(base, train):
    """In train() or else in the first forward with gradients: not every loop calls train()."""
    ids, settings = tokens(1, 20), dict(target_modules=["q_proj"])
    model = sparse_model(base=base)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(modules_to_save=["self_attn.gate"], **settings)
    )
    # Whole; gates, too; nothing at all.
    for learns in (model, adapted, sparse_model(base=base).requires_grad_(False)):
        of_a_call = warnings_of(functools.partial(learns, input_ids=ids))
        assert warnings_of(learns.train) == of_a_call == []
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        assert warnings_of(lambda: model(input_ids=ids)) == []
    steps = [warnings_of(adapted.train)] if train else []
    steps += [warnings_of(lambda: model(input_ids=ids)) for _ in range(2)]
    assert [len(found) for found in steps] == [1, 0, 0][: len(steps)]
    assert "Fix: with LoRA, modules_to_save" in steps[0][0]


@pytest.mark.parametrize("place", ["itself", "patched inside", "put inside"])
def test_continuous_batching_is_refused_in_the_callers_thread(place):
    """Whichever model holds the NSA layers, and however its manager comes about:
    in a thread an error is only logged.
    """
    model = sparse_model() if place == "itself" else dense_model()
    if place == "patched inside":
        patch_model(model.model, "tiny", verbose=False)
    elif place == "put inside":
        model.model = sparse_model(base=True)
    name = model.config._attn_implementation
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    batching = transformers.ContinuousBatchingConfig()
    for start in (
        lambda: model.generate_batch([[5, 6, 7]], generation_config=settings),
        lambda: model.init_continuous_batching(generation_config=settings),
        lambda: transformers.ContinuousBatchingManager(model, settings, batching),
    ):
        with pytest.raises(NotImplementedError, match=r"continuous batching.*Fix: .*nsa-fsa serve"):
            start()
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_whose_nsa_layers_were_taken_out_by_hand(cached):
    """The model around them still prepares its forward for NSA layers."""
    model, ids, dense = sparse_model(), tokens(1, 20), dense_model()
    for layer, other in zip(model.model.layers, dense.model.layers, strict=True):
        layer.self_attn = other.self_attn
    with pytest.raises(RuntimeError, match=r"LlamaModel has no NSA layer.*Fix: unpatch_model"):
        model(ids, past_key_values=DynamicCache() if cached else None)
    assert torch.equal(unpatch_model(model)(ids).logits, dense(ids).logits)


def test_a_layer_that_is_split_otherwise_than_by_kv_heads_is_refused():
    """Where a rank's projections return half of the query heads."""
    model = sparse_model()
    layer = model.model.layers[0].self_attn
    layer.q_proj = torch.nn.Linear(64, 32, bias=False)
    found = r"\(4, 2, 8, 8\), and was made for \(8, 2, 8, 8\).*Tensor parallelism.*Fix"
    with pytest.raises(ValueError, match=found):
        model(tokens(1, 20))
    assert sparse_layers(model) == [0, 1]
