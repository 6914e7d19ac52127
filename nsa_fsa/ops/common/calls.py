"""What the calls of several operators consist of, and the checks that they share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.checks import check_ints, check_positive, check_rows, is_finite_number
from nsa_fsa.sequences import Sequences

# How much memory kernels may take by default beside inputs, outputs and gradients. Not 2 GiB, which
# FlashAttention's padding would exceed by a thousandth at 65,536 tokens of 32 heads of 128: its
# backward, in two parts then, takes 9.5 ms instead of 7.3, and saves 5% of the memory (one H200,
# G = 4, the FlashAttention in PyTorch).
WORKSPACE_BYTES = 9 << 28


class Windows(NamedTuple):
    """How keys are compressed: a window of `kernel_size` tokens every `kernel_stride`."""

    kernel_size: int
    kernel_stride: int

    def check(self) -> "Windows":
        """Raises ValueError for sizes that do not fit together; returns itself."""
        kernel_size, kernel_stride = self
        check_positive(kernel_size=kernel_size, kernel_stride=kernel_stride)
        if kernel_size % kernel_stride != 0:
            raise ValueError(
                f"kernel_size={kernel_size} must be a multiple of kernel_stride={kernel_stride}. "
                "Fix: for example kernel_size = 2 * kernel_stride."
            )
        return self


class Blocks(NamedTuple):
    """Blocks of keys, and which of them every query chooses whatever their score."""

    block_size: int
    init_blocks: int  # the first so many
    local_blocks: int  # and the last so many, the query's own among them

    def check(self) -> "Blocks":
        """Raises ValueError for sizes that are not whole numbers; returns itself."""
        check_positive(block_size=self.block_size)
        check_ints(0, init_blocks=self.init_blocks, local_blocks=self.local_blocks)
        return self

    def check_selection(self, windows: Windows, num_selected_blocks: int) -> None:
        """Raises ValueError where blocks do not consist of windows, or too many are forced."""
        (kernel_size, kernel_stride), block_size = windows, self.block_size
        if block_size % kernel_stride != 0 or kernel_size > block_size:
            raise ValueError(
                f"block_size={block_size} must be a multiple "
                f"of kernel_stride={kernel_stride} and at least kernel_size={kernel_size}. "
                "Fix: for example block_size = 2 * kernel_size."
            )
        check_positive(num_selected_blocks=num_selected_blocks)
        if self.init_blocks + self.local_blocks > num_selected_blocks:
            raise ValueError(
                f"init_blocks={self.init_blocks} and local_blocks={self.local_blocks} "
                f"must together be at most num_selected_blocks={num_selected_blocks}. "
                "Fix: select more, or force fewer."
            )


class Call:
    """One call of an operator: a frozen dataclass whose first member is a tensor."""

    @property
    def first(self) -> Tensor:
        """Its first tensor."""
        member: dataclasses.Field[Any] = dataclasses.fields(self)[0]  # type: ignore[arg-type]
        first: Tensor = getattr(self, member.name)  # Dynamo of PyTorch 2.11 follows no other way
        return first

    @property
    def device(self) -> torch.device:
        return self.first.device


class GroupedCall(Call):
    """One call of an operator whose query heads share KV heads."""

    q: Tensor  # [T, HQ, D]
    k: Tensor  # [rows, HKV, D]
    sequences: Sequences

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def check_values(self) -> None:
        """Raises ValueError for sequences whose numbers do not fit the tensors."""
        self.sequences.check_values(self.q.shape[0], self.k.shape[0])


@dataclass(frozen=True)
class AttentionCall(GroupedCall):
    """What every branch's operator is called with."""

    q: Tensor  # [T, HQ, D]
    k: Tensor  # [T, HKV, D]; [T // kernel_stride, HKV, D] of compressed tokens
    v: Tensor  # [T, HKV, DV], with as many rows as k
    sequences: Sequences
    scale: float
    workspace_bytes: int
    backend: str


class AttentionResult(NamedTuple):
    o: Tensor  # [T, HQ, DV]
    lse: Tensor  # [T, HQ], natural log; -inf where a query sees nothing


