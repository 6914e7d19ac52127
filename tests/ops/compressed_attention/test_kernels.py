"""Tiles so small that short sequences are cut as only long ones otherwise are:
into many steps, tiles and parts.
"""

import dataclasses
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Windows
from nsa_fsa.ops.common.softmax_statistics import Statistics
from nsa_fsa.ops.common.tuning import CompressedConfig
from nsa_fsa.ops.common.windowed_attention import backward
from nsa_fsa.ops.common.windowed_attention.backend import MAX_GROUP_SIZE
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.sequences import Sequences
from tests.cases import RESULTS, backends_of, device_of
from tests.guards import guarded_allocations
from tests.oracle import windows as owned_rows

WARPS = dict(fwd_warps=4, dq_warps=4, dkdv_warps=4, fwd_stages=2, dq_stages=2, dkdv_stages=2)
# Rows cut into parts of 32 and more, two heads of keys at a time; steps and tiles of 16.
SMALL = CompressedConfig(
    fwd_m=16,
    fwd_n=16,
    dq_m=16,
    dq_n=16,
    dkdv_m=16,
    dkdv_n=16,
    dkdv_heads=2,
    dkdv_programs=1000,
    dkdv_part_rows=32,
    **WARPS,
)
# A tile of keys whose parts are summed in two pieces, every row in one part.
WHOLE = dataclasses.replace(
    SMALL, fwd_m=32, fwd_n=32, dq_m=32, dkdv_n=32, dkdv_m=32, dkdv_part_rows=2**20
)
PIECES = dataclasses.replace(WHOLE, dkdv_part_rows=64, dkdv_heads=16)

# lengths, last queries or None for as many, used rows or None for all
ONE = ((60,), None, None)
PACKED = ((5, 0, 50, 33), None, None)
CACHED = ((40, 0, 9, 60), (1, 0, 3, 30), (35, 0, 9, 51))
USED = ((40, 0, 9, 60), None, (35, 0, 0, 51))


