"""How cached keys are turned back for layers that rotate compressed keys (`compress_rope="after"`).

The positions of a row's real tokens follow one another, so a window's keys are turned against its
first one by the same angles everywhere, and the angles of the latest tokens follow from that of a
new one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (any tensor of the dtype and device wanted, position_ids int64 [B or 1, S]) -> cos and sin,
# [B or 1, S, rotary_dim]
Rotary = Callable[..., tuple[Tensor, Tensor]]


class Turning(NamedTuple):
    """What layers need to turn keys back at a step of S new tokens of every row."""

    turn: Tensor  # [2, l, rotary_dim / 2], l the longest of their windows: see `append_tokens`
    # cos and sin [B or 1, l - 1 + S, rotary_dim] of the latest tokens; None: all compressors pool.
    latest: tuple[Tensor, Tensor] | None


def turns_back(modules: list[Any]) -> bool:
    """Whether any of the layers turns keys back."""
    return any(module.nsa_config.compress_rope == "after" for module in modules)


def like_rotated(modules: list[Any], device: torch.device) -> Tensor:
    """An empty tensor of the dtype in which a model rotates; the gate itself may be offloaded."""
    return torch.empty(0, dtype=modules[0].gate.weight.dtype, device=device)


def make_turn(modules: list[Any], rotary: Rotary, device: torch.device) -> Tensor:
    """`Turning.turn` of the layers of a decoder, with its rotary embedding."""
    dtype = torch.promote_types(modules[0].gate.weight.dtype, torch.float32)
    position = torch.arange(_longest(modules), device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), position_ids=position)
    turn = torch.cat((cos, sin))[..., : cos.shape[-1] // 2]  # the halves are equal
    return turn / turn[0, 0, 0]  # where RoPE scales, as YaRN does, that is its factor


def turning_of(
    modules: list[Any],
    turn: Tensor,
    rotary: Rotary,
    position_ids: Any,
    past: int | Tensor,
    num_new: int,
) -> Turning:
    """position_ids: of the new tokens, `[B or 1, S]`; if they are not, positions are columns, of
    which there are `past`."""
    after = [x for x in modules if x.nsa_config.compress_rope == "after"]
    if all(None not in (x.compress_k.pooling(), x.compress_v.pooling()) for x in after):
        return Turning(turn, None)
    first = position_ids[:, :1] if _are_positions(position_ids) else past
    behind = _longest(modules) - 1
    latest = first + torch.arange(-behind, num_new, device=turn.device)[None]
    return Turning(turn, rotary(like_rotated(modules, turn.device), position_ids=latest))


def _longest(modules: list[Any]) -> int:
    configs = [module.nsa_config for module in modules]
    return max(c.kernel_size for c in configs if c.compress_rope == "after")


def _are_positions(position_ids: Any) -> bool:
    return isinstance(position_ids, Tensor) and position_ids.ndim == 2


def positions_follow(mask: Tensor, position_ids: Any, past: int | Tensor) -> Tensor:
    """Whether the positions of every row's real tokens follow one another, bool `[]`.

    They do not where they are columns, of which some between real ones are hidden by the mask
    `[B, columns]`. The new tokens, all of them real, tell: see `positions_of_keys`.
    """
    real = mask.ne(0)
    has_gap = (real[:, :-1] & ~real[:, 1:]).any(1)
    if _are_positions(position_ids):
        has_gap = has_gap & position_ids[:, 0].eq(past)
    return ~has_gap.any()


def positions_of_keys(
    columns: Tensor | None, mask: Tensor | None, position_ids: Any, past: int, like: Tensor
) -> Tensor:
    """The positions by which the keys of a cache were rotated, `[B or 1, past + S]`, in the order
    of `columns` `[B, past + S]`; None: in that of the cache. like: any tensor `[B, S, ...]`.

    Nobody says those of cached tokens. They were columns, if nothing else is said of the new ones
    or they are, too. Otherwise tokens are counted as real ones, from whatever number on.
    """
    device = like.device
    rank = torch.arange(past + like.shape[1], device=device)[None]
    given_order = rank if columns is None else columns
    if not _are_positions(position_ids):
        return given_order
    counted, first = rank[:, past:], torch.zeros(1, 1, dtype=torch.int64, device=device)
    if columns is not None:
        assert mask is not None
        real = mask.ne(0)
        counted = real.cumsum(1)[:, past:] - 1
        first = real[:, past:].int().argmax(1, keepdim=True)
    number = max(len(position_ids), len(counted))
    given, counted, first = (x.expand(number, -1) for x in (position_ids, counted, first))
    at, begin = given.gather(1, first), counted.gather(1, first)
    return torch.where(at == first + past, given_order, rank + at - begin)
