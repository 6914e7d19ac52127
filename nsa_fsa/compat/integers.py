"""Integer tensors of other conventions as the int32 that the operators take."""

import torch
from torch import Tensor


def to_int32(name: str, x: Tensor) -> Tensor:
    """x, int32 or int64 of any shape, as int32."""
    if not (isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)):
        raise ValueError(
            f"{name} is {x.dtype if isinstance(x, Tensor) else repr(x)[:100]}; it must be an int32 "
            "or int64 tensor. Fix: torch.as_tensor(..., dtype=torch.int32) on the others' device."
        )
    return x.int()


def clamp_to_int32(name: str, x: Tensor, limit: int) -> Tensor:
    """x as int32, clamped first: 2**32 cut to 32 bits would be block 0, which exists."""
    if isinstance(x, Tensor) and x.dtype == torch.int64:
        x = x.clamp(-1, limit)
    return to_int32(name, x)