@dataclasses.dataclass
class Launches:
    """Of a kernel: the grid and the keyword arguments of every launch."""

    kernel: object
    seen: list = dataclasses.field(default_factory=list)

    def __getitem__(self, grid):
        def launch(*args, **keywords):
            self.seen.append((grid, keywords))
            return self.kernel[grid](*args, **keywords)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Of the kernel of dk and dv."""
    found = Launches(backward.compressed_bwd_dkdv_kernel)
    monkeypatch.setattr(backward, "compressed_bwd_dkdv_kernel", found)
    return found


def ints(values):
    return torch.tensor(list(values), dtype=torch.int32)


def make(layout, num_kv_heads, group_size, head_dim, v_dim, kernel_size, kernel_stride):
    """Tensors in float32 and keywords. Compressed rows that no window owns are NaN;
    max_seqlen is an upper bound.
    """
    lengths, num_queries, used = layout
    cu_seqlens = [*accumulate(lengths, initial=0)]
    keywords = dict(
        cu_seqlens=ints(cu_seqlens),
        max_seqlen=max(lengths) + 20,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens_q=None if num_queries is None else ints(accumulate(num_queries, initial=0)),
        seqused_k=None if used is None else ints(used),
    )
    rows = sum(lengths if num_queries is None else num_queries)
    compressed = sum(lengths) // kernel_stride
    q, do = (torch.randn(rows, num_kv_heads * group_size, width) for width in (head_dim, v_dim))
    k, v = (torch.randn(compressed, num_kv_heads, width) for width in (head_dim, v_dim))
    owned = set(owned_rows(cu_seqlens, kernel_size, kernel_stride, seqused_k=keywords["seqused_k"]))
    unowned = sorted(set(range(compressed)) - owned)
    k[unowned] = v[unowned] = torch.nan
    return (q, k, v, do), unowned, keywords


def run(tensors, keywords, backend, dtype, device):
    q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in tensors[:3])
    keywords = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()
    }
    o, lse = ops.compressed_attention(q, k, v, **keywords, return_lse=True, backend=backend)
    grads = torch.autograd.grad(o, (q, k, v), tensors[3].to(o))
    return [x.detach().cpu().double() for x in (o, lse, *grads)]


@pytest.mark.parametrize(
    ("config", "layout", "num_kv_heads", "group_size", "windows", "parts", "heads"),
    [
        (SMALL, ONE, 2, 1, (2, 1), 3, 2),
        (SMALL, PACKED, 2, 3, (4, 2), 7, 2),
        (SMALL, PACKED, 1, 5, (2, 1), 11, 1),
        (SMALL, CACHED, 3, 3, (4, 2), 8, 1),
        (SMALL, USED, 2, 1, (2, 1), 3, 2),
        (WHOLE, PACKED, 2, 5, (4, 2), 1, 2),
        (PIECES, ONE, 4, 3, (2, 1), 4, 4),
        (PIECES, PACKED, 6, 1, (3, 1), 2, 2),
        (PIECES, CACHED, 1, 20, (2, 1), 25, 1),
    ],
)
@pytest.mark.parametrize(
    "backend", [b for b in backends_of("compressed_attention") if b.values[0] != "reference"]
)
def test_how_work_is_cut_does_not_show(
    monkeypatch, launches, backend, config, layout, num_kv_heads, group_size, windows, parts, heads
):
    monkeypatch.setattr(tuning, "compressed_config", lambda *_: config)
    tensors, unowned, keywords = make(layout, num_kv_heads, group_size, 32, 16, *windows)
    expected = run(tensors, keywords, "reference", torch.float64, "cpu")
    with guarded_allocations():  # what is not written is NaN
        found = run(tensors, keywords, backend, torch.float32, device_of(backend))
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        if name == "lse":
            # float32, and sums of 32 products of numbers around 1.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:  # row 1 of reliability.md
            ratio = float((a - b).norm() / b.norm())
            assert ratio <= 1e-5, f"{name}: RMS ratio {ratio:.2e}"
    for grad in found[3:]:
        assert (grad[unowned] == 0).all()
    ((grid, constants),) = launches.seen
    assert (grid[1], constants["HEADS"]) == (parts, heads)


def test_the_cuts_really_cut():
    """Otherwise the test above would prove nothing: of the longest sequence,
    several tiles and steps with and without mask.
    """
    rows, windows = 50 * 5, 50 - 2 + 1
    assert rows > 3 * SMALL.fwd_m
    assert windows > 3 * SMALL.fwd_n  # the last tiles' first query sees three whole steps
    assert windows > 3 * SMALL.dkdv_n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
def test_every_group_has_a_row_of_its_own(head_dim, dtype):
    """A tile holds whole groups of query heads, for every group size that the operator allows."""
    for gluon, cramped in ((False, False), (False, True), (True, False)):
        for group_size in range(1, MAX_GROUP_SIZE + 1):
            config = tuning._compressed_config(
                dtype, head_dim, head_dim, group_size, gluon and dtype.itemsize == 2, cramped
            )
            assert min(config.fwd_m, config.dq_m) >= group_size
            assert config.dkdv_n % 16 == 0  # sum_parts adds 16 windows at a time


@pytest.mark.parametrize("group_size", [1, 3, 4, 5, 7, 12, 64])
@pytest.mark.parametrize("max_seqlen", [0, 1, 2500, 65_536])
@pytest.mark.parametrize("num_tiles", [1, 17, 5000])
def test_parts_are_whole_queries(num_tiles, max_seqlen, group_size):
    """A part that began inside a query gave wrong dk and dv in the kernel for Hopper,
    which no interpreter runs.
    """
    config = CompressedConfig(dkdv_m=64)
    parts, part_rows = backward.cut_parts(max_seqlen, group_size, num_tiles, config)
    assert part_rows % group_size == 0
    assert part_rows % config.dkdv_m == 0
    assert parts * part_rows >= max_seqlen * group_size
    assert num_tiles < config.dkdv_programs or parts <= 1
    parts, part_rows = backward.cut_parts(max_seqlen, group_size, None, config)
    assert part_rows % group_size == part_rows % config.dkdv_m == 0
    assert parts <= config.one_pass_parts
    assert parts * part_rows >= max_seqlen * group_size


def test_in_one_pass():
    """Gluon kernels, whole groups in tiles of 64 rows, long sequences, and no order asked for."""
    config, tokens = CompressedConfig(hopper=True, dkdv_m=64), CompressedConfig().one_pass_tokens
    in_one_pass = backward.in_one_pass
    assert in_one_pass(config, 16, tokens)
    assert not in_one_pass(config, 16, tokens - 1)
    assert not in_one_pass(config, 5, tokens)
    assert not in_one_pass(dataclasses.replace(config, hopper=False), 16, tokens)
    torch.use_deterministic_algorithms(True)
    try:
        assert not in_one_pass(config, 16, tokens)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("num_kv_heads", [1, 7])
def test_bytes_of_one_pass(num_kv_heads, parts):
    """Of a KV head: float32 sums of dq, and of dk and dv in parts, unless there is one,
    which is written in place.
    """
    rows, windows, group_size, width = 100, 6, 4, 128
    config = CompressedConfig(dkdv_m=64, one_pass_part_rows=rows * group_size // parts)
    q = torch.empty(rows, num_kv_heads * group_size, width, device="meta")
    k = torch.empty(windows, num_kv_heads, width, device="meta")
    sequences = Sequences(torch.empty(2, dtype=torch.int32, device="meta"), rows)
    call = WindowedCall(q, k, k, sequences, 1.0, WORKSPACE_BYTES, "triton", Windows(1, 1), None)
    inputs = backward.Inputs(q, k, k, q, Statistics(q[..., 0], q[..., 0]), call, config)
    expected = 4 * rows * group_size * width + (4 * parts * windows * 2 * width if parts > 1 else 0)
    assert backward.bytes_of_kv_head(inputs) == expected
    few = dataclasses.replace(config, one_pass_sums=2 * 4 * rows * group_size * width)
    for settings, heads in ((config, num_kv_heads), (few, 2)):
        chunks = list(backward.one_pass_chunks(inputs._replace(config=settings)))
        assert max(x.stop - x.start for _, x in chunks) == min(heads, num_kv_heads)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_scale_rows(accumulate, head_dim):
    """Some heads of a gradient; the others stay."""
    device = device_of("triton")
    generator = torch.Generator().manual_seed(0)
    whole, sums = (
        torch.randn(50, heads, head_dim, generator=generator).to(device) for heads in (5, 2)
    )
    before = whole.clone()
    backward.scale_rows(whole[:, 1:3], sums, 0.3, accumulate)
    expected = before.clone()
    expected[:, 1:3] = 0.3 * sums + (before[:, 1:3] if accumulate else 0)
    torch.testing.assert_close(whole, expected)
