"""Collectives with gradients, which `torch.compile` can trace.

Shapes: n ranks have `S / n` of the S tokens of each of B sequences, rank after rank; H heads.
"""

from typing import Any

import torch
from torch import Tensor

_ops: Any = torch.ops._c10d_functional


class _Swap(torch.autograd.Function):
    """x `[n, ...]`: part i goes to rank i, and part i of the result comes from there. Gradients go
    the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _swap(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """x `[...]` -> `[n, ...]`, that of every rank. Every rank has a gradient of every part, and
    each rank gets the sum of those of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        gathered = _ops.all_gather_into_tensor(x[None].contiguous(), size, group)
        return _ops.wait_tensor(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mine = _ops.reduce_scatter_tensor(gradient.contiguous(), "sum", ctx.size, ctx.group)
        return _ops.wait_tensor(mine).squeeze(0), None, None


def _swap(x: Tensor, group: str) -> Tensor:
    one_each = [1] * x.shape[0]
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), one_each, one_each, group))


def tokens_to_heads(x: Tensor, size: int, group: str) -> Tensor:
    """`[B, S / n, H, ...]`, all heads of this rank's tokens, -> `[B, S, H / n, ...]`,
    all tokens of its heads."""
    parts = x.unflatten(2, (size, -1)).movedim(2, 0)  # [n, B, S / n, H / n, ...]
    return _Swap.apply(parts, group).movedim(0, 1).flatten(1, 2)


def heads_to_tokens(x: Tensor, size: int, group: str) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    parts = x.unflatten(1, (size, -1)).movedim(1, 0)  # [n, B, S / n, H / n, ...]
    return _Swap.apply(parts, group).movedim(0, 2).flatten(2, 3)


def gather_tokens(x: Tensor, size: int, group: str) -> Tensor:
    """`[B, S / n, ...]` -> `[B, S, ...]`, the tokens of all ranks."""
    return _Gather.apply(x, size, group).movedim(0, 1).flatten(1, 2)


class _SumGradients(torch.autograd.Function):
    """x itself; its gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group), None


def summed(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks, without a gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def sum_gradients(x: Tensor, group: str) -> Tensor:
    """x, whose gradient will be summed over the ranks."""
    return _SumGradients.apply(x, group)
