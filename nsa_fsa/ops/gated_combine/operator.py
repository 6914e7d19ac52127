"""The gated sum of the three branches as an operator."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.gated_combine import reference


def gated_combine(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, *, backend: str = "auto") -> Tensor:
    """`sum over branches of sigmoid(gate_logits) * o` (NSA paper, eq. 5); branch order is compressed, selected, sliding.

    Args:
        gate_logits: `[T, HQ, 3]` (a gate per head) or `[T, 1, 3]` (shared by the heads), any float dtype.
        o_cmp, o_slc, o_swa: branch outputs `[T, HQ, DV]` of one dtype.
        backend: which implementation runs: "triton", "reference", or "auto": the first of them that can, on a GPU.

    Returns:
        `[T, HQ, DV]` in the branches' dtype.

    Raises:
        ValueError: for inconsistent shapes, dtypes or devices.
    """
    for name, o in (("o_cmp", o_cmp), ("o_slc", o_slc), ("o_swa", o_swa)):
        checks.check_rows(name, o, 3, "[T, HQ, DV]")
        checks.require(
            o.shape == o_cmp.shape and o.dtype == o_cmp.dtype and o.device == o_cmp.device,
            lambda: (
                f"{name} is {o.dtype} {tuple(o.shape)} on {o.device} but o_cmp is {o_cmp.dtype} {tuple(o_cmp.shape)} on "
                f"{o_cmp.device}: the branches must agree. Fix: compute all three with the same q and the same width of values."
            ),
        )
    check_gates(gate_logits, o_cmp, "the branches")
    backends.check_known(backend, "gated_combine")
    return _forward(gate_logits, o_cmp, o_slc, o_swa, backend)


def check_gates(gate_logits: Tensor, rows: Tensor, whose: str) -> None:
    """Raises ValueError unless there is a gate for every head of `rows`, `[T, HQ, ...]`, or one for all."""
    num_tokens, num_heads = rows.shape[:2]
    checks.check_rows("gate_logits", gate_logits, 3, "[T, HQ or 1, 3]")
    checks.require(
        gate_logits.shape[0] == num_tokens and gate_logits.shape[1] in (1, num_heads) and gate_logits.shape[2] == 3,
        lambda: f"gate_logits has shape {tuple(gate_logits.shape)}; it must be [{num_tokens}, {num_heads} or 1, 3].",
    )
    checks.require(
        gate_logits.device == rows.device,
        lambda: f"gate_logits is on {gate_logits.device} but {whose} on {rows.device}. Fix: move them together.",
    )


def _forward_run(gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, backend: str) -> Tensor:
    return backends.to_run("gated_combine", backend, gate_logits, o_cmp).forward(gate_logits, o_cmp, o_slc, o_swa)


def _forward_fake(gate_logits, o_cmp, o_slc, o_swa, backend):
    return o_cmp.new_empty(o_cmp.shape)


def _backward_run(
    do: Tensor, gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.to_run("gated_combine", backend, gate_logits, o_cmp, backward=True).backward(
        do, gate_logits, o_cmp, o_slc, o_swa
    )


def _backward_fake(do, gate_logits, o_cmp, o_slc, o_swa, backend):
    return gate_logits.new_empty(gate_logits.shape), *(o_cmp.new_empty(o_cmp.shape) for _ in range(3))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _vjp(ctx, do):
    return *_backward(do, *ctx.saved_tensors, ctx.backend), None


_backward = define_operator("gated_combine_backward", _backward_run, _backward_fake)
_forward = define_operator("gated_combine", _forward_run, _forward_fake, setup_context=_setup_context, vjp=_vjp)


def _unsupported(gate_logits: Tensor, o_cmp: Tensor, *_: Tensor, **__: Any) -> str | None:
    """Why the Triton kernels cannot run these arguments, or None."""
    if (reason := triton_backends.unsupported_tensors(o_cmp, name="o_cmp")) is not None:
        return reason
    return triton_backends.unsupported_dtype(gate_logits, "gate_logits")


def _triton_forward(*tensors: Tensor) -> Tensor:
    from nsa_fsa.ops.gated_combine import triton as kernels

    return kernels.gated_combine(*tensors)


def _triton_backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nsa_fsa.ops.gated_combine import triton as kernels

    return kernels.gated_combine_backward(*tensors)


def _triton_branch_gradients(
    do: Tensor, outputs: Sequence[Tensor | None], statistics: Sequence[Tensor], gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from nsa_fsa.ops.gated_combine import triton as kernels

    return kernels.branch_gradients(do, outputs, statistics, gate_logits)


backends.register(
    "gated_combine",
    backends.Backend(
        "triton", _triton_forward, _triton_backward, triton_backends.unavailable, _unsupported, triton_backends.elsewhere
    ),
)
backends.register("gated_combine", backends.Backend("reference", reference.gated_combine, reference.gated_combine_backward))

# The gates' part of the whole core's backward; not an operator, `nsa_attention` calls it.
backends.register(
    "branch_gradients",
    backends.Backend(
        "triton", _triton_branch_gradients, unavailable=triton_backends.unavailable, unsupported=_unsupported,
        avoided=triton_backends.elsewhere,
    ),
)  # fmt: skip
backends.register("branch_gradients", backends.Backend("reference", reference.branch_gradients))
