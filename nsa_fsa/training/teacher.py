"""What dense attention says of every NSA layer, from the same queries, keys and values, in the same
forward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_fsa import checks
from nsa_fsa.modules.branches import Record, blocks_of, windows_of
from nsa_fsa.modules.recording import is_run_again, recorded_by, sparse_layers
from nsa_fsa.ops import block_divergence, sliding_window_attention
from nsa_fsa.ops.block_divergence.operator import BACKENDS as DIVERGENCE_BACKENDS
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES
from nsa_fsa.ops.common.reference_attention import compute_dtype
from nsa_fsa.ops.dense_queries import EVERYTHING
from nsa_fsa.ops.sliding_window_attention.operator import BACKENDS as SLIDING_BACKENDS


class Lesson(NamedTuple):
    """One forward of an NSA layer beside dense attention over the same queries, keys and values.

    Numbers are means over the tokens that are no padding and whose queries are not dense, 0 where
    there are none; the first two carry gradients.
    """

    layer_idx: int
    # How far the output is from the dense one: the norm of their difference over all heads, divided
    # by the norm of the dense one.
    error: Tensor
    # How far the scores of blocks are from where dense attention's mass lies: see
    # `ops.block_divergence`.
    divergence: Tensor
    mass: Tensor  # the share of dense attention's mass that the chosen blocks hold
    # Of the free blocks with the most mass, as many as are chosen, the share that is chosen; NaN
    # where no query had to choose.
    recall: Tensor
    gates: Tensor  # [3], compressed, selected, sliding; the mean over heads, too


class Teacher:
    """What `teach` yields.

    Attributes:
        lessons: one for every forward of every NSA layer, in the order in which they ran.
    """

    def __init__(self) -> None:
        self.lessons: list[Lesson] = []
        self._with_gradients: list[bool] = []  # whether each lesson's forward kept any
        self._is_run_again = self._has_left = False  # whether a backward needs the forward again

    def loss(self, *, error: float = 1.0, divergence: float = 1.0) -> Tensor:
        """The sum of both losses, each times its weight, as a mean over the lessons.

        Raises:
            RuntimeError: without lessons; where gradients are on but were off in a layer's forward,
                as in reentrant checkpointing; and in a backward after the `with` of `teach`, where
                gradient checkpointing runs the layers once more.
        """
        if not self.lessons:
            raise RuntimeError(
                "no NSA layer has run inside `with teach(model) as teacher:`. Fix: call the model "
                "there, and no other `teach` or `record` of it around that call."
            )
        if torch.is_grad_enabled() and not all(self._with_gradients):
            raise RuntimeError(
                "gradients are on, but were off while an NSA layer ran, so that lessons have none: "
                "under torch.no_grad, or in reentrant checkpointing. Fix: "
                'gradient_checkpointing_enable({"use_reentrant": False}); or where nothing is to '
                "be learned, call loss() under torch.no_grad as well."
            )
        device = self.lessons[0].error.device
        terms = [(error * x.error + divergence * x.divergence).to(device) for x in self.lessons]
        total = torch.stack(terms).mean()
        if total.requires_grad and self._is_run_again:
            total.register_hook(self._check_inside)
        return total

    def _check_inside(self, _: Tensor) -> None:
        if self._has_left:
            raise RuntimeError(
                "gradient checkpointing runs the layers once more in the backward, and the lessons "
                "with them, but `with teach(model)` is over. Fix: call backward inside it."
            )


@contextmanager
def teach(
    model: nn.Module,
    *,
    local: bool = False,
    free_only: bool = True,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Iterator[Teacher]:
    """Compares every forward of every NSA layer in the model with dense attention over the same
    queries, keys and values, without a change of what the model computes.

    The output of dense attention and where its mass lies are what is to be learned: gradients go to
    the layer's own output and to its block scores, and from there to the gates, the compressors and
    whatever their input is made of. With `kv_per_branch` dense attention has the keys and values of
    the selected branch.

    Works with padded and packed batches, caches, torch.compile, and gradient checkpointing unless
    that is reentrant, for which `Teacher.loss` raises. With checkpointing, backward has to be
    called inside the `with`.

    Args:
        model: holds at least one NSA layer.
        local: what a layer is given and what it hands on are detached, so that each learns from
            its own lesson alone, and where all else is frozen nothing outside of NSA layers is kept
            for the backward. The model's own loss then teaches no NSA layer, and its gradients go
            around them.
        free_only: whether block scores are compared among the free blocks alone: those that are a
            matter of choice. Where all are compared, most of what is learned is how much lies in
            blocks that are read anyway.
        workspace_bytes: how much memory the comparison of blocks may take, at any length: see
            `ops.block_divergence`.

    Raises:
        ValueError: for a model without an NSA layer, or workspace_bytes < 1.

    Example, where everything learns:
        >>> with teach(model) as teacher:
        ...     loss = model(input_ids, labels=input_ids).loss
        ...     (loss + 0.1 * teacher.loss()).backward()
        >>> {x.layer_idx: x.mass.item() for x in teacher.lessons}
    """
    layers = sparse_layers(model)
    checks.check_positive(workspace_bytes=workspace_bytes)
    teacher = Teacher()

    def keep(layer_idx: int, entry: Record) -> None:
        lesson = _lesson(layer_idx, entry, free_only, workspace_bytes)
        if is_run_again():  # for what the backward needs of the lesson that is there already
            return
        teacher.lessons.append(lesson)
        teacher._with_gradients.append(torch.is_grad_enabled())
        if not torch.compiler.is_compiling() and _is_checkpointed():
            teacher._is_run_again = True

    with ExitStack() as stack:
        stack.enter_context(recorded_by(layers, keep))
        if local:
            module: Any
            for module in layers:
                before = module.register_forward_pre_hook(_detach_inputs, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(_detach_output).remove)
        try:
            yield teacher
        finally:
            teacher._has_left = True


def _is_checkpointed() -> bool:
    """Whether what autograd saves goes through hooks, by which checkpointing that is not reentrant
    makes it anew."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _lesson(layer_idx: int, entry: Record, free_only: bool, workspace_bytes: int) -> Lesson:
    inside, layout, c = entry.inside, entry.layout, entry.config
    assert inside is not None
    where: dict[str, Any] = dict(layout._asdict(), scale=inside.scale)

    with torch.no_grad():
        dense, lse = sliding_window_attention(
            *(inside.q, inside.k, inside.v),
            **where,
            window_size=EVERYTHING,
            return_lse=True,
            backend=SLIDING_BACKENDS.or_auto(c.backend),
        )

    compared = block_divergence(
        *(inside.q, inside.k, inside.k_cmp, lse, inside.branches.lse_cmp, entry.block_indices),
        **(where | windows_of(c) | blocks_of(c)),
        free_only=free_only,
        workspace_bytes=workspace_bytes,
        backend=DIVERGENCE_BACKENDS.or_auto(c.backend),
    )

    counted, recall = _counted(entry), compared.recall
    if counted is not None:
        recall = torch.where(counted[:, None], recall, torch.nan)

    return Lesson(
        layer_idx,
        _mean(_relative_error(inside.o, dense), counted),
        _mean(compared.divergence.mean(1), counted),
        _mean(compared.mass.mean(1), counted),
        recall.nanmean(),
        _mean(entry.gates.to(compute_dtype(entry.gates)).mean(1), counted),
    )


