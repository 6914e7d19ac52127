"""The gated sum of the branches as an operator, and the gates' part of the core's backward."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsa_fsa.checks import check_rows
from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import Call
from nsa_fsa.ops.common.registration import define_operator, gradient_of_call
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_dtype, unsupported_tensors
from nsa_fsa.ops.gated_combine import reference


def gated_combine(
    gate_logits: Tensor, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`sum over branches of sigmoid(gate_logits) * o` (NSA paper, eq. 5);
    branch order is compressed, selected, sliding.

    Args:
        gate_logits: `[T, HQ, 3]` (a gate per head) or `[T, 1, 3]` (shared by the heads),
            any float dtype.
        o_cmp, o_slc, o_swa: branch outputs `[T, HQ, DV]` of one dtype.
        backend: which implementation runs: "triton", "reference", or "auto":
            the first of them that can, on a GPU.

    Returns:
        `[T, HQ, DV]` in the branches' dtype.

    Raises:
        ValueError: for inconsistent shapes, dtypes or devices.
    """
    for name, o in (("o_cmp", o_cmp), ("o_slc", o_slc), ("o_swa", o_swa)):
        check_rows(name, o, 3, "[T, HQ, DV]")
        if not (o.shape == o_cmp.shape and o.dtype == o_cmp.dtype and o.device == o_cmp.device):
            raise ValueError(
                f"{name} is {o.dtype} {tuple(o.shape)} on {o.device} but o_cmp is "
                f"{o_cmp.dtype} {tuple(o_cmp.shape)} on {o_cmp.device}: the branches must agree. "
                "Fix: compute all three with the same q and the same width of values."
            )
    check_gates(gate_logits, o_cmp, "the branches")
    BACKENDS.check(backend)
    return OPERATOR(GatedCall(gate_logits, o_cmp, o_slc, o_swa, backend))


def check_gates(gate_logits: Tensor, rows: Tensor, whose: str) -> None:
    """Raises ValueError unless rows `[T, HQ, ...]` have a gate for every head, or one for all."""
    num_tokens, num_heads = rows.shape[:2]
    check_rows("gate_logits", gate_logits, 3, "[T, HQ or 1, 3]")
    if not (
        gate_logits.shape[0] == num_tokens
        and gate_logits.shape[1] in (1, num_heads)
        and gate_logits.shape[2] == 3
    ):
        raise ValueError(
            f"gate_logits has shape {tuple(gate_logits.shape)}; "
            f"it must be [{num_tokens}, {num_heads} or 1, 3]."
        )
    if gate_logits.device != rows.device:
        raise ValueError(
            f"gate_logits is on {gate_logits.device} but {whose} on {rows.device}. "
            "Fix: move them together."
        )


@dataclass(frozen=True)
class GatedCall(Call):
    """One call of `gated_combine`."""

    gate_logits: Tensor  # [T, HQ or 1, 3]
    o_cmp: Tensor  # [T, HQ, DV], as the other two
    o_slc: Tensor
    o_swa: Tensor
    backend: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gate_logits, self.o_cmp, self.o_slc, self.o_swa


class GatedGradients(NamedTuple):
    gate_logits: Tensor
    o_cmp: Tensor
    o_slc: Tensor
    o_swa: Tensor


@dataclass(frozen=True)
class BranchesCall(Call):
    """One call of the gates' part of the core's backward: see `reference.branch_gradients`."""

    do: Tensor  # [T, HQ, DV]
    outputs: tuple[Tensor | None, ...]  # [T, HQ, DV] of each branch; None for one that is left out
    lses: tuple[Tensor, ...]  # [T, HQ] of each branch
    gate_logits: Tensor  # [T, HQ or 1, 3]
    backend: str


def unsupported_gates(rows: Tensor, gate_logits: Tensor) -> str | None:
    """Why the Triton kernels cannot take these gates of rows like `[T, HQ, DV]`, or None."""
    reason = unsupported_tensors(rows, name="o_cmp")
    return reason or unsupported_dtype(gate_logits, "gate_logits")


class Triton(TritonBackend[GatedCall]):
    def refuses(self, call: GatedCall, *, backward: bool = False) -> str | None:
        return unsupported_gates(call.o_cmp, call.gate_logits)

    def forward(self, call: GatedCall) -> Tensor:
        from nsa_fsa.ops.gated_combine import triton as kernels

        return kernels.gated_combine(*call.tensors)

    def backward(self, call: GatedCall, do: Tensor) -> GatedGradients:
        from nsa_fsa.ops.gated_combine import triton as kernels

        return GatedGradients(*kernels.gated_combine_backward(do, *call.tensors))


class Reference(Backend[GatedCall]):
    name = "reference"

    def forward(self, call: GatedCall) -> Tensor:
        return reference.gated_combine(*call.tensors)

    def backward(self, call: GatedCall, do: Tensor) -> GatedGradients:
        return GatedGradients(*reference.gated_combine_backward(do, *call.tensors))


class TritonBranches(TritonBackend[BranchesCall]):
    def refuses(self, call: BranchesCall, *, backward: bool = False) -> str | None:
        return unsupported_gates(call.do, call.gate_logits)

    def forward(self, call: BranchesCall) -> tuple[Tensor, Tensor, Tensor]:
        from nsa_fsa.ops.gated_combine import triton as kernels

        return kernels.branch_gradients(call.do, call.outputs, call.lses, call.gate_logits)


class ReferenceBranches(Backend[BranchesCall]):
    name = "reference"

    def forward(
        self, call: BranchesCall
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        return reference.branch_gradients(call.do, call.outputs, call.lses, call.gate_logits)


def _fake(call: GatedCall) -> Tensor:
    return call.o_cmp.new_empty(call.o_cmp.shape)


BACKENDS = Backends("gated_combine", Triton(), Reference())
BRANCH_GRADIENTS = Backends("branch_gradients", TritonBranches(), ReferenceBranches())
_GRADIENT = gradient_of_call(GatedGradients, BACKENDS.differentiate)
OPERATOR = define_operator("gated_combine", GatedCall, Tensor, BACKENDS.run, _fake, _GRADIENT)
