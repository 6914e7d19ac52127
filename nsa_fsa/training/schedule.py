"""When a conversion learns what: first only the new parts, from dense attention, and then
everything, from the language model's own loss, while outputs have to match less and less."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_fsa import checks
from nsa_fsa.modules.recording import sparse_layers
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES
from nsa_fsa.training.teacher import Lesson, Teacher, teach
from nsa_fsa.training.warm_up import new_parameters

PRECISIONS = ("bf16", "fp32")  # in which layers compute; weights that learn are float32


@dataclass(frozen=True)
class Teaching:
    """What a training step learns from.

    Args:
        own: the weight of the model's own loss.
        error, divergence: the weights of the lessons' losses, as in `Teacher.loss`.
        local, free_only, workspace_bytes: as in `teach`.
    """

    own: float = 1.0
    error: float = 0.1
    divergence: float = 0.1
    local: bool = False
    free_only: bool = True
    workspace_bytes: int = WORKSPACE_BYTES

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[Teacher]:
        """`teach`, as this says."""
        options: dict[str, Any] = dict(local=self.local, free_only=self.free_only)
        with teach(model, **options, workspace_bytes=self.workspace_bytes) as teacher:
            yield teacher

    def loss(self, own: Tensor, teacher: Teacher, batches: int = 1) -> Tensor:
        """What a batch is to learn: the model's own loss and the lessons', each times its weight.

        batches: by how many the lessons' is divided, where own has been divided already.
        """
        lessons = teacher.loss(error=self.error, divergence=self.divergence) / batches
        return self.own * own + lessons.to(own.device)


@dataclass(frozen=True)
class Schedule:
    """Two stages. In the warm-up only gates and compressors learn, each layer from dense attention
    alone. Then everything learns from the language model's own loss, and still from dense
    attention: how outputs should be by a weight that falls to 0 in a straight line, and where the
    mass lies by one that stays. Hardly anything else holds compressors to their choice: gates that
    start at 0.0025 let little of the model's own loss through, which Adam makes as large as any.

    Both have a learning rate of their own, which rises in a straight line over the first `ramp`
    steps in which it applies. That of the new parts stays there until the warm-up is over; from
    then on both fall to 0 in half a cosine.

    Args:
        steps: of the optimizer, those of the warm-up included.
        warm_up: how many of them are the warm-up; 0: there is none. All of them: there is nothing
            else.
        learning_rate, new_learning_rate: at their highest, of what was there before, and of gates
            and compressors.
        gate_learning_rate: that of gates alone; None: as the compressors'.
        ramp: steps until that.
        fade: the share of the second stage after which outputs are not compared any more.
        first: what the warm-up learns from.
        then: what the second stage learns from at its beginning.

    Raises:
        ValueError: names the field, its value, what is allowed and how to fix it.

    Example, a loop of one's own:
        >>> patch_model(model)
        >>> schedule = Schedule(steps=400, warm_up=100)
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, schedule))
        >>> for step, batch in enumerate(batches):
        ...     learn(model, batch, schedule.begin(step, optimizer))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    steps: int
    warm_up: int
    learning_rate: float = 2e-5
    new_learning_rate: float = 3e-4
    gate_learning_rate: float | None = None
    ramp: int = 10
    fade: float = 0.5
    first: Teaching = Teaching(own=0.0, error=1.0, divergence=1.0, local=True)
    then: Teaching = Teaching()

    def __post_init__(self) -> None:
        checks.check_positive(steps=self.steps)
        checks.check_ints(0, warm_up=self.warm_up, ramp=self.ramp)
        if self.warm_up > self.steps:
            raise ValueError(
                f"warm_up={self.warm_up} must be at most steps={self.steps}, among which it "
                "counts. Fix: more steps, or a shorter warm-up."
            )
        for name in ("learning_rate", "new_learning_rate", "gate_learning_rate"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name}={value!r} must be 0 or more. Fix: 2e-5, for example.")
        if not 0 <= self.fade <= 1:
            raise ValueError(
                f"fade={self.fade!r} must be a share of the second stage, from 0 to 1. Fix: 0.5."
            )

    def teaching(self, step: int) -> Teaching | None:
        """What the step learns from, counted from 0; None: the model's own loss alone."""
        if step < self.warm_up:
            return self.first
        fading = self.fade * (self.steps - self.warm_up)
        left = 1 - (step - self.warm_up) / fading if fading else 0.0
        error = max(0.0, left) * self.then.error
        if self.then.own == 1 and error == self.then.divergence == 0:
            return None
        return replace(self.then, error=error)

    def share_of_rate(self, step: int, is_new: bool) -> float:
        """By what a learning rate is multiplied in a step."""
        if step < self.warm_up and not is_new:
            return 0.0
        begun = 0 if is_new else self.warm_up
        risen = min(1.0, (step - begun + 1) / max(1, self.ramp))
        done = max(0, step - self.warm_up) / max(1, self.steps - self.warm_up)
        return risen * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> Teaching | None:
        """Has the parameters of an optimizer learn what they are to learn in a step, and at which
        rate.

        Args:
            step: counted from 0.
            optimizer: of `parameter_groups`.

        Returns:
            What the step learns from, as of `teaching`.
        """
        for group in optimizer.param_groups:
            is_new = group["is_new"]
            group["lr"] = group["peak"] * self.share_of_rate(step, is_new)
            for parameter in group["params"]:
                parameter.requires_grad_(is_new or step >= self.warm_up)
        return self.teaching(step)


