"""The keys that the queries of a chunk see, out of a cache."""

from dataclasses import replace

import torch

from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.sequences import Sequences


def keys_before(call: WindowedCall) -> int:
    """How many keys before its queries a sequence has in their sliding windows at most."""
    assert call.window_size is not None
    return min(call.window_size - 1, call.sequences.max_seqlen)


def over_last_keys(call: WindowedCall) -> WindowedCall:
    """The same attention over a copy of the keys and values that its queries see, without gaps and
    so without seqused_k.

    That is of every sequence the new keys, and the last `window_size - 1` before them or as many as
    there are. How many these are is known to the device alone: there is room for all, and what is
    left of it repeats the last key, because whoever reads past the end must find a number there.
    """
    k, v, num_queries = call.k, call.v, call.q.shape[0]
    cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k = call.sequences
    assert cu_seqlens_q is not None
    assert seqused_k is not None
    before = keys_before(call)
    num_rows = min(num_queries + before * seqused_k.shape[0], k.shape[0])

    kept = torch.minimum(seqused_k, cu_seqlens_q.diff() + before)
    ends = kept.cumsum(0, dtype=torch.int32)
    shift = cu_seqlens[:-1] + seqused_k - ends  # from a row of the copy to its row of the cache
    row = torch.arange(num_rows, dtype=torch.int32, device=k.device)
    row = torch.minimum(row, ends[-1] - 1)
    # Without any key the last one is row -1.
    sequence = torch.searchsorted(ends, row, right=True)
    source = (row + shift.index_select(0, sequence)).clamp(min=0)

    starts = torch.nn.functional.pad(ends, (1, 0))
    sequences = Sequences(starts, min(max_seqlen, num_rows), cu_seqlens_q)
    k, v = k.index_select(0, source), v.index_select(0, source)
    return replace(call, k=k, v=v, sequences=sequences)
