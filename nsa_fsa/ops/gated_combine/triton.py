"""Gates in Triton: sigmoids and the weighted sum of the three branches in one pass over memory, and the gradients.

A program owns some (query, head) rows. Gradients of gates shared by the heads of a query are summed over these afterwards, in
a fixed order.

There are two backwards. That of the operator by itself writes every branch's share of do, three gigabytes at 65,536 tokens of
64 heads. That of the whole core, `branch_gradients`, writes none: a branch's backward computes p = exp(s - lse), and with
lse - log(gate) in place of lse every p, and with it dq, dk and dv, is scaled by the gate.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.primitives import kernel, load_rows, store_rows
from nsa_fsa.ops.common.sizes import cdiv, padded_dim, rows_contiguous

# Elements of a branch that a program holds: 16 a thread with 4 warps, two loads of 16 bytes in 16 bits.
ELEMENTS = 2048


@triton.jit
def load_gates(logits_ptr, token, gate_head, stride_t, stride_h, stride_b, inside):
    """The sigmoids of the three branches, float32 `[ROWS]` each."""
    at, stride_b = logits_ptr + token * stride_t + gate_head * stride_h, tl.cast(stride_b, tl.int64)
    gate_cmp = tl.sigmoid(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    gate_slc = tl.sigmoid(tl.load(at + stride_b, mask=inside, other=0.0).to(tl.float32))
    gate_swa = tl.sigmoid(tl.load(at + 2 * stride_b, mask=inside, other=0.0).to(tl.float32))
    return gate_cmp, gate_slc, gate_swa


@kernel
def gated_combine_fwd_kernel(
    logits_ptr, o_cmp_ptr, o_slc_ptr, o_swa_ptr, o_ptr,
    stride_logits_t, stride_logits_h, stride_logits_b, stride_cmp_t, stride_cmp_h, stride_slc_t, stride_slc_h,
    stride_swa_t, stride_swa_h, num_heads, total,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of [T * HQ]
    inside = row < total
    token, head = row // num_heads, row % num_heads
    gates = load_gates(logits_ptr, token, head, stride_logits_t, stride_logits_h, stride_logits_b, inside)
    o_cmp = load_rows(o_cmp_ptr, token * stride_cmp_t + head * stride_cmp_h, inside, DV, PADDED_DV, True).to(tl.float32)
    o_slc = load_rows(o_slc_ptr, token * stride_slc_t + head * stride_slc_h, inside, DV, PADDED_DV, True).to(tl.float32)
    o_swa = load_rows(o_swa_ptr, token * stride_swa_t + head * stride_swa_h, inside, DV, PADDED_DV, True).to(tl.float32)
    o = o_cmp * gates[0][:, None] + o_slc * gates[1][:, None] + o_swa * gates[2][:, None]
    store_rows(o_ptr, row * DV, o, inside, DV, PADDED_DV)


@triton.jit
def gate_gradient(do, branch_ptr, dbranch_ptr, at, row, gate, inside, DV: tl.constexpr, PADDED_DV: tl.constexpr):
    """Writes a branch's share of do, and returns the gradient of its gate's logit, float32 `[ROWS]`."""
    branch = load_rows(branch_ptr, at, inside, DV, PADDED_DV, True).to(tl.float32)
    store_rows(dbranch_ptr, row * DV, do * gate[:, None], inside, DV, PADDED_DV)
    return tl.sum(do * branch, 1) * gate * (1.0 - gate)


@kernel
def gated_combine_bwd_kernel(
    do_ptr, logits_ptr, o_cmp_ptr, o_slc_ptr, o_swa_ptr, dlogits_ptr, do_cmp_ptr, do_slc_ptr, do_swa_ptr,
    stride_do_t, stride_do_h, stride_logits_t, stride_logits_h, stride_logits_b, stride_cmp_t, stride_cmp_h, stride_slc_t,
    stride_slc_h, stride_swa_t, stride_swa_h, num_heads, total,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    token, head = row // num_heads, row % num_heads
    gates = load_gates(logits_ptr, token, head, stride_logits_t, stride_logits_h, stride_logits_b, inside)
    do = load_rows(do_ptr, token * stride_do_t + head * stride_do_h, inside, DV, PADDED_DV, True).to(tl.float32)
    at_cmp, at_slc = token * stride_cmp_t + head * stride_cmp_h, token * stride_slc_t + head * stride_slc_h
    at_swa = token * stride_swa_t + head * stride_swa_h
    d_cmp = gate_gradient(do, o_cmp_ptr, do_cmp_ptr, at_cmp, row, gates[0], inside, DV, PADDED_DV)
    d_slc = gate_gradient(do, o_slc_ptr, do_slc_ptr, at_slc, row, gates[1], inside, DV, PADDED_DV)
    d_swa = gate_gradient(do, o_swa_ptr, do_swa_ptr, at_swa, row, gates[2], inside, DV, PADDED_DV)
    to = dlogits_ptr + row * 3
    tl.store(to, d_cmp.to(dlogits_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 1, d_slc.to(dlogits_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 2, d_swa.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def branch_gradient(
    do, o_ptr, at, lse_ptr, logits_ptr, dlogits_ptr, gated_lse_ptr, delta_ptr, row, inside,
    DV: tl.constexpr, PADDED_DV: tl.constexpr,
):  # fmt: skip
    """One branch of `branch_gradients`; nothing of a branch that is left out."""
    if o_ptr is not None:
        o = load_rows(o_ptr, at, inside, DV, PADDED_DV, True).to(tl.float32)
        logit = tl.load(logits_ptr, mask=inside, other=0.0).to(tl.float32)
        delta = tl.sum(do * o, 1)
        gate = tl.sigmoid(logit)
        log_gate = tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))  # of the sigmoid, without overflow
        tl.store(dlogits_ptr + row, (delta * gate * (1.0 - gate)).to(dlogits_ptr.dtype.element_ty), mask=inside)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        # A closed gate is a log of -inf, and for a query that sees nothing lse is: their difference would be NaN.
        tl.store(gated_lse_ptr + row, tl.where(lse == -float("inf"), lse, lse - log_gate), mask=inside)
        tl.store(delta_ptr + row, delta, mask=inside)


@kernel
def branch_gradients_kernel(
    do_ptr, logits_ptr, o_cmp_ptr, o_slc_ptr, o_swa_ptr, lse_cmp_ptr, lse_slc_ptr, lse_swa_ptr,
    dlogits_ptr, gated_lse_ptr, delta_ptr,
    stride_do_t, stride_do_h, stride_logits_t, stride_logits_h, stride_logits_b, stride_cmp_t, stride_cmp_h, stride_slc_t,
    stride_slc_h, stride_swa_t, stride_swa_h, num_heads, total,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    token, head = row // num_heads, row % num_heads
    do = load_rows(do_ptr, token * stride_do_t + head * stride_do_h, inside, DV, PADDED_DV, True).to(tl.float32)
    logits_ptr += token * stride_logits_t + head * stride_logits_h
    stride_logits_b, every = tl.cast(stride_logits_b, tl.int64), tl.cast(total, tl.int64)
    at_cmp, at_slc = token * stride_cmp_t + head * stride_cmp_h, token * stride_slc_t + head * stride_slc_h
    at_swa = token * stride_swa_t + head * stride_swa_h
    branch_gradient(
        do, o_cmp_ptr, at_cmp, lse_cmp_ptr, logits_ptr, dlogits_ptr, gated_lse_ptr, delta_ptr, row, inside, DV, PADDED_DV
    )
    branch_gradient(
        do, o_slc_ptr, at_slc, lse_slc_ptr, logits_ptr + stride_logits_b,
        dlogits_ptr + every, gated_lse_ptr + every, delta_ptr + every, row, inside, DV, PADDED_DV,
    )  # fmt: skip
    branch_gradient(
        do, o_swa_ptr, at_swa, lse_swa_ptr, logits_ptr + 2 * stride_logits_b,
        dlogits_ptr + 2 * every, gated_lse_ptr + 2 * every, delta_ptr + 2 * every, row, inside, DV, PADDED_DV,
    )  # fmt: skip


def _gate_strides(gate_logits: Tensor) -> tuple[int, int, int]:
    """Of tokens, heads (0 for gates that these share) and branches."""
    token, head, branch = gate_logits.stride()
    return token, head if gate_logits.shape[1] > 1 else 0, branch


def _sizes(o: Tensor) -> tuple[int, dict[str, int]]:
    """The number of programs, and what the kernels know at compile time."""
    padded = padded_dim(o.shape[2])
    rows = max(ELEMENTS // padded, 1)
    return cdiv(o.shape[0] * o.shape[1], rows), dict(DV=o.shape[2], PADDED_DV=padded, ROWS=rows)


def gated_combine(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor) -> Tensor:
    """gate_logits `[T, HQ or 1, 3]`, branch outputs `[T, HQ, DV]` -> their sum `[T, HQ, DV]`, weighted by the sigmoids."""
    branches = [rows_contiguous(x) for x in (o_cmp, o_slc, o_swa)]
    o = o_cmp.new_empty(o_cmp.shape)
    if o.numel():
        programs, constants = _sizes(o)
        strides = (stride for x in branches for stride in x.stride()[:2])
        gated_combine_fwd_kernel[(programs,)](
            gate_logits, *branches, o, *_gate_strides(gate_logits), *strides, o.shape[1], o.shape[0] * o.shape[1], **constants
        )
    return o


def gated_combine_backward(
    do: Tensor, gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate_logits and of the three branches, each in its own shape and dtype."""
    num_tokens, num_heads, _ = o_cmp.shape
    do, *branches = (rows_contiguous(x) for x in (do, o_cmp, o_slc, o_swa))
    shared = gate_logits.shape[1] != num_heads
    dlogits = gate_logits.new_empty(num_tokens, num_heads, 3, dtype=torch.float32 if shared else gate_logits.dtype)
    dbranches = [o_cmp.new_empty(o_cmp.shape) for _ in range(3)]
    if o_cmp.numel():
        programs, constants = _sizes(o_cmp)
        strides = (stride for x in (do, *branches) for stride in x.stride()[:2])
        do_strides = [next(strides), next(strides)]
        gated_combine_bwd_kernel[(programs,)](
            do, gate_logits, *branches, dlogits, *dbranches, *do_strides, *_gate_strides(gate_logits), *strides,
            num_heads, num_tokens * num_heads, **constants,
        )  # fmt: skip
    else:
        dlogits.zero_()
    if shared:
        dlogits = dlogits.sum(1, keepdim=True).to(gate_logits.dtype)
    return dlogits, *dbranches  # type: ignore[return-value]