class Softmax(NamedTuple):
    """What a branch's backward needs of its forward."""

    # [T, HQ, DV]; may be None where there is delta, except for the FlashAttention libraries
    o: Tensor | None
    lse: Tensor  # [T, HQ]; with delta, exp(s - lse) need not add up to 1, as with a gated lse
    delta: Tensor | None = None  # [T, HQ], sum(o * do), where the caller has it


class AttentionGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


class AddTo(NamedTuple):
    """Contiguous gradients that a backward adds its own to in place, so that tensors of a gigabyte
    are written once instead of three times, read and added; None: the backward makes a new one."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    def targets(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionGradients:
        """For every tensor the gradient to add to, or a new one, uninitialised."""
        pairs = zip(self, (q, k, v), strict=True)
        return AttentionGradients(
            *(x.new_empty(x.shape) if total is None else total for total, x in pairs)
        )

    def add(self, grads: tuple[Tensor, Tensor, Tensor]) -> AttentionGradients:
        """The gradients, of which those that have something to add to are added to it."""
        pairs = zip(self, grads, strict=True)
        return AttentionGradients(
            *(grad if total is None else total.add_(grad) for total, grad in pairs)
        )


NOTHING = AddTo()


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, kernel_stride: int | None = None
) -> None:
    """Raises ValueError for shapes, dtypes or devices of q, k and v that do not fit together;
    queries and keys share their rows unless the sequences have queries of their own.

    kernel_stride: of compressed k and v, which then have a row for every so many.
    """
    compressed = kernel_stride is not None
    check_rows("q", q, 3, "[T, HQ, D]")
    names = ("k_cmp", "v_cmp") if compressed else ("k", "v")

    for name, x in zip(names, (k, v), strict=True):
        check_rows(name, x, 3, "[T // kernel_stride, HKV, D]" if compressed else "[T, HKV, D]")
        if x.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype} but q has {q.dtype}. Fix: cast them to one dtype."
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} but q is on {q.device}. Fix: move them together."
            )
        if x.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but {names[0]} has {tuple(k.shape)}: "
                "rows and heads must agree. "
                "Fix: make keys and values from the same tokens, with the same number of KV heads."
            )

    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"q has head width {q.shape[2]} but {names[0]} has {k.shape[2]}: they must agree. "
            "Fix: project queries and keys to one width; only values may have another."
        )
    if not 0 < k.shape[1] <= q.shape[1] or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"q has {q.shape[1]} heads and {names[0]} has {k.shape[1]}: "
            "query heads must be a multiple of KV heads. "
            "Fix: choose them so that each KV head serves a whole group of query heads."
        )

    if sequences.cu_seqlens_q is None:
        if kernel_stride is not None:
            check_compressed_rows(k, q.shape[0], kernel_stride)
        elif q.shape[0] != k.shape[0]:
            raise ValueError(
                f"q has {q.shape[0]} rows and k has {k.shape[0]}. Fix: pass cu_seqlens_q "
                "when the queries are only the last positions of their sequences."
            )


def check_compressed_rows(k_cmp: Tensor, num_tokens: int, kernel_stride: int) -> None:
    """Raises ValueError unless k_cmp has all the rows that kernels read."""
    if k_cmp.shape[0] < num_tokens // kernel_stride:
        raise ValueError(
            f"k_cmp has {k_cmp.shape[0]} rows; {num_tokens} tokens "
            f"with kernel_stride={kernel_stride} need {num_tokens // kernel_stride}. "
            "Fix: lay compressed tokens out as pool_windows does, with this stride."
        )


def check_compressed_values(
    q: Tensor, k_cmp: Tensor, sequences: Sequences, kernel_stride: int
) -> None:
    """Raises ValueError for sequences that do not fit compressed tokens; looks only on the CPU."""
    if sequences.cu_seqlens.device.type != "cpu":
        return
    num_tokens = q.shape[0] if sequences.cu_seqlens_q is None else int(sequences.cu_seqlens[-1])
    sequences.check_values(q.shape[0], num_tokens)
    check_compressed_rows(k_cmp, num_tokens, kernel_stride)


def default_scale(q: Tensor, scale: float | None) -> float:
    """The softmax scale, `D ** -0.5` for None. Raises ValueError unless it is a finite number."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if not is_finite_number(scale):
        raise ValueError(
            f"scale={scale!r} must be a finite number. Fix: leave it out for D ** -0.5."
        )
    return float(scale)
