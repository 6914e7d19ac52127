"""Compression windows as operators: gathered, for a matrix product, or pooled."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nsa_fsa.checks import check_rows, check_tensor
from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import Call, Windows
from nsa_fsa.ops.common.registration import define_operator, gradient_of_call
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors
from nsa_fsa.ops.compression import reference
from nsa_fsa.sequences import Sequences


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
        kernel_size, kernel_stride: window length and stride, in tokens.
        seqused_k: int32 `[B]`: only this many rows of each sequence count.
        backend: which implementation runs: "triton", "reference", or "auto":
            the first of them that can, on a GPU.

    Returns:
        `[T // kernel_stride, HKV, D]` in x's dtype. Window i of sequence b is row
        `cu_seqlens[b] // kernel_stride + i`; rows that no window owns are unspecified and receive
        no gradient.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    check_rows("x", x, 3, "[T, HKV, D]")
    sequences = Sequences(cu_seqlens, max_seqlen, None, seqused_k).check(x.device)
    POOL_BACKENDS.check(backend)
    if weight is not None:
        check_tensor("weight", weight, "float [HKV, kernel_size], or None")
        if not (
            weight.shape == (x.shape[1], kernel_size)
            and weight.dtype.is_floating_point
            and weight.device == x.device
        ):
            raise ValueError(
                f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; it must "
                f"be a float tensor [HKV, kernel_size] = {(x.shape[1], kernel_size)} on {x.device}."
            )
    return POOL(PoolCall(x, sequences, windows, backend, weight))


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
        `[T // kernel_stride, HKV, kernel_size, D]` in x's dtype; windows that no
        sequence owns are 0.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    check_rows("x", x, 3, "[T, HKV, D]")
    sequences = Sequences(cu_seqlens, max_seqlen, None, seqused_k).check(x.device)
    GATHER_BACKENDS.check(backend)
    return GATHER(GatherCall(x, sequences, windows, backend))


def window_starts(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The row of x `[T, ...]` at which each window begins, int64 `[T // kernel_stride]`.

    Rows of windows that no sequence owns point somewhere inside x.
    Plain tensor arithmetic, without a host sync.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    check_tensor("x", x, "[T, ...]")
    if x.ndim == 0:
        raise ValueError("x has shape (); it must be [T, ...]. Fix: one row for each token.")
    Sequences(cu_seqlens, 0, None, seqused_k).check(x.device)
    return reference.window_rows(x, cu_seqlens, *windows, seqused_k)[0][:, 0]


@dataclass(frozen=True)
class GatherCall(Call):
    """One call of `gather_windows`."""

    x: Tensor  # [T, HKV, D]
    sequences: Sequences
    windows: Windows
    backend: str

    @property
    def num_windows(self) -> int:
        """Rows of the result."""
        return self.x.shape[0] // self.windows.kernel_stride

    @property
    def sizes(self) -> dict[str, Any]:
        """Keywords of the reference."""
        return dict(**self.windows._asdict(), seqused_k=self.sequences.seqused_k)

    def check_values(self) -> None:
        """Raises ValueError for sequences whose numbers do not fit x."""
        self.sequences.check_values(self.x.shape[0], self.x.shape[0])


@dataclass(frozen=True)
class PoolCall(GatherCall):
    """One call of `pool_windows`."""

    weight: Tensor | None  # [HKV, kernel_size]


class GatherGradients(NamedTuple):
    x: Tensor


class PoolGradients(NamedTuple):
    x: Tensor
    weight: Tensor | None


class TritonGather(TritonBackend[GatherCall]):
    def refuses(self, call: GatherCall, *, backward: bool = False) -> str | None:
        return unsupported_tensors(call.x, name="x")

    def forward(self, call: GatherCall) -> Tensor:
        from nsa_fsa.ops.compression import triton as kernels

        return kernels.gather_windows(call.x, call.sequences, call.windows)

    def backward(self, call: GatherCall, do: Tensor) -> GatherGradients:
        from nsa_fsa.ops.compression import triton as kernels

        dx = kernels.gather_windows_backward(do, call.x, call.sequences, call.windows)
        return GatherGradients(dx)


class ReferenceGather(Backend[GatherCall]):
    name = "reference"

    def forward(self, call: GatherCall) -> Tensor:
        return reference.gather_windows(call.x, call.sequences.cu_seqlens, **call.sizes)

    def backward(self, call: GatherCall, do: Tensor) -> GatherGradients:
        cu_seqlens = call.sequences.cu_seqlens
        return GatherGradients(
            reference.gather_windows_backward(do, call.x, cu_seqlens, **call.sizes)
        )


class TritonPool(TritonBackend[PoolCall]):
    def refuses(self, call: PoolCall, *, backward: bool = False) -> str | None:
        return unsupported_tensors(call.x, name="x")

    def forward(self, call: PoolCall) -> Tensor:
        from nsa_fsa.ops.compression import triton as kernels

        return kernels.pool_windows(call.x, call.weight, call.sequences, call.windows)

    def backward(self, call: PoolCall, do: Tensor) -> PoolGradients:
        from nsa_fsa.ops.compression import triton as kernels

        tensors = (do, call.x, call.weight)
        return PoolGradients(*kernels.pool_windows_backward(*tensors, call.sequences, call.windows))


class ReferencePool(Backend[PoolCall]):
    name = "reference"

    def forward(self, call: PoolCall) -> Tensor:
        return reference.pool_windows(call.x, call.weight, call.sequences.cu_seqlens, **call.sizes)

    def backward(self, call: PoolCall, do: Tensor) -> PoolGradients:
        tensors = (do, call.x, call.weight, call.sequences.cu_seqlens)
        return PoolGradients(*reference.pool_windows_backward(*tensors, **call.sizes))


GATHER_BACKENDS = Backends("gather_windows", TritonGather(), ReferenceGather())
POOL_BACKENDS = Backends("pool_windows", TritonPool(), ReferencePool())


def _gather(call: GatherCall) -> Tensor:
    call.check_values()
    return GATHER_BACKENDS.run(call)


def _gather_fake(call: GatherCall) -> Tensor:
    _, num_heads, dim = call.x.shape
    return call.x.new_empty(call.num_windows, num_heads, call.windows.kernel_size, dim)


def _pool(call: PoolCall) -> Tensor:
    call.check_values()
    return POOL_BACKENDS.run(call)


def _pool_fake(call: PoolCall) -> Tensor:
    return call.x.new_empty(call.num_windows, *call.x.shape[1:])


_OF_GATHER = gradient_of_call(GatherGradients, GATHER_BACKENDS.differentiate)
_OF_POOL = gradient_of_call(PoolGradients, POOL_BACKENDS.differentiate)
GATHER = define_operator("gather_windows", GatherCall, Tensor, _gather, _gather_fake, _OF_GATHER)
POOL = define_operator("pool_windows", PoolCall, Tensor, _pool, _pool_fake, _OF_POOL)
