"""Which implementation of an operator runs, and why.

Each operator file registers its implementations here by name. "auto" takes the first one, in order of registration, that
can run; a backend asked for by name runs or raises with the reason, and nothing falls back silently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _not_differentiable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this operator has no gradient")


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    `forward` and `backward` take and return what the operator's functions in `nsa_fsa.reference` do. `unavailable()` gives
    the reason why this machine cannot run it, or None.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] = _not_differentiable
    unavailable: Callable[[], str | None] = lambda: None


_BACKENDS: dict[str, dict[str, Backend]] = {}


def register(operator: str, backend: Backend) -> None:
    """Adds an implementation of an operator; the ones that "auto" should prefer are registered first."""
    _BACKENDS.setdefault(operator, {})[backend.name] = backend


def available(operator: str) -> dict[str, str | None]:
    """The names of an operator's backends, with the reason why each cannot run here (None: it can)."""
    return {name: backend.unavailable() for name, backend in _BACKENDS[operator].items()}


def resolve(operator: str, name: str) -> Backend:
    """The backend that `name` stands for.

    Raises:
        ValueError: for a name that this operator does not have.
        RuntimeError: for a backend that cannot run on this machine, with the reason.
    """
    candidates = _BACKENDS[operator]
    if name == "auto":
        return next(backend for backend in candidates.values() if backend.unavailable() is None)
    if name not in candidates:
        raise ValueError(
            f"backend={name!r} is not an implementation of {operator}: allowed are {('auto', *candidates)}. "
            'Fix: use backend="auto".'
        )
    if (reason := candidates[name].unavailable()) is not None:
        raise RuntimeError(f'backend={name!r} of {operator} cannot run here: {reason}. Fix: use backend="auto".')
    return candidates[name]
