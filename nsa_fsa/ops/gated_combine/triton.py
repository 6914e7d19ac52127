"""Gates in Triton: the sum of the three branches, weighted by sigmoids, and its gradients.

A program owns some pairs, a query and one of its heads each, and reads their rows once. Where the
heads of a query share their gates, the gradients of these are summed over the heads afterwards, in
a fixed order.

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

from nsa_fsa.ops.common.bundles import Heads, Pairs, constants, heads
from nsa_fsa.ops.common.primitives import kernel, load_pairs, store_rows
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


class Sizes(NamedTuple):
    """What is alike in all programs of a launch; a constant of the kernels."""

    DV: int
    PADDED_DV: int
    PAIRS: int  # of a program


@triton.jit
def pairs_of_program(num_heads, total, SIZES: tl.constexpr):
    """The numbers, query * HQ + head in int64, of this program's pairs, and the `Pairs`."""
    number = tl.program_id(0).to(tl.int64) * SIZES.PAIRS + tl.arange(0, SIZES.PAIRS)
    return number, Pairs(number // num_heads, number % num_heads, number < total)


@triton.jit
def load_floats(x, pairs, SIZES: tl.constexpr):
    """The pairs' rows of x, which is `Heads`, float32 `[PAIRS, PADDED_DV]`."""
    return load_pairs(x, pairs, SIZES.DV, SIZES.PADDED_DV).to(tl.float32)


@triton.jit
def load_logit(gates, branch, pairs):
    """The logits of a branch's gate, float32 `[PAIRS]`."""
    at = gates.ptr + pairs.query * gates.stride_t + pairs.head * gates.stride_h
    at += branch * tl.cast(gates.stride_b, tl.int64)
    return tl.load(at, mask=pairs.inside, other=0.0).to(tl.float32)


@kernel
def gated_combine_fwd_kernel(gates, outputs, o_ptr, num_heads, total, SIZES: tl.constexpr):
    """The sum of the branches' outputs, three `Heads`, weighted by their gates."""
    number, pairs = pairs_of_program(num_heads, total, SIZES)
    gate_cmp = tl.sigmoid(load_logit(gates, 0, pairs))[:, None]
    gate_slc = tl.sigmoid(load_logit(gates, 1, pairs))[:, None]
    gate_swa = tl.sigmoid(load_logit(gates, 2, pairs))[:, None]

    cmp = load_floats(outputs[0], pairs, SIZES)
    slc = load_floats(outputs[1], pairs, SIZES)
    swa = load_floats(outputs[2], pairs, SIZES)
    o = cmp * gate_cmp + slc * gate_slc + swa * gate_swa
    store_rows(o_ptr, number * SIZES.DV, o, pairs.inside, SIZES.DV, SIZES.PADDED_DV)


@kernel
def gated_combine_bwd_kernel(
    do, gates, outputs, dlogits_ptr, do_ptrs, num_heads, total, SIZES: tl.constexpr
):
    """The gradients of the logits, `[T, HQ, 3]`, and of the three outputs, contiguous."""
    number, pairs = pairs_of_program(num_heads, total, SIZES)
    gates_of_pairs = (
        tl.sigmoid(load_logit(gates, 0, pairs)),
        tl.sigmoid(load_logit(gates, 1, pairs)),
        tl.sigmoid(load_logit(gates, 2, pairs)),
    )
    grad = load_floats(do, pairs, SIZES)
    for branch in tl.static_range(3):
        gate = gates_of_pairs[branch]
        o = load_floats(outputs[branch], pairs, SIZES)
        at = number * SIZES.DV
        grad_of_branch = grad * gate[:, None]
        store_rows(do_ptrs[branch], at, grad_of_branch, pairs.inside, SIZES.DV, SIZES.PADDED_DV)
        dlogit = tl.sum(grad * o, 1) * gate * (1.0 - gate)
        dlogit = dlogit.to(dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + number * 3 + branch, dlogit, mask=pairs.inside)


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
    SIZES: tl.constexpr,
):
    """What `branch_gradients` returns: dlogits `[T, HQ, 3]`, gated_lse and delta `[3, T, HQ]`.

    outputs and lse_ptrs have a member for each branch. Nothing is written where the output is None.
    """
    number, pairs = pairs_of_program(num_heads, total, SIZES)
    grad = load_floats(do, pairs, SIZES)
    for branch in tl.static_range(3):
        if outputs[branch] is not None:
            first = branch * tl.cast(total, tl.int64)
            logit = load_logit(gates, branch, pairs)
            lse = tl.load(lse_ptrs[branch] + number, mask=pairs.inside, other=0.0)
            # The log of the sigmoid does not overflow in this form.
            log_gate = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
            # The lse of a query that sees nothing is -inf, as is the log of a closed gate: their
            # difference would be NaN.
            gated_lse = tl.where(lse == -float("inf"), lse, lse - log_gate)
            tl.store(gated_lse_ptr + first + number, gated_lse, mask=pairs.inside)

            o = load_floats(outputs[branch], pairs, SIZES)
            delta = tl.sum(grad * o, 1)
            gate = tl.sigmoid(logit)
            dlogit = (delta * gate * (1.0 - gate)).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + number * 3 + branch, dlogit, mask=pairs.inside)
            tl.store(delta_ptr + first + number, delta, mask=pairs.inside)


