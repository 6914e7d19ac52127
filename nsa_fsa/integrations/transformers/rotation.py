"""The rotation of a model's queries and keys, in one kernel where there is one."""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa.modules.fused import kernels_for
from nsa_fsa.modules.rotary import apply_rotary

ROTATION = "apply_rotary_pos_emb"  # what transformers' models call theirs


# How a model makes cos and sin whose halves are equal, as the kernel takes them to be.
HALVES = "torch.cat((freqs, freqs), dim=-1)"


def with_fused_rotation(attention_class: type[nn.Module]) -> type[nn.Module]:
    """An attention class whose forward rotates queries and keys in one kernel where
    `nsa_fsa.modules.fused` has one; the same class if it rotates in another way than Llama.

    The forward is the class's own, but for the rotation that it finds among its globals. Where
    that has been replaced since, the class's own runs as it is.
    """
    plain = attention_class.forward
    core: Any = inspect.unwrap(plain)
    names = getattr(core, "__globals__", {})
    rotation: Any = names.get(ROTATION)
    if not callable(rotation):
        return attention_class
    changed = {**names, ROTATION: _fused(rotation)}
    fused = _rebuilt(plain, changed)
    if (
        fused is None
        or ROTATION not in core.__code__.co_names
        or rotation.__module__ != core.__module__  # somebody else's kernel stays
        or HALVES not in _source(core)
        or not _is_half_split(rotation)
    ):
        return attention_class

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # torch.compile looks for the globals of a function in its module.
        if torch.compiler.is_compiling() or names.get(ROTATION) is not rotation:
            return plain(self, *args, **kwargs)
        # What else has been replaced since, by a test for example.
        changed.update(
            {x: names[x] for x in core.__code__.co_names if x in names and x != ROTATION}
        )
        return fused(self, *args, **kwargs)

    return type(attention_class.__name__, (attention_class,), {"forward": forward})


def _source(function: Any) -> str:
    """What the module of a function says, if it has a file."""
    try:
        return inspect.getsource(sys.modules[function.__module__])
    except (OSError, TypeError, KeyError):
        return ""


def _rebuilt(function: Any, names: dict[str, Any]) -> Any:
    """A function as it is, decorators included, with other globals at its core; None where a
    decorator hides it."""
    is_compiled = hasattr(function, "_torchdynamo_orig_callable")
    if not isinstance(function, types.FunctionType) or is_compiled:
        return None
    closure, wrapped = function.__closure__, getattr(function, "__wrapped__", None)
    if wrapped is not None:
        names, core = function.__globals__, _rebuilt(wrapped, names)
        found = [_content(cell) is wrapped for cell in closure or ()]
        if core is None or not any(found):
            return None
        pairs = zip(closure or (), found, strict=True)
        closure = tuple(types.CellType(core) if is_it else cell for cell, is_it in pairs)
    code, defaults = function.__code__, function.__defaults__
    made: Any = types.FunctionType(code, names, function.__name__, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    del made.__wrapped__  # `update_wrapper` names the function that this one replaces
    if wrapped is not None:
        made.__wrapped__ = core
    return made


def _content(cell: types.CellType) -> Any:
    """What a closure's cell holds; None for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_half_split(rotation: Callable[..., Any]) -> bool:
    """Whether a model's rotation is the one that `apply_rotary` computes."""
    kind: dict[str, Any] = dict(dtype=torch.float64, device="cpu")
    angle = torch.linspace(0, 3, 12, **kind).view(1, 3, 4).repeat(1, 1, 2)
    x, cos, sin = torch.linspace(-1, 1, 24, **kind).view(1, 1, 3, 8), angle.cos(), angle.sin()
    try:
        q, k = rotation(x, -x, cos, sin)
        expected = _rotated(x, cos, sin)
        return torch.allclose(q, expected) and torch.allclose(k, -expected)
    except Exception:  # of another signature
        return False


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, H, S, D]`, usually a view of `[B, S, H, D]`, by cos and sin `[B or 1, S, D]`."""
    batch_size, _, length, _ = x.shape
    cos, sin = (y.expand(batch_size, -1, -1).flatten(0, 1) for y in (cos, sin))
    rows = apply_rotary(x.transpose(1, 2).flatten(0, 1), cos, sin)
    return rows.unflatten(0, (batch_size, length)).transpose(1, 2)


def _fused(rotation: Callable[..., Any]) -> Callable[..., Any]:
    """A model's rotation, in one kernel where that runs and the arguments are the usual ones."""

    @functools.wraps(rotation)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        usual = not args and not kwargs and cos.ndim == 3
        alike = all(x.dtype == cos.dtype and x.shape[-1] == cos.shape[-1] for x in (q, k))
        if not usual or not alike or kernels_for(q) is None or kernels_for(k) is None:
            return rotation(q, k, cos, sin, *args, **kwargs)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    return rotate
