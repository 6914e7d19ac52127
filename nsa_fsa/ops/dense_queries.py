"""Dense queries, which attend to all keys up to their own (docs/spec.md, section 12): those at a
position below `dense_below` of their sequence.

A sliding window as long as that is full attention for them. How many of a batch's queries are dense
only the device knows, so there is room for as many as there can be. What of it they leave is filled
with the queries behind them, whose results are dropped.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.sliding_window_attention.operator import OPERATOR
from nsa_fsa.sequences import Sequences, uniform_layout

EVERYTHING = 1 << 30  # a sliding window of so many keys is full attention


class FirstQueries(NamedTuple):
    """The first queries of every sequence of a batch, the dense ones among them."""

    rows: Tensor  # int64 [R], ascending: which of the batch's queries these are
    is_dense: Tensor | None  # bool [R]; None: all are
    call: WindowedCall  # of these queries, over the keys that they see


def is_known(condition: bool) -> bool:
    """Whether a condition on lengths holds. While torch traces, whether it holds for all lengths
    that the trace is made for."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def attend_densely(call: WindowedCall, o: Tensor) -> Tensor:
    """o `[T, HQ, DV]`, which gets full attention in the rows of dense queries.

    call: of all queries, with a sliding window of `dense_below` keys.
    """
    rows, is_dense, first = first_queries(call)
    found = OPERATOR(first).o
    if is_dense is not None:
        found = torch.where(is_dense[:, None, None], found, o.index_select(0, rows))
    return o.index_copy_(0, rows, found)  # of all of o, a copy would take as much memory again


def first_queries(call: WindowedCall) -> FirstQueries:
    """As many of the first queries of every sequence as their dense ones can be together."""
    sequences, num_queries = call.sequences, call.q.shape[0]
    assert call.window_size is not None
    length = None if torch.compiler.is_compiling() else sequences.common_length(num_queries)
    if length is None:
        return _first_queries(call, call.window_size)
    # Where all sequences are alike, the host knows, which saves two dozen launches.
    number, size = sequences.cu_seqlens.shape[0] - 1, min(call.window_size, length)
    row = torch.arange(num_queries, device=call.q.device)
    rows = row.view(number, length)[:, :size].flatten()
    layout = uniform_layout(number, size, call.q.device)
    return FirstQueries(rows, None, _of_rows(call, rows, layout))


def _first_queries(call: WindowedCall, dense_below: int) -> FirstQueries:
    """Where only the device knows how long the sequences are."""
    sequences = call.sequences
    starts, lengths = sequences.of_queries, sequences.lengths
    number = starts.diff()  # of queries, as everything below `[B]`
    first = lengths - number  # the position of the first of them
    dense = (dense_below - first).clamp(min=0).minimum(number)

    most = _least(dense_below, sequences.max_seqlen) * number.shape[0]
    room = _least(call.q.shape[0], most)
    others = number - dense
    others_before = others.cumsum(0) - others
    taken = dense + (room - dense.sum() - others_before).clamp(min=0).minimum(others)

    ends = taken.cumsum(0)
    place = torch.arange(room, device=starts.device)
    sequence = torch.searchsorted(ends, place, right=True)
    nth = place - (ends - taken)[sequence]
    rows, is_dense = starts[sequence] + nth, nth < dense[sequence]

    ends = pad(ends, (1, 0)).int()
    if sequences.shares_rows:
        layout = Sequences(ends, _least(sequences.max_seqlen, room))
    else:
        used = (first + taken).int()
        layout = Sequences(sequences.cu_seqlens, sequences.max_seqlen, ends, used)
    return FirstQueries(rows, is_dense, _of_rows(call, rows, layout))


def _least(a: int, b: int) -> int:
    """The smaller number, for all lengths of a trace where one of them is symbolic.

    Compiled code makes `sym_min` of `min` by itself, and PyTorch 2.11 none of two plain numbers.
    """
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _of_rows(call: WindowedCall, rows: Tensor, layout: Sequences) -> WindowedCall:
    """The call of some queries, and of as many keys where these lie in the same rows."""
    q, k, v = call.q.index_select(0, rows), call.k, call.v
    if layout.shares_rows:
        k, v = (x.index_select(0, rows) for x in (k, v))
    return replace(call, q=q, k=k, v=v, sequences=layout)
