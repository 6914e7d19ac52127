"""What lies beside a layer of transformers' caches: compressed tokens, so that a step compresses
those alone that it completes.

The keys and values stay where transformers keeps them. A layer of a cache that holds compressed
tokens gets a class that does with them what is done to its keys: reordering, cropping and so on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from nsa_fsa.decode import Pages, append_tokens, nsa_decode
from nsa_fsa.decode.operator import BACKENDS, MOST_NEW
from nsa_fsa.ops.common.sizes import cdiv
from nsa_fsa.sequences import Sequences


@dataclass
class CompressedTokens:
    """The compressed tokens of a cache's rows: see `decode.Pages`, where they are states."""

    k: Tensor  # [B, HKV, states, D]
    v: Tensor  # [B, HKV, states, DV]
    num_columns: int  # of the cache, padding included, whose windows have been compressed
    padded: bool  # whether a mask hid any of them
    made_by: tuple[Any, ...]  # what tells the compressors of one layer from those of another

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does something to the rows."""
        self.k, self.v = change(self.k), change(self.v)

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
            held = int(self.get_seq_length())
            self.compressed.num_columns = min(self.compressed.num_columns, held)

    def reset(self) -> None:
        super().reset()
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


def compare_masks(cache: Any, mask: Tensor | None, past: int) -> None:
    """Forgets the compressed tokens of a cache if its past columns are hidden by another mask
    `[B, past + S]` than before; None: nothing is hidden."""
    before = getattr(cache, "nsa_mask", None)
    now = None if mask is None else mask[:, :past].ne(0)
    alike = before is now is None
    if before is not None and now is not None:
        alike = torch.equal(before[:, :past], now)
    if not alike:
        for layer in cache.layers:
            if isinstance(layer, _WithCompressedTokens):
                layer.compressed = None
    cache.nsa_mask = None if mask is None else mask.ne(0)


def compressors_of(module: Any) -> tuple[Any, ...]:
    """The windows and compressors of a layer; by ids, so that a copied cache copies no module."""
    c = module.nsa_config
    return c.kernel_size, c.kernel_stride, id(module.compress_k), id(module.compress_v)


def keep(
    layer: Any,
    module: Any,
    k_cmp: Tensor,
    v_cmp: Tensor,
    layout: Sequences,
    columns: tuple[int, bool],
) -> None:
    """Puts compressed tokens of all keys, as a module's operators have them, beside a cache's
    layer.

    columns: how many the cache holds, and whether any is padding.
    """
    stride = module.nsa_config.kernel_stride
    hops = module.nsa_config.kernel_size // stride
    starts, held = layout.cu_seqlens[:-1].long() // stride, columns[0]
    number = max(held // stride - hops + 1, 0)
    rows = torch.arange(number, device=starts.device) + starts[:, None]  # [B, number]
    rows = rows.clamp(max=max(k_cmp.shape[0] - 1, 0))
    room = max(getattr(layer, "max_cache_len", 0) // stride, 2 * (held // stride), hops + 1)

    def placed(x: Tensor) -> Tensor:
        kept = x.new_empty(len(starts), x.shape[1], room, x.shape[2])
        if number:
            kept[:, :, hops - 1 : hops - 1 + number] = x[rows].transpose(1, 2)
        return kept

    layer.__class__ = COMPRESSED.get(type(layer), type(layer))
    k, v = (placed(x.detach()) for x in (k_cmp, v_cmp))
    layer.compressed = CompressedTokens(k, v, *columns, compressors_of(module))


def can_go_on(
    layer: Any,
    module: Any,
    keys: tuple[Tensor, Tensor],
    num_new: int,
    past: int,
    padded: bool,
    has_padding_now: bool,
) -> bool:
    """Whether a few new tokens can be decoded with the compressed tokens that lie beside a layer.

    keys: the cache's, and its values. padded: whether a mask hides any column.
    """
    compressed = getattr(layer, "compressed", None)
    return (
        compressed is not None
        and 0 < past == compressed.num_columns
        and padded == compressed.padded
        and compressed.made_by == compressors_of(module)
        and {x.dtype for x in keys} == {compressed.k.dtype}
        and num_new <= MOST_NEW
        and not has_padding_now
        and module.recorder is None
        and module.nsa_config.compress_rope == "before"
        and None not in (module.compress_k.pooling(), module.compress_v.pooling())
    )


def decode(
    module: Any,
    layer: Any,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    gate_logits: Tensor,
    layout: Sequences,
    columns: Tensor | None,
    scale: float | None,
) -> Tensor:
    """What new tokens read of a cache: q `[B * S, HQ, D]` -> `[B * S, HQ, DV]`.

    keys: the cache's, `[B, HKV, columns, D or DV]`, and values. columns: `[B, columns]`, of every
    row the real ones first; None: all are real.
    """
    c, compressed, lengths = module.nsa_config, layer.compressed, layout.seqused_k
    assert lengths is not None
    (k, v), number = keys, keys[0].shape[0]
    total, num_new = layout.max_seqlen, q.shape[0] // number
    compressed.reserve(cdiv(total, c.kernel_stride))
    one_page = torch.arange(number, dtype=torch.int32, device=q.device)[:, None]
    table = one_page
    if columns is not None:
        # Every row of the cache is a page, whose number is that of the row among all heads'.
        k, v = (_as_rows(x) for x in (k, v))
        first = torch.arange(number, device=q.device)[:, None] * (
            keys[0].shape[1] * keys[0].shape[2]
        )
        table = (first + columns).int()
    pages = Pages(k, v, compressed.k, compressed.v, table, one_page)
    # These are in the cache already: their number is all that is asked for.
    new_k, new_v = (x[:1, :, 0].expand(q.shape[0], -1, -1) for x in keys)
    windows = dict(kernel_size=c.kernel_size, kernel_stride=c.kernel_stride)
    backend = BACKENDS.or_auto(c.backend)
    append_tokens(
        *(new_k, new_v, pages, lengths),
        **windows,
        pool_k=module.compress_k.pooling(),
        pool_v=module.compress_v.pooling(),
        write=False,
        backend=backend,
    )
    found = nsa_decode(
        *(q.to(k.dtype), gate_logits.unflatten(-1, (-1, 3)), pages, lengths),
        **windows,
        block_size=c.block_size,
        num_selected_blocks=c.num_selected_blocks,
        init_blocks=c.init_blocks,
        local_blocks=c.local_blocks,
        window_size=c.window_size,
        scale=c.scale if scale is None else scale,
        backend=backend,
    )
    compressed.num_columns += num_new
    return found.o


def _as_rows(x: Tensor) -> Tensor:
    """`[B, HKV, N, width]` as pages of one row, of which the other heads' lie N rows behind."""
    x = x.contiguous()
    number, num_heads, rows, width = x.shape
    pages = number * num_heads * rows - (num_heads - 1) * rows
    return x.as_strided((pages, num_heads, 1, width), (width, rows * width, width, 1))
