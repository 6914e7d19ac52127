"""Registers operators with torch.library: an operator takes one typed call and gives one
typed result.

A call is a frozen dataclass of tensors, numbers and named tuples of these. torch.library knows
plain arguments, tensors and numbers: a row of them, as it is called here. `Signature` writes a call
out as one, and the operator's schema with it.

`torch.library.custom_op` would do, but does more in Python at every call. With it, a compressed
attention whose backend does nothing took 140 microseconds forward with gradients and 236 forward
and backward (one core, checks of values on the CPU included); it takes 92 and 180 here. The kernels
take 200 forward at 8,192 tokens.
"""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._C import _are_functorch_transforms_active as transformed
from torch._C._dynamo import eval_frame
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from nsa_fsa.ops.common.replay import replayed
from nsa_fsa.sequences import Length

NAMESPACE = "nsa_fsa"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)
for _key in ("CUDA", "XPU", "HPU", "MPS", "PrivateUse1"):
    _AUTOCAST |= DispatchKeySet(getattr(DispatchKey, f"Autocast{_key}"))
_NOTHING = contextlib.nullcontext()

# What torch.library calls the types of a call's members. One that may be None has "?" behind it.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    int: "int",
    Length: "SymInt",
    float: "float",
    str: "str",
    tuple[str, ...]: "str[]",
}

Call = TypeVar("Call")
Result = TypeVar("Result")
Saved = TypeVar("Saved")


class Signature(Generic[Call]):
    """How a call, or a result, is written as a row of tensors and numbers, and read again.

    A member may be a named tuple or dataclass of its own, whose members then stand in its place.
    Where such a one, or a tensor, is None, the row has None in all of its places.
    """

    def __init__(self, kind: type[Call], optional: bool = False):
        self.kind = kind
        self.optional = optional
        self.members: dict[str, str | Signature[Any]] = {}
        for name, hint in _members(kind).items():
            member, may_be_none = _without_none(hint)
            if dataclasses.is_dataclass(member) or hasattr(member, "_fields"):
                self.members[name] = Signature(member, may_be_none)
            else:
                self.members[name] = _SCHEMA_TYPES[member] + "?" * may_be_none
        members = self.members.values()
        self.size: int = sum(x.size if isinstance(x, Signature) else 1 for x in members)

    def schema(self) -> list[str]:
        """The row for torch.library, such as `["Tensor q", "int block_size"]`."""
        found: list[str] = []
        for name, member in self.members.items():
            if not isinstance(member, Signature):
                found.append(f"{member} {name}")
            elif member.optional:
                found += [x.replace("Tensor ", "Tensor? ") for x in member.schema()]
            else:
                found += member.schema()
        return found

    def flatten(self, call: Any) -> list[Any]:
        """The row of a call."""
        row: list[Any] = []
        for name, member in self.members.items():
            value = getattr(call, name)
            if not isinstance(member, Signature):
                row.append(value)
            elif value is None:
                row += [None] * member.size
            else:
                row += member.flatten(value)
        return row

    def build(self, row: Sequence[Any], start: int = 0) -> Call:
        """The call whose row begins at `start`."""
        values: list[Any] = []
        for member in self.members.values():
            if not isinstance(member, Signature):
                values.append(row[start])
                start += 1
            else:
                absent = member.optional and row[start] is None
                values.append(None if absent else member.build(row, start))
                start += member.size
        return self.kind(*values)


