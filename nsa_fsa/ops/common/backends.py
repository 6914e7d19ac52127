"""Which implementation of an operator runs, and why.

Each operator file registers its implementations here by name. "auto" takes the first one, in order of registration, that
can run; a backend asked for by name runs or raises with the reason, and nothing falls back silently.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _not_differentiable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this operator has no gradient")


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator.

    `forward` and `backward` take what the operator passes and return what its functions in `nsa_fsa.reference` do.
    `unavailable(device)` gives the reason why the GPU `device`, or the current one where it is None or no GPU, cannot run it,
    or None; `unsupported(*tensors, backward=bool, **arguments)`, called with an operator's own arguments, the reason why it
    cannot run them; `avoided(*tensors, **arguments)` the reason why "auto" does not take it although it can, or None.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] = _not_differentiable
    unavailable: Callable[[torch.device | None], str | None] = lambda _: None
    unsupported: Callable[..., str | None] = lambda *_, **__: None
    avoided: Callable[..., str | None] = lambda *_, **__: None


_BACKENDS: dict[str, dict[str, Backend]] = {}


def register(operator: str, backend: Backend) -> None:
    """Adds an implementation of an operator; the ones that "auto" should prefer are registered first."""
    _BACKENDS.setdefault(operator, {})[backend.name] = backend


def available(operator: str) -> dict[str, str | None]:
    """The names of an operator's backends, with the reason why each cannot run here (None: it can)."""
    return {name: backend.unavailable(None) for name, backend in _BACKENDS[operator].items()}


def resolve(operator: str, name: str, *tensors: Tensor, backward: bool = False, **arguments: Any) -> Backend:
    """The backend that `name` stands for; with the operator's own arguments, the one that can run these.

    Raises:
        ValueError: for a name that this operator does not have, or arguments that the named backend does not support.
        RuntimeError: for a backend that cannot run on this machine, with the reason.
    """
    candidates = _BACKENDS[operator]
    if name == "auto":
        skipped = passed_over(operator, *tensors, backward=backward, **arguments)
        return next(backend for backend in candidates.values() if backend.name not in skipped)
    if name not in candidates:
        raise ValueError(
            f"backend={name!r} is not an implementation of {operator}: allowed are {('auto', *candidates)}. "
            'Fix: use backend="auto".'
        )
    if (reason := candidates[name].unavailable(tensors[0].device if tensors else None)) is not None:
        raise RuntimeError(f'backend={name!r} of {operator} cannot run here: {reason}. Fix: use backend="auto".')
    if tensors and (reason := candidates[name].unsupported(*tensors, backward=backward, **arguments)) is not None:
        raise ValueError(f'backend={name!r} of {operator} does not support this: {reason}. Fix: use backend="auto".')
    return candidates[name]


def to_run(operator: str, name: str, *tensors: Tensor, **arguments: Any) -> Backend:
    """What `resolve` gives; where "auto" leaves a GPU to the reference, a UserWarning says so, once for each reason."""
    backend = resolve(operator, name, *tensors, **arguments)
    if name == "auto" and backend.name == "reference" and tensors[0].is_cuda:
        reason = "; ".join(dict.fromkeys(passed_over(operator, *tensors, **arguments).values()))
        if reason and (operator, reason) not in _WARNED:
            _WARNED.add((operator, reason))
            warnings.warn(
                f"{operator} runs on a GPU as the reference, plain PyTorch in chunks, which is slow: {reason}. "
                'Fix: give it what a faster backend supports, or pass backend="reference" to say that this is meant.',
                stacklevel=2,
            )
    return backend


_WARNED: set[tuple[str, str]] = set()


def check_known(name: str, whole: str, *operators: str) -> None:
    """Raises ValueError unless `name` is "auto" or a backend of any of `operators` (default: of `whole` itself)."""
    known = dict.fromkeys(backend for operator in operators or (whole,) for backend in _BACKENDS[operator])
    if not isinstance(name, str) or (name != "auto" and name not in known):
        raise ValueError(
            f'backend={name!r} is not an implementation of {whole}: allowed are {("auto", *known)}. Fix: use backend="auto".'
        )


def of_several(operator: str, name: str) -> str:
    """What a backend asked for a whole layer means for one of its operators: itself where the operator has it, else "auto"."""
    return name if name in _BACKENDS[operator] else "auto"


def passed_over(operator: str, *tensors: Tensor, backward: bool = False, **arguments: Any) -> dict[str, str]:
    """The backends that "auto" does not take although they come before the one that it takes, with the reasons."""
    skipped: dict[str, str] = {}
    for backend in _BACKENDS[operator].values():
        reason = backend.unavailable(tensors[0].device if tensors else None)
        if reason is None and tensors:
            reason = backend.unsupported(*tensors, backward=backward, **arguments)
        if reason is None:
            reason = backend.avoided(*tensors, **arguments)
        if reason is None:
            return skipped
        skipped[backend.name] = reason
    raise AssertionError(f"{operator} has no backend that always runs")
