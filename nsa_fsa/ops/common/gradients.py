"""Where the gradients of several branches meet: a backward may add its own to those that another one left.

Tensors of a gigabyte are written once instead of three times, read and added.
"""

from torch import Tensor

# Contiguous gradients of queries, keys and values to add to in place; None: the backward makes a new one.
AddTo = tuple[Tensor | None, Tensor | None, Tensor | None]
NOTHING: AddTo = (None, None, None)


def sums_of(add_to: AddTo, *tensors: Tensor) -> tuple[Tensor, ...]:
    """For every tensor the gradient to add to, or a new one, uninitialised."""
    return tuple(x.new_empty(x.shape) if total is None else total for total, x in zip(add_to, tensors, strict=False))
