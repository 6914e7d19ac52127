"""Functions that the Gluon kernels share, for the versions of Triton in tuning.GLUON_VERSIONS."""

from collections.abc import Callable
from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from nsa_fsa.ops.common.launcher import Launcher
from nsa_fsa.ops.common.primitives import specialisation

# A barrier of the threads of a partition where warps are specialised, else of the whole program.
# Triton 3.7 calls it `barrier`.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


def gluon_kernel(function: Callable[..., Any]) -> Any:
    """gluon.jit for what the host launches, as `primitives.kernel` is triton.jit."""
    return Launcher(gluon.jit(function, **specialisation(function)))


@gluon.jit
def copy_rows(buffer, ptr, offsets, DIM: gl.constexpr, layout: gl.constexpr):
    """Copies rows of DIM elements that begin at `offsets`, asynchronously."""
    column = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(buffer, ptr + offsets[:, None] + column[None, :])


@gluon.jit
def copy_rows_or_zeros(buffer, ptr, offsets, exists, DIM: gl.constexpr, layout: gl.constexpr):
    """Copies rows as `copy_rows` does, and zeros for the rows that do not exist."""
    column = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    mask = exists[:, None] & (column < DIM)[None, :]
    async_copy.async_copy_global_to_shared(
        buffer, ptr + offsets[:, None] + column[None, :], mask=mask
    )


@builtin
def bulk_add(desc, at, buffer, _semantic=None):
    """Adds the numbers in a buffer to a block in global memory, asynchronously.

    Gluon has no name for it, only its builder.
    """
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, at, buffer.handle
    )
