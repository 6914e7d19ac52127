"""The operators of Native Sparse Attention, each usable alone: tensors first, then `cu_seqlens, max_seqlen`, then keywords."""

from nsa_fsa.ops.block_selection import select_blocks
from nsa_fsa.ops.compress import gather_windows, pool_windows, window_starts
from nsa_fsa.ops.compressed_attention import compressed_attention
from nsa_fsa.ops.gated_combine import gated_combine
from nsa_fsa.ops.nsa_attention import Branches, nsa_attention
from nsa_fsa.ops.selected_attention import selected_attention
from nsa_fsa.ops.sliding_window_attention import sliding_window_attention
from nsa_fsa.ops.varlen import Layout

__all__ = [
    "Branches",
    "Layout",
    "compressed_attention",
    "gated_combine",
    "gather_windows",
    "nsa_attention",
    "pool_windows",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "window_starts",
]
