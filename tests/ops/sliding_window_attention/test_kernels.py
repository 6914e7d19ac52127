"""The sliding window by the kernels of compressed attention, in tiles so small that windows begin
and end in all parts.
"""

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops
from nsa_fsa.ops.common import tuning
from tests.ops.compressed_attention.test_kernels import SMALL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(values):
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


# lengths, last queries or None for as many, used rows or None for all
@pytest.mark.parametrize(
    ("lengths", "last", "used"),
    [
        ((37, 0, 41), None, None),
        ((45,), None, None),
        ((40, 0, 9, 30), (1, 0, 3, 30), (35, 0, 9, 30)),
    ],
    ids=["packed", "one", "cached"],
)
@pytest.mark.parametrize(
    ("num_kv_heads", "group_size", "window_size"),
    [(1, 1, 16), (1, 3, 21), (1, 2, 1), (1, 2, 2**31)],
)
def test_window(lengths, last, used, num_kv_heads, group_size, window_size, monkeypatch):
    monkeypatch.setattr(tuning, "compressed_config", lambda *_: SMALL)
    heads = num_kv_heads * group_size
    shapes = (
        (sum(last or lengths), heads, 32),
        (sum(lengths), num_kv_heads, 32),
        (sum(lengths), num_kv_heads, 16),
    )
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    layout = dict(
        cu_seqlens=ints(accumulate(lengths, initial=0)),
        max_seqlen=max(lengths),
        window_size=window_size,
    )
    if last is not None:
        layout |= dict(cu_seqlens_q=ints(accumulate(last, initial=0)), seqused_k=ints(used))
    do, found = torch.randn(shapes[0][0], heads, 16, device=DEVICE), []
    for backend in ("reference", "triton_window"):
        o, lse = ops.sliding_window_attention(*leaves, **layout, return_lse=True, backend=backend)
        found.append((o, lse, *torch.autograd.grad(o, leaves, do)))
    for a, b in zip(*found, strict=True):  # float32, and sums of some dozen numbers around 1
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