def gates_of(gate_logits: Tensor) -> Gates:
    """What a kernel is given of the gates' logits `[T, HQ or 1, 3]`."""
    stride_t, stride_h, stride_b = gate_logits.stride()
    return Gates(gate_logits, stride_t, stride_h if gate_logits.shape[1] > 1 else 0, stride_b)


def contiguous_heads(x: Tensor) -> Heads:
    """What a kernel is given of `[T, HQ, DV]`, which is copied if its rows are not contiguous."""
    return heads(rows_contiguous(x))


def cut_pairs(o: Tensor) -> tuple[tuple[int], tuple[int, int, Sizes]]:
    """The grid of a kernel of pairs of `[T, HQ, DV]`, and its last arguments from num_heads on."""
    num_tokens, num_heads, width = o.shape
    padded, total = padded_dim(width), num_tokens * num_heads
    pairs = max(ELEMENTS // padded, 1)
    sizes = constants(Sizes(width, padded, pairs))
    return (cdiv(total, pairs),), (num_heads, total, sizes)


def new_dlogits(gate_logits: Tensor, num_heads: int) -> Tensor:
    """What a kernel writes the gradients of logits `[T, HQ or 1, 3]` to: `[T, HQ, 3]`, float32 if
    `sum_shared` is to add up those of several heads.
    """
    num_tokens, num_gates, _ = gate_logits.shape
    dtype = gate_logits.dtype if num_gates == num_heads else torch.float32
    return gate_logits.new_empty(num_tokens, num_heads, 3, dtype=dtype)


def sum_shared(dlogits: Tensor, gate_logits: Tensor) -> Tensor:
    """The gradients `[T, HQ, 3]`, added up where the heads of a query share their gates."""
    if gate_logits.shape == dlogits.shape:
        return dlogits
    return dlogits.sum(1, keepdim=True).to(gate_logits.dtype)


def gated_combine(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor) -> Tensor:
    """The sum of the branches `[T, HQ, DV]`, each times the sigmoid of its gate_logits."""
    o = o_cmp.new_empty(o_cmp.shape)
    if o.numel():
        grid, arguments = cut_pairs(o)
        outputs = tuple(contiguous_heads(x) for x in (o_cmp, o_slc, o_swa))
        gated_combine_fwd_kernel[grid](gates_of(gate_logits), outputs, o, *arguments)
    return o


def gated_combine_backward(
    do: Tensor, gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate_logits and of the three branches, each in its own shape and dtype."""
    dlogits = new_dlogits(gate_logits, o_cmp.shape[1])
    do_cmp, do_slc, do_swa = (o_cmp.new_empty(o_cmp.shape) for _ in range(3))
    if o_cmp.numel():
        grid, arguments = cut_pairs(o_cmp)
        outputs = tuple(contiguous_heads(x) for x in (o_cmp, o_slc, o_swa))
        gated_combine_bwd_kernel[grid](
            *(contiguous_heads(do), gates_of(gate_logits), outputs),
            *(dlogits, (do_cmp, do_slc, do_swa), *arguments),
        )
    else:
        dlogits.zero_()
    return sum_shared(dlogits, gate_logits), do_cmp, do_slc, do_swa


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
    dlogits = new_dlogits(gate_logits, do.shape[1])
    gated_lse, delta = (do.new_empty(3, *do.shape[:2], dtype=torch.float32) for _ in range(2))
    if do.numel():
        grid, arguments = cut_pairs(do)
        branch_gradients_kernel[grid](
            *(contiguous_heads(do), gates_of(gate_logits)),
            tuple(None if o is None else contiguous_heads(o) for o in outputs),
            *(tuple(lses), dlogits, gated_lse, delta, *arguments),
        )
    return sum_shared(dlogits, gate_logits), gated_lse, delta
