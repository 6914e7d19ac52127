"""NSACache: what one layer remembers between calls (docs/spec.md, section 9).

Buffers are `[B, capacity, HKV, width]`, row b holding sequence b from its first real token on, so that the operators read
them in place: sequence b begins at row `b * capacity` of the flattened buffer and counts `lengths[b]` rows. Compressed
buffers are `[B, capacity // kernel_stride, HKV, width]`, which is where the operators expect compressed tokens.

The open window is the tail of the sequence that future compression windows still cover, kept as compression reads it
(before RoPE, by default), together with the cos and sin of its positions. It reaches `rollback` tokens further back than
needed, so that speculative decoding can crop.

No method but `crop` reads anything back from the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.config import NSAConfig
from nsa_fsa.ops import Layout
from nsa_fsa.ops.varlen import sequence_ids


class KeyValues(NamedTuple):
    """Keys and values of a packed batch of T tokens, for every branch."""

    k: Tensor  # [T, HKV, D] selected branch, rotated
    v: Tensor  # [T, HKV, DV]
    k_swa: Tensor  # sliding branch; the same tensors unless kv_per_branch
    v_swa: Tensor
    k_src: Tensor  # what compression reads
    v_src: Tensor
    cos: Tensor | None = None  # [T, rotary_dim], where compressed keys are rotated after compression
    sin: Tensor | None = None


# (k_src, v_src, cos, sin, layout) -> (k_cmp, v_cmp)
Compress = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Layout], tuple[Tensor, Tensor]]


class NSACache:
    """Decode state of one `NativeSparseAttention` layer.

    Args:
        config: the layer's configuration.
        max_length: None for buffers that grow by doubling; a number of tokens for buffers of fixed size, allocated once.
        rollback: how many of the latest tokens `crop` can take back.

    Example:
        >>> cache = NSACache(attn.config)
        >>> y = torch.cat([attn(x[:, :100], cache=cache), attn(x[:, 100:], cache=cache)], dim=1)  # equals attn(x)
    """

    def __init__(self, config: NSAConfig, *, max_length: int | None = None, rollback: int = 128) -> None:
        for name, value, minimum in (("max_length", max_length, 1), ("rollback", rollback, 0)):
            if value is not None and (not isinstance(value, int) or value < minimum):
                raise ValueError(f"{name}={value!r} must be an int >= {minimum}.")
        self.config = config
        self.max_length = max_length
        self.rollback = rollback
        self.keep_history = False  # True: the open window is trimmed by `crop` alone, which may then go back to the last crop
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.num_tokens = 0  # columns fed so far, padding included: an upper bound on every length that the host knows
        self.capacity = 0
        self._buffers: dict[str, Tensor] = {}  # [B, capacity or capacity // stride, HKV, width]
        self._open: dict[str, Tensor] = {}  # [B, width of the open window, ...]
        self._lengths = torch.zeros(0, dtype=torch.int64)  # int64 [B]
        self._open_start = torch.zeros(0, dtype=torch.int64)  # int64 [B], the position of the open window's first column

    @property
    def is_empty(self) -> bool:
        return self.num_tokens == 0

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each sequence, int64 `[B]`; `[0]` before the first batch."""
        return self._lengths

    def next_positions(self, layout: Layout, num_rows: int) -> Tensor:
        """The positions that `num_rows` new packed tokens will take in their sequences, int64 `[num_rows]`.

        Raises ValueError as `update` does.
        """
        self._check_room(layout)
        sequence = sequence_ids(layout.cu_seqlens, num_rows)
        position = torch.arange(num_rows, device=sequence.device) - layout.cu_seqlens[sequence]
        return position + self._lengths[sequence] if self._buffers else position

    def update(self, new: KeyValues, layout: Layout, compress: Compress) -> tuple[KeyValues, Tensor, Tensor, Layout]:
        """Appends a packed batch of new tokens.

        Args:
            new: their keys and values.
            layout: where the sequences lie among them; its `max_seqlen` is the number of columns that they take.
            compress: turns packed keys and values into compressed ones.

        Returns:
            All keys and values so far as flat views of the buffers (`k_src` and the following fields are those of `new`),
            the compressed keys and values, and the layout that makes the operators read them.

        Raises:
            ValueError: if the batch size changed, or a fixed-size cache is full; nothing is changed then.
        """
        num_sequences, num_columns, stride = layout.cu_seqlens.shape[0] - 1, layout.max_seqlen, self.config.kernel_stride
        position = self.next_positions(layout, new.k.shape[0])
        if not self._buffers:
            self._lengths = torch.zeros(num_sequences, dtype=torch.int64, device=new.k.device)
            self._open_start = torch.zeros_like(self._lengths)
        old_lengths = self._lengths
        sequence = sequence_ids(layout.cu_seqlens, new.k.shape[0])
        self._lengths = old_lengths + layout.cu_seqlens.diff()
        self.num_tokens += num_columns
        self._reserve(new)

        tokens = {"k": new.k, "v": new.v}
        if self.config.kv_per_branch:
            tokens |= {"k_swa": new.k_swa, "v_swa": new.v_swa}
        for name, values in tokens.items():
            self._write(self._buffers, name, (sequence, position), values)

        # The open window and the new tokens side by side; its first incomplete window begins at `first`.
        self._widen_open_window(num_columns)
        source = new._asdict()
        for name in self._open:
            self._write(self._open, name, (sequence, position - self._open_start[sequence]), source[name])
        num_complete = self._num_windows(old_lengths)
        first = num_complete * stride
        width = _round_up(self.config.kernel_size + num_columns, stride)
        pending = {name: x.flatten(0, 1) for name, x in self._shifted(first - self._open_start, width).items()}
        rows = torch.arange(num_sequences + 1, dtype=torch.int32, device=new.k.device) * width
        k_cmp, v_cmp = compress(
            pending["k_src"],
            pending["v_src"],
            pending.get("cos"),
            pending.get("sin"),
            Layout(rows, width, seqused_k=(self._lengths - first).int()),
        )
        # Windows that are still incomplete are written as well: nobody reads them before they are overwritten.
        column = num_complete[:, None] + torch.arange(width // stride, device=new.k.device)
        row = torch.arange(num_sequences, device=new.k.device)[:, None].expand_as(column)
        for name, values in (("k_cmp", k_cmp), ("v_cmp", v_cmp)):
            self._write(self._buffers, name, (row, column), values.unflatten(0, column.shape))
        if not self.keep_history:
            self._trim_open_window()

        flat = {name: x.flatten(0, 1) for name, x in self._buffers.items()}
        keys = new._replace(k=flat["k"], v=flat["v"], k_swa=flat.get("k_swa", flat["k"]), v_swa=flat.get("v_swa", flat["v"]))
        starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=new.k.device) * self.capacity
        return keys, flat["k_cmp"], flat["v_cmp"], Layout(starts, self.num_tokens, layout.cu_seqlens, self._lengths.int())

    # -- what generation does to a cache -------------------------------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was; also selects a part of the batch. index: int64 `[new B]`."""
        self._map(lambda x: x.index_select(0, index.to(x.device)))

    def repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` adjacent rows."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, num_removed: int) -> None:
        """Takes back the last `num_removed` columns of every row: real tokens, or a row's left padding.

        Raises:
            ValueError: if there are not that many.
            RuntimeError: if the open window does not reach back that far; nothing is changed then.
        """
        if not 0 <= num_removed <= self.num_tokens:
            raise ValueError(f"cannot remove {num_removed} tokens from a cache of {self.num_tokens}.")
        if num_removed == self.num_tokens:
            self.reset()
            return
        lengths = (self._lengths - num_removed).clamp(min=0)
        if bool((self._num_windows(lengths) * self.config.kernel_stride < self._open_start).any()):
            raise RuntimeError(
                f"cannot remove {num_removed} tokens: this cache keeps what it needs to take back the last {self.rollback}. "
                f"Fix: NSACache(..., rollback={num_removed}) or keep_history = True before feeding it, or feed it again."
            )
        self._lengths, self.num_tokens = lengths, self.num_tokens - num_removed
        self._trim_open_window()

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _check_room(self, layout: Layout) -> None:
        num_sequences = layout.cu_seqlens.shape[0] - 1
        if self._buffers and num_sequences != self._lengths.shape[0]:
            raise ValueError(
                f"the batch has {num_sequences} sequences but the cache holds {self._lengths.shape[0]}. "
                "Fix: reset() it, or reorder() / repeat_interleave() it first."
            )
        if self.max_length is not None and self.num_tokens + layout.max_seqlen > self.max_length:
            raise ValueError(
                f"{layout.max_seqlen} more tokens do not fit: the cache holds {self.num_tokens} of {self.max_length}. "
                "Fix: a larger max_length, or None for a cache that grows."
            )

    def _reserve(self, like: KeyValues) -> None:
        """Makes room for num_tokens, and for writing a few compressed tokens past the last complete one."""
        stride = self.config.kernel_stride
        slack = self.config.kernel_size + 2 * stride
        if self.num_tokens + slack <= self.capacity:
            return
        wanted = max(self.num_tokens + slack, 2 * self.capacity) if self.max_length is None else self.max_length + slack
        capacity = _round_up(wanted, stride)
        names = ("k", "v", "k_swa", "v_swa") if self.config.kv_per_branch else ("k", "v")
        shapes = {name: (capacity, getattr(like, name)) for name in names}
        shapes |= {"k_cmp": (capacity // stride, like.k_src), "v_cmp": (capacity // stride, like.v_src)}
        for name, (length, x) in shapes.items():
            grown = x.new_zeros(self._lengths.shape[0], length, *x.shape[1:])
            if name in self._buffers:
                old = self._buffers[name]
                grown[:, : old.shape[1]] = old
            self._buffers[name] = grown
        if not self._open:
            sources = {name: getattr(like, name) for name in ("k_src", "v_src", "cos", "sin")}
            self._open = {
                name: x.new_zeros(self._lengths.shape[0], stride, *x.shape[1:]) for name, x in sources.items() if x is not None
            }
        self.capacity = capacity

    def _widen_open_window(self, num_columns: int) -> None:
        for name, x in self._open.items():
            self._open[name] = torch.cat((x, x.new_zeros(x.shape[0], num_columns, *x.shape[2:])), dim=1)

    def _trim_open_window(self) -> None:
        """Drops what neither the next window nor a crop of `rollback` tokens can need."""
        stride = self.config.kernel_stride
        reach = self.rollback + self.config.kernel_size
        start = torch.maximum(self._open_start, (self._lengths - reach).div(stride, rounding_mode="floor") * stride)
        width = min(next(iter(self._open.values())).shape[1], _round_up(reach + stride, stride))
        self._open = self._shifted(start - self._open_start, width)
        self._open_start = start

    def _shifted(self, offset: Tensor, width: int) -> dict[str, Tensor]:
        """Columns `offset[b] .. offset[b] + width` of the open window; past its end the last column repeats."""
        column = offset[:, None] + torch.arange(width, device=offset.device)
        row = torch.arange(offset.shape[0], device=offset.device)[:, None]
        return {name: x[row, column.clamp(max=x.shape[1] - 1)] for name, x in self._open.items()}

    def _num_windows(self, lengths: Tensor) -> Tensor:
        """Complete compression windows of sequences of these lengths, int64 `[B]`."""
        return ((lengths - self.config.kernel_size).div(self.config.kernel_stride, rounding_mode="floor") + 1).clamp(min=0)

    @staticmethod
    def _write(tensors: dict[str, Tensor], name: str, index: tuple[Tensor, Tensor], values: Tensor) -> None:
        """In place under no_grad; else into a copy, since a backward may still need the old values."""
        if torch.is_grad_enabled():
            tensors[name] = tensors[name].index_put(index, values)
        else:
            tensors[name].index_put_(index, values)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a change of the batch axis to everything."""
        self._buffers = {name: change(x) for name, x in self._buffers.items()}
        self._open = {name: change(x) for name, x in self._open.items()}
        self._lengths, self._open_start = change(self._lengths), change(self._open_start)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
