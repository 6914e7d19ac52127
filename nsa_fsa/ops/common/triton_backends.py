"""Whether Triton can run here, and whether its kernels take such tensors."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from nsa_fsa.ops.common.backends import Backend, C

MAX_HEAD_DIM = 256


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, which is slow and for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _missing() -> str | None:
    return None if is_installed("triton") else "Triton is not installed (pip install triton)"


ASSUMED: ContextVar[tuple[int, int] | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(capability: tuple[int, int] | None) -> Iterator[None]:
    """Inside, answers are for a GPU of this compute capability with Triton; None: this machine."""
    token = ASSUMED.set(capability)
    try:
        yield
    finally:
        ASSUMED.reset(token)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, each its own; None where there is none."""
    return ASSUMED.get() or _capability(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def too_old(
    device: torch.device | None, oldest: tuple[int, int], elsewhere: str = ""
) -> str | None:
    """Why this GPU, by default the current one, cannot run what needs compute capability `oldest`
    or newer, or None.

    Where the device is no GPU, none is asked: that would start CUDA, which takes memory of a GPU
    and keeps the process from forking. elsewhere: what to add for machines without a GPU.
    """
    if device is not None and device.type != "cuda" and torch.cuda.is_available():
        return f"the tensors are on {device}"
    if device is None or device.type != "cuda":
        device = torch.device(
            "cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0
        )
    found = capability(device)
    if found is None:
        return f"it needs a CUDA GPU{elsewhere}"
    if found >= oldest:
        return None
    return (
        f"it needs compute capability {'.'.join(map(str, oldest))} or newer, "
        f"and this GPU has {'.'.join(map(str, found))}"
    )


def unavailable(device: torch.device | None = None) -> str | None:
    """Why Triton kernels cannot run on this GPU (default: the current one), or None."""
    if ASSUMED.get() is None and ((reason := _missing()) is not None or interpreted()):
        return reason
    return too_old(device, (8, 0), " (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)")


# `selected_attention` asks where the compiler of a model looks on:
# this is `torch.compiler.assume_constant_result`, which would import that compiler.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


class TritonBackend(Backend[C]):
    """A backend of Triton kernels, which are imported only where they run."""

    name = "triton"

    def unavailable(self, device: torch.device | None = None) -> str | None:
        return unavailable(device)

    def avoids(self, call: C) -> str | None:
        """On a CPU: the interpreter is far slower than the reference."""
        return None if call.device.type == "cuda" else f"the tensors are on {call.device}"


def unsupported_dtype(x: Tensor, name: str) -> str | None:
    """Why no Triton kernel of this package can take numbers like x, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{name} has dtype {x.dtype}; supported are float16, bfloat16 and float32"
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def unsupported_tensors(*tensors: Tensor, name: str = "q") -> str | None:
    """Why no Triton kernel can take these rows `[T, heads, width]`, the first `name`, or None."""
    first = tensors[0]
    if not first.is_cuda and not interpreted():
        return f"{name} is on {first.device}, and Triton kernels run on CUDA devices"
    if (reason := unsupported_dtype(first, name)) is not None:
        return reason
    if any(x.shape[-1] > MAX_HEAD_DIM for x in tensors):
        widths = " and ".join(str(x.shape[-1]) for x in tensors)
        return f"head widths {widths}; supported are at most {MAX_HEAD_DIM}"
    return None
