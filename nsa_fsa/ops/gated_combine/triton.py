"""Gates in Triton: the sum of the three branches, weighted by sigmoids, and its gradients.

A program owns some (query, head) rows and reads them once. Where the heads of a query share their
gates, the gradients of these are summed over the heads afterwards, in a fixed order.

There are two backwards. That of the operator by itself writes every branch's share of do, which is
three gigabytes at 65,536 tokens of 64 heads. That of the whole core, `branch_gradients`, writes
none: a branch's backward computes p = exp(s - lse), and with lse - log(gate) in place of lse every
p, and with it dq, dk and dv, is scaled by the gate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import Heads, heads
from nsa_fsa.ops.common.primitives import kernel, load_rows, store_rows
from nsa_fsa.ops.common.sizes import cdiv, padded_dim, rows_contiguous

# A program holds so many elements of a branch: 16 for each thread of 4 warps. In 16 bits that makes
# two loads of 16 bytes.
ELEMENTS = 2048


class Gates(NamedTuple):
    """The gates' logits `[T, HQ, 3]` in a kernel; gates that the heads share have a stride of 0."""

    ptr: Any
    stride_t: Any
    stride_h: Any
    stride_b: Any


class Rows(NamedTuple):
    """The (query, head) rows of a program, `[ROWS]`."""

    number: Any  # query * HQ + head, int64
    token: Any
    head: Any
    inside: Any  # whether there is such a row


