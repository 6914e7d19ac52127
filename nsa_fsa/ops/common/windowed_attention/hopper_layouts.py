"""Layouts and buffers of the Gluon kernels: those of windows and those of selected attention."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def row_layout(width, warps=4):
    """Of warps that read or write rows of so many 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(width, warps=4):
    """Of the matrix unit's result, 16 rows of so many numbers a warp."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, width, 16])


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, NUMBER: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Shared memory for tiles of ROWS rows that the matrix unit reads."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    return gl.allocate_shared_memory(dtype, [NUMBER, ROWS, D], layout)


@gluon.jit
def allocate_numbers(dtype: gl.constexpr, NUMBER: gl.constexpr, SIZE: gl.constexpr):
    """Shared memory for numbers that single threads read and write."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(dtype, [NUMBER, SIZE], layout)
