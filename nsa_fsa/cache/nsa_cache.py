"""NSACache: what one layer remembers between calls (docs/spec.md, section 9).

Buffers are `[B, capacity, HKV, width]`, row b holding sequence b from its first real token on, so
that the operators read them in place: sequence b begins at row `b * capacity` of the flattened
buffer and counts `lengths[b]` rows. Compressed buffers are
`[B, capacity // kernel_stride, HKV, width]`. To the operators of decoding the buffers are pages, a
page for every sequence, and so compressed token i lies in state `i + l / s - 1`, counted from 0
like rows. Other operators expect it at `i`: they see the flattened compressed buffers from row
`l / s - 1` on.

Keys are kept rotated. Compression, by default, reads keys as they were before RoPE, and they are
turned back: by `turn` where a window's keys are pooled in a kernel, otherwise by the cos and sin of
every token, which are kept as well. That is 6% more memory for a Llama-3-8B, where a second copy of
all keys would be 50%. In 16 bits a key is rounded once more by this, before a mean is taken.

A layer that never decodes the fast way, whose compressors may do other things than take a mean,
keeps the latest keys as they came, too, in the buffer "recent": the key of position p in column
`p % num_recent`. It turns rotated ones back only after a crop beyond them. Turning back every time
would cost it up to 0.7% of its output's scale in 16 bits, and a choice of blocks here and there.
With `kv_per_branch`, what compression reads is kept whole beside the keys and values of the other
two branches.

Only `hide`, and `reorder` with a bool index, wait for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa import checks
from nsa_fsa.config import NSAConfig
from nsa_fsa.decode.pages import Pages
from nsa_fsa.ops.compression.reference import num_windows_of
from nsa_fsa.sequences import Sequences, sequence_ids


class KeyValues(NamedTuple):
    """Keys and values of a packed batch of T tokens, for every branch."""

    k: Tensor  # [T, HKV, D] selected branch, rotated
    v: Tensor  # [T, HKV, DV]
    k_swa: Tensor  # sliding branch; the same tensors unless kv_per_branch
    v_swa: Tensor
    k_src: Tensor  # what compression reads
    v_src: Tensor
    # [T, rotary_dim], where compressed keys are rotated after compression
    cos: Tensor | None = None
    sin: Tensor | None = None


Sources = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # k_src, v_src, cos, sin
# (*sources, layout) -> (k_cmp, v_cmp)
Compress = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Sequences], tuple[Tensor, Tensor]
]
# (positions [N], dtype) -> cos and sin, [N, rotary_dim]
Rotation = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """Where a few new tokens of every sequence go; T of them together."""

    pages: Pages
    lengths: Tensor  # int32 [B], new tokens included
    # cos and sin of the new tokens, [T, rotary_dim], and `turn` of `append_tokens`, where
    # compressed keys are rotated after compression
    rotation: tuple[Tensor, Tensor] | None
    turn: Tensor | None


class _Update(NamedTuple):
    """What an update or a step prepared and `NSACache.commit` makes last."""

    buffers: dict[str, Tensor]
    lengths: Tensor  # int64 [B]
    num_columns: int  # new ones
    padding: Tensor | None = None  # bool [B, new columns], where they hold no token
    # Where in the buffer "recent" the keys of the T new tokens go, and these.
    recent: tuple[tuple[Tensor, Tensor], Tensor] | None = None


class NSACache:
    """Decode state of one `NativeSparseAttention` layer.

    What was fed in inference mode, under autocast or with gradients may be continued in any other
    mode: buffers become as wide as the widest dtype fed, and nothing is written into a tensor that
    a pending backward needs. A forward that raises leaves the cache as it was, but for tokens that
    its mask hid, which stay hidden.

    A few new tokens at a time, without gradients and without padding among them, take the fast path
    of decoding where the layer's compressors are "mean" or "weighted" and the branches share their
    keys: see the layer.

    In a cache of fixed size such a step can be recorded in a CUDA graph, because the lengths are on
    the device. The host counts columns beside them: `advance` counts those of a replay, and refuses
    what does not fit. A graph stays good after `crop`, `hide`, `reset` and other calls in its mode
    of gradients, for as many sequences of the same dtype, but not after `reorder` and
    `repeat_interleave`. With `compress_rope="before"` RoPE must be "default" or "linear" for it.

    Args:
        config: the layer's configuration.
        max_length: None for buffers that grow by doubling; a number of tokens for buffers of fixed
            size, allocated once.
        rollback: how many of the latest tokens `crop` can take back without rounding any key, in a
            layer that never takes the fast path. It has no effect in others.

    Example:
        >>> cache = NSACache(attn.config)
        >>> prompt, rest = attn(x[:, :100], cache=cache), attn(x[:, 100:], cache=cache)
        >>> y = torch.cat((prompt, rest), dim=1)  # equals attn(x)

        A loop of one's own, of which a GPU runs whole steps without the host. `model` calls layers
        that have a cache each, and writes its answer into `token`, its input:

        >>> caches = [NSACache(layer.config, max_length=4096) for layer in layers]
        >>> model(prompt, caches)
        >>> model(token, caches)  # the first step compiles kernels
        >>> graph = torch.cuda.CUDAGraph()
        >>> with torch.cuda.graph(graph):
        ...     model(token, caches)
        >>> for _ in range(100):
        ...     for cache in caches:
        ...         cache.advance(1)
        ...     graph.replay()
    """

    def __init__(
        self, config: NSAConfig, *, max_length: int | None = None, rollback: int = 128
    ) -> None:
        if not isinstance(config, NSAConfig):
            raise ValueError(
                f"config={config!r:.100} must be an NSAConfig. Fix: NSACache(attn.config)."
            )
        if max_length is not None:
            checks.check_positive(max_length=max_length)
        checks.check_ints(0, rollback=rollback)
        self.config = config
        self.max_length = max_length
        self.rollback = rollback
        # [B, capacity, ...] or [B, capacity // kernel_stride, ...]; in an empty cache they are to
        # be used again, if they fit.
        # "padding", bool [B, capacity]: which of the columns fed hold no token.
        # "recent", [B, num_recent + 1, HKV, D]: see above; the last column takes the other keys.
        self._buffers: dict[str, Tensor] = {}
        self._lengths = torch.zeros(0, dtype=torch.int64)  # [B]; of an empty cache, meaningless
        self._turn: Tensor | None = None
        self._needed_by_backward = False  # then the next update writes into copies of the buffers
        self.reset()

    def reset(self) -> None:
        """Forgets everything. A cache of fixed size keeps its memory."""
        # Columns fed so far, padding included: an upper bound on every length that the host knows.
        self.num_tokens = 0
        self.has_padding = False  # whether any column may hold no token; what the host knows
        # Whether the cos and sin of every position are known, past and to come: see `update`.
        self.is_by_position = True
        self._furthest = 0  # the most columns that there were since "recent" was last turned back
        self._pending: _Update | None = None
        if self.max_length is None:
            self._buffers, self._needed_by_backward = {}, False
        elif self._buffers:
            self._show_columns(0)

    @property
    def is_empty(self) -> bool:
        return self.num_tokens == 0

    @property
    def capacity(self) -> int:
        """How long a sequence can become before the buffers have to grow."""
        return 0 if self.is_empty else self._buffers["k"].shape[1]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each sequence, int64 `[B]`; `[0]` before the first batch. The next call
        of the layer may write into it."""
        return self._lengths[:0] if self.is_empty else self._lengths

    def differences(self, config: NSAConfig) -> str:
        """The settings in which a layer's config differs from the cache's, with both values;
        "" where none does.
        """
        kept, found = self.config.to_dict(), config.to_dict()
        others = (name for name in kept if kept[name] != found[name])
        return ", ".join(f"{name}={kept[name]!r} (layer: {found[name]!r})" for name in others)

    def check_room(self, num_sequences: int, num_columns: int) -> None:
        """Raises ValueError unless that many sequences can go on by that many columns."""
        if not self.is_empty and num_sequences != self._lengths.shape[0]:
            raise ValueError(
                f"the batch has {num_sequences} sequences but the cache holds "
                f"{self._lengths.shape[0]}. "
                "Fix: reset() it, or reorder() / repeat_interleave() it first."
            )
        if self.max_length is not None and self.num_tokens + num_columns > self.max_length:
            raise ValueError(
                f"{num_columns} more tokens do not fit: the cache holds {self.num_tokens} of "
                f"{self.max_length}. Fix: a larger max_length, or None for a cache that grows."
            )

    def next_positions(self, layout: Sequences | None, num_rows: int) -> Tensor:
        """The positions that `num_rows` new packed tokens will take, int64 `[num_rows]`.

        layout: None where as many are of every sequence of a cache that is not empty.
        """
        if layout is not None:
            return self._places(layout, num_rows)[1]
        num_new, position = num_rows // self._lengths.shape[0], self._lengths[:, None]
        if num_new > 1:
            position = position + torch.arange(num_new, device=position.device)
        return position.flatten()

    def update(
        self,
        new: KeyValues,
        layout: Sequences,
        compress: Compress,
        rows: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[KeyValues, Tensor, Tensor, Sequences]:
        """Prepares to append a packed batch of new tokens; `commit` makes it last.

        Args:
            new: their keys and values.
            layout: where the sequences lie among them; `max_seqlen` is the number of columns S.
            compress: turns packed keys and values into compressed ones.
            rows: int64 `[T]`, where the tokens stood in the flattened `[B, S]` batch, the other
                places being padding; None: there is no padding.
            rotation: how any position is rotated, where keys are rotated after compression and the
                layer may go on by `step`. Tokens have the cos and sin of the positions they take.

        Returns:
            Keys and values of everything so far, the compressed ones, and the layout that makes the
            operators read them. After an empty cache that is what came in, in its own layout; later
            they are flat views of the buffers (`k_src` and what follows stay those of `new`).

        Raises:
            ValueError: as `check_room` does.
        """
        num_sequences, num_columns = layout.cu_seqlens.shape[0] - 1, layout.max_seqlen
        self.check_room(num_sequences, num_columns)
        self._pending = None  # what a forward that raised has left takes memory
        if rotation is None and new.cos is not None and self.is_by_position:
            self.is_by_position = False
            if not (self.is_empty or self.config.kv_per_branch):
                self._keep_recent()
        stride, device = self.config.kernel_stride, new.k.device
        sequence, position = self._places(layout, new.k.shape[0])
        no_tokens = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        old_lengths = no_tokens if self.is_empty else self._lengths
        lengths = old_lengths + layout.cu_seqlens.diff()
        num_tokens = self.num_tokens + num_columns
        padding = None
        if rows is not None:
            padding = torch.ones(num_sequences * num_columns, dtype=torch.bool, device=device)
            padding = padding.index_fill_(0, rows, False).view(num_sequences, num_columns)

        # Until the commit, everything is written beyond the lengths that hold.
        tokens = self._tokens(new)
        like = tokens | {"k_cmp": new.k_src, "v_cmp": new.v_src}
        like["padding"] = torch.empty(0, dtype=torch.bool, device=device)
        recent = None
        if not (self.is_by_position or new.cos is None or self.config.kv_per_branch):
            like["recent"] = new.k_src
            is_recent = position >= (lengths - self._num_recent)[sequence]
            column = torch.where(is_recent, position % self._num_recent, self._num_recent)
            recent = (sequence, column), new.k_src  # written at the commit
        buffers = self._writable(like, num_sequences, num_tokens, rotation)
        for name, values in tokens.items():
            _put(buffers[name], (sequence, position), values)

        # From the first window on that was not complete before.
        num_complete = self._num_windows(old_lengths)
        if self.is_empty:
            k_cmp, v_cmp = compress(new.k_src, new.v_src, new.cos, new.sin, layout)
            windows = layout
        else:
            first = num_complete * stride
            width = _round_up(self.config.kernel_size + num_columns, stride)
            sources = self._sources(buffers, first, width)
            if new.cos is not None:  # what is new has not to be turned back
                _put(sources[0], (sequence * width + position - first[sequence],), new.k_src)
            windows = Sequences(_starts(lengths, width), width, seqused_k=(lengths - first).int())
            k_cmp, v_cmp = compress(*sources, windows)
        # Incomplete windows are written as well: nobody reads them before they are overwritten.
        window = torch.arange(min(windows.max_seqlen // stride, k_cmp.shape[0]), device=device)
        row = (windows.cu_seqlens[:-1, None] // stride + window).clamp(max=k_cmp.shape[0] - 1)
        place = (_rows(lengths), self._first_state + num_complete[:, None] + window)
        _put(buffers["k_cmp"], place, k_cmp[row])
        _put(buffers["v_cmp"], place, v_cmp[row])

        self._pending = _Update(buffers, lengths, num_columns, padding, recent)
        if self.is_empty:
            return new, k_cmp, v_cmp, layout
        # So many rows less of tokens, because so many compressed ones come before the first.
        num_rows = max(buffers["padding"].numel() - self._first_state * stride, 0)
        flat = {name: x.flatten(0, 1)[:num_rows] for name, x in buffers.items()}
        k_cmp, v_cmp = (buffers[x].flatten(0, 1)[self._first_state :] for x in ("k_cmp", "v_cmp"))
        k_swa, v_swa = ("k_swa", "v_swa") if self.config.kv_per_branch else ("k", "v")
        keys = KeyValues(
            flat["k"], flat["v"], flat[k_swa], flat[v_swa], new.k_src, new.v_src, new.cos, new.sin
        )
        starts = _starts(lengths, buffers["k"].shape[1]).clamp(max=num_rows)
        everything = Sequences(starts, num_tokens, layout.cu_seqlens, lengths.int())
        return keys, k_cmp, v_cmp, everything

    def step(self, k: Tensor, v: Tensor, num_new: int, rotation: Rotation | None) -> Step:
        """Prepares to append `num_new` tokens of every sequence, which the caller writes into the
        pages; `commit` makes it last. The cache must not be empty.

        Args:
            k, v: `[T, HKV, D]` and `[T, HKV, DV]`, of the dtype of the new ones.
            rotation: how any position is rotated, where compressed keys are rotated after
                compression.

        Raises:
            ValueError: as `check_room` does.
        """
        num_sequences = self._lengths.shape[0]
        self.check_room(num_sequences, num_new)
        self._pending = None
        like = {name: x.flatten(0, 1) for name, x in self._buffers.items()}
        like |= {"k": k, "v": v, "k_cmp": k, "v_cmp": v}
        buffers = self._writable(like, num_sequences, self.num_tokens + num_new, rotation)
        lengths = self._lengths + num_new
        row = torch.arange(num_sequences, dtype=torch.int32, device=k.device)[:, None]
        cos_and_sin = None
        if rotation is not None:
            position = self.next_positions(None, k.shape[0])
            twice = (buffers[name][0, :, None].expand(-1, 2, -1) for name in ("cos", "sin"))
            cos, sin = (x[position].flatten(1) for x in twice)  # rows of all sequences are alike
            cos_and_sin = cos, sin
        k, v, k_cmp, v_cmp = (buffers[x].transpose(1, 2) for x in ("k", "v", "k_cmp", "v_cmp"))
        self._pending = _Update(buffers, lengths, num_new)
        pages = Pages(k, v, k_cmp, v_cmp, table=row)
        return Step(pages, lengths.int(), cos_and_sin, None if rotation is None else self._turn)

    def commit(self, needed_by_backward: bool) -> None:
        """Makes the last update or step last; for the end of a forward, when nothing can fail any
        more.

        needed_by_backward: whether the forward recorded a graph, which then holds the buffers: the
            next update leaves them as they are and writes into copies.
        """
        assert self._pending is not None, "there is no update to commit"
        buffers, lengths, num_columns, padding, recent = self._pending
        if recent is not None:
            _put(buffers["recent"], *recent)
        if padding is not None:
            self.has_padding = True
            buffers["padding"][:, self.num_tokens : self.num_tokens + num_columns] = padding
        self._buffers, self._lengths = buffers, _written(self._lengths, lengths)
        # What a CUDA graph records does not run yet: see `advance`.
        if not (lengths.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.num_tokens += num_columns
        self._furthest = max(self._furthest, self.num_tokens)
        self._needed_by_backward, self._pending = needed_by_backward, None

    def advance(self, num_columns: int) -> None:
        """Counts the columns that a replay of a recorded step is about to append, for there the
        host does not see them.

        Raises:
            ValueError: where they do not fit, or buffers grow.
        """
        checks.check_ints(0, num_columns=num_columns)
        if self.max_length is None or self.is_empty:
            raise ValueError(
                "advance counts the tokens of a recorded step, which goes on from a prompt in "
                "buffers of fixed size. Fix: NSACache(config, max_length=...), and feed a prompt."
            )
        self.check_room(self._lengths.shape[0], num_columns)
        self.num_tokens += num_columns

    # -- what generation does to a cache -----------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was; also selects a part of the batch.

        index: int64 `[new B]`, or bool `[B]`.

        Raises:
            ValueError: if it is no tensor.
        """
        checks.check_tensor("index", index, "int64 [new B] or bool [B]")
        index = index.to(self._lengths.device)
        rows = index.nonzero().flatten() if index.dtype == torch.bool else index
        self._map(lambda x: x[rows])

    def repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` adjacent rows."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, num_removed: int) -> None:
        """Takes back the last `num_removed` columns: of every row the real tokens among them.

        Raises:
            ValueError: if there are not that many.
        """
        held = self.num_tokens
        if not (checks.is_int(num_removed) and 0 <= num_removed <= held):
            raise ValueError(
                f"num_removed={num_removed!r:.100} must be an int from 0 to the {held} tokens "
                "held. Fix: crop(min(n, cache.num_tokens)), or reset() to take back all of them."
            )
        if num_removed == self.num_tokens:
            self.reset()
            return
        self.num_tokens -= num_removed
        self._show_columns(self.num_tokens)
        padding = self._buffers["padding"]
        self._lengths = _written(self._lengths, self.num_tokens - padding.sum(1))
        if "recent" in self._buffers and self._furthest - self.num_tokens > self.rollback:
            self._keep_recent()

    def hide(self, mask: Tensor) -> None:
        """Takes back the tokens that a mask hides, which must be the last ones of their rows.

        Args:
            mask: `[B, num_tokens]`, zero where a column is padding.

        Raises:
            ValueError: if a row goes on after hidden tokens, with tokens that were computed from
                them, or if the mask shows a column that holds no token. Nothing is changed then.
        """
        padding = self._buffers["padding"]
        fed, shown = ~padding[:, : self.num_tokens], mask.bool()
        kept = fed & shown
        goes_on = kept.sum(1, keepdim=True) > kept.cumsum(1)
        wrong = (fed & ~shown & goes_on) | (shown & ~fed)
        changed, refused = torch.stack(((fed != shown).any(), wrong.any())).tolist()

        if not changed:
            return
        if refused:
            row, column = wrong.nonzero()[0].tolist()
            if fed[row, column]:
                raise ValueError(
                    f"attention_mask[{row}, {column}] is 0, but the cache holds a token there, and "
                    "later tokens of its row that were computed from it. A mask can hide the last "
                    "tokens of a row, in the first call after them. "
                    f"Fix: crop the cache to {column} columns and feed the rest again."
                )
            raise ValueError(
                f"attention_mask[{row}, {column}] is not 0, but the cache holds no token there: "
                "the column was fed as padding, or was hidden since. "
                "Fix: keep the mask of earlier columns as it was."
            )

        self.has_padding = True
        shorter = kept.sum(1) != self._lengths
        self._lengths = _written(self._lengths, kept.sum(1))
        unused = padding.shape[1] - self.num_tokens
        hidden = torch.nn.functional.pad(~kept, (0, unused))
        self._buffers["padding"] = _written(padding, hidden)

        if "recent" in self._buffers:
            recent = torch.where(
                shorter[:, None, None, None], self._turned_back(), self._buffers["recent"]
            )
            self._buffers["recent"] = recent

    def by_column(self, name: str) -> Tensor | None:
        """The buffer "k" or "v" in the order fed, 0 at padding: `[B, HKV, num_tokens, width]`."""
        if self.is_empty:
            return None
        real = ~self._buffers["padding"][:, : self.num_tokens]
        position = (real.cumsum(1) - 1).clamp(min=0)
        tokens = self._buffers[name][_rows(real), position]  # [B, num_tokens, HKV, width]
        return (tokens * real[..., None, None]).transpose(1, 2)

    # -- buffers -----------------------------------------------------------------------------------

    def _places(self, layout: Sequences, num_rows: int) -> tuple[Tensor, Tensor]:
        """Sequence and position that `num_rows` new packed tokens will take,
        both int64 `[num_rows]`.
        """
        sequence = sequence_ids(layout.cu_seqlens, num_rows)
        position = torch.arange(num_rows, device=sequence.device) - layout.cu_seqlens[sequence]
        return sequence, position if self.is_empty else position + self._lengths[sequence]

    def _tokens(self, new: KeyValues) -> dict[str, Tensor]:
        """What is kept of every token, by the name of its buffer."""
        tokens = {"k": new.k, "v": new.v}
        if self.config.kv_per_branch:
            tokens |= {"k_swa": new.k_swa, "v_swa": new.v_swa}
            tokens |= {"k_src": new.k_src, "v_src": new.v_src}
        if new.cos is not None and new.sin is not None:
            half = new.cos.shape[1] // 2  # the halves are equal
            tokens |= {"cos": new.cos[:, :half], "sin": new.sin[:, :half]}
        return tokens

    def _writable(
        self,
        like: dict[str, Tensor],
        num_sequences: int,
        num_tokens: int,
        rotation: Rotation | None,
    ) -> dict[str, Tensor]:
        """Buffers with what the cache holds and room for `num_tokens`, that may be written to.

        like: by the names of the buffers, rows of as many numbers, of the dtype to be written.
        """
        stride = self.config.kernel_stride
        slack = self.config.kernel_size + 2 * stride  # compressed tokens past the last complete one
        capacity = self.capacity
        if num_tokens + slack > capacity:
            wanted = self.max_length or max(num_tokens, 2 * capacity - slack)
            capacity = _round_up(wanted + slack, stride)
        states = capacity // stride
        lengths = {"k_cmp": states, "v_cmp": states, "recent": self._num_recent + 1}
        buffers = {}
        for name, rows in like.items():
            length = lengths.get(name, capacity)
            shape = (num_sequences, length, *rows.shape[1:])
            buffers[name] = self._writable_buffer(name, shape, rows)
        is_new = self.is_empty or buffers.get("cos") is not self._buffers.get("cos")
        if rotation is not None and self.is_by_position and is_new:
            self._rotate_all(buffers, rotation)
        return buffers

    def _writable_buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The buffer, or a copy where it is too short, of a narrower dtype, needed as it is by a
        backward, or made in inference mode, outside of which it may not be written to."""
        old = self._buffers.get(name)
        if old is None:
            return like.new_zeros(shape)
        dtype = like.dtype if self.is_empty else torch.promote_types(old.dtype, like.dtype)
        fits = old.shape == shape and old.dtype == dtype and old.device == like.device
        if fits and not self._needed_by_backward and _can_be_written(old):
            return old
        copy = like.new_zeros(shape, dtype=dtype)
        if not self.is_empty:
            copy[:, : old.shape[1]] = old
        return copy

    def _rotate_all(self, buffers: dict[str, Tensor], rotation: Rotation) -> None:
        """Writes the cos and sin of every position, those to come included."""
        cos, sin = buffers["cos"], buffers["sin"]
        position, half = torch.arange(cos.shape[1], device=cos.device), cos.shape[2]
        for buffer, values in zip((cos, sin), rotation(position, cos.dtype), strict=True):
            buffer.copy_(values[:, :half])
        wide = torch.promote_types(cos.dtype, torch.float32)
        turn = torch.stack(rotation(position[: self.config.kernel_size], wide))[..., :half]
        turn = turn / turn[0, 0, 0]  # where RoPE scales, as YaRN does, that is its factor
        self._turn = turn if self._turn is None else _written(self._turn, turn)

    def _sources(self, buffers: dict[str, Tensor], first: Tensor, width: int) -> Sources:
        """What compression reads of positions `first[b] .. first[b] + width`, packed."""
        column = first[:, None] + torch.arange(width, device=first.device)

        def read(name: str, column: Tensor = column) -> Tensor:
            return buffers[name][_rows(first), column].flatten(0, 1)

        v_src = read("v_src" if self.config.kv_per_branch else "v")
        if "recent" in buffers:
            k_src = read("recent", column % self._num_recent)
        else:
            k_src = read("k_src" if self.config.kv_per_branch else "k")
        if "cos" not in buffers:
            return k_src, v_src, None, None
        cos, sin = (read(name).repeat(1, 2) for name in ("cos", "sin"))
        if "recent" not in buffers and not self.config.kv_per_branch:
            k_src = turn_back(k_src, cos, sin)
        return k_src, v_src, cos, sin

    def _keep_recent(self) -> None:
        """Makes the buffer "recent" of rotated keys."""
        self._buffers["recent"] = self._turned_back()
        self._furthest = self.num_tokens

    def _turned_back(self) -> Tensor:
        """The buffer "recent" for sequences of the present lengths, from their rotated keys."""
        latest = torch.arange(-self._num_recent, 0, device=self._lengths.device)
        position = self._lengths[:, None] + latest
        rows, column = _rows(position), position.clamp(min=0)
        k, cos, sin = (
            self._buffers[name][rows, column].flatten(0, 1) for name in ("k", "cos", "sin")
        )
        k = turn_back(k, cos.repeat(1, 2), sin.repeat(1, 2)).unflatten(0, position.shape)
        recent = k.new_zeros(k.shape[0], self._num_recent + 1, *k.shape[2:])
        return recent.index_put((rows, position % self._num_recent), k)

    @property
    def _num_recent(self) -> int:
        """Enough for every window that is incomplete after a crop of `rollback` tokens."""
        return self.rollback + self.config.kernel_size

    @property
    def _first_state(self) -> int:
        """Where the first compressed token of a sequence lies."""
        return self.config.kernel_size // self.config.kernel_stride - 1

    def _show_columns(self, num_columns: int) -> None:
        """Forgets of what is padding from a column on: what is not fed yet is none."""
        padding = self._buffers["padding"]
        column = torch.arange(padding.shape[1], device=padding.device)
        self._buffers["padding"] = _written(padding, padding & (column < num_columns))

    def _num_windows(self, lengths: Tensor) -> Tensor:
        """Complete compression windows of sequences of these lengths, int64 `[B]`."""
        return num_windows_of(lengths, self.config.kernel_size, self.config.kernel_stride)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the batch axis to everything."""
        if not self.is_empty:
            self._buffers = {name: change(x) for name, x in self._buffers.items()}
            self._lengths = change(self._lengths)


def _can_be_written(x: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not x.is_inference()


def _written(x: Tensor, values: Tensor) -> Tensor:
    """x with other values, in its own memory, which a CUDA graph may know, where that is
    possible; otherwise the values."""
    fits = x.shape == values.shape and x.device == values.device
    return x.copy_(values) if fits and _can_be_written(x) else values


def _put(x: Tensor, index: tuple[Tensor, ...], values: Tensor) -> None:
    x.index_put_(index, values.to(x.dtype))


def _rows(x: Tensor) -> Tensor:
    """x `[B, ...]` -> the rows of a batch, int64 `[B, 1]`, to index it with."""
    return torch.arange(x.shape[0], device=x.device)[:, None]


def _starts(x: Tensor, length: int) -> Tensor:
    """x `[B]` -> boundaries of B sequences of this length, int32 `[B + 1]`."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * length


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys `[T, H, D]` as they were before they were rotated by cos and sin `[T, rotary_dim]`.

    Divides by cos^2 + sin^2, which is not quite 1 in 16 bits, and a larger number where RoPE
    scales, as YaRN does.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1] // 2  # the halves are equal
    cos, sin = cos[:, None, :half].to(wide), sin[:, None, :half].to(wide)
    first, second, unrotated = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    square = (cos * cos + sin * sin).clamp(min=torch.finfo(wide).tiny)  # 0 in an empty row
    first, second = (first * cos + second * sin) / square, (second * cos - first * sin) / square
    return torch.cat((first.to(x.dtype), second.to(x.dtype), unrotated), dim=-1)
