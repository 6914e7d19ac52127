"""The loss in chunks, MLPs in chunks and checkpoints of layers change what is held, not what is
computed; test_train_script.py has them under FSDP2.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from nsa_fsa.integrations.transformers import (
    checkpoint_layers,
    chunk_loss,
    chunk_mlp,
    patch_model,
    unpatch_model,
)
from nsa_fsa.integrations.transformers.loss import LossHead, _Question
from tests.integrations.families import family
from tests.integrations.models import VOCAB, dense_model, sparse_model, tokens

EXACT = dict(rtol=0, atol=1e-12)


def labels_of(ids):
    """Not every token is learned."""
    labels = ids.clone()
    labels[:, ::7] = -100
    return labels


def whole_loss(model, ids, labels, number=None):
    """In the model's own dtype, where transformers rounds float64 to float32."""
    logits = model(ids, use_cache=False).logits.flatten(0, 1)
    targets = functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    total = functional.cross_entropy(logits, targets, reduction="sum")
    return total / ((targets != -100).sum() if number is None else number)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_equal(found, expected):
    largest = max(x.abs().max() for x in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / largest, gradient / largest, **EXACT)


@pytest.mark.parametrize("number", [None, 37, torch.tensor(37.0)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("chunk_size", [1, 50, 10**6])
def test_loss_in_chunks_is_the_whole_loss(chunk_size, number):
    model, ids = sparse_model().double(), tokens(2, 70)
    labels = labels_of(ids)
    expected = whole_loss(model, ids, labels, number)
    expected_gradients = gradients(model, expected)
    chunk_loss(model, chunk_size)
    given = {} if number is None else dict(num_items_in_batch=number)
    output = model(ids, labels=labels, **given)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, **EXACT)
    assert_equal(gradients(model, output.loss), expected_gradients)


def test_loss_in_chunks_is_that_of_transformers():
    """In float32: of positional arguments, of labels that are shifted already, and of others to
    ignore."""
    model, ids = sparse_model(), tokens(2, 70)
    labels = labels_of(ids)
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    calls = (
        ((), dict(labels=labels)),
        ((ids, None, None, None, None, labels), dict()),
        ((), dict(labels=labels, shift_labels=shifted.roll(3), num_items_in_batch=5)),
        ((), dict(labels=ids, ignore_index=int(ids[0, 5]))),
    )
    for position, named in calls:
        named = named if position else dict(input_ids=ids, **named)
        twin = copy.deepcopy(model)
        expected = twin(*position, **named).loss
        chunk_loss(model, 50)
        torch.testing.assert_close(model(*position, **named).loss, expected)
        model = twin


@pytest.mark.parametrize("name", ["Gemma3", "GPT2", "Phi", "Llama, tied", "Mixtral", "Qwen3-VL"])
def test_loss_of_other_families(name):
    """With biases, tied weights, an auxiliary loss, or a model of images around."""
    model, ids = family(name), tokens(2, 40).clamp(max=95)
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = chunk_loss(model, 16)(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None
    found.loss.backward()
    assert model.get_output_embeddings().weight.grad.abs().max() > 0


def test_number_of_labels_that_was_rounded_is_noticed():
    """FSDP2 casts it: 1022 would be 1024."""
    model, ids = chunk_loss(sparse_model(), 50), tokens(2, 40)
    with pytest.warns(UserWarning, match=r"came in torch.bfloat16.*Fix: Mixed.*inputs=False"):
        model(ids, labels=ids, num_items_in_batch=torch.tensor(1022.0).bfloat16())


def test_weight_gradient_is_rounded_once():
    """A sum of many parts in 16 bits loses most of what is small beside it."""
    torch.manual_seed(0)
    head = nn.Linear(8, 20, bias=True).bfloat16()
    rows, labels = torch.randn(1, 4000, 8).bfloat16(), torch.randint(20, (1, 4000))
    exact = copy.deepcopy(head).double()
    loss = functional.cross_entropy(
        exact(rows.double()).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    head.__class__, head.chunk_size = LossHead, 2
    head._asked = _Question(labels, 1, -100)
    head(rows).backward()
    for found, expected in ((head.weight, exact.weight), (head.bias, exact.bias)):
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert (
            error < 4e-3
        )  # 2**-8, of one rounding; summed in bfloat16 they are off by 7% and more


def test_without_labels_and_after_an_error_nothing_differs():
    model, ids = sparse_model(), tokens(2, 40)
    expected = model(ids).logits
    chunk_loss(model, 16)
    with pytest.raises(ValueError, match=r"30 labels for 40|60 labels for 80"):
        model(ids, labels=ids[:, :30])
    assert torch.equal(model(ids).logits, expected)
    found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, dense_of(model).generate(ids, max_new_tokens=3, do_sample=False))


def dense_of(model):
    """A twin whose head is a plain one."""
    twin = copy.deepcopy(model)
    twin.lm_head.__class__ = nn.Linear
    return twin


def test_copies_and_frozen_heads_work():
    model, ids = sparse_model(), tokens(1, 40)
    expected = model(ids, labels=ids).loss
    chunk_loss(model, 16)
    model.lm_head.weight.requires_grad_(False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss = twin(ids, labels=ids).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert twin.lm_head.weight.grad is None
        assert twin.model.embed_tokens.weight.grad.abs().max() > 0
    assert model.lm_head._answer is None


def test_autocast_computes_in_its_dtype():
    model, ids = sparse_model(), tokens(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, labels=ids).loss
        chunk_loss(model, 16)
        loss = model(ids, labels=ids).loss
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert model.lm_head.weight.grad.dtype is torch.float32


def test_what_has_another_loss_is_refused():
    tied = dense_model()
    tied.lm_head = nn.Sequential(tied.lm_head)
    with pytest.raises(ValueError, match=r"a Sequential, and only a plain nn.Linear.*Fix: call"):
        chunk_loss(tied)
    other = dense_model()
    other.loss_function = functional.cross_entropy
    with pytest.raises(ValueError, match="by cross_entropy, and only ForCausalLMLoss"):
        chunk_loss(other)
    for size in (0, 1.5):
        with pytest.raises(ValueError, match=r"chunk_size=.* must be a positive number"):
            chunk_loss(dense_model(), size)
    scaled, ids = family("Granite"), tokens(1, 20)
    scaled.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match=r"scales or caps its logits.*Fix: leave chunk_loss out"):
        chunk_loss(scaled)(ids, labels=ids)
    wrapped = chunk_loss(dense_model())
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    with pytest.raises(ValueError, match=r"was replaced or wrapped.*Fix: call chunk_loss last"):
        wrapped(ids, labels=ids)


def test_mlp_in_chunks_and_checkpoints_change_nothing():
    model, ids = sparse_model().double().train(), tokens(2, 70)
    expected = gradients(model, whole_loss(model, ids, ids))
    chunk_mlp(model, 33)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_equal(gradients(twin, whole_loss(twin, ids, ids)), expected)
    for change in (None, False, True):
        if change is not None:
            checkpoint_layers(model, in_host_memory=change)
        assert_equal(gradients(model, whole_loss(model, ids, ids)), expected)


def saved_for_backward(model, ids):
    """Bytes, without parameters."""
    sizes, parameters = {}, {x.data_ptr() for x in model.parameters()}

    def pack(x):
        if x.data_ptr() not in parameters:
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(ids, labels=ids, use_cache=False)
    del output
    return sum(sizes.values())


def test_less_is_kept_for_backward():
    """The logits, the MLP's insides, and then all but the layers' inputs."""
    model, ids = dense_model(intermediate_size=512).train(), tokens(1, 300)
    whole = saved_for_backward(model, ids)
    chunk_loss(model, 100)
    without_logits = saved_for_backward(model, ids)
    chunk_mlp(model, 100)
    without_mlp = saved_for_backward(model, ids)
    checkpoint_layers(model)
    assert whole - without_logits > 0.9 * 4 * 300 * VOCAB
    assert without_logits - without_mlp >= 2 * 3 * 4 * 300 * 512
    assert saved_for_backward(model, ids) < 0.6 * without_mlp


def test_mlp_that_is_none_is_refused():
    for name, said in (("Mixtral", "the mixture"), ("Qwen3Moe", "the mixture")):
        model = family(name)
        kinds = [type(x) for x in model.modules()]
        with pytest.raises(ValueError, match=rf"{said}|no module named mlp.*Fix: leave chunk_mlp"):
            chunk_mlp(model, 16)
        assert [type(x) for x in model.modules()] == kinds
    with pytest.raises(ValueError, match=r"chunk_size=0 must be"):
        chunk_mlp(dense_model(), 0)


def test_patching_does_not_mind():
    """Before or after, and back."""
    model, ids = dense_model(), tokens(1, 40)
    expected = model(ids, labels=ids).loss
    chunk_mlp(chunk_loss(model, 16), 16)
    patch_model(model, "tiny", verbose=False)
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(unpatch_model(model)(ids, labels=ids).loss, expected)
    assert model.loss_function is not ForCausalLMLoss


@pytest.mark.gpu
def test_checkpoints_in_host_memory_free_the_gpu():
    """Of the layers' inputs; the gradients stay the same."""
    ids = tokens(1, 4096).cuda()
    held, found = {}, {}
    for in_host_memory in (False, True):
        model = sparse_model(num_hidden_layers=8).cuda().train()
        chunk_loss(checkpoint_layers(model, in_host_memory), 256)
        before = torch.cuda.memory_allocated()
        loss = model(ids, labels=ids, use_cache=False).loss
        held[in_host_memory] = torch.cuda.memory_allocated() - before
        found[in_host_memory] = gradients(model, loss)
    assert held[False] - held[True] > 7 * 4096 * 64 * 4
    assert all(torch.allclose(found[True][name], x, atol=1e-5) for name, x in found[False].items())
