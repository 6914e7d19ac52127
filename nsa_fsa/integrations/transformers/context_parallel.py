"""What the Trainer of transformers needs to train NSA models with context parallelism."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, is_grad_enabled, nn

from nsa_fsa.distributed import ContextParallel

_HOOK = "_prepare_context_parallel_inputs"
if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object


class NSAContextParallel(_Trainer):
    """Mixed in before a Trainer: with `ParallelismConfig(cp_size=n)`, which takes FSDP2, n ranks
    share the sequences of a batch.

        >>> class MyTrainer(NSAContextParallel, Trainer): ...

    A batch is cut by `ContextParallel.shard`, and so is one of evaluation whose loss alone is asked
    for. Where there are metrics, every rank evaluates whole sequences, and the longest has to fit.

    Raises:
        RuntimeError: where transformers has no place for it.
        ValueError: in the first step, for what looks at labels itself: label smoothing, a
            `compute_loss_func`, and `average_tokens_across_devices=False`.
    """

    _context_parallel: ContextParallel | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(super(), _HOOK):
            raise RuntimeError(
                f"{type(self).__name__} has no {_HOOK} after NSAContextParallel, which transformers"
                f" {transformers.__version__} may have renamed; 5.17 and 5.24 have it. "
                "Fix: class MyTrainer(NSAContextParallel, Trainer), and one of these versions."
            )
        super().__init__(*args, **kwargs)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """What transformers calls before a step: a context to run it in, and its inputs."""
        if not is_grad_enabled() or (cp := self._shared_by()) is None:
            return contextlib.nullcontext, inputs
        return contextlib.nullcontext, cp.shard(**inputs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the inputs' part of this rank, if their loss is all that is asked for."""
        if prediction_loss_only and (cp := self._shared_by()) is not None:
            inputs = cp.shard(**inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Without gradients, the mean over the batch: of inputs that are cut, the number of labels
        is among them, and of others, which every rank has, the model finds it."""
        if not is_grad_enabled() and self._shared_by() is not None:
            num_items_in_batch = None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _shared_by(self) -> ContextParallel | None:
        """The ranks that share sequences, found once; None: there is no context parallelism."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is None or not parallelism.cp_enabled:
            return None
        if self._context_parallel is None:
            self._check_loss()
            self._context_parallel = ContextParallel(self.accelerator.torch_device_mesh["cp"])
        return self._context_parallel

    def _check_loss(self) -> None:
        wrong = {
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "average_tokens_across_devices=False": not self.args.average_tokens_across_devices,
        }
        if names := [name for name in wrong if wrong[name]]:
            raise ValueError(
                f"{names[0]} is not available with context parallelism, where a rank has some of a "
                "batch's tokens, and labels that are shifted already. Fix: leave it out."
            )
