"""Gates and the weighted sum of compressed, selected and sliding (docs/spec.md, section 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_fsa.ops.common.reference_attention import compute_dtype


def gated_combine(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor) -> Tensor:
    """gate_logits `[T, HQ or 1, 3]`, branches `[T, HQ, DV]` -> their sum, weighted by sigmoids."""
    dtype = compute_dtype(o_cmp)
    g = torch.sigmoid(gate_logits.to(dtype))
    branches = torch.stack((o_cmp, o_slc, o_swa), dim=-1).to(dtype)  # [T, HQ, DV, 3]
    return (branches * g[:, :, None, :]).sum(-1).to(o_cmp.dtype)


def gated_combine_backward(
    do: Tensor, gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to gate_logits and the three branch outputs."""
    dtype = compute_dtype(o_cmp)
    g = torch.sigmoid(gate_logits.to(dtype))
    branches = torch.stack((o_cmp, o_slc, o_swa), dim=-1).to(dtype)
    do = do.to(dtype)
    dg = (do[..., None] * branches).sum(2)  # [T, HQ, 3]
    if gate_logits.shape[1] == 1:
        dg = dg.sum(1, keepdim=True)
    dbranches = (do[..., None] * g[:, :, None, :]).to(o_cmp.dtype)
    # Cloned, because an operator's outputs must not share memory, not even that of an empty tensor.
    do_cmp, do_slc, do_swa = (
        x.clone(memory_format=torch.contiguous_format) for x in dbranches.unbind(-1)
    )
    return (dg * g * (1 - g)).to(gate_logits.dtype).contiguous(), do_cmp, do_slc, do_swa


def branch_gradients(
    do: Tensor, outputs: Sequence[Tensor | None], lses: Sequence[Tensor], gate_logits: Tensor
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """The gates, backward, without gated copies of do.

    A branch's gradients are linear in each query's weights p = exp(s - lse) once delta is known. So
    the branch's backward may be given the do of the gated sum: with lse - log(gate) for lse, every
    p is multiplied by the gate.

    Args:
        do: `[T, HQ, DV]`, the gradient of the gated sum.
        outputs, lses: o `[T, HQ, DV]` and lse `[T, HQ]` of the three branches;
            None for one that is left out.
        gate_logits: `[T, HQ or 1, 3]`.

    Returns:
        The gradient of gate_logits, and for each branch lse - log(gate)
        `[T, HQ]` and delta = sum(o * do) `[T, HQ]`; of a branch that is left out anything.
    """
    dtype = compute_dtype(do)
    dlogits = gate_logits.new_empty(gate_logits.shape)
    gated_lses: list[Tensor | None] = [None] * 3
    deltas: list[Tensor | None] = [None] * 3
    for branch, (o, lse) in enumerate(zip(outputs, lses, strict=True)):
        if o is None:
            continue
        logits = gate_logits[..., branch].to(dtype)
        g, delta = torch.sigmoid(logits), (do.to(dtype) * o.to(dtype)).sum(-1)
        dg = delta.sum(1, keepdim=True) if gate_logits.shape[1] == 1 else delta
        dlogits[..., branch] = dg * g * (1 - g)
        # A closed gate is a log of -inf, and for a query that sees nothing lse is:
        # their difference would be NaN.
        log_gate = torch.nn.functional.logsigmoid(logits)
        gated_lses[branch] = torch.where(lse == -torch.inf, lse, lse - log_gate)
        deltas[branch] = delta
    return dlogits, gated_lses, deltas