def _counted(entry: Record) -> Tensor | None:
    """Which tokens have something to learn from dense attention, bool `[T]`; None: all."""
    assert entry.inside is not None
    real, dense_below = entry.inside.real, entry.config.dense_below
    if not dense_below:
        return real
    is_sparse = entry.layout.positions(entry.gates.shape[0]) >= dense_below
    return is_sparse if real is None else real & is_sparse


def _relative_error(o: Tensor, dense: Tensor) -> Tensor:
    """Of every token of o `[T, HQ, DV]`: `[T]`."""
    dtype = compute_dtype(o)
    o, dense = (x.flatten(1).to(dtype) for x in (o, dense))
    norm = torch.linalg.vector_norm(dense, dim=1).clamp(min=torch.finfo(dtype).tiny)
    return torch.linalg.vector_norm(o - dense, dim=1) / norm


def _mean(x: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of x `[T, ...]` over the tokens that count, None: all; 0 where there are none."""
    if counted is None:
        return x.sum(0) / max(1, x.shape[0])
    counted = counted.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(counted, x, 0.0).sum(0) / counted.sum().clamp(min=1)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _detach_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_detached, args)), {name: _detached(x) for name, x in kwargs.items()}


def _detach_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tuple(map(_detached, output)) if isinstance(output, tuple) else _detached(output)
