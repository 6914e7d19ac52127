"""The operators of NSA, called with tensors, then `cu_seqlens, max_seqlen`, then keywords."""

from nsa_fsa.ops.block_divergence.operator import Divergence, block_divergence
from nsa_fsa.ops.block_selection.operator import select_blocks
from nsa_fsa.ops.compressed_attention.operator import compressed_attention
from nsa_fsa.ops.compression.operator import gather_windows, pool_windows, window_starts
from nsa_fsa.ops.gated_combine.operator import gated_combine
from nsa_fsa.ops.nsa_attention import Branches, nsa_attention
from nsa_fsa.ops.selected_attention.operator import selected_attention
from nsa_fsa.ops.sliding_window_attention.operator import sliding_window_attention

__all__ = [
    "Branches",
    "Divergence",
    "block_divergence",
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
