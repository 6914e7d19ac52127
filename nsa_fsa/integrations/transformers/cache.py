"""What lies beside a layer of transformers' caches: compressed tokens, so that a step compresses
those alone that it completes.

The keys and values stay where transformers keeps them. A layer of a cache that holds compressed
tokens gets a class that does with them what is done to its keys: reordering, cropping and so on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.decode import Pages
from nsa_fsa.decode.operator import BACKENDS, MOST_NEW, unsupported_heads
from nsa_fsa.integrations.transformers.turning import (
    Rotary,
    Turning,
    positions_follow,
    turning_of,
    turns_back,
)
from nsa_fsa.ops.common.sizes import cdiv
from nsa_fsa.ops.common.triton_backends import unavailable
from nsa_fsa.ops.compression.reference import num_windows_of
from nsa_fsa.sequences import Sequences, uniform_layout


@dataclass
class CompressedTokens:
    """The compressed tokens of a cache's rows: see `decode.Pages`, where they are states."""

    k: Tensor  # [B, HKV, states, D]
    v: Tensor  # [B, HKV, states, DV]
    # Of the cache, padding included, whose windows have been compressed; beside a static cache an
    # int64 on its device, so that a step reads nothing back.
    num_columns: int | Tensor
    made_by: tuple[Any, ...]  # what tells the compressors of one layer from those of another

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does something to the rows."""
        self.k, self.v = change(self.k), change(self.v)

    def advance(self, num_new: int) -> None:
        """Counts columns whose windows have been compressed."""
        if isinstance(self.num_columns, Tensor):
            self.num_columns.add_(num_new)
        else:
            self.num_columns += num_new

    def reserve(self, num_states: int) -> None:
        """Makes room for so many states of every row, and for as many again, in tensors that can be
        written to: those of inference mode cannot outside of it."""
        if self.k.is_inference() and not torch.is_inference_mode_enabled():
            self.map(Tensor.clone)
        if num_states > self.k.shape[2]:
            self.map(lambda x: torch.cat((x, x.new_empty(*_grown(x, 2 * num_states))), dim=2))


def _grown(x: Tensor, num_states: int) -> tuple[int, ...]:
    return (*x.shape[:2], num_states - x.shape[2], x.shape[3])


class _WithCompressedTokens(CacheLayerMixin):
    """Mixed in before a class of a cache's layer, whose instances become ones of the new class."""

    compressed: CompressedTokens | None = None

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map(lambda x: x[indices, ...])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.compressed is not None:
            held, compressed = self.get_seq_length(), self.compressed
            if isinstance(compressed.num_columns, Tensor):
                compressed.num_columns.clamp_(max=held)
            else:
                compressed.num_columns = min(compressed.num_columns, int(held))

    def reset(self) -> None:
        super().reset()
        if self.compressed is not None and isinstance(self.compressed.num_columns, Tensor):
            self.compressed.num_columns.zero_()  # the tensors may be those of a graph
        else:
            self.compressed = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.compressed is not None:
            self.compressed.map(change)


class CompressedDynamicLayer(_WithCompressedTokens, DynamicLayer):
    pass


class CompressedStaticLayer(_WithCompressedTokens, StaticLayer):
    pass


COMPRESSED: dict[type, type] = {
    DynamicLayer: CompressedDynamicLayer,
    StaticLayer: CompressedStaticLayer,
}
DYNAMIC = (DynamicLayer, CompressedDynamicLayer)


def layer_of(cache: Any, layer_idx: int) -> Any:
    """The layer of a cache beside which compressed tokens can lie, or None."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    return layer if type(layer) in (*COMPRESSED, *COMPRESSED.values()) else None


def room_of(cache: Any) -> int:
    """Columns of the layers of a static cache, full attention's; 0 for another cache."""
    layers = (x for x in getattr(cache, "layers", ()) if isinstance(x, StaticLayer))
    return next((x.max_cache_len for x in layers if not x.is_sliding), 0)


class Hidden(NamedTuple):
    """Which columns of a cache a mask has hidden."""

    mask: Tensor  # bool [B, columns], False where hidden; beside a static cache of all it can hold
    # Beside a static cache, int64 [B, columns], of every row the real ones first, and how many are
    # hidden, int32 [B].
    columns: Tensor | None = None
    number: Tensor | None = None


