"""Which implementation of an operator runs, and why.

Every operator has one `Backends`. "auto" takes the first implementation that can run a call;
a backend asked for by name runs or raises with the reason, and nothing falls back silently.
"""

import warnings
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch


class Call(Protocol):
    """What every operator's call has."""

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> torch.device: ...


C = TypeVar("C", bound=Call)


class Backend(ABC, Generic[C]):
    """One implementation of one operator: of some calls, on some machines."""

    name: str

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """Why the GPU `device`, or the current one if it is none, cannot run it, or None."""
        return None

    def refuses(self, call: C, *, backward: bool = False) -> str | None:
        """Why it cannot run this call, or None. backward: as well as its forward."""
        return None

    def avoids(self, call: C) -> str | None:
        """Why "auto" does not take it although it can run the call, or None."""
        return None

    @abstractmethod
    def forward(self, call: C) -> Any:
        """What the operator's reference returns."""

    def backward(self, call: C, *gradients: Any, **settings: Any) -> Any:
        """What the operator's reference returns for the gradients, where the operator has any."""
        raise RuntimeError(f"backend={self.name!r} has no gradient. Fix: detach what goes into it.")


class Backends(Generic[C]):
    """The implementations of one operator, in the order of "auto"; the last one always runs."""

    def __init__(self, operator: str, *backends: Backend[C]):
        self.operator = operator
        self.by_name = {backend.name: backend for backend in backends}
        self._warned: set[str] = set()

    def available(self) -> dict[str, str | None]:
        """The names of the backends, with the reason why each cannot run here (None: it can)."""
        return {name: backend.unavailable() for name, backend in self.by_name.items()}

    def check(self, name: Any) -> None:
        """Raises ValueError unless `name` is "auto" or a backend's."""
        check_known(name, self.operator, self)

    def or_auto(self, name: str) -> str:
        """`name` where the operator has a backend of this name, else "auto"."""
        return name if name in self.by_name else "auto"

    def named(self, name: str, device: torch.device | None = None) -> Backend[C]:
        """The backend of this name, which may not be "auto".

        Raises:
            ValueError: for a name that this operator does not have.
            RuntimeError: for a backend that cannot run on this machine, with the reason.
        """
        self.check(name)
        backend = self.by_name[name]
        if (reason := backend.unavailable(device)) is not None:
            raise RuntimeError(
                f"backend={name!r} of {self.operator} cannot run here: {reason}. "
                'Fix: use backend="auto".'
            )
        return backend

    def choose(self, call: C, *, backward: bool = False, warn: bool = True) -> Backend[C]:
        """The backend that `call.backend` stands for.

        Where "auto" leaves a GPU to the reference, a UserWarning says so, once for each reason,
        unless `warn` is False.

        Raises:
            ValueError: for a name that this operator does not have,
                or a call that the named backend cannot run.
            RuntimeError: for a backend that cannot run on this machine, with the reason.
        """
        if call.backend == "auto":
            passed_over = self.passed_over(call, backward=backward)
            backend = next(x for x in self.by_name.values() if x.name not in passed_over)
            if warn and backend.name == "reference" and passed_over and call.device.type == "cuda":
                self._warn("; ".join(dict.fromkeys(passed_over.values())))
            return backend
        backend = self.named(call.backend, call.device)
        if (reason := backend.refuses(call, backward=backward)) is not None:
            raise ValueError(
                f"backend={backend.name!r} of {self.operator} does not support this: {reason}. "
                'Fix: use backend="auto".'
            )
        return backend

    def run(self, call: C) -> Any:
        """What the backend of the call's choice returns."""
        return self.choose(call).forward(call)

    def differentiate(self, call: C, *gradients: Any) -> Any:
        """What the backend of the call's choice returns for the gradients."""
        return self.choose(call, backward=True).backward(call, *gradients)

    def passed_over(self, call: C, *, backward: bool = False) -> dict[str, str]:
        """The backends that come before the one that "auto" takes, with the reasons."""
        skipped: dict[str, str] = {}
        for name, backend in self.by_name.items():
            reason = (
                backend.unavailable(call.device)
                or backend.refuses(call, backward=backward)
                or backend.avoids(call)
            )
            if reason is None:
                return skipped
            skipped[name] = reason
        raise AssertionError(f"{self.operator} has no backend that always runs")

    def _warn(self, reason: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        warnings.warn(
            f"{self.operator} runs on a GPU as the reference, plain PyTorch in chunks, "
            f"which is slow: {reason}. Fix: give it what a faster backend supports, "
            'or pass backend="reference" to say that this is meant.',
            stacklevel=3,
        )


def check_known(name: Any, whole: str, *operators: Backends[Any]) -> None:
    """Raises ValueError unless `name` is "auto" or a backend of any of the whole's operators."""
    known = dict.fromkeys(
        ["auto", *(backend for operator in operators for backend in operator.by_name)]
    )
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"backend={name!r} is not an implementation of {whole}: allowed are {tuple(known)}. "
            'Fix: use backend="auto".'
        )
