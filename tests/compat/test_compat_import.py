"""What nsa_fsa.compat needs: nothing but PyTorch, and nobody imports it unasked."""

from tests.test_import import run_python


def test_compat_is_imported_on_request_and_without_triton_and_transformers(tmp_path):
    code = """
import nsa_fsa, nsa_fsa.ops
found = [name for name in sys.modules if name.startswith("nsa_fsa.compat")]
assert not found, "import nsa_fsa imports nsa_fsa.compat"
import torch
from nsa_fsa.compat import parallel_nsa, topk_sparse_attention

q, k = torch.ones(1, 8, 2, 4), torch.ones(1, 8, 1, 4)
gate = torch.ones(1, 8, 2)
o = parallel_nsa(q, k, k, gate, gate, gate, block_size=2, window_size=2)
index = torch.zeros(1, 8, 1, dtype=torch.int32)
cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
selected = topk_sparse_attention(q[0], k[0], k[0], index, 2, cu_seqlens)
print(o[0, 0, 0, 0].item(), o[0, 7, 1, 3].item(), selected.mean().item())
"""
    # Every value is 1, so every branch that sees a key gives 1: the first query sees no
    # whole block.
    assert (
        run_python(code, tmp_path, blocked=("triton", "transformers", "flash_attn"))
        == "2.0 3.0 1.0\n"
    )
