"""Collectives with gradients, which `torch.compile` can trace.

Shapes: n ranks have `S / n` of the S tokens of each of B sequences, rank after rank; H heads.

What is exchanged may be *on its way*: a tensor that is written while the GPU computes other things,
and that nobody may read before `wait_tensor` has returned it. Tokens are exchanged for heads, and
back, in four steps:

    depart:  all heads of a rank's tokens -> all tokens of its heads, group by group, on their way
    arrive:  those of a group, once they are there
    leave:   what was computed for a group -> on its way back
    collect: all groups' -> all heads of a rank's tokens, once they are there

The gradient of what was on its way is on its way, too: `collect` sends gradients to `leave`, and
`arrive` to `depart`. Autograd goes back from what was computed last, so backward computes one group
while another travels, as forward does.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ops: Any = torch.ops._c10d_functional


class Split(NamedTuple):
    """How heads are divided: each rank has a run of them, and each group a run of every rank's."""

    size: int  # n
    groups: int
    process_group: str

    def of(self, x: Tensor, number: int) -> Tensor:
        """Of x `[B, S / n, H, ...]` the heads of one group: `[n, B, S / n, h, ...]`, where h is
        H / (n * groups). A view."""
        heads = x.unflatten(2, (self.size, self.groups, -1))
        return heads[:, :, :, number].movedim(2, 0)

    def swap(self, x: Tensor) -> Tensor:
        """x `[n, ...]`: part i goes to rank i, and part i of the result, which is on its way, comes
        from there."""
        one_each = [1] * self.size
        coming = _ops.all_to_all_single(x.contiguous(), one_each, one_each, self.process_group)
        # `detect_anomaly` looks at every gradient for NaN.
        looked_at = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
        return _ops.wait_tensor(coming) if looked_at else coming

    def send(self, x: Tensor, number: int) -> Tensor:
        """One group of x `[B, S / n, H, ...]`, rank r's heads to rank r: `[n, B, S / n, h, ...]`
        from all ranks, on its way."""
        part = self.of(x, number)
        packed = part.new_empty(part.shape)
        _copy(packed, part)
        return self.swap(packed)

    def receive(self, parts: Sequence[Tensor], order: Iterable[int]) -> Tensor:
        """All groups' `[n, B, S / n, h, ...]`, on their way, -> `[B, S / n, H, ...]`. order: in
        which the groups were sent."""
        _, batch_size, length, h, *rest = parts[0].shape
        x = parts[0].new_empty(batch_size, length, self.size * self.groups * h, *rest)
        for number in order:
            _copy(self.of(x, number), _ops.wait_tensor(parts[number]))
        return x


def _copy(target: Tensor, source: Tensor) -> None:
    """Of the same shape and dtype. In words of eight bytes where that is possible: PyTorch copies
    what is not contiguous element by element, and four elements of 16 bits take four times the
    instructions of one word."""
    if not torch.compiler.is_compiling():  # Inductor writes its own copies
        size = max(8 // source.itemsize, 1)
        if _has_words(source, size) and _has_words(target, size):
            source, target = source.view(torch.int64), target.view(torch.int64)
    target.copy_(source)


def _has_words(x: Tensor, size: int) -> bool:
    """Whether x lies in memory as words of so many elements."""
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(n % size == 0 for n in steps)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.split, ctx.number = split, len(tensors)
        return tuple(split.send(x, number) for number in range(split.groups) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        split, order = ctx.split, [*reversed(range(ctx.split.groups))]
        of_each = (gradients[i :: ctx.number] for i in range(ctx.number))
        return None, *(split.receive(parts, order) for parts in of_each)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.split = split
        return tuple(_ops.wait_tensor(x) for x in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(ctx.split.swap(x) for x in gradients)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, x: Tensor) -> Tensor:
        return split.swap(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _ops.wait_tensor(gradient)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *parts: Tensor) -> Tensor:
        ctx.split = split
        return split.receive(parts, range(split.groups))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        last_first = [ctx.split.send(gradient, i) for i in reversed(range(ctx.split.groups))]
        return None, *reversed(last_first)


def depart(split: Split, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Of `[B, S / n, H, ...]` each, for every group, `[n, B, S / n, h, ...]`, on their way."""
    parts = _Depart.apply(split, *tensors)
    number = len(tensors)
    return [parts[i : i + number] for i in range(0, len(parts), number)]


def arrive(split: Split, *parts: Tensor) -> list[Tensor]:
    """Of `[n, B, S / n, h, ...]`, on their way, the packed tokens of all ranks, `[T, h, ...]`."""
    return [x.movedim(0, 1).flatten(0, 2) for x in _Arrive.apply(split, *parts)]


def leave(split: Split, x: Tensor, batch_size: int) -> Tensor:
    """Packed tokens `[T, h, ...]` -> `[n, B, S / n, h, ...]`, on their way to their ranks."""
    parts = x.unflatten(0, (batch_size, split.size, -1)).movedim(1, 0)
    return _Leave.apply(split, parts)


def collect(split: Split, parts: Sequence[Tensor]) -> Tensor:
    """All groups' `[n, B, S / n, h, ...]`, on their way, -> `[B, S / n, H, ...]`."""
    return _Collect.apply(split, *parts)


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
