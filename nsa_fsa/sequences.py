"""Packed sequences without device-to-host syncs: who a row belongs to,
and where a batch's sequences lie.

Everything here is tensor arithmetic on the device except `pack_batch`:
only a mask or positions know its sizes.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.checks import check_device, check_tensor, is_int

Length = Annotated[int, "SymInt"]  # torch.compile makes no other graph for another one


class Sequences(NamedTuple):
    """Where the sequences of a packed batch lie: the arguments that every operator takes.

    Without a cache only `cu_seqlens` and `max_seqlen` are set, and queries and keys share their
    rows. With one, keys lie in a buffer: sequence b begins at row `cu_seqlens[b]`, only its first
    `seqused_k[b]` rows count, and its queries, rows `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` of q,
    are its last positions.
    """

    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: Length  # an upper bound on the number of keys of one sequence
    cu_seqlens_q: Tensor | None = None  # int32 [B + 1]
    seqused_k: Tensor | None = None  # int32 [B]

    @property
    def shares_rows(self) -> bool:
        """Whether queries and keys lie in the same rows, of which all are in use."""
        return self.cu_seqlens_q is None and self.seqused_k is None

    def common_length(self, num_rows: int) -> int | None:
        """The length of all sequences, which have so many rows together, where it is known
        without a look at the device: of one sequence, or where all must be as long as the
        longest may be."""
        number = self.cu_seqlens.shape[0] - 1
        alike = number == 1 or (number > 1 and number * self.max_seqlen == num_rows)
        return num_rows // number if alike and self.shares_rows else None

    def up_to(self, start: int, end: int) -> "Sequences":
        """Of queries and keys that share their rows, the queries of the rows from `start` to before
        `end`, and the keys of all rows before `end`."""
        ends = self.cu_seqlens
        return Sequences(ends.clamp(max=end), self.max_seqlen, ends.clamp(start, end) - start)

    @property
    def of_queries(self) -> Tensor:
        """Where the sequences' queries begin, int32 `[B + 1]`."""
        return self.cu_seqlens if self.cu_seqlens_q is None else self.cu_seqlens_q

    @property
    def lengths(self) -> Tensor:
        """How many keys the sequences have, int32 `[B]`."""
        return self.cu_seqlens.diff() if self.seqused_k is None else self.seqused_k

    def positions(self, num_queries: int) -> Tensor:
        """Every query's position inside its own sequence, int64 `[num_queries]`."""
        starts = self.of_queries
        row = torch.arange(num_queries, device=starts.device)
        shift = self.lengths - starts[1:]  # queries are the last positions of their sequence
        return row + shift[sequence_ids(starts, num_queries)]

    def check(self, device: torch.device) -> "Sequences":
        """Raises ValueError for wrong types, shapes or devices, not values; returns itself."""
        cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k = self
        if not (is_int(max_seqlen) and max_seqlen >= 0):
            raise ValueError(
                f"max_seqlen={max_seqlen!r:.100} must be a Python int >= 0, "
                "so that nothing is read back from the device. "
                "Fix: pass the length you pack to, or int(lengths.max())."
            )
        check_tensor("cu_seqlens", cu_seqlens, "int32 [batch + 1]")
        num_sequences = cu_seqlens.shape[0] - 1 if cu_seqlens.ndim == 1 else -1
        for name, x, size in (
            ("cu_seqlens", cu_seqlens, num_sequences + 1),
            ("cu_seqlens_q", cu_seqlens_q, num_sequences + 1),
            ("seqused_k", seqused_k, num_sequences),
        ):
            if x is None:
                continue
            shape = "[batch]" if name == "seqused_k" else "[batch + 1]"
            check_tensor(name, x, f"int32 {shape}")
            if x.dtype != torch.int32 or x.ndim != 1 or x.shape[0] != size or num_sequences < 0:
                raise ValueError(
                    f"{name} has dtype {x.dtype} and shape {tuple(x.shape)}; "
                    f"it must be int32 {shape}. Fix: {name}.int(), one number per sequence."
                )
            check_device(name, x, device)
        return self

    def check_values(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError for numbers that do not fit so many rows; looks only on the CPU."""
        cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k = self
        if cu_seqlens.device.type != "cpu":
            return

        if not _rises(cu_seqlens, num_keys):
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()} must rise from 0 to the number of key rows, "
                f"{num_keys}. Fix: 0, and after it the cumulative sum of the sequences' lengths."
            )
        if cu_seqlens_q is not None and not _rises(cu_seqlens_q, num_queries):
            raise ValueError(
                f"cu_seqlens_q={cu_seqlens_q.tolist()} must "
                f"rise from 0 to the number of query rows, {num_queries}. "
                "Fix: 0, and after it the cumulative sum of each sequence's number of queries."
            )

        lengths = cu_seqlens.long().diff()
        if seqused_k is not None:
            if bool(((seqused_k < 0) | (seqused_k > lengths)).any()):
                raise ValueError(
                    f"seqused_k={seqused_k.tolist()} must lie between 0 and the rows of each "
                    f"sequence, {lengths.tolist()}. Fix: leave it out where every row holds a key, "
                    "or give the sequences more rows."
                )
            lengths = seqused_k

        longest = int(lengths.max()) if len(lengths) else 0
        if longest > max_seqlen:
            raise ValueError(
                f"max_seqlen={max_seqlen} is less than the longest sequence, {longest}. "
                "Fix: raise it."
            )


def _rises(starts: Tensor, end: int) -> bool:
    """Whether numbers `[B + 1]` rise from 0 to `end`."""
    starts = starts.long()
    return bool((starts.diff() >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) == end


class Packing(NamedTuple):
    """Where the real tokens of a batch `[B, S]` lie: found once for all layers."""

    rows: Tensor | None  # int64 [T], their rows in the flattened batch; None: all tokens are real
    layout: Sequences  # where the sequences lie among them
    # bool [B, past + S]: which tokens are real. None if all are and no cache has to be compared
    # with it; a chunk of several tokens beside a cache always has it.
    mask: Tensor | None = None
    packed: bool = False  # whether the sequences are others than the batch's rows
    # Whether the mask hides any token, those of the past included; True where torch traces.
    padded: bool = False


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Lengths `[B]` -> int32 `[B + 1]` starting with 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def sequence_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The sequence that each of `num_rows` packed rows belongs to, int64 `[num_rows]`."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def positions(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Each packed row's position inside its own sequence, int64 `[num_rows]`."""
    row = torch.arange(num_rows, device=cu_seqlens.device)
    return row - cu_seqlens[sequence_ids(cu_seqlens, num_rows)]


def uniform_layout(batch_size: int, length: int, device: torch.device) -> Sequences:
    """The layout of a `[B, S]` batch without padding."""
    sequence = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    return Sequences(sequence * length, length)


def pack_batch(
    batch_size: int,
    length: int,
    device: torch.device,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Packing:
    """Where the real tokens of a batch `[B, S]` lie, and which sequences they form.

    Reads back from the device once, and not at all without mask and positions. While torch traces
    it reads nothing: the numbers of tokens and sequences are then symbols, and an additive mask is
    not noticed.

    Args:
        batch_size, length, device: B, S, and where the batch lies.
        mask: `[B, S]` or `[B, past + S]`, non-zero where a token is real.
        position_ids: `[B or 1, S]`, where the batch may be packed: a new sequence starts at a real
            token whose position does not follow that of the real token before it. Hidden tokens in
            between may be counted or not.

    Raises:
        ValueError: for a mask with negative values, or of floating zeros alone:
            an additive one, which would be read the other way round.
    """
    if (mask is None and position_ids is None) or batch_size * length == 0:
        return Packing(None, uniform_layout(batch_size, length, device))
    if mask is None:
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    mask = mask.to(device)
    seen = mask != 0
    real = seen[:, seen.shape[1] - length :]
    lengths = real.sum(1)
    facts = [seen.all(), _is_additive(mask, seen), lengths.sum()]
    if position_ids is None:
        facts += [lengths.amax()]
    else:
        starts = _starts(real, position_ids.to(device))
        rank = real.flatten().cumsum(0)  # of a real token among the real ones, from 1 on
        longest = (rank - torch.where(starts, rank, 0).cummax(0).values).amax() + 1
        facts += [longest, starts.sum(), (lengths > 0).sum()]

    # What a trace has to go by, and what the host knows otherwise.
    all_seen, num_real, max_seqlen, num_starts = False, None, length, None
    packed = position_ids is not None
    if not torch.compiler.is_compiling():
        all_seen, additive, num_real, max_seqlen, *sequences = torch.stack(facts).tolist()
        if additive:
            raise ValueError(
                "attention_mask has negative values, or is all 0.0, as masks that are "
                "added to scores are: it must be non-zero where a token is real, and 0 or False "
                "where there is padding. Fix: attention_mask == 0 makes one of an additive mask."
            )
        num_starts, num_filled_rows = sequences or (0, 0)
        packed = num_starts > num_filled_rows

    rows = _indices(real, num_real) if num_real is None or num_real < batch_size * length else None
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    if packed:
        cu_seqlens = torch.cat((rank[_indices(starts, num_starts)] - 1, rank[-1:])).int()
    asked = seen.shape[1] > length > 1
    layout, known = Sequences(cu_seqlens, max_seqlen), seen if asked or not all_seen else None
    return Packing(rows, layout, known, packed, not all_seen)


def keep_padding(mask: Tensor) -> Packing:
    """A Packing of sizes that do not depend on the mask `[B, S]`, so that torch can trace it whole:
    all B * S tokens, the real ones first, and behind them every row's padding as a sequence of its
    own. What comes out for padding is to be dropped."""
    real = mask != 0
    lengths = real.sum(1)
    cu_seqlens = cu_seqlens_from_lengths(torch.cat((lengths, mask.shape[1] - lengths)))
    rows = (~real).flatten().argsort(stable=True)
    return Packing(rows, Sequences(cu_seqlens, mask.shape[1]), real)


def _starts(real: Tensor, position_ids: Tensor) -> Tensor:
    """Which tokens begin a sequence, bool `[B * S]`, by their positions `[B or 1, S]`."""
    column = torch.arange(real.shape[1], device=real.device)
    previous = torch.where(real, column, -1).cummax(1).values
    # The real token before; -1: there is none.
    previous = torch.nn.functional.pad(previous[:, :-1], (1, 0), value=-1)
    position = position_ids.expand(real.shape)
    step = position - position.gather(1, previous.clamp(min=0))
    follows = (previous >= 0) & ((step == 1) | (step == column - previous))
    return (real & ~follows).flatten()


def _indices(x: Tensor, count: int | None) -> Tensor:
    """Where x is True in its flattened form; count: how often, if known."""
    x = x.flatten()
    return (x.nonzero() if count is None else x.nonzero_static(size=count)).flatten()


def _is_additive(mask: Tensor, seen: Tensor) -> Tensor:
    """Whether a mask is added to scores: 0 where a key is seen, negative or NaN where not."""
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    negative = ~(mask >= 0).all()
    return negative | ~seen.any() if mask.is_floating_point() else negative
