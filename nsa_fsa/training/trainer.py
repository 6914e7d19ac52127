"""Teaching in transformers' Trainer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from nsa_fsa.training.schedule import Schedule, Teaching, parameter_groups
from nsa_fsa.training.teacher import Lesson, Teacher

EVERYTHING = Teaching()
LOGGED = ("error", "divergence", "mass", "recall")


class TeachingMixin:
    """Mixed in before transformers' Trainer: every training step learns from dense attention, too.

    Logs have the means of all lessons since the last ones, as "nsa_error", "nsa_divergence",
    "nsa_mass" and "nsa_recall", and that of the model's own loss, as "nsa_own". Gradient
    checkpointing may be on, unless it is reentrant.

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

    def __init__(self, *args: Any, teaching: Teaching | None = EVERYTHING, **kwargs: Any) -> None:
        self.teaching = teaching
        self._teacher: Teacher | None = None  # of the step that is running
        # Of every batch since the last log, [5]: as in LOGGED, and the model's own loss.
        self._learned: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's."""
        step = super().training_step  # type: ignore[misc]
        if self.teaching is None:
            return step(model, *args, **kwargs)
        with self.teaching.of(model) as self._teacher:
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
            batches = self._batches_of_a_step(num_items_in_batch)
            own, loss = loss.detach(), self.teaching.loss(loss, self._teacher, batches)
            self._learned.append(_means(self._teacher.lessons, batches * own))
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
            names = (*LOGGED, "own")
            logs |= {f"nsa_{name}": mean for name, mean in zip(names, means, strict=True)}
            self._learned.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class ConversionMixin(TeachingMixin):
    """Mixed in before transformers' Trainer: a conversion by a schedule, in one run that may be
    resumed anywhere.

    Learning rates and their course are the schedule's, and weight decay and the optimizer's kind
    the arguments'. The new parts have no weight decay.

    Args:
        schedule: has as many steps as the arguments' `max_steps`.
        The other arguments are Trainer's.

    Raises:
        ValueError: for another number of steps, and for several processes.

    Example:
        >>> class ConversionTrainer(ConversionMixin, Trainer):
        ...     pass
        >>> patch_model(model)
        >>> schedule = Schedule(steps=400, warm_up=100)
        >>> arguments = TrainingArguments("run", max_steps=400)
        >>> ConversionTrainer(model, arguments, train_dataset=data, schedule=schedule).train()
    """

    def __init__(self, *args: Any, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(*args, teaching=None, **kwargs)
        self.schedule = schedule
        trainer: Any = self
        if (found := trainer.args.max_steps) != schedule.steps:
            raise ValueError(
                f"max_steps={found} must be the schedule's {schedule.steps}. "
                f"Fix: TrainingArguments(..., max_steps={schedule.steps})."
            )
        if trainer.args.world_size > 1 and 0 < schedule.warm_up < schedule.steps:
            raise ValueError(
                f"a schedule with two stages is not available on {trainer.args.world_size} "
                "processes, which agree at the start on what is trained. Fix: one process; or two "
                "runs, of Schedule(steps=n, warm_up=n) and then of Schedule(..., warm_up=0)."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, of `parameter_groups`."""
        trainer: Any = self
        if trainer.optimizer is None:
            model = trainer.model if model is None else model
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            groups = parameter_groups(model, self.schedule, trainer.args.weight_decay)
            trainer.optimizer = kind(groups, **options)
        return trainer.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As Trainer's, of the schedule."""
        trainer: Any = self
        if trainer.lr_scheduler is None:
            optimizer = trainer.optimizer if optimizer is None else optimizer
            shares = [self._share(group["is_new"]) for group in optimizer.param_groups]
            trainer.lr_scheduler = LambdaLR(optimizer, shares)
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _share(self, is_new: bool) -> Any:
        def share(step: int) -> float:
            return self.schedule.share_of_rate(step, is_new)

        return share

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, of the stage that the step is in."""
        trainer: Any = self
        self.teaching = self.schedule.begin(trainer.state.global_step, trainer.optimizer)
        return super().training_step(model, *args, **kwargs)


def _means(lessons: list[Lesson], own: Tensor) -> Tensor:
    """Over the lessons, and the model's own loss behind them, `[5]`; NaN where all are."""
    device = own.device
    rows = [torch.stack([getattr(x, name).detach() for name in LOGGED]) for x in lessons]
    means = torch.stack([row.to(device) for row in rows]).nanmean(0)
    return torch.cat([means, own.to(means)[None]])
