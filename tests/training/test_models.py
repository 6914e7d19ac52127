"""What patched Hugging Face models learn from the dense ones that they were."""

from pathlib import Path

import pytest
import torch

from nsa_fsa import patch_model
from nsa_fsa.training import freeze_all_but_new, teach
from nsa_fsa.visualization import record
from tests.integrations.models import attentions, dense_model, scramble, sparse_model, tokens


def numbers(teacher):
    return [torch.stack([*x[1:5], *x.gates]).detach() for x in teacher.lessons]


def assert_same_lessons(found, expected, near=1e-5):
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_the_teacher_is_the_dense_model():
    """In the first layer, whose input is the same: what transformers itself computes there."""
    seen = []

    def keep(module, args):
        seen.append(args[0].detach())

    input_ids = tokens(2, 150)
    for make in (dense_model, sparse_model):
        model = make()
        attentions(model)[0].o_proj.register_forward_pre_hook(keep)
        plain = model(input_ids).logits
        if make is sparse_model:
            with teach(model) as teacher:
                assert torch.equal(model(input_ids).logits, plain)
    dense, ours, again = seen
    assert torch.equal(ours, again)
    error = ((ours - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()
    torch.testing.assert_close(teacher.lessons[0].error.detach(), error, rtol=1e-5, atol=0)
    assert error > 0.1
    assert [x.layer_idx for x in teacher.lessons] == [0, 1]
    assert all(x.divergence > 0.01 and 0 < x.mass < 1 and x.recall < 1 for x in teacher.lessons)


def test_only_patched_layers_have_lessons():
    model = sparse_model(layers=[1])
    with teach(model) as teacher:
        model(tokens(1, 40))
    assert [x.layer_idx for x in teacher.lessons] == [1]
    assert all(x.recorder is None for x in attentions(model)[1:])


@pytest.mark.parametrize("compress_rope", ["before", "after"])
def test_padded_and_packed_batches_are_their_sequences(compress_rope):
    model = sparse_model(nsa=dict(compress_rope=compress_rope)).double()
    lengths, width = (150, 121), 150
    rows = [tokens(1, n, seed=n) for n in lengths]
    with teach(model) as separate:
        for x in rows:
            model(x)
    padded, mask = (torch.zeros(2, width, dtype=torch.long) for _ in range(2))
    for row, x in enumerate(rows):
        padded[row, width - x.shape[1] :], mask[row, width - x.shape[1] :] = x[0], 1
    with teach(model) as of_padded:
        model(padded, attention_mask=mask)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    with teach(model) as packed:
        model(torch.cat(rows, dim=1), position_ids=position_ids)
    expected = [
        (lengths[0] * a + lengths[1] * b)[[0, 1, 2, 4, 5, 6]] / sum(lengths)
        for a, b in zip(numbers(separate)[:2], numbers(separate)[2:], strict=True)
    ]
    for found in (of_padded, packed):
        for ours, theirs in zip(numbers(found), expected, strict=True):
            # Llama's norms and rotations are float32 whatever the model is, and round to 6e-8.
            torch.testing.assert_close(ours[[0, 1, 2, 4, 5, 6]], theirs, rtol=1e-7, atol=1e-7)
    assert_same_lessons(of_padded, packed, near=1e-7)


def parameter_gradients(model):
    """0 where there is none, as compiled models say that themselves."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def assert_same_gradients(found, expected, **near):
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name, **near)


def learn(model, input_ids, **options):
    """One backward of the model's own loss and of its lessons."""
    model.zero_grad()
    with teach(model, **options) as teacher:
        loss = model(input_ids, labels=input_ids).loss
        (loss + teacher.loss()).backward()
    return teacher, parameter_gradients(model)


@pytest.mark.parametrize("local", [False, True])
def test_gradient_checkpointing_changes_nothing(local):
    model, input_ids = sparse_model().train(), tokens(1, 130)
    expected, grads = learn(model, input_ids, local=local)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    found, again = learn(model, input_ids, local=local)
    assert len(found.lessons) == 2
    assert_same_lessons(found, expected)
    assert attentions(model)[0].compress_k.phi.logits.grad.abs().sum() > 0
    assert_same_gradients(again, grads)


def test_checkpointing_that_cannot_work_is_refused_by_name():
    model, input_ids = sparse_model().train(), tokens(1, 130)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with teach(model) as teacher:
        loss = model(input_ids, labels=input_ids).loss
    with pytest.raises(RuntimeError, match=r"is over\. Fix: call backward inside it"):
        (loss + teacher.loss()).backward()
    model.gradient_checkpointing_disable()
    with teach(model) as teacher:
        loss = model(input_ids, labels=input_ids).loss
    (loss + teacher.loss()).backward()  # nothing is run again

    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    model.enable_input_require_grads()
    with teach(model) as teacher:
        model(input_ids)
        with pytest.raises(RuntimeError, match=r'enable\(\{"use_reentrant": False\}\)'):
            teacher.loss()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_compiled_model_has_the_same_lessons(padded):
    """Also beside padding, which a compiled model does not leave out but puts at the end."""
    torch._dynamo.reset()
    model, input_ids = sparse_model(), tokens(2, 130)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[1, :40] = 0
    arguments = dict(attention_mask=mask, use_cache=False)
    with teach(model) as expected:
        model(input_ids, **arguments)
        expected.loss().backward()
    grads = parameter_gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    with teach(model) as found:
        compiled(input_ids, **arguments)
        found.loss().backward()
    assert_same_lessons(found, expected, near=1e-4)
    assert_same_gradients(parameter_gradients(model), grads, rtol=1e-3, atol=1e-5)


def test_who_looks_last_sees():
    """As with `record` in `record`."""
    model = sparse_model()
    with teach(model) as teacher:
        model(tokens(1, 20))
        with record(model) as records:
            model(tokens(1, 20))
        model(tokens(1, 20))
    assert (len(teacher.lessons), len(records)) == (4, 2)


def test_under_autocast_lessons_are_finite_and_close():
    model, input_ids = sparse_model(), tokens(1, 130)
    with teach(model) as expected:
        model(input_ids)
    with torch.autocast("cpu", torch.bfloat16), teach(model) as found:
        model(input_ids)
    assert all(x.error.dtype == torch.float32 for x in found.lessons)
    assert_same_lessons(found, expected, near=0.1)
    found.loss().backward()
    assert attentions(model)[1].compress_k.phi.logits.grad.isfinite().all()


def test_a_warm_up_teaches_the_new_parts_and_them_alone():
    """On text: this repository's own."""
    text = Path(__file__).parents[2].joinpath("docs", "concepts.md").read_bytes()
    text = torch.tensor(list(text[: 4 * 192])).reshape(4, 192)
    model = dense_model(vocab_size=256)
    patch_model(model, preset="tiny", compress_k="linear", num_selected_blocks=4, verbose=False)
    scramble(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    new = freeze_all_but_new(model)
    optimizer = torch.optim.AdamW(new, lr=1e-2, weight_decay=0.0)
    history = []
    for step in range(13):
        with teach(model, local=True) as teacher:
            model.base_model(text[step % 4][None], use_cache=False)
            teacher.loss().backward()
        history.append([(x.error.item(), x.divergence.item()) for x in teacher.lessons])
        optimizer.step()
        optimizer.zero_grad()
    history = torch.tensor(history)  # [steps, layers, 2]
    assert (history[-1] < 0.9 * history[0]).all(), history  # of the same text
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if any(p is x for x in new)}
