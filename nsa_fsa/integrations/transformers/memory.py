"""What else a long sequence needs to fit in training: checkpoints of layers, on the device or in
host memory, and MLPs in chunks of tokens. The loss in chunks is in `loss.py`.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nsa_fsa.integrations.transformers.attention import new_of
from nsa_fsa.integrations.transformers.layers import attention_layers


def checkpoint_layers(model: PreTrainedModel, in_host_memory: bool = False) -> PreTrainedModel:
    """Has every layer keep nothing but its input for backward, and compute the rest again there.

    Args:
        model: any model of transformers.
        in_host_memory: keep that input in pinned memory of the host, which frees the GPU of
            `layers x tokens x hidden_size` numbers and copies them twice. Without a GPU it lies
            there anyway.

    Returns:
        The model.

    Raises:
        ValueError: for a model whose layers cannot be checkpointed.
    """
    # transformers has given it another name since 5.17.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    offload = in_host_memory and torch.accelerator.is_available()
    (enable or model.gradient_checkpointing_enable)(offload=offload)
    return model


def chunk_mlp(model: PreTrainedModel, chunk_size: int) -> PreTrainedModel:
    """Has the MLP of every layer compute `chunk_size` tokens at a time, in place, and compute them
    again in backward: what it keeps is its input. Call it before the model is wrapped, and again
    to change the size.

    Args:
        model: a model of transformers whose layers have a dense MLP named `mlp`.
        chunk_size: tokens.

    Returns:
        The model.

    Raises:
        ValueError: for a layer without such an MLP, as one with a mixture of experts. The model is
            untouched then.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be a positive number. Fix: 16384.")
    found: list[Any] = []
    for i, layer in attention_layers(model).items():
        mlp = getattr(model.get_submodule(layer.name.rpartition(".")[0]), "mlp", None)
        if mlp is None or any(hasattr(mlp, name) for name in ("experts", "gate", "router")):
            kind = "no module named mlp" if mlp is None else f"the mixture {type(mlp).__name__}"
            raise ValueError(
                f"layer {i} of {type(model).__name__} has {kind}; only a dense MLP can be computed "
                "in chunks. Fix: leave chunk_mlp out."
            )
        found.append(mlp)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with causal self-attention. "
            "Fix: a language model of transformers, before it is wrapped."
        )
    for mlp in found:
        if not isinstance(mlp, _ChunkedMLP):
            mlp.__class__ = _chunked_class(mlp.__class__)
        mlp._chunk_size = chunk_size
    return model


class _ChunkedMLP:
    """Mixed in before the class of an MLP."""

    dense_class: Any  # that class
    _chunk_size: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        run: Any = super().forward  # type: ignore[misc]
        chunks = hidden_states.flatten(0, -2).split(self._chunk_size)
        if torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False)
        return torch.cat([run(x) for x in chunks]).view_as(hidden_states)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class was made, and is made again wherever a copy is unpickled."""
        return new_of, (_chunked_class, self.dense_class), self.__dict__


@functools.cache
def _chunked_class(dense_class: Any) -> Any:
    names = {"__module__": __name__, "dense_class": dense_class}
    return type(f"Chunked{dense_class.__name__}", (_ChunkedMLP, dense_class), names)
