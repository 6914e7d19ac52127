"""Collectives with gradients, which `torch.compile` can trace.

Shapes: n ranks have `L = S / n` of the S tokens of each of B sequences, rank after rank; H heads.

What is exchanged may be *on its way*: a tensor that is written while the GPU computes other things,
and that nobody may read before `wait_tensor` has returned it. Tokens are exchanged for heads, and
back, in four steps:

    depart:  all heads of a rank's tokens -> tokens of its heads, group by group, on their way
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
Tensors = tuple[Tensor, ...]


class Split(NamedTuple):
    """Who computes what: rank `share * spans + span` has one share of the heads, which is all keys
    and values of these, and the queries of one span of the tokens."""

    shares: int
    spans: int
    groups: int  # of the heads of a share, which are exchanged one after another
    span_of: tuple[int, ...]  # of each rank's tokens
    rank: int
    process_group: str

    def of(self, x: Tensor, number: int) -> Tensor:
        """Of x `[B, L, H, ...]` the heads of one group: `[shares, B, L, h, ...]`, where h is
        H / (shares * groups). A view."""
        heads = x.unflatten(2, (self.shares, self.groups, -1))
        return heads[:, :, :, number].movedim(2, 0)

    def send(self, x: Tensor, number: int, is_key: bool) -> Tensor:
        """One group of x `[B, L, H, ...]` to the ranks that compute it; from them
        `[shares or n, B, L, h, ...]`, on its way. is_key: whether every span needs it."""
        part = self.of(x, number)
        if is_key:  # a copy for every span
            part = part[:, None].expand(-1, self.spans, *part.shape[1:])
        packed = part.new_empty(part.shape)
        _copy(packed, part)
        return self.swap(packed.flatten(0, 1) if is_key else packed, is_key)

    def receive(self, parts: Sequence[Tensor], order: Iterable[int], is_key: bool) -> Tensor:
        """All groups' `[shares or n, B, L, h, ...]`, on their way, -> `[B, L, H, ...]`. order: in
        which the groups were sent."""
        _, batch_size, length, h, *rest = parts[0].shape
        x = parts[0].new_empty(batch_size, length, self.shares * self.groups * h, *rest)
        for number in order:
            part = _ops.wait_tensor(parts[number])
            if is_key and self.spans > 1:  # the sum of what every span gives
                part = part.unflatten(0, (self.shares, self.spans)).sum(1)
            _copy(self.of(x, number), part)
        return x

    def swap(self, x: Tensor, is_key: bool, back: bool = False) -> Tensor:
        """x `[shares or n, ...]`, part after part to the ranks that want one; as many parts from
        those that have one for this rank, on their way."""
        there, here = [1] * len(self.span_of), [1] * len(self.span_of)
        if not is_key:  # between the ranks of a span's tokens and those that compute it
            mine, computed = self.span_of[self.rank], self.rank % self.spans
            there = [int(rank % self.spans == mine) for rank in range(len(self.span_of))]
            here = [int(span == computed) for span in self.span_of]
        sizes = (there, here) if back else (here, there)
        coming = _ops.all_to_all_single(x.contiguous(), *sizes, self.process_group)
        # `detect_anomaly` looks at every gradient for NaN.
        looked_at = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
        return _ops.wait_tensor(coming) if looked_at else coming


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
    def forward(ctx: Any, split: Split, are_keys: tuple[bool, ...], *tensors: Tensor) -> Tensors:
        ctx.split, ctx.are_keys = split, are_keys
        pairs = [*zip(tensors, are_keys, strict=True)]
        return tuple(split.send(x, i, is_key) for i in range(split.groups) for x, is_key in pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        split, order = ctx.split, [*reversed(range(ctx.split.groups))]
        found = []
        for i, is_key in enumerate(ctx.are_keys):
            found.append(split.receive(gradients[i :: len(ctx.are_keys)], order, is_key))
        return None, None, *found


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, are_keys: tuple[bool, ...], *parts: Tensor) -> Tensors:
        ctx.split, ctx.are_keys = split, are_keys
        return tuple(_ops.wait_tensor(x) for x in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, ctx.are_keys, strict=True)
        return None, None, *(ctx.split.swap(x, is_key, back=True) for x, is_key in pairs)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, x: Tensor) -> Tensor:
        return split.swap(x, False, back=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _ops.wait_tensor(gradient)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *parts: Tensor) -> Tensor:
        ctx.split = split
        return split.receive(parts, range(split.groups), False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        order = reversed(range(ctx.split.groups))
        last_first = [ctx.split.send(gradient, number, False) for number in order]
        return None, *reversed(last_first)


def depart(split: Split, are_keys: tuple[bool, ...], *tensors: Tensor) -> list[Tensors]:
    """Of `[B, L, H, ...]` each, for every group, `[n or shares, B, L, h, ...]`, on their way.
    are_keys: which of them every span needs all of."""
    parts = _Depart.apply(split, are_keys, *tensors)
    number = len(tensors)
    return [parts[i : i + number] for i in range(0, len(parts), number)]


def arrive(split: Split, are_keys: tuple[bool, ...], *parts: Tensor) -> list[Tensor]:
    """Of `[n or shares, B, L, h, ...]`, on their way, packed tokens, `[T, h, ...]`: of keys all,
    and of queries those of this rank's span."""
    whole = _Arrive.apply(split, are_keys, *parts)
    return [x.movedim(0, 1).flatten(0, 2) for x in whole]


def leave(split: Split, x: Tensor, batch_size: int) -> Tensor:
    """Packed queries' `[T, h, ...]` -> `[shares, B, L, h, ...]`, on their way to their ranks."""
    parts = x.unflatten(0, (batch_size, split.shares, -1)).movedim(1, 0)
    return _Leave.apply(split, parts)


def collect(split: Split, parts: Sequence[Tensor]) -> Tensor:
    """All groups' `[shares, B, L, h, ...]`, on their way, -> `[B, L, H, ...]`."""
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
