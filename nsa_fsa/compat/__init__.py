"""The calling conventions of earlier NSA implementations on top of `nsa_fsa.ops`:
moving over is an import change.

| instead of | import from `nsa_fsa.compat` |
|---|---|
| `from fla.ops.nsa import parallel_nsa` | `parallel_nsa` |
| `from native_sparse_attention.ops.parallel import parallel_nsa` | `parallel_nsa` |
| `from native_sparse_attention.ops import topk_sparse_attention` | `topk_sparse_attention` |
| `FSA_topk_sparse_attention(...)`, with the same arguments | `topk_sparse_attention(...)` |

Each docstring says where the result differs from the original's on purpose.
"""

from nsa_fsa.compat.parallel_nsa import parallel_nsa
from nsa_fsa.compat.topk_sparse_attention import topk_sparse_attention

__all__ = ["parallel_nsa", "topk_sparse_attention"]
