"""Checks on arguments. Each error names the value, what is allowed and the fix."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_ATTENTION = torch._C._nn.scaled_dot_product_attention
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_ints(minimum: int, **values: Any) -> None:
    """Raises ValueError unless each of the values, by name, is an int of at least `minimum`."""
    for name, value in values.items():
        if not (is_int(value) and value >= minimum):
            raise ValueError(
                f"{name}={value!r:.100} must be an int >= {minimum}. Fix: pass a whole number."
            )


def check_positive(**values: Any) -> None:
    """Raises ValueError unless each of the values, by name, is an int of at least 1."""
    check_ints(1, **values)


def check_one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raises ValueError unless each of the values, by name, is one of those allowed."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} is not known: allowed are {', '.join(allowed)}. "
                f"Fix: {allowed[0]!r}, for example."
            )


def is_int(value: Any) -> bool:
    """Whether it is a Python int or the compiler's; `True`, an int to Python, is not."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_whole_sequences() -> None:
    """Raises ValueError while PyTorch's context parallelism is on, which gives every rank a part of
    a sequence, and replaces PyTorch's own attention by one that knows of the others."""
    attention = torch.nn.functional.scaled_dot_product_attention
    if attention is _ATTENTION:  # which a compiler can follow
        return
    if (getattr(attention, "__module__", None) or "").startswith("torch.distributed."):
        raise ValueError(
            "context_parallel is on, and an NSA layer would take a rank's part of a sequence for "
            "the whole of it. Fix: leave PyTorch's context parallelism out (cp_size=1), and share "
            "sequences by nsa_fsa.distributed.ContextParallel, or the Trainer's by "
            "NSAContextParallel; or unpatch_model."
        )


def check_tensor(name: str, x: Any, what: str) -> None:
    """Raises ValueError unless x is a tensor. what: its dtype and shape, for the error."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name}={x!r:.100} must be a tensor, {what}. "
            "Fix: torch.as_tensor(...) on the others' device."
        )


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises ValueError unless x is on the device of the other tensors."""
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device}, the other tensors on {device}. Fix: move it there."
        )


def check_rows(name: str, x: Tensor, ndim: int, shape: str) -> None:
    """Raises ValueError unless x is a floating-point tensor of `ndim` axes, the last not empty."""
    check_tensor(name, x, shape)
    if not (x.ndim == ndim and x.shape[-1] > 0):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be {shape}, the last of at least 1."
        )
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {x.dtype}; it must be one of {FLOAT_DTYPES}. "
            "Fix: cast it, as in x.float()."
        )


def is_finite_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold; `True` is none."""
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        return False
    try:
        # torch.compile traces the comparison, and not math.isfinite.
        return abs(float(value)) < math.inf
    except OverflowError:  # an int beyond every float
        return False