def compare_masks(cache: Any, mask: Tensor | None, past: int, follow: Tensor | None = None) -> bool:
    """Forgets the compressed tokens of a cache if its past columns are hidden by another mask
    `[B, past + S]` than before; None: nothing is hidden.

    follow: a bool `[]` that the caller wants to know, and gets; read back with the comparison. It
    is True where there is none, or nothing to compare.
    """
    before: Hidden | None = getattr(cache, "nsa_hidden", None)
    now = None if mask is None else mask[:, :past].ne(0)
    alike, followed = before is now is None, True
    if before is not None and now is not None and before.mask[:, :past].shape == now.shape:
        same = before.mask[:, :past].eq(now).all()
        truth = same.new_ones(()) if follow is None else follow
        alike, followed = torch.stack((same, truth)).tolist()

    if not alike:
        for layer in cache.layers:
            if isinstance(layer, _WithCompressedTokens):
                layer.compressed = None

    if mask is None:
        cache.nsa_hidden = None
        return followed

    mask = mask.ne(0)
    room = room_of(cache)
    if room == 0:
        cache.nsa_hidden = Hidden(mask)
        return followed
    mask = torch.nn.functional.pad(mask, (0, room - mask.shape[1]), value=True)
    found = (mask, real_first(mask), (~mask).sum(1, dtype=torch.int32))

    if before is not None and before.mask.shape == mask.shape:  # they may be those of a graph
        for old, new in zip(before, found, strict=True):
            assert old is not None
            old.copy_(new)
    else:
        cache.nsa_hidden = Hidden(*_fixed(*found))
    return followed


def keep_turn(cache: Any, turn: Tensor) -> None:
    """Puts `Turning.turn` of the layers that compress all keys now beside a cache."""
    before: Tensor | None = getattr(cache, "nsa_turn", None)
    if room_of(cache) == 0:
        cache.nsa_turn = turn
    elif before is not None and (before.shape, before.dtype) == (turn.shape, turn.dtype):
        before.copy_(turn)  # it may be that of a graph
    else:
        (cache.nsa_turn,) = _fixed(turn)


def real_first(mask: Tensor) -> Tensor:
    """The columns of a mask `[B, columns]`, of every row the real ones first, int64."""
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)


def _fixed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of which torch.compile knows that they stay where they are."""
    for x in tensors:
        torch._dynamo.mark_static_address(x)
    return tensors


def compressors_of(module: Any) -> tuple[Any, ...]:
    """The windows and compressors of a layer; by ids, so that a copied cache copies no module."""
    c, ids = module.nsa_config, (id(module.compress_k), id(module.compress_v))
    return c.kernel_size, c.kernel_stride, c.compress_rope, *ids


def keep(
    layer: Any, module: Any, k_cmp: Tensor, v_cmp: Tensor, layout: Sequences, held: int
) -> None:
    """Puts compressed tokens of all keys, as a module's operators have them, beside a cache's
    layer, which holds so many columns."""
    stride = module.nsa_config.kernel_stride
    hops = module.nsa_config.kernel_size // stride
    starts = layout.cu_seqlens[:-1].long() // stride
    number = max(held // stride - hops + 1, 0)
    rows = torch.arange(number, device=starts.device) + starts[:, None]  # [B, number]
    rows = rows.clamp(max=max(k_cmp.shape[0] - 1, 0))
    is_static = isinstance(layer, StaticLayer)
    room = layer.max_cache_len // stride if is_static else 2 * (held // stride)
    layer.__class__ = COMPRESSED.get(type(layer), type(layer))
    before = layer.compressed

    def placed(x: Tensor, old: Tensor | None) -> Tensor:
        shape = (len(starts), x.shape[1], max(room, hops + 1), x.shape[2])
        # A graph may have been made of the tensors beside a static cache.
        stays = is_static and old is not None and (old.shape, old.dtype) == (shape, x.dtype)
        kept = old if old is not None and stays else x.new_empty(shape)
        if number:
            kept[:, :, hops - 1 : hops - 1 + number] = x[rows].transpose(1, 2)
        return kept

    old = (None, None) if before is None else (before.k, before.v)
    k, v = (placed(x.detach(), y) for x, y in zip((k_cmp, v_cmp), old, strict=True))
    if not is_static:
        layer.compressed = CompressedTokens(k, v, held, compressors_of(module))
    elif before is not None and k is before.k and v is before.v:
        before.num_columns.fill_(held)
        before.made_by = compressors_of(module)
    else:
        k, v, number_held = _fixed(k, v, torch.tensor(held, device=k.device))
        layer.compressed = CompressedTokens(k, v, number_held, compressors_of(module))


class Step(NamedTuple):
    """What the layers of a model need to decode a few new tokens, all real, of every row."""

    lengths: Tensor  # int32 [B], of the real tokens, the new ones included
    one_page: Tensor  # int32 [B, 1], the number of every row
    columns: Tensor | None  # int64 [B, columns], of every row the real ones first; None: all real
    turning: Turning | None = None  # where layers turn keys back


def step_of(lengths: Tensor, columns: Tensor | None, turning: Turning | None) -> Step:
    """A step of rows of a cache, each a page of its own."""
    one_page = torch.arange(lengths.shape[0], dtype=torch.int32, device=lengths.device)
    return Step(lengths, one_page[:, None], columns, turning)


def decodes(module: Any) -> bool:
    """Whether a module's new tokens can be decoded by themselves: nobody records what they see."""
    return module.recorder is None


