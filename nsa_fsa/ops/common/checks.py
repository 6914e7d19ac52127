"""Checks on operator arguments: bad input is refused, with the value and the fix, before anything is launched."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(ok: bool, message: Callable[[], str]) -> None:
    """Raises ValueError(message()) unless ok. A message is only made when needed: printing a symbolic shape would pin it."""
    if not ok:
        raise ValueError(message())


def check_ints(minimum: int, **values: Any) -> None:
    """Raises ValueError unless each of the values, given by their names, is an int of at least `minimum`."""
    for name, value in values.items():
        require(
            is_int(value) and value >= minimum,
            lambda: f"{name}={value!r:.100} must be an int >= {minimum}. Fix: pass a whole number.",
        )


def check_positive(**values: Any) -> None:
    """Raises ValueError unless each of the values, given by their names, is an int of at least 1."""
    check_ints(1, **values)


def is_int(value: Any) -> bool:
    """Whether it is a Python int or the compiler's; `True`, an int to Python, is not."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_tensor(name: str, x: Any, what: str) -> None:
    """Raises ValueError unless x is a tensor. what: its dtype and shape, for the error."""
    require(
        isinstance(x, Tensor),
        lambda: f"{name}={x!r:.100} must be a tensor, {what}. Fix: torch.as_tensor(...) on the others' device.",
    )


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises ValueError unless x is on the device of the other tensors."""
    require(x.device == device, lambda: f"{name} is on {x.device}, the other tensors on {device}. Fix: move it there.")


def check_rows(name: str, x: Tensor, ndim: int, shape: str) -> None:
    """Raises ValueError unless x is a floating-point tensor of `ndim` axes, the last one not empty."""
    check_tensor(name, x, shape)
    require(
        x.ndim == ndim and x.shape[-1] > 0,
        lambda: f"{name} has shape {tuple(x.shape)}; it must be {shape}, the last of at least 1.",
    )
    require(
        x.dtype in FLOAT_DTYPES,
        lambda: f"{name} has dtype {x.dtype}; it must be one of {FLOAT_DTYPES}. Fix: cast it, as in x.float().",
    )


def check_layout(
    device: torch.device, cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_q: Tensor | None, seqused_k: Tensor | None
) -> None:
    """Raises ValueError for wrong types or shapes of the sequence descriptors (their values: `check_layout_values`)."""
    require(
        is_int(max_seqlen) and max_seqlen >= 0,
        lambda: (
            f"max_seqlen={max_seqlen!r:.100} must be a Python int >= 0, so that nothing is read back from the device. "
            "Fix: pass the length you pack to, or int(lengths.max())."
        ),
    )
    check_tensor("cu_seqlens", cu_seqlens, "int32 [batch + 1]")
    num_sequences = cu_seqlens.shape[0] - 1 if cu_seqlens.ndim == 1 else -1
    for name, x, size in (
        ("cu_seqlens", cu_seqlens, num_sequences + 1),
        ("cu_seqlens_q", cu_seqlens_q, num_sequences + 1),
        ("seqused_k", seqused_k, num_sequences),
    ):
        if x is None:
            continue
        check_tensor(name, x, "int32 [batch]" if name == "seqused_k" else "int32 [batch + 1]")
        require(
            x.dtype == torch.int32 and x.ndim == 1 and x.shape[0] == size and num_sequences >= 0,
            lambda: (
                f"{name} has dtype {x.dtype} and shape {tuple(x.shape)}; it must be int32 "
                f"[{'batch' if name == 'seqused_k' else 'batch + 1'}]. Fix: {name}.int(), one entry per sequence."
            ),
        )
        check_device(name, x, device)


def check_layout_values(
    num_queries: int, num_keys: int, cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_q: Tensor | None, seqused_k: Tensor | None
) -> None:
    """Raises ValueError for wrong values of the sequence descriptors; looks only where that is cheap, on the CPU."""
    if cu_seqlens.device.type != "cpu":
        return
    starts = cu_seqlens.long()
    lengths = starts.diff()
    require(
        bool((lengths >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) == num_keys,
        lambda: (
            f"cu_seqlens={cu_seqlens.tolist()} must rise from 0 to the number of key rows, {num_keys}. "
            "Fix: 0, and after it the cumulative sum of the sequences' lengths."
        ),
    )
    if cu_seqlens_q is not None:
        require(
            bool((cu_seqlens_q.diff() >= 0).all()) and int(cu_seqlens_q[0]) == 0 and int(cu_seqlens_q[-1]) == num_queries,
            lambda: (
                f"cu_seqlens_q={cu_seqlens_q.tolist()} must rise from 0 to the number of query rows, {num_queries}. "
                "Fix: 0, and after it the cumulative sum of each sequence's number of queries."
            ),
        )
    if seqused_k is not None:
        require(
            bool(((seqused_k >= 0) & (seqused_k <= lengths)).all()),
            lambda: (
                f"seqused_k={seqused_k.tolist()} must lie between 0 and the rows of each sequence, {lengths.tolist()}. "
                "Fix: leave it out where every row holds a key, or give the sequences more rows."
            ),
        )
        lengths = seqused_k
    longest = int(lengths.max()) if len(lengths) else 0
    require(
        longest <= max_seqlen, lambda: f"max_seqlen={max_seqlen} is less than the longest sequence, {longest}. Fix: raise it."
    )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor | None,
    seqused_k: Tensor | None,
    kernel_stride: int | None = None,
) -> None:
    """Raises ValueError for shapes, dtypes or devices of q, k and v that do not fit together, or sequence descriptors that do
    not fit them; queries and keys share their rows unless cu_seqlens_q is given.

    kernel_stride: of compressed k and v, which then have a row for every so many.
    """
    compressed = kernel_stride is not None
    check_rows("q", q, 3, "[T, HQ, D]")
    names = ("k_cmp", "v_cmp") if compressed else ("k", "v")
    for name, x in zip(names, (k, v), strict=True):
        check_rows(name, x, 3, "[T // kernel_stride, HKV, D]" if compressed else "[T, HKV, D]")
        require(x.dtype == q.dtype, lambda: f"{name} has dtype {x.dtype} but q has {q.dtype}. Fix: cast them to one dtype.")
        require(x.device == q.device, lambda: f"{name} is on {x.device} but q is on {q.device}. Fix: move them together.")
        require(
            x.shape[:2] == k.shape[:2],
            lambda: (
                f"{name} has shape {tuple(x.shape)} but {names[0]} has {tuple(k.shape)}: rows and heads must agree. "
                "Fix: make keys and values from the same tokens, with the same number of KV heads."
            ),
        )
    require(
        k.shape[2] == q.shape[2],
        lambda: (
            f"q has head width {q.shape[2]} but {names[0]} has {k.shape[2]}: they must agree. "
            "Fix: project queries and keys to one width; only values may have another."
        ),
    )
    require(
        0 < k.shape[1] <= q.shape[1] and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"q has {q.shape[1]} heads and {names[0]} has {k.shape[1]}: query heads must be a multiple of KV heads. "
            "Fix: choose them so that each KV head serves a whole group of query heads."
        ),
    )
    if kernel_stride is not None and cu_seqlens_q is None:
        check_compressed_rows(k, q.shape[0], kernel_stride)
    require(
        compressed or cu_seqlens_q is not None or q.shape[0] == k.shape[0],
        lambda: (
            f"q has {q.shape[0]} rows and k has {k.shape[0]}. Fix: pass cu_seqlens_q when the queries are only the last "
            "positions of their sequences."
        ),
    )
    check_layout(q.device, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)


def check_compressed_rows(k_cmp: Tensor, num_tokens: int, kernel_stride: int) -> None:
    """Raises ValueError unless k_cmp has a row for every `kernel_stride` tokens: kernels read so many."""
    require(
        k_cmp.shape[0] >= num_tokens // kernel_stride,
        lambda: (
            f"k_cmp has {k_cmp.shape[0]} rows; {num_tokens} tokens with kernel_stride={kernel_stride} need "
            f"{num_tokens // kernel_stride}. Fix: lay compressed tokens out as pool_windows does, with this stride."
        ),
    )


def check_windows(kernel_size: int, kernel_stride: int, block_size: int | None = None) -> None:
    """Raises ValueError for sizes of the compression window, its stride and the selection block that do not fit together."""
    check_positive(kernel_size=kernel_size, kernel_stride=kernel_stride)
    require(
        kernel_size % kernel_stride == 0,
        lambda: (
            f"kernel_size={kernel_size} must be a multiple of kernel_stride={kernel_stride}. "
            "Fix: for example kernel_size = 2 * kernel_stride."
        ),
    )
    if block_size is None:
        return
    check_positive(block_size=block_size)
    require(
        block_size % kernel_stride == 0 and kernel_size <= block_size,
        lambda: (
            f"block_size={block_size} must be a multiple of kernel_stride={kernel_stride} and at least "
            f"kernel_size={kernel_size}. Fix: for example block_size = 2 * kernel_size."
        ),
    )


def default_scale(q: Tensor, scale: float | None) -> float:
    """The softmax scale as a float, `D ** -0.5` for None. Raises ValueError unless it is a finite number."""
    if scale is None:
        return q.shape[-1] ** -0.5
    require(
        is_finite_number(scale),
        lambda: f"scale={scale!r} must be a finite number. Fix: leave it out for D ** -0.5.",
    )
    return float(scale)


def is_finite_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold; `True` is none."""
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) < math.inf  # torch.compile traces the comparison, and not math.isfinite
    except OverflowError:  # an int beyond every float
        return False
