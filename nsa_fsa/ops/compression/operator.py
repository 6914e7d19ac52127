"""Compression windows as operators: gathered (for the linear, mlp and gated kinds) or pooled (mean and weighted)."""

from typing import Any, Optional

from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.compression import reference


def pool_windows(
    x: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of every compression window (NSA paper, section 3.3.1).

    Args:
        x: keys or values `[T, HKV, D]`, float16, bfloat16, float32 or float64.
        weight: `[HKV, kernel_size]`, any float dtype; None for the mean.
        cu_seqlens: int32 `[B + 1]`; sequence b is rows `cu_seqlens[b] : cu_seqlens[b + 1]` of x.
        max_seqlen: an upper bound on the longest sequence.
        kernel_size, kernel_stride: window length and step in tokens.
        seqused_k: int32 `[B]`: only this many rows of each sequence count.
        backend: which implementation runs: "triton", "reference", or "auto": the first of them that can, on a GPU.

    Returns:
        `[T // kernel_stride, HKV, D]` in x's dtype. Window i of sequence b is row `cu_seqlens[b] // kernel_stride + i`; rows
        that no window owns are unspecified and receive no gradient.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_rows("x", x, 3, "[T, HKV, D]")
    checks.check_layout(x.device, cu_seqlens, max_seqlen, None, seqused_k)
    backends.check_known(backend, "pool_windows")
    if weight is not None:
        checks.check_tensor("weight", weight, "float [HKV, kernel_size], or None")
        checks.require(
            weight.shape == (x.shape[1], kernel_size) and weight.dtype.is_floating_point and weight.device == x.device,
            lambda: (
                f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; it must be a float tensor "
                f"[HKV, kernel_size] = {(x.shape[1], kernel_size)} on {x.device}."
            ),
        )
    return _pool(x, weight, cu_seqlens, max_seqlen, kernel_size, kernel_stride, seqused_k, backend)


def gather_windows(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Every compression window of x, laid out for a batched matrix product.

    Args and errors as in `pool_windows`.

    Returns:
        `[T // kernel_stride, HKV, kernel_size, D]` in x's dtype; windows that no sequence owns are 0.
    """
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_rows("x", x, 3, "[T, HKV, D]")
    checks.check_layout(x.device, cu_seqlens, max_seqlen, None, seqused_k)
    backends.check_known(backend, "gather_windows")
    return _gather(x, cu_seqlens, max_seqlen, kernel_size, kernel_stride, seqused_k, backend)


def window_starts(
    x: Tensor, cu_seqlens: Tensor, *, kernel_size: int, kernel_stride: int, seqused_k: Tensor | None = None
) -> Tensor:
    """The row of x `[T, ...]` at which each compression window begins, int64 `[T // kernel_stride]`.

    Rows of windows that no sequence owns point somewhere inside x. Plain tensor arithmetic, without a host sync.
    """
    checks.check_windows(kernel_size, kernel_stride)
    checks.check_tensor("x", x, "[T, ...]")
    checks.require(x.ndim > 0, lambda: "x has shape (); it must be [T, ...].")
    checks.check_layout(x.device, cu_seqlens, 0, None, seqused_k)
    return reference.window_rows(x, cu_seqlens, kernel_size, kernel_stride, seqused_k)[0][:, 0]


def _pool_run(
    x: Tensor,
    weight: Optional[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Optional[Tensor],
    backend: str,
) -> Tensor:
    checks.check_layout_values(x.shape[0], x.shape[0], cu_seqlens, max_seqlen, None, seqused_k)
    sizes: dict[str, Any] = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, seqused_k=seqused_k)
    return backends.to_run("pool_windows", backend, x, **sizes).forward(x, weight, cu_seqlens, **sizes)


def _pool_fake(x, weight, cu_seqlens, max_seqlen, kernel_size, kernel_stride, seqused_k, backend):
    return x.new_empty(x.shape[0] // kernel_stride, x.shape[1], x.shape[2])


def _pool_backward_run(
    dpooled: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Optional[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    sizes: dict[str, Any] = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, seqused_k=seqused_k)
    backward = backends.to_run("pool_windows", backend, x, backward=True, **sizes).backward
    dx, dweight = backward(dpooled, x, weight, cu_seqlens, **sizes)
    return dx, x.new_empty(0) if dweight is None else dweight  # an operator cannot return None


def _pool_backward_fake(dpooled, x, weight, cu_seqlens, kernel_size, kernel_stride, seqused_k, backend):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _pool_setup(ctx, inputs, output):
    x, weight, cu_seqlens, _, ctx.kernel_size, ctx.kernel_stride, seqused_k, ctx.backend = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, seqused_k)


def _pool_vjp(ctx, dpooled):
    x, weight, cu_seqlens, seqused_k = ctx.saved_tensors
    dx, dweight = _pool_backward(dpooled, x, weight, cu_seqlens, ctx.kernel_size, ctx.kernel_stride, seqused_k, ctx.backend)
    return dx, None if weight is None else dweight, None, None, None, None, None, None


_pool_backward = define_operator("pool_windows_backward", _pool_backward_run, _pool_backward_fake)
_pool = define_operator("pool_windows", _pool_run, _pool_fake, setup_context=_pool_setup, vjp=_pool_vjp)


def _gather_run(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Optional[Tensor],
    backend: str,
) -> Tensor:
    checks.check_layout_values(x.shape[0], x.shape[0], cu_seqlens, max_seqlen, None, seqused_k)
    sizes: dict[str, Any] = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, seqused_k=seqused_k)
    return backends.to_run("gather_windows", backend, x, **sizes).forward(x, cu_seqlens, **sizes)


def _gather_fake(x, cu_seqlens, max_seqlen, kernel_size, kernel_stride, seqused_k, backend):
    return x.new_empty(x.shape[0] // kernel_stride, x.shape[1], kernel_size, x.shape[2])


def _gather_backward_run(
    dwindows: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Optional[Tensor],
    backend: str,
) -> Tensor:
    sizes: dict[str, Any] = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, seqused_k=seqused_k)
    backward = backends.to_run("gather_windows", backend, x, backward=True, **sizes).backward
    return backward(dwindows, x, cu_seqlens, **sizes)


def _gather_backward_fake(dwindows, x, cu_seqlens, kernel_size, kernel_stride, seqused_k, backend):
    return x.new_empty(x.shape)


def _gather_setup(ctx, inputs, output):
    x, cu_seqlens, _, ctx.kernel_size, ctx.kernel_stride, seqused_k, ctx.backend = inputs
    ctx.save_for_backward(x, cu_seqlens, seqused_k)


def _gather_vjp(ctx, dwindows):
    x, cu_seqlens, seqused_k = ctx.saved_tensors
    dx = _gather_backward(dwindows, x, cu_seqlens, ctx.kernel_size, ctx.kernel_stride, seqused_k, ctx.backend)
    return dx, None, None, None, None, None, None


_gather_backward = define_operator("gather_windows_backward", _gather_backward_run, _gather_backward_fake)
_gather = define_operator("gather_windows", _gather_run, _gather_fake, setup_context=_gather_setup, vjp=_gather_vjp)


def _kernels() -> Any:
    from nsa_fsa.ops.compression import triton as compress

    return compress


def _unsupported(x: Tensor, **_: Any) -> str | None:
    return triton_backends.unsupported_tensors(x, name="x")


def _register(operator: str) -> None:
    triton = backends.Backend(
        "triton",
        lambda *tensors, **sizes: getattr(_kernels(), operator)(*tensors, **sizes),
        lambda *tensors, **sizes: getattr(_kernels(), f"{operator}_backward")(*tensors, **sizes),
        triton_backends.unavailable,
        _unsupported,
        triton_backends.elsewhere,
    )
    backends.register(operator, triton)
    by_torch = (getattr(reference, operator), getattr(reference, f"{operator}_backward"))
    backends.register(operator, backends.Backend("reference", *by_torch))


_register("pool_windows")
_register("gather_windows")