def _members(kind: type) -> dict[str, Any]:
    """The types of a named tuple's or a dataclass's members."""
    hints = typing.get_type_hints(kind, include_extras=True)
    named = [x.name for x in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else hints
    return {name: hints[name] for name in named}


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type that a hint allows, and whether it allows None beside it."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (other,) = (x for x in typing.get_args(hint) if x is not types.NoneType)
        return other, True
    return hint, False


# An operator cannot return None: an empty tensor of one axis, which no result has, stands for it.
def _present(row: list[Any], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in row]


def _absent(row: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x.ndim == 1 else x for x in row]


@dataclass(frozen=True)
class Gradient(Generic[Call, Result, Saved]):
    """How an operator's first result is differentiated; the others carry no gradient.

    Attributes:
        saved: a named tuple of what `backward` needs beside the call.
        keep: makes it of the call and its result.
        gradients: a named tuple whose members are called as those of the call that they are the
            gradients of; None where the call has None.
        backward: gives the gradients, each shaped as what it is the gradient of, and contiguous.
    """

    saved: type[Saved]
    keep: Callable[[Call, Result], Saved]
    gradients: type
    backward: Callable[[Call, Tensor, Saved], Any]


class NothingSaved(NamedTuple):
    """What a backward needs beside the call where it needs nothing."""


def gradient_of_call(
    gradients: type, differentiate: Callable[[Call, Tensor], Any]
) -> Gradient[Call, Any, NothingSaved]:
    """The gradient of an operator whose backward needs nothing but the call."""

    def keep(call: Call, result: Any) -> NothingSaved:
        return NothingSaved()

    def backward(call: Call, do: Tensor, saved: NothingSaved) -> Any:
        return differentiate(call, do)

    return Gradient(NothingSaved, keep, gradients, backward)


class Operator(Generic[Call, Result]):
    """What `torch.ops.nsa_fsa.<name>` does, for a call."""

    def __init__(self, name: str, call: type[Call], result: type[Result]):
        self.name = name
        self.call = Signature(call)
        self.result = None if result is Tensor else Signature(result)
        self.num_results = 1 if self.result is None else self.result.size
        self.run: Any = None  # of torch.library

    def __call__(self, call: Call) -> Result:
        return self.read_result(self.run(*self.call.flatten(call)))

    def read_result(self, found: Any) -> Result:
        return found if self.result is None else self.result.build(_absent(found))

    def write_result(self, result: Any, like: Tensor) -> Any:
        return result if self.result is None else tuple(_present(self.result.flatten(result), like))


def _in_its_precision() -> contextlib.AbstractContextManager[Any]:
    """Leaves autocast out, which would turn the products of the reference's float32 scores
    into bfloat16.

    What goes into an operator may well have been cast; inside, the operator says itself in what it
    computes. Asking whether there is anything to leave out takes 0.1 microseconds, leaving it out
    another 1.2.
    """
    return _ExcludeDispatchKeyGuard(_AUTOCAST) if torch._C._is_any_autocast_enabled() else _NOTHING


class _OnGPU(torch.cuda.device):
    """Makes a GPU the current one: that is where Triton launches.

    Setting the device where it is set already is no waste: it gives a thread that is new to CUDA a
    context, without which Triton cannot describe a bulk copy. Entering takes 0.8 microseconds,
    setting the device 0.5 (an H100's host).
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.wanted = device

    def __enter__(self) -> None:
        super().__enter__()
        torch.cuda.set_device(self.wanted)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, the GPU that x is on, if it is on one, is the current one."""
    return _OnGPU(x.device) if x.is_cuda else _NOTHING


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the GPU of its first tensor as the current one."""

    def guarded(*inputs: Any, **settings: Any) -> Any:
        with on_device(next(x for x in inputs if isinstance(x, Tensor))):
            return run(*inputs, **settings)

    return guarded


def unseen_by_the_compiler(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, into which the compiler of a model that calls operators between graph breaks is
    not to look.

    It is what `torch._dynamo.skip_code` does, for callees too. `torch._disable_dynamo` would import
    the compiler at the first call of the first operator, which takes as long as importing torch
    itself (1.5 s of 3.0).
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(run.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return run


def has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def define_operator(
    name: str,
    call: type[Call],
    result: type[Result],
    forward: Callable[[Call], Result],
    fake: Callable[[Call], Result],
    gradient: Gradient[Call, Result, Any] | None = None,
) -> Operator[Call, Result]:
    """Registers `nsa_fsa::<name>` for every device and returns it;
    with a gradient also `nsa_fsa::<name>_backward`.

    Args:
        call: a frozen dataclass whose first member is a tensor.
        result: Tensor, or a named tuple.
        forward: the operator on real tensors. It changes none of them and returns new ones,
            contiguous as those of `fake` are.
        fake: the shapes, dtypes and strides of the result, from a call whose tensors have
            nothing else.
        gradient: without it, a backward pass through the operator raises RuntimeError.
    """
    operator = Operator(name, call, result)

    def run(*row):
        def decide():
            return operator.write_result(forward(operator.call.build(row)), row[0])

        with _in_its_precision(), on_device(row[0]):
            return replayed(name, row, decide)

    def run_fake(*row):
        return operator.write_result(fake(operator.call.build(row)), row[0])

    operator.run = _register(name, operator.call.schema(), operator.num_results, run, run_fake)
    differentiable = None if gradient is None else _differentiable(operator, gradient)
    _register_autograd(name, operator.run, differentiable)
    return operator


def define_mutation(
    name: str, call: type[Call], forward: Callable[[Call], None], written: Collection[str]
) -> Callable[[Call], None]:
    """Registers `nsa_fsa::<name>`, which writes into tensors that it is given and returns nothing;
    no gradient goes through what it writes.

    Args:
        call: a frozen dataclass whose first member is a tensor.
        forward: the operator on real tensors.
        written: names of the tensors that it writes to, as they stand in the row.
    """
    signature = Signature(call)
    row = [
        x.replace("Tensor", f"Tensor({chr(ord('a') + n)}!)") if x.split()[1] in written else x
        for n, x in enumerate(signature.schema())
    ]

    def run(*row):
        def write():
            forward(signature.build(row))

        with _in_its_precision(), on_device(row[0]):
            return replayed(name, row, write)

    def run_fake(*row):
        return None

    operator = _register(name, row, 0, run, run_fake)

    def below_autograd(*row):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*row)

    _LIBRARY.impl(name, unseen_by_the_compiler(below_autograd), "Autograd")

    def mutate(call: Call) -> None:
        operator(*signature.flatten(call))

    return mutate


def _register(
    name: str, row: list[str], num_results: int, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    results = "Tensor" if num_results == 1 else f"({', '.join(['Tensor'] * num_results)})"
    schema = f"{name}({', '.join(row)}) -> {results}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, unseen_by_the_compiler(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _differentiable(
    operator: Operator[Any, Any], gradient: Gradient[Any, Any, Any]
) -> Callable[..., Any]:
    """The operator, called with a row, as autograd records it."""
    backward = _define_backward(operator, gradient)
    saved = Signature(gradient.saved)
    size, names = operator.call.size, [x.split()[1] for x in operator.call.schema()]
    places = [names.index(name) for name in _members(gradient.gradients)]  # of what has a gradient

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *row):
            # Zeros for a statistic's gradient would be one more launch.
            ctx.set_materialize_grads(False)
            with _gradients_below(), torch._C._AutoDispatchBelowAutograd():
                found = operator.run(*row)
            kept = gradient.keep(operator.call.build(row), operator.read_result(found))
            ctx.others = [None if isinstance(x, Tensor) else x for x in row]
            ctx.save_for_backward(
                *(x if isinstance(x, Tensor) else None for x in row), *saved.flatten(kept)
            )
            if isinstance(found, tuple):
                ctx.mark_non_differentiable(*found[1:])
            return found

        @staticmethod
        def backward(ctx, do, *_):
            grads: list[Any] = [None] * size
            if do is None:
                return tuple(grads)
            tensors = ctx.saved_tensors
            row = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=False)]
            found = backward(do, *row, *tensors[size:])
            for place, grad in zip(places, found if len(places) > 1 else (found,), strict=True):
                grads[place] = None if grad.ndim == 1 else grad
            return tuple(grads)

    # Without `Function.apply`, which hands over to torch.func what has come through it: the
    # dispatcher calls this once for each of its transformations, with tensors of that level, and
    # what is below is the dispatcher's to find.
    return super(torch.autograd.Function, Differentiable).apply


def _gradients_below() -> contextlib.AbstractContextManager[Any]:
    """Turns gradients on where torch.func has a level below, which may want them."""
    return torch.enable_grad() if transformed() else _NOTHING


def _define_backward(operator: Operator[Any, Any], gradient: Gradient[Any, Any, Any]) -> Any:
    """Registers `nsa_fsa::<name>_backward`, called with do, the call's row and what was saved."""
    name, size = f"{operator.name}_backward", operator.call.size
    saved: Signature[Any] = Signature(gradient.saved)
    gradients: Signature[Any] = Signature(gradient.gradients)

    def written(grads: list[Any], do: Tensor) -> Any:
        found = _present(grads, do)
        return tuple(found) if len(found) > 1 else found[0]

    def run(do, *row):
        def decide():
            grads = gradient.backward(operator.call.build(row), do, saved.build(row, size))
            return written(gradients.flatten(grads), do)

        with _in_its_precision(), on_device(do):
            return replayed(name, (do, *row), decide)

    def run_fake(do, *row):
        call = operator.call.build(row)
        inputs = [getattr(call, member) for member in gradients.members]
        return written([None if x is None else x.new_empty(x.shape) for x in inputs], do)

    arguments = ["Tensor dout", *operator.call.schema(), *saved.schema()]
    backward = _register(name, arguments, gradients.size, run, run_fake)
    _register_autograd(name, backward, None)
    return backward


def _register_autograd(name: str, operator: Any, differentiable: Callable[..., Any] | None) -> None:
    """What the dispatcher calls where gradients may be wanted."""
    differentiate = differentiable or _refusing(name, operator)

    def autograd(*row):
        if forward_ad._current_level >= 0 and any(map(has_tangent, row)):
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                "hessian; forward_ad). Fix: use reverse mode (torch.func.vjp, jacrev; backward)."
            )
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in row):
            with enable_single_level_autograd_function() if transformed() else _NOTHING:
                return differentiate(*row)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*row)

    _LIBRARY.impl(name, unseen_by_the_compiler(autograd), "Autograd")


def _refusing(name: str, operator: Any) -> Callable[..., Any]:
    """The operator; a backward pass through it raises RuntimeError."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *row):
            with _gradients_below(), torch._C._AutoDispatchBelowAutograd():
                return operator(*row)

        @staticmethod
        def backward(ctx, *grads):
            reason = f"{NAMESPACE}::{name} has no gradient. Fix: detach what goes into it."
            raise RuntimeError(reason)

    return super(torch.autograd.Function, Refusing).apply
