"""What is timed, in general: calls without arguments, and an implementation that turns the inputs of a setting into them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.benchmarking.check import AttentionInputs
from nsa_fsa.benchmarking.measure import package_version
from nsa_fsa.benchmarking.settings import Setting


@dataclass
class Calls:
    """The three passes; a pass that an implementation does not have is None."""

    forward: Callable[[], Any]
    backward: Callable[[], tuple[Tensor, ...]] | None = None
    forward_backward: Callable[[], tuple[Tensor, ...]] | None = None
    not_timed: dict[str, str] = field(default_factory=dict)  # the reasons, by pass
    outputs: tuple[str, ...] = ("o",)  # what the forward returns; one tensor or a tuple
    gradients: tuple[str, ...] = ("dq", "dk", "dv")  # what backward and both return

    def of(self, name: str) -> Callable[[], Any] | None:
        return getattr(self, name)

    def named(self, name: str, result: Any) -> dict[str, Tensor]:
        """The tensors that a pass returned, by name."""
        names = self.outputs if name == "forward" else self.gradients
        return dict(zip(names, (result,) if isinstance(result, Tensor) else result, strict=True))


@dataclass(frozen=True)
class Implementation:
    """One way to compute something, what a person calls it, and which distribution's version to state."""

    name: str
    label: str
    kind: str  # "ours"; "full": causal attention over all keys; anything else: the same function by others
    prepare: Callable[[Any], Calls]
    load: Callable[[], Any] = lambda: None
    unsupported: Callable[[Setting], str | None] = lambda setting: None
    distribution: str = ""
    notes: str = ""
    facts: Callable[[Any, str], dict[str, Any]] = lambda inputs, name: {}  # more to record about a pass

    def missing(self) -> str | None:
        """Why it cannot be timed here, or None."""
        try:
            self.load()
        except Exception as error:  # a broken installation may raise anything
            return f"import failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        return None

    def version(self) -> str | None:
        return package_version(self.distribution) if self.distribution else None

    def describe(self, inputs: Any, name: str) -> dict[str, Any]:
        """What a row says about it beside its measurements."""
        return dict(label=self.label, version=self.version(), notes=self.notes, **self.facts(inputs, name))


def by_autograd(inputs: AttentionInputs, attention: Callable[..., Tensor]) -> Calls:
    """All passes of a differentiable function of q, k and v."""
    return differentiated((inputs.q, inputs.k, inputs.v), inputs.do, attention)


def differentiated(
    leaves: tuple[Tensor, ...], do: Tensor, attention: Callable[..., Tensor], gradients: tuple[str, ...] = ("dq", "dk", "dv")
) -> Calls:
    """All passes of a differentiable function of leaves; the backward alone reuses one graph."""
    detached = tuple(x.detach() for x in leaves)
    graph: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(*detached)

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(attention(*leaves))
        return torch.autograd.grad(graph[0], leaves, do, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*leaves), leaves, do)

    return Calls(forward, backward, forward_backward, gradients=gradients)