def reads_nothing_back(module: Any) -> bool:
    """Whether a module's decoding leaves what is on a GPU there, as its kernels do."""
    like: Tensor = module.gate.weight
    if not like.is_cuda:
        return True
    c = module.nsa_config
    rows = like.new_empty(0, 1, max(c.head_dim, c.v_head_dim))
    missing = unavailable(like.device) or unsupported_heads(rows, rows, c.group_size)
    return missing is None and BACKENDS.or_auto(c.backend) != "reference"


def _compressed(modules: list[Any], cache: Any, num_new: int) -> list[Any] | None:
    """The `CompressedTokens` with which modules can decode so many new tokens, or None."""
    layers: list[Any] = [layer_of(cache, module.layer_idx) for module in modules]
    found: list[Any] = [getattr(layer, "compressed", None) for layer in layers]
    if num_new > MOST_NEW or torch.is_grad_enabled() or None in found:
        return None
    alike = all(
        x.keys.dtype == x.values.dtype == y.k.dtype for x, y in zip(layers, found, strict=True)
    )
    return found if alike and all(map(decodes, modules)) else None


def can_decode(modules: list[Any], cache: Any, past: int, num_new: int) -> bool:
    """Whether beside a cache lie the compressed tokens of all its `past` columns, made by the
    compressors that the modules have now, and new ones are few."""
    found = _compressed(modules, cache, num_new)
    if found is None or any(
        x.made_by != compressors_of(module) for x, module in zip(found, modules, strict=True)
    ):
        return False
    held: list[Any] = [x.num_columns for x in found]
    if isinstance(held[0], Tensor):
        return bool(torch.stack(held).eq(past).all())
    return all(x == past for x in held)


def traced_step(
    modules: list[Any],
    cache: Any,
    mask: Tensor | None,
    num_new: int,
    position_ids: Any,
    rotary: Rotary | None,
) -> Step | None:
    """The step of a forward that must read nothing back, of which a compiler or a CUDA graph makes
    one for all lengths; None where it cannot be had. Only beside static caches there is one.

    Args:
        mask: `[B, columns]`, those that have not been fed yet of any value. It can show and hide
            what it did before, which is looked at on the device.
        position_ids: `[B or 1, S]` of the new tokens, or None.
        rotary: the decoder's, where layers turn keys back.
    """
    found = _compressed(modules, cache, num_new)
    if found is None or room_of(cache) == 0:
        return None

    first, hidden = cache.layers[modules[0].layer_idx], getattr(cache, "nsa_hidden", None)
    total = first.cumulative_length + num_new
    torch._assert_async(
        found[0].num_columns + num_new == total,
        "the static cache holds tokens whose windows have not been compressed, as after a dense "
        "model has gone on with it. Fix: a step that is not compiled.",
    )

    if mask is not None:
        shown, column = mask.ne(0), torch.arange(mask.shape[1], device=mask.device)
        real = True if hidden is None else hidden.mask[:, : mask.shape[1]]
        torch._assert_async(
            ((shown == real) | (column >= total)).all(),
            "attention_mask hides other tokens than when the static cache was filled, which a "
            "compiled step cannot do. Fix: a step that is not compiled.",
        )

    turning = None
    if turns_back(modules):
        assert rotary is not None
        past = first.cumulative_length
        turning = turning_of(modules, cache.nsa_turn, rotary, position_ids, past, num_new)
        if hidden is not None:
            torch._assert_async(
                positions_follow(hidden.mask, position_ids, past),
                "attention_mask hides columns between real ones, and positions are columns: then "
                "keys cannot be turned back in a compiled step. Fix: position_ids that count the "
                "real tokens of a row, as generate passes them.",
            )

    lengths = total.to(torch.int32).expand(first.keys.shape[0])
    if hidden is None:
        return step_of(lengths.contiguous(), None, turning)
    return step_of(lengths - hidden.number, hidden.columns, turning)


