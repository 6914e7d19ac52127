"""The stages of a conversion: what learns when, at which rate, and that a loop of one's own and the
Trainer do the same."""

import dataclasses
import math
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from nsa_fsa.training import (
    ConversionMixin,
    Schedule,
    Teaching,
    freeze_all_but_new,
    learn,
    parameter_groups,
)
from tests.integrations.models import sparse_model, tokens

STEPS, WARM_UP, RATE, NEW_RATE = 8, 3, 2e-3, 5e-2
SCHEDULE = Schedule(
    steps=STEPS,
    warm_up=WARM_UP,
    learning_rate=RATE,
    new_learning_rate=NEW_RATE,
    ramp=2,
    fade=0.6,
    then=Teaching(divergence=0.0),  # so that the last steps are without a teacher
)
PARTS = (".gate.", ".compress_k.", ".compress_v.")


class ConversionTrainer(ConversionMixin, Trainer):
    pass


def is_new(name):
    return any(part in name for part in PARTS)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def test_rates_and_weights_of_every_step():
    def rates(is_new):
        return [SCHEDULE.share_of_rate(step, is_new) for step in range(STEPS)]

    falling = [0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]
    assert rates(True) == pytest.approx([0.5, 1, 1, *falling])
    assert rates(False) == pytest.approx([0, 0, 0, 0.5, *falling[1:]])
    found = [SCHEDULE.teaching(step) for step in range(STEPS)]
    assert found[:WARM_UP] == [Teaching(own=0.0, error=1.0, divergence=1.0, local=True)] * WARM_UP
    assert [x.error for x in found[3:6]] == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])
    assert [x.divergence for x in found[3:6]] == [0, 0, 0]
    assert all(x.own == 1 and not x.local for x in found[3:6])
    assert found[6:] == [None, None]


def test_the_choice_of_blocks_is_taught_to_the_end():
    schedule = dataclasses.replace(SCHEDULE, then=Teaching(divergence=0.2))
    found = [schedule.teaching(step) for step in range(WARM_UP, STEPS)]
    assert [x.divergence for x in found] == [0.2] * 5
    assert [x.error for x in found] == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3, 0, 0])


def test_the_ends_of_a_schedule():
    only_new = Schedule(steps=3, warm_up=3)
    assert only_new.share_of_rate(2, True) == pytest.approx(0.3)
    assert only_new.share_of_rate(2, False) == 0
    at_once = Schedule(steps=3, warm_up=0, ramp=0, fade=0.0)
    assert at_once.share_of_rate(0, False) == 1
    assert at_once.teaching(0) == Teaching(error=0.0)
    half = Schedule(steps=3, warm_up=0, fade=0.0, then=Teaching(own=0.5, divergence=0.0))
    assert half.teaching(0) == Teaching(own=0.5, error=0.0, divergence=0.0)


def test_what_a_schedule_cannot_be():
    with pytest.raises(ValueError, match=r"steps=0 must be an int >= 1\. Fix"):
        Schedule(steps=0, warm_up=0)
    with pytest.raises(ValueError, match=r"warm_up=4 must be at most steps=3.* Fix: more steps"):
        Schedule(steps=3, warm_up=4)
    with pytest.raises(ValueError, match=r"new_learning_rate=-1 must be 0 or more\. Fix"):
        Schedule(steps=3, warm_up=0, new_learning_rate=-1)
    with pytest.raises(ValueError, match=r"gate_learning_rate=-1 must be 0 or more\. Fix"):
        Schedule(steps=3, warm_up=0, gate_learning_rate=-1)
    with pytest.raises(ValueError, match=r"fade=2 must be a share .* Fix: 0\.5"):
        Schedule(steps=3, warm_up=0, fade=2)


def test_groups_leave_frozen_what_was_frozen():
    model = sparse_model()
    model.model.embed_tokens.requires_grad_(False)
    groups = parameter_groups(model, SCHEDULE, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, vectors, compressors, gates = (
        {names[id(p)] for p in group["params"]} for group in groups
    )
    new = compressors | gates
    assert all(is_new(name) for name in new)
    assert all(".gate." in name for name in gates)
    assert not any(".gate." in name for name in compressors)
    assert not any(is_new(name) for name in matrices | vectors)
    assert {*names.values()} - matrices - vectors - new == {"model.embed_tokens.weight"}
    assert all(name.endswith("norm.weight") for name in vectors)
    assert [x["weight_decay"] for x in groups] == [0.1, 0.0, 0.0, 0.0]
    assert [x["lr"] for x in groups] == [RATE, RATE, NEW_RATE, NEW_RATE]
    freeze_all_but_new(model)
    assert len(parameter_groups(model, SCHEDULE)) == 2


def test_gates_may_have_a_rate_of_their_own():
    model = sparse_model()
    schedule = dataclasses.replace(SCHEDULE, gate_learning_rate=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, schedule))
    assert [x["lr"] for x in optimizer.param_groups] == [RATE, RATE, NEW_RATE, 0.5]
    schedule.begin(0, optimizer)  # half of the ramp
    rates = [x["lr"] for x in optimizer.param_groups]
    assert rates == pytest.approx([0.0, 0.0, NEW_RATE / 2, 0.25])


def batches():
    return [*tokens(STEPS, 1, 130)]


@pytest.fixture(scope="module")
def looped():
    """A model, converted by a loop, with the losses of every step."""
    model = sparse_model().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, SCHEDULE, 0.1), betas=(0.9, 0.95))
    losses = []
    for step, x in enumerate(batches()):
        before = weights(model)
        learned = learn(model, dict(input_ids=x, labels=x), SCHEDULE.begin(step, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(learned.loss.item())
        assert len(learned.lessons) == (2 if step < 6 else 0)
        moved = changed(before, model)
        assert any(map(is_new, moved))
        assert all(map(is_new, moved)) == (step < WARM_UP)
    return model, losses


def train(folder, save_steps=STEPS, resume=None, **changes):
    settings = dict(
        report_to="none",
        save_strategy="steps",
        save_steps=save_steps,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        weight_decay=0.1,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
    )
    data = [{"input_ids": x[0], "labels": x[0]} for x in batches()]
    arguments = TrainingArguments(str(folder), **{**settings, **changes})
    trainer = ConversionTrainer(sparse_model(), arguments, train_dataset=data, schedule=SCHEDULE)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_does_the_same_and_goes_on_where_it_was_stopped(looped, tmp_path):
    """Also where it stopped in the warm-up, and the rates are those that it logs."""
    model, losses = looped
    trainer = train(tmp_path / "whole", save_steps=2)
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["nsa_own"] for x in logs[:6]] == pytest.approx(losses[:6], rel=1e-4)
    assert [x["loss"] for x in logs[6:]] == pytest.approx(losses[6:], rel=1e-4)
    expected = [RATE * SCHEDULE.share_of_rate(step, False) for step in range(STEPS)]
    assert [x["learning_rate"] for x in logs] == pytest.approx(expected, abs=1e-12)
    for stop in (2, 4):
        folder = tmp_path / f"from_{stop}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
        resumed = train(folder, resume=str(folder / f"checkpoint-{stop}"))
        for name, p in resumed.model.named_parameters():
            assert torch.equal(p, trainer.model.get_parameter(name)), name
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=0.02 * NEW_RATE)


def test_who_cannot_follow_a_schedule_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"max_steps=7 must be the schedule's 8\. Fix"):
        train(tmp_path, max_steps=7)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"not available on 2 processes.* Fix: one process; or"):
        train(tmp_path)
