"""Teaching in transformers' Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from nsa_fsa.training import Teaching, TeachingMixin, freeze_all_but_new, teach
from tests.integrations.models import attentions, sparse_model, tokens


class TeachingTrainer(TeachingMixin, Trainer):
    pass


def train(model, tmp_path, texts, *, teaching, **arguments):
    settings = dict(
        output_dir=str(tmp_path),
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        num_train_epochs=1,
    )
    data = [{"input_ids": x, "labels": x} for x in texts]
    model.config.use_cache = False
    arguments = TrainingArguments(**{**settings, **arguments})
    trainer = TeachingTrainer(model, arguments, train_dataset=data, teaching=teaching)
    trainer.train()
    return trainer


def gradients_by_hand(model, texts, teaching):
    """Of one step, in which texts are batches of their own, with the lessons and the mean loss."""
    model.train().zero_grad()
    learned, losses = [], []
    for x in texts:
        with teach(model, local=teaching.local) as teacher:
            own = model(x[None], labels=x[None], use_cache=False).loss
            losses.append(own.item())
            lessons = teacher.loss(error=teaching.error, divergence=teaching.divergence)
            ((teaching.own * own + lessons) / len(texts)).backward()
        learned += teacher.lessons
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, learned, sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("teaching", "checkpointing"),
    [(Teaching(own=0.7, error=2.0, divergence=0.3), True), (Teaching(own=0.0, local=True), False)],
    ids=["all_and_checkpointing", "warm_up"],
)
def test_a_step_of_several_batches_is_the_sum_of_its_losses(tmp_path, teaching, checkpointing):
    """By plain gradient descent with a rate of 1, which shows the gradients."""
    texts = [*tokens(2, 130)]
    model = sparse_model()
    if teaching.local:
        freeze_all_but_new(model)
    expected, lessons, own = gradients_by_hand(model, texts, teaching)
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(
        model,
        tmp_path,
        texts,
        teaching=teaching,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        gradient_checkpointing=checkpointing,
    )
    for name, parameter in model.named_parameters():
        step = expected.get(name, torch.zeros(()))
        torch.testing.assert_close(
            before[name] - parameter, step.expand_as(parameter), rtol=1e-3, atol=2e-5, msg=name
        )
    (logs,) = (x for x in trainer.state.log_history if "loss" in x)
    for name in ("error", "divergence", "mass", "recall"):
        mean = sum(getattr(x, name).item() for x in lessons) / 4
        assert logs[f"nsa_{name}"] == pytest.approx(mean, rel=1e-5)
    assert logs["nsa_own"] == pytest.approx(own, rel=1e-5)
    assert attentions(model)[0].recorder is None


def test_without_teaching_it_is_a_trainer(tmp_path):
    model = sparse_model()
    trainer = train(model, tmp_path, [*tokens(2, 40)], teaching=None)
    (logs,) = (x for x in trainer.state.log_history if "loss" in x)
    assert not any(name.startswith("nsa_") for name in logs)
