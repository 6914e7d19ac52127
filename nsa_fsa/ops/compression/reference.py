"""Compression windows (docs/spec.md, section 1).

Window i of a sequence covers positions `[i*s, i*s + l)`; an incomplete last window does not exist.
Window i of sequence b is row `cu_seqlens[b] // s + i` of the packed result: there is always room,
and no offset has to be read from the device. The `sizes` of a function are kernel_size l and
kernel_stride s.
"""

import torch
from torch import Tensor

from nsa_fsa.ops.common.reference_attention import compute_dtype


def num_windows(length: int, kernel_size: int, kernel_stride: int) -> int:
    """How many complete windows a sequence of `length` tokens has."""
    return max(0, (length - kernel_size) // kernel_stride + 1)


def num_windows_of(lengths: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """As `num_windows`, of lengths on a device."""
    return ((lengths - kernel_size).div(kernel_stride, rounding_mode="floor") + 1).clamp(min=0)


def window_rows(
    x: Tensor, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int, seqused_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows of x `[T // s, l]` that each window covers, and whether it is owned `[T // s]`.

    Rows of unowned windows point somewhere inside x, so that gathering them is safe.
    """
    window = torch.arange(x.shape[0] // kernel_stride, device=x.device)
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long() if seqused_k is None else seqused_k.long()
    # The owner is the last sequence whose windows begin at or before this row:
    # shorter neighbours that begin at the same row have no window of their own.
    owner = torch.searchsorted(starts // kernel_stride, window, right=True) - 1
    index = window - starts[owner] // kernel_stride
    owned = index * kernel_stride + kernel_size <= lengths[owner]
    first = torch.where(owned, starts[owner] + index * kernel_stride, 0)
    rows = first[:, None] + torch.arange(kernel_size, device=x.device)
    return rows.clamp_(max=max(0, x.shape[0] - 1)), owned


def gather_windows(
    x: Tensor, cu_seqlens: Tensor, seqused_k: Tensor | None = None, **sizes: int
) -> Tensor:
    """x `[T, HKV, D]` -> its windows `[T // s, HKV, l, D]`; rows that no sequence owns are 0."""
    return _gather(x, *window_rows(x, cu_seqlens, seqused_k=seqused_k, **sizes))


def gather_windows_backward(
    dwindows: Tensor, x: Tensor, cu_seqlens: Tensor, seqused_k: Tensor | None = None, **sizes: int
) -> Tensor:
    """Gradient of `gather_windows` with respect to x; gradients of unowned rows are ignored."""
    rows, owned = window_rows(x, cu_seqlens, seqused_k=seqused_k, **sizes)
    return _add_windows(dwindows, x, rows, owned)


def pool_windows(
    x: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
    **sizes: int,
) -> Tensor:
    """x `[T, HKV, D]`, weight `[HKV, l]` (None: the mean) -> sums of windows `[T // s, HKV, D]`."""
    kernel_size, kernel_stride = sizes["kernel_size"], sizes["kernel_stride"]
    if kernel_size > x.shape[0]:  # no window exists: memory follows the tokens, not the window
        return x.new_zeros(x.shape[0] // kernel_stride, *x.shape[1:])
    weight = _pool_weight(weight, x, kernel_size)
    windows = _gather(x, *window_rows(x, cu_seqlens, seqused_k=seqused_k, **sizes))
    return torch.einsum("nhld,hl->nhd", windows.to(weight.dtype), weight).to(x.dtype).contiguous()


def pool_windows_backward(
    dpooled: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
    **sizes: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool_windows` with respect to x and weight (None for the mean)."""
    if sizes["kernel_size"] > x.shape[0]:
        return x.new_zeros(x.shape), None if weight is None else weight.new_zeros(weight.shape)
    wide = _pool_weight(weight, x, sizes["kernel_size"])
    rows, owned = window_rows(x, cu_seqlens, seqused_k=seqused_k, **sizes)
    dpooled = torch.where(owned[:, None, None], dpooled, 0).to(wide.dtype)
    dwindows = dpooled[:, :, None, :] * wide[None, :, :, None]
    dx = _add_windows(dwindows, x, rows, owned)
    if weight is None:
        return dx, None
    windows = _gather(x, rows, owned).to(wide.dtype)
    return dx, torch.einsum("nhld,nhd->hl", windows, dpooled).to(weight.dtype).contiguous()


def _gather(x: Tensor, rows: Tensor, owned: Tensor) -> Tensor:
    """The windows `[T // s, HKV, l, D]` of x that `window_rows` describes."""
    windows = torch.where(owned[:, None, None, None], x[rows], 0)
    return windows.transpose(1, 2).contiguous()


def _add_windows(dwindows: Tensor, x: Tensor, rows: Tensor, owned: Tensor) -> Tensor:
    """The gradient of x: for each of its rows the sum over the windows that it lies in."""
    dwindows = torch.where(owned[:, None, None, None], dwindows.transpose(1, 2), 0)
    dx = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device)
    dx.index_add_(0, rows.flatten(), dwindows.flatten(0, 1).to(dx.dtype))
    return dx.to(x.dtype)


def _pool_weight(weight: Tensor | None, x: Tensor, kernel_size: int) -> Tensor:
    if weight is None:
        weight = x.new_full((x.shape[1], kernel_size), 1 / kernel_size, dtype=compute_dtype(x))
    return weight.to(compute_dtype(x))