def decode(
    module: Any,
    layer: Any,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    gate_logits: Tensor,
    step: Step,
    rotation: tuple[Tensor, Tensor] | None,
    scale: float | None,
) -> Tensor:
    """What new tokens read of a cache: q `[B * S, HQ, D]` -> `[B * S, HQ, DV]`.

    keys: the cache's, `[B, HKV, columns, D or DV]`, and values. rotation: cos and sin
    `[B or 1, S, rotary_dim]` of the new tokens, where keys are turned back.
    """
    c, compressed, (lengths, one_page, columns, _) = module.nsa_config, layer.compressed, step
    (k, v), (number, num_heads, room) = keys, keys[0].shape[:3]
    num_new = q.shape[0] // number
    if not isinstance(layer, StaticLayer):
        compressed.reserve(cdiv(room, c.kernel_stride))

    table = one_page
    if columns is not None:
        # Every row of the cache is a page, whose number is that of the row among all heads'.
        k, v = (_as_rows(x) for x in (k, v))
        table = (one_page * (num_heads * room) + columns[:, :room]).int()
    pages = Pages(k, v, compressed.k, compressed.v, table, one_page)

    turning = None if rotation is None else step.turning
    pool_k, pool_v = module.compress_k.pooling(), module.compress_v.pooling()
    if pool_k is None or pool_v is None:
        _compress_completed(module, compressed, keys, num_new, step, turning)
    else:
        of_embedding = None
        if rotation is not None and pool_k.embedding is not None:
            cos, sin = (x.expand(number, -1, -1).flatten(0, 1) for x in rotation)
            of_embedding = cos, sin
        # These are in the cache already: their number is all that is asked for.
        new_k, new_v = (x[:1, :, 0].expand(q.shape[0], -1, -1) for x in keys)
        turn = None if turning is None else turning.turn[:, : c.kernel_size]
        options = dict(turn=turn, rotation=of_embedding, write=False)
        module.append_step(new_k, new_v, pages, lengths, **options)

    o = module.mix_step(q, gate_logits, pages, lengths, scale)
    compressed.advance(num_new)
    return o


def _compress_completed(
    module: Any,
    compressed: CompressedTokens,
    keys: tuple[Tensor, Tensor],
    num_new: int,
    step: Step,
    turning: Turning | None,
) -> None:
    """Writes the compressed tokens of the windows that new tokens complete, by the module's own
    compressors. Of every row there are as many as can be, because how many are complete is known on
    the device alone; the others repeat the last of them, or leave what is there."""
    size, stride = module.nsa_config.kernel_size, module.nsa_config.kernel_stride
    total = step.lengths.long()[:, None]  # [B, 1]
    old, complete = (num_windows_of(x, size, stride) for x in (total - num_new, total))
    most = torch.arange(cdiv(num_new, stride), device=total.device)
    window = (old + most).clamp(max=complete - 1).maximum(old)  # [B, windows]
    position = window[..., None] * stride + torch.arange(size, device=total.device)
    position = position.flatten(1).minimum(total - 1)  # [B, windows * l]
    column = position if step.columns is None else step.columns.gather(1, position)
    row = torch.arange(total.shape[0], device=total.device)[:, None]
    k, v = (x.transpose(1, 2)[row, column].flatten(0, 1) for x in keys)

    cos = sin = None
    if turning is not None:
        assert turning.latest is not None
        # The last of them is the last new token.
        latest = (position - total + turning.latest[0].shape[1]).clamp(min=0)
        cos, sin = (
            x.expand(total.shape[0], -1, -1)[row, latest].flatten(0, 1) for x in turning.latest
        )
        k = turn_back(k, cos, sin)

    layout = uniform_layout(window.numel(), size, total.device)  # a sequence of every window
    hops = size // stride  # rows that compression has for each, of which the first one counts
    state = (window + hops - 1).clamp(max=compressed.k.shape[2] - 1)
    head = torch.arange(compressed.k.shape[1], device=total.device)
    place = row[..., None], head, state[..., None]  # [B, windows, HKV]
    is_complete = (window < complete)[..., None, None]

    found = module.compress(k, v, cos, sin, layout)
    for kept, x in zip((compressed.k, compressed.v), found, strict=True):
        x = x[::hops].unflatten(0, window.shape)
        kept.index_put_(place, torch.where(is_complete, x, kept[place]))


def _as_rows(x: Tensor) -> Tensor:
    """`[B, HKV, N, width]` as pages of one row, of which the other heads' lie N rows behind."""
    x = x.contiguous()
    number, num_heads, rows, width = x.shape
    pages = number * num_heads * rows - (num_heads - 1) * rows
    return x.as_strided((pages, num_heads, 1, width), (width, rows * width, width, 1))
