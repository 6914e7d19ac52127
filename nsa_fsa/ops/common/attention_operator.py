"""How a branch's call becomes an operator: one autograd formula for the three of them.

A branch's backends are called as `forward(call) -> (o, lse)` and
`backward(call, do, softmax, add_to) -> (dq, dk, dv)`.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import (
    NOTHING,
    AddTo,
    AttentionCall,
    AttentionGradients,
    AttentionResult,
    Softmax,
)
from nsa_fsa.ops.common.reference_attention import (
    Chunk,
    attention,
    attention_backward,
    compute_dtype,
)
from nsa_fsa.ops.common.registration import Gradient, Operator, define_operator

A = TypeVar("A", bound=AttentionCall)


class AttentionBackend(Backend[A]):
    """One implementation of one branch."""

    @abstractmethod
    def forward(self, call: A) -> AttentionResult:
        """The output and the log-sum-exp of every query."""

    @abstractmethod
    def backward(
        self, call: A, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        """The gradients of q, k and v, or what they are added to where there is such."""


class ReferenceBackend(AttentionBackend[A]):
    """A branch in plain PyTorch."""

    name = "reference"

    @abstractmethod
    def chunks(self, call: A) -> Iterator[Chunk]:
        """Who sees what."""

    def forward(self, call: A) -> AttentionResult:
        return AttentionResult(*attention(call.q, call.k, call.v, self.chunks(call), call.scale))

    def backward(
        self, call: A, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        (o, lse, delta), chunks = softmax, self.chunks(call)
        tensors = (do, call.q, call.k, call.v, o, lse)
        return add_to.add(attention_backward(*tensors, chunks, call.scale, delta))


def define_attention(backends: Backends[A], kind: type[A]) -> Operator[A, AttentionResult]:
    """Registers a branch with torch.library, differentiable in q, k and v."""

    def forward(call: A) -> AttentionResult:
        call.check_values()
        return AttentionResult(*backends.run(call))

    def backward(call: A, do: Tensor, softmax: Softmax) -> AttentionGradients:
        return AttentionGradients(*backends.differentiate(call, do, softmax))

    gradient = Gradient(Softmax, _keep, AttentionGradients, backward)
    return define_operator(backends.operator, kind, AttentionResult, forward, fake_result, gradient)


def fake_result(call: AttentionCall) -> AttentionResult:
    """Shapes and dtypes of what a branch returns."""
    shape = call.q.shape[:2]
    lse = call.q.new_empty(shape, dtype=compute_dtype(call.q))
    return AttentionResult(call.q.new_empty(*shape, call.v.shape[2]), lse)


def _keep(_: AttentionCall, result: AttentionResult) -> Softmax:
    return Softmax(*result)