def parameter_groups(
    model: nn.Module, schedule: Schedule, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What an optimizer is to be made of, so that a schedule can drive it: what was there before,
    compressors, and gates.

    Parameters that are frozen now stay so, unless they are new: the base of LoRA, for example.
    Only matrices that were there before have the weight decay.

    Raises:
        ValueError: for a model without an NSA layer.
    """
    new = {id(p): p for p in new_parameters(model)}
    of_gates = {id(p) for x in sparse_layers(model) for p in x.gate.parameters()}
    gates = [p for key, p in new.items() if key in of_gates]
    compressors = [p for key, p in new.items() if key not in of_gates]
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in new]
    matrices, vectors = ([p for p in others if (p.ndim > 1) == wide] for wide in (True, False))

    rate, of_compressors = schedule.learning_rate, schedule.new_learning_rate
    of_gates_rate = schedule.gate_learning_rate
    if of_gates_rate is None:
        of_gates_rate = of_compressors
    groups = [
        _group(matrices, rate, weight_decay=weight_decay),
        _group(vectors, rate),
        _group(compressors, of_compressors, is_new=True),
        _group(gates, of_gates_rate, is_new=True),
    ]
    return [group for group in groups if group["params"]]


def _group(
    params: list[nn.Parameter], peak: float, *, is_new: bool = False, weight_decay: float = 0.0
) -> dict[str, Any]:
    return dict(params=params, lr=peak, peak=peak, is_new=is_new, weight_decay=weight_decay)


class Learned(NamedTuple):
    """What `learn` says of a batch."""

    loss: Tensor  # the model's own, a scalar without gradient
    lessons: list[Lesson]  # empty where dense attention was not looked at


def learn(model: nn.Module, batch: Mapping[str, Any], teaching: Teaching | None = None) -> Learned:
    """One forward and backward of a language model.

    Args:
        model: is called with the batch, and returns something with a `loss`.
        batch: holds `input_ids` and `labels`, say.
        teaching: as `Schedule.begin` returns it.
    """
    if teaching is None:
        own = model(**batch).loss
        own.backward()
        return Learned(own.detach(), [])
    with teaching.of(model) as teacher:
        own = model(**batch).loss
        teaching.loss(own, teacher).backward()
    return Learned(own.detach(), teacher.lessons)
