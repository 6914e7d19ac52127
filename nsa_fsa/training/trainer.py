"""Teaching in transformers' Trainer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa.ops.common.calls import WORKSPACE_BYTES
from nsa_fsa.training.teacher import Lesson, Teacher, teach

LOGGED = ("error", "divergence", "mass", "recall")


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


class TeachingMixin:
    """Mixed in before transformers' Trainer: every training step learns from dense attention, too.

    Logs have the means of all lessons since the last ones, as "nsa_error", "nsa_divergence",
    "nsa_mass" and "nsa_recall". Gradient checkpointing may be on, unless it is reentrant.

    Args:
        teaching: what steps learn from; None: as without the mixin. A callback may set
            `trainer.teaching` anew at any step.
        The other arguments are Trainer's.

    Example, of a warm-up:
        >>> class TeachingTrainer(TeachingMixin, Trainer):
        ...     pass
        >>> freeze_all_but_new(model)
        >>> teaching = Teaching(own=0.0, error=1.0, divergence=1.0, local=True)
        >>> TeachingTrainer(model, arguments, train_dataset=data, teaching=teaching).train()
    """

    def __init__(self, *args: Any, teaching: Teaching | None = Teaching(), **kwargs: Any) -> None:
        self.teaching = teaching
        self._teacher: Teacher | None = None  # of the step that is running
        self._learned: list[Tensor] = []  # of every batch since the last log, [4], as in LOGGED
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's."""
        step = super().training_step  # type: ignore[misc]
        if (teaching := self.teaching) is None:
            return step(model, *args, **kwargs)
        with teach(
            model,
            local=teaching.local,
            free_only=teaching.free_only,
            workspace_bytes=teaching.workspace_bytes,
        ) as self._teacher:
            try:
                return step(model, *args, **kwargs)
            finally:
                self._teacher = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; in a training step with what there is to learn from the lessons."""
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(model, inputs, True, num_items_in_batch)
        if self._teacher is not None and self.teaching is not None:
            weights = dict(error=self.teaching.error, divergence=self.teaching.divergence)
            lessons = self._teacher.loss(**weights) / self._batches_of_a_step(num_items_in_batch)
            loss = self.teaching.own * loss + lessons.to(loss.device)
            self._learned.append(_means(self._teacher.lessons))
        return (loss, outputs) if return_outputs else loss

    def _batches_of_a_step(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how much losses that are a batch's means are still to be divided where gradients of
        several batches are summed up, because Trainer does not: the model has done it with its
        own."""
        trainer: Any = self
        is_done = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
        told = getattr(trainer, "loss_is_scaled_for_ga", None)
        is_done = is_done if told is None else told
        return trainer.current_gradient_accumulation_steps if is_done else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with what was learned since the last time."""
        if self._learned and "loss" in logs:  # that of training, not of an evaluation
            means = torch.stack(self._learned).nanmean(0).tolist()
            logs |= {f"nsa_{name}": mean for name, mean in zip(LOGGED, means, strict=True)}
            self._learned.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _means(lessons: list[Lesson]) -> Tensor:
    """Over the lessons, `[4]`; NaN where all are."""
    device = lessons[0].error.device
    rows = [torch.stack([getattr(x, name).detach() for name in LOGGED]) for x in lessons]
    return torch.stack([row.to(device) for row in rows]).nanmean(0)
