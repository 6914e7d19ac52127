"""Walking through packed sequences, and through their queries in chunks of bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from nsa_fsa.sequences import Sequences

# How many attention scores one chunk of queries holds. 2^19 float32 stay in a CPU's cache: a
# training step at 1,024 tokens takes 0.31 s with them, 0.69 s with 2^24. Long rows of keys still
# get MIN_CHUNK_QUERIES together, to use each key they read more than once, as long as the scores
# stay within MAX_CHUNK_SCORES: 64 MiB, of which about four are alive at a time.
CHUNK_SCORES = 2**19
MIN_CHUNK_QUERIES = 32
MAX_CHUNK_SCORES = 2**24


class Sequence(NamedTuple):
    """One sequence of a packed batch, whose queries are its last positions."""

    q: slice  # rows of its queries
    k: slice  # rows of its keys
    length: int  # number of its keys

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.length - (self.q.stop - self.q.start)


def sequences(
    cu_seqlens: Tensor, cu_seqlens_q: Tensor | None = None, seqused_k: Tensor | None = None
) -> list[Sequence]:
    """The sequences that the tensors of `Sequences` describe."""
    starts = cu_seqlens.tolist()
    lengths = (cu_seqlens.diff() if seqused_k is None else seqused_k).tolist()
    starts_q = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    found = []
    for b, length in enumerate(lengths):
        k = slice(starts[b], starts[b] + length)
        q = k if starts_q is None else slice(starts_q[b], starts_q[b + 1])
        if q.stop - q.start > length:
            raise ValueError(
                f"sequence {b} has {q.stop - q.start} queries but {length} keys: "
                "queries are the last positions of their sequence. "
                "Fix: count the new tokens into seqused_k / cu_seqlens."
            )
        found.append(Sequence(q, k, length))
    return found


def sequences_of(layout: Sequences) -> list[Sequence]:
    """The same of a `Sequences`."""
    return sequences(layout.cu_seqlens, layout.cu_seqlens_q, layout.seqused_k)


def chunk_size(q: Tensor, keys_per_query: int) -> int:
    """How many queries of q `[T, HQ, D]` are worked on together if each scores so many keys."""
    row = max(1, q.shape[1] * keys_per_query)
    if q.device.type != "cpu":
        return most_queries(row)
    return min(max(CHUNK_SCORES // row, MIN_CHUNK_QUERIES), most_queries(row))


def most_queries(numbers: int) -> int:
    """How many queries may be worked on together where each takes so many numbers."""
    return max(1, MAX_CHUNK_SCORES // max(1, numbers))


def query_chunks(sequence: Sequence, size: int) -> Iterator[tuple[slice, int, int]]:
    """Yields (rows of up to `size` queries, position of the first, one past that of the last)."""
    for start in range(sequence.q.start, sequence.q.stop, size):
        stop = min(start + size, sequence.q.stop)
        first = sequence.offset + start - sequence.q.start
        yield slice(start, stop), first, first + stop - start
