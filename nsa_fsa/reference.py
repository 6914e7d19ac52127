"""The operators of Native Sparse Attention in plain PyTorch: any device, any float dtype,
differentiable by autograd.

Written to be read, and to be the oracle of every faster backend. Memory is bounded by working
through the queries in chunks, and of long sequences only what is selected or in the window is
worked on; the `*_backward` functions give the gradients within the same bounds. Arguments are those
of `nsa_fsa.ops`, with a scale; a backward takes do before q, and o and lse after v.
"""

from nsa_fsa.ops.block_selection.reference import block_scores, select_blocks
from nsa_fsa.ops.compressed_attention.reference import (
    compressed_attention,
    compressed_attention_backward,
)
from nsa_fsa.ops.compression.reference import (
    gather_windows,
    gather_windows_backward,
    pool_windows,
    pool_windows_backward,
    window_rows,
)
from nsa_fsa.ops.gated_combine.reference import (
    branch_gradients,
    gated_combine,
    gated_combine_backward,
)
from nsa_fsa.ops.selected_attention.reference import selected_attention, selected_attention_backward
from nsa_fsa.ops.sliding_window_attention.reference import (
    sliding_window_attention,
    sliding_window_attention_backward,
)

__all__ = [
    "block_scores",
    "branch_gradients",
    "compressed_attention",
    "compressed_attention_backward",
    "gated_combine",
    "gated_combine_backward",
    "gather_windows",
    "gather_windows_backward",
    "pool_windows",
    "pool_windows_backward",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "sliding_window_attention",
    "sliding_window_attention_backward",
    "window_rows",
]