@triton.jit
def rows_of_program(num_heads, total, ROWS: tl.constexpr):
    """The rows that this program owns of `total` in all."""
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return Rows(number, number // num_heads, number % num_heads, number < total)


@triton.jit
def load_heads(x, rows, DV: tl.constexpr, PADDED_DV: tl.constexpr):
    """The rows of x, which is `Heads`, in float32 `[ROWS, PADDED_DV]`."""
    at = rows.token * x.stride_t + rows.head * x.stride_h
    return load_rows(x.ptr, at, rows.inside, DV, PADDED_DV, True).to(tl.float32)


@triton.jit
def load_logit(gates, branch, rows):
    """The logits of a branch's gate, float32 `[ROWS]`."""
    at = gates.ptr + rows.token * gates.stride_t + rows.head * gates.stride_h
    at += branch * tl.cast(gates.stride_b, tl.int64)
    return tl.load(at, mask=rows.inside, other=0.0).to(tl.float32)


@kernel
def gated_combine_fwd_kernel(
    gates,
    o_cmp,
    o_slc,
    o_swa,
    o_ptr,
    num_heads,
    total,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of the branches, weighted by their gates; all are `Heads`."""
    rows = rows_of_program(num_heads, total, ROWS)
    gate_cmp = tl.sigmoid(load_logit(gates, 0, rows))[:, None]
    gate_slc = tl.sigmoid(load_logit(gates, 1, rows))[:, None]
    gate_swa = tl.sigmoid(load_logit(gates, 2, rows))[:, None]

    cmp = load_heads(o_cmp, rows, DV, PADDED_DV)
    slc = load_heads(o_slc, rows, DV, PADDED_DV)
    swa = load_heads(o_swa, rows, DV, PADDED_DV)
    o = cmp * gate_cmp + slc * gate_slc + swa * gate_swa
    store_rows(o_ptr, rows.number * DV, o, rows.inside, DV, PADDED_DV)


@triton.jit
def gate_gradient(do, o, do_branch_ptr, gate, rows, DV: tl.constexpr, PADDED_DV: tl.constexpr):
    """Writes a branch's share of do; returns the gradient of its gate's logit, float32 `[ROWS]`."""
    branch = load_heads(o, rows, DV, PADDED_DV)
    store_rows(do_branch_ptr, rows.number * DV, do * gate[:, None], rows.inside, DV, PADDED_DV)
    return tl.sum(do * branch, 1) * gate * (1.0 - gate)


@kernel
def gated_combine_bwd_kernel(
    do,
    gates,
    o_cmp,
    o_slc,
    o_swa,
    dlogits_ptr,
    do_cmp_ptr,
    do_slc_ptr,
    do_swa_ptr,
    num_heads,
    total,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of the logits, `[T, HQ, 3]`, and of the branches, contiguous."""
    rows = rows_of_program(num_heads, total, ROWS)
    gate_cmp = tl.sigmoid(load_logit(gates, 0, rows))
    gate_slc = tl.sigmoid(load_logit(gates, 1, rows))
    gate_swa = tl.sigmoid(load_logit(gates, 2, rows))

    grad = load_heads(do, rows, DV, PADDED_DV)
    d_cmp = gate_gradient(grad, o_cmp, do_cmp_ptr, gate_cmp, rows, DV, PADDED_DV)
    d_slc = gate_gradient(grad, o_slc, do_slc_ptr, gate_slc, rows, DV, PADDED_DV)
    d_swa = gate_gradient(grad, o_swa, do_swa_ptr, gate_swa, rows, DV, PADDED_DV)

    to = dlogits_ptr + rows.number * 3
    tl.store(to, d_cmp.to(dlogits_ptr.dtype.element_ty), mask=rows.inside)
    tl.store(to + 1, d_slc.to(dlogits_ptr.dtype.element_ty), mask=rows.inside)
    tl.store(to + 2, d_swa.to(dlogits_ptr.dtype.element_ty), mask=rows.inside)


@kernel
def branch_gradients_kernel(
    do,
    gates,
    outputs,
    lse_ptrs,
    dlogits_ptr,
    gated_lse_ptr,
    delta_ptr,
    num_heads,
    total,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What `branch_gradients` returns: dlogits `[T, HQ, 3]`, gated_lse and delta `[3, T, HQ]`.

    outputs and lse_ptrs have a member for each branch. Nothing is written where the output is None.
    """
    rows = rows_of_program(num_heads, total, ROWS)
    grad = load_heads(do, rows, DV, PADDED_DV)
    for branch in tl.static_range(3):
        if outputs[branch] is not None:
            first = branch * tl.cast(total, tl.int64)
            logit = load_logit(gates, branch, rows)
            lse = tl.load(lse_ptrs[branch] + rows.number, mask=rows.inside, other=0.0)
            # The log of the sigmoid does not overflow in this form.
            log_gate = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
            # The lse of a query that sees nothing is -inf, as is the log of a closed gate: their
            # difference would be NaN.
            gated_lse = tl.where(lse == -float("inf"), lse, lse - log_gate)
            tl.store(gated_lse_ptr + first + rows.number, gated_lse, mask=rows.inside)

            o = load_heads(outputs[branch], rows, DV, PADDED_DV)
            delta = tl.sum(grad * o, 1)
            gate = tl.sigmoid(logit)
            dlogit = (delta * gate * (1.0 - gate)).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + rows.number * 3 + branch, dlogit, mask=rows.inside)
            tl.store(delta_ptr + first + rows.number, delta, mask=rows.inside)


def gates_of(gate_logits: Tensor) -> Gates:
    """What a kernel is given of the gates' logits `[T, HQ or 1, 3]`."""
    stride_t, stride_h, stride_b = gate_logits.stride()
    return Gates(gate_logits, stride_t, stride_h if gate_logits.shape[1] > 1 else 0, stride_b)


def contiguous_heads(x: Tensor) -> Heads:
    """What a kernel is given of `[T, HQ, DV]`, which is copied if its rows are not contiguous."""
    return heads(rows_contiguous(x))


def cut_rows(o: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs own the rows of `[T, HQ, DV]`, and what is constant in a kernel."""
    num_tokens, num_heads, width = o.shape
    padded = padded_dim(width)
    rows = max(ELEMENTS // padded, 1)
    return (cdiv(num_tokens * num_heads, rows),), dict(DV=width, PADDED_DV=padded, ROWS=rows)


def gated_combine(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor) -> Tensor:
    """The sum of the branches `[T, HQ, DV]`, each times the sigmoid of its gate_logits.

    gate_logits: `[T, HQ or 1, 3]`; o_cmp, o_slc and o_swa: `[T, HQ, DV]`.
    """
    num_tokens, num_heads, _ = o_cmp.shape
    o = o_cmp.new_empty(o_cmp.shape)
    if o.numel():
        grid, constants = cut_rows(o)
        branches = (contiguous_heads(branch) for branch in (o_cmp, o_slc, o_swa))
        total = num_tokens * num_heads
        gated_combine_fwd_kernel[grid](
            gates_of(gate_logits), *branches, o, num_heads, total, **constants
        )
    return o


def gated_combine_backward(
    do: Tensor, gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate_logits and of the three branches, each in its own shape and dtype."""
    num_tokens, num_heads, _ = o_cmp.shape
    shared = gate_logits.shape[1] != num_heads
    dtype = torch.float32 if shared else gate_logits.dtype
    dlogits = gate_logits.new_empty(num_tokens, num_heads, 3, dtype=dtype)
    do_cmp, do_slc, do_swa = (o_cmp.new_empty(o_cmp.shape) for _ in range(3))

    if o_cmp.numel():
        grid, constants = cut_rows(o_cmp)
        gated_combine_bwd_kernel[grid](
            contiguous_heads(do),
            gates_of(gate_logits),
            *(contiguous_heads(branch) for branch in (o_cmp, o_slc, o_swa)),
            *(dlogits, do_cmp, do_slc, do_swa),
            num_heads,
            num_tokens * num_heads,
            **constants,
        )
    else:
        dlogits.zero_()

    if shared:
        dlogits = dlogits.sum(1, keepdim=True).to(gate_logits.dtype)
    return dlogits, do_cmp, do_slc, do_swa


def branch_gradients(
    do: Tensor, outputs: Sequence[Tensor | None], lses: Sequence[Tensor], gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates' logits, and gated lse and delta `[3, T, HQ]`, in one pass over do.

    Args:
        do: gradient of the gated sum, `[T, HQ, DV]`.
        outputs: of the three branches, `[T, HQ, DV]`; None where nothing is wanted.
        lses: of the three branches, float32 `[T, HQ]`.
        gate_logits: `[T, HQ or 1, 3]`, as its gradient.
    """
    num_tokens, num_heads, _ = do.shape
    shared = gate_logits.shape[1] != num_heads
    dtype = torch.float32 if shared else gate_logits.dtype
    dlogits = do.new_empty(num_tokens, num_heads, 3, dtype=dtype)
    gated_lse, delta = (
        do.new_empty(3, num_tokens, num_heads, dtype=torch.float32) for _ in range(2)
    )

    if do.numel():
        grid, constants = cut_rows(do)
        branch_gradients_kernel[grid](
            contiguous_heads(do),
            gates_of(gate_logits),
            tuple(None if o is None else contiguous_heads(o) for o in outputs),
            tuple(lses),
            *(dlogits, gated_lse, delta),
            num_heads,
            num_tokens * num_heads,
            **constants,
        )

    if shared:
        dlogits = dlogits.sum(1, keepdim=True).to(gate_logits.dtype)
    return dlogits, gated_lse, delta