def branch_gradients(
    do: Tensor, outputs: Sequence[Tensor | None], statistics: Sequence[Tensor], gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `nsa_fsa.reference`: gradients of the gates' logits, lse and delta, branch by branch, in one pass over do."""
    num_tokens, num_heads, _ = do.shape
    do = rows_contiguous(do)
    branches = [None if o is None else rows_contiguous(o) for o in outputs]
    shared = gate_logits.shape[1] != num_heads
    dlogits = do.new_empty(3, num_tokens, num_heads, dtype=torch.float32 if shared else gate_logits.dtype)
    gated_lse, delta = (torch.empty(3, num_tokens, num_heads, dtype=torch.float32, device=do.device) for _ in range(2))
    if do.numel():
        programs, constants = _sizes(do)
        strides = (stride for x in (do, *branches) for stride in ((0, 0) if x is None else x.stride()[:2]))
        do_strides = [next(strides), next(strides)]
        branch_gradients_kernel[(programs,)](
            do, gate_logits, *branches, *statistics, dlogits, gated_lse, delta,
            *do_strides, *_gate_strides(gate_logits), *strides, num_heads, num_tokens * num_heads, **constants,
        )  # fmt: skip
    if shared:
        dlogits = dlogits.sum(2, keepdim=True).to(gate_logits.dtype)
    return dlogits, gated_lse, delta
