"""Existing fused kernels for what surrounds attention: those of quack,
which flash-attn 4 depends on.

Only outside torch.compile: there Inductor fuses the plain operations with their neighbours.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.ops.common.registration import on_its_device


class Kernels(NamedTuple):
    """Functions with gradients."""

    rotary: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]


@functools.cache
def quack_kernels() -> Kernels | None:
    """quack's; None, with a warning unless quack is not installed,
    where they cannot be imported.
    """
    try:
        from quack import rmsnorm
        from quack.rotary import apply_rotary_emb
    except Exception as error:  # it may not fit the other packages that it imports
        if importlib.util.find_spec("quack") is not None:
            warnings.warn(
                f"quack is installed but cannot be imported ({error}): "
                "RoPE and RMSNorm run without it, slower.",
                stacklevel=3,
            )
        return None
    return Kernels(on_its_device(apply_rotary_emb), on_its_device(rmsnorm))


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels, where they run on x `[T, H, D]`, each head on its own."""
    takes = (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.shape[-1] <= 512
        and x.shape[-1] % 8 == 0
        and x.stride(-1) == 1
        # The kernels read 16 bytes at once.
        and all(n % 8 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )
    return quack_kernels() if takes else None
