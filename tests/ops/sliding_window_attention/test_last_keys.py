"""The sliding window of a chunk after a past, by a library that may read past the keys in use."""

from itertools import accumulate

import pytest
import torch

from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Windows
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.sliding_window_attention.flash_attention import FlashAttn4, TorchFlash
from nsa_fsa.ops.sliding_window_attention.last_keys import over_last_keys
from nsa_fsa.ops.sliding_window_attention.operator import Reference
from nsa_fsa.sequences import Sequences

CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64, and sums of at most some dozen numbers around 1
# Of every sequence the tokens before the chunk, the chunk's, and the rows of the cache behind them.
MIXED = ((0, 20, 3), (40, 5, 0), (2, 2, 17), (7, 1, 1), (30, 0, 9), (0, 0, 6), (9, 11, 2))
LAYOUTS = [
    MIXED,
    MIXED[::-1],
    ((50, 9, 4),),
    ((0, 6, 0),),
    ((5, 3, 0), (0, 0, 7)),
    ((0, 0, 4), (8, 2, 1)),
    ((0, 0, 3), (0, 0, 0)),
]


def make_call(layout, window_size=6, group_size=2, head_dim=8, v_head_dim=4):
    """A call in float64 whose rows of keys that are not in use hold NaN."""
    capacities = [sum(of_sequence) for of_sequence in layout]
    unused = [i >= past + new for past, new, rest in layout for i in range(past + new + rest)]
    num_queries = sum(new for _, new, _ in layout)

    def randn(rows, heads, width):
        return torch.randn(rows, heads, width, dtype=torch.float64)

    def ints(values):
        return torch.tensor(list(values), dtype=torch.int32)

    k, v = (randn(sum(capacities), 2, width) for width in (head_dim, v_head_dim))
    k[unused] = v[unused] = torch.nan
    sequences = Sequences(
        ints(accumulate(capacities, initial=0)),
        max(capacities),
        ints(accumulate((new for _, new, _ in layout), initial=0)),
        ints(past + new for past, new, _ in layout),
    )
    q = randn(num_queries, 2 * group_size, head_dim)
    return WindowedCall(
        q, k, v, sequences, 0.3, WORKSPACE_BYTES, "reference", Windows(1, 1), window_size
    )


@pytest.mark.parametrize("window_size", [1, 2, 6, 2**31])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_queries_see_is_all_there(layout, window_size):
    """And no more: no row of the copy is NaN, and the chunk and the window bound their number."""
    call = make_call(layout, window_size)
    copied = over_last_keys(call)
    assert copied.sequences.seqused_k is None
    for found, expected in zip(Reference().forward(copied), Reference().forward(call), strict=True):
        assert torch.equal(found, expected)
    kept = [min(past + new, new + window_size - 1) for past, new, _ in layout]
    assert copied.sequences.cu_seqlens.tolist() == [*accumulate(kept, initial=0)]
    assert max(kept) <= copied.sequences.max_seqlen
    assert sum(kept) <= len(copied.k) <= len(call.q) + (window_size - 1) * len(layout)
    if sum(kept):
        assert not copied.k.isnan().any()
        assert not copied.v.isnan().any()


class Alike:
    """What a library does, in PyTorch, and with every key that lies behind those that a query sees:
    these are weighed with 0."""

    def run(self, q, k, v, sliding):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
        lengths = sliding.cu_seqlens_k.diff() if sliding.seqused_k is None else sliding.seqused_k
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        for b, length in enumerate(lengths.tolist()):
            first, end = sliding.cu_seqlens_q[b : b + 2].tolist()
            start = int(sliding.cu_seqlens_k[b])
            stop = start + length if self.stops_at_end else len(k)
            for row in range(first, end):
                own = length - (end - row)
                begin = max(own - sliding.size + 1, 0)
                scores = torch.einsum("hd,khd->hk", q[row], k[start:stop]) * sliding.scale
                position = torch.arange(stop - start)
                unseen = (position < begin) | (position > own)
                scores = scores.masked_fill(unseen, -torch.inf)
                o[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[start:stop])
                lse[row] = scores.logsumexp(-1)
        return o, lse.T


class ReadsOn(Alike, FlashAttn4):
    pass


class Stops(Alike, TorchFlash):
    def run(self, q, k, v, sliding):
        self.rows = len(k)
        return super().run(q, k, v, sliding)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("v_head_dim", [8, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("library", [ReadsOn, Stops])
def test_a_library_over_a_cache(library, layout, v_head_dim, group_size):
    """In a library that reads past the keys in use, no NaN of the cache reaches a query; and no
    library is given a padded copy of the whole cache."""
    call = make_call(layout, group_size=group_size, v_head_dim=v_head_dim)
    library = library()
    found, expected = library.forward(call), Reference().forward(call)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, **CLOSE)
    if isinstance(library, Stops) and len(call.q):
        whole = v_head_dim == 8
        assert library.rows == (len(call.k) if whole else len(over_last_keys(call).k))
