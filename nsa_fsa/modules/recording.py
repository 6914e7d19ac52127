"""Who looks on while the NSA layers of a model run: every forward of a layer gives them a
`Record`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nsa_fsa.modules.branches import Record, SparseBranches


def sparse_layers(model: nn.Module) -> list[SparseBranches]:
    """The NSA layers of a model, in the order of `model.modules()`.

    Raises:
        ValueError: for a model without any.
    """
    layers: list[SparseBranches] = [x for x in model.modules() if isinstance(x, SparseBranches)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no NSA layer. Fix: patch_model(model) first.")
    return layers


@contextmanager
def recorded_by(
    layers: list[SparseBranches], keep: Callable[[int, Record], None]
) -> Iterator[None]:
    """Inside, `keep` is called after every forward of every layer, with the layer's `layer_idx`, or
    its number where it has none of its own."""

    def recorder(number: int, layer: SparseBranches) -> Callable[[Record], None]:
        layer_idx = number if layer.layer_idx is None else layer.layer_idx

        def record(entry: Record) -> None:
            keep(layer_idx, entry)

        return record

    before = [layer.recorder for layer in layers]
    for number, layer in enumerate(layers):
        layer.recorder = recorder(number, layer)
    try:
        yield
    finally:
        for layer, former in zip(layers, before, strict=True):
            layer.recorder = former


def is_run_again() -> bool:
    """Whether gradient checkpointing runs this forward once more, inside a backward. What is
    compiled is not run by Python then."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
