"""The Triton backend at sizes that only a GPU runs: against the reference in float64, run after
run, without waiting for the GPU, and within its memory."""

import dataclasses

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops.block_divergence.operator import BACKENDS, DivergenceCall
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks, Windows
from nsa_fsa.sequences import Sequences
from tests.on_gpu import MIB, assert_rms_close, extra, needs, record, starts, syncs_forbidden

pytestmark = pytest.mark.gpu

BF16, F32 = torch.bfloat16, torch.float32
FULL = 2**30  # a sliding window of so many positions is full attention
TRITON, REFERENCE = (BACKENDS.by_name[name] for name in ("triton", "reference"))


def make(
    lengths, num_kv_heads, group_size, head_dim=64, dtype=BF16, *, blocks=(64, 1, 2),
    windows=(32, 16), num_selected=6, free_only=0, seed=0,
):  # fmt: skip
    """A call of packed sequences."""
    options = dict(device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    windows, blocks, total = Windows(*windows), Blocks(*blocks), sum(lengths)
    q = (torch.randn(total, num_kv_heads * group_size, head_dim, **options) * 2).to(dtype)
    k = torch.randn(total, num_kv_heads, head_dim, **options).to(dtype)
    num_rows = total // windows.kernel_stride
    k_cmp = torch.randn(num_rows, num_kv_heads, head_dim, **options).to(dtype)
    layout = Sequences(starts(lengths), max(lengths))
    where = dict(cu_seqlens=layout.cu_seqlens, max_seqlen=layout.max_seqlen)
    _, lse = ops.sliding_window_attention(q, k, k, window_size=FULL, return_lse=True, **where)
    hops = windows._asdict()
    _, lse_cmp = ops.compressed_attention(q, k_cmp, k_cmp, return_lse=True, **hops, **where)
    chosen = ops.select_blocks(
        q, k_cmp, lse_cmp, num_selected_blocks=num_selected, **hops, **blocks._asdict(), **where
    )
    rest = (layout, head_dim**-0.5, windows, blocks, free_only, WORKSPACE_BYTES, "triton")
    return DivergenceCall(q, k, k_cmp, lse, lse_cmp, chosen, *rest)


def ones(call):
    """A gradient of the divergence."""
    return torch.ones(call.q.shape[0], call.k.shape[1], device="cuda")


def run(call):
    return (*TRITON.forward(call), *TRITON.backward(call, ones(call)))


def assert_equals_float64(call):
    wide = {name: getattr(call, name).double() for name in ("q", "k", "k_cmp", "lse", "lse_cmp")}
    wide = dataclasses.replace(call, **wide)
    found, expected = TRITON.forward(call), REFERENCE.forward(wide)
    # They follow from scores in float32 whatever the dtype, but for the lse that is given.
    assert_rms_close("divergence", found.divergence, expected.divergence, F32)
    assert_rms_close("mass", found.mass, expected.mass, F32)
    assert torch.equal(found.recall.isnan(), expected.recall.isnan())
    # Of blocks with as good as the same mass either may be the better one.
    assert (found.recall.double() - expected.recall).abs().nan_to_num().mean() < 1e-4
    do = torch.randn(found.mass.shape, device="cuda")
    grads = TRITON.backward(call, do), REFERENCE.backward(wide, do.double())
    for name, ours, theirs in zip(grads[0]._fields, *grads, strict=True):
        assert_rms_close(f"d{name}", ours, theirs, call.q.dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("free_only", [0, 1], ids=["all", "free"])
@pytest.mark.parametrize(
    ("group_size", "head_dim"), [(3, 64), (1, 128), (16, 128), (4, 256)], ids=str
)
def test_equals_the_reference(group_size, head_dim, free_only, dtype):
    assert_equals_float64(make((2048,), 1, group_size, head_dim, dtype, free_only=free_only))


@pytest.mark.parametrize("dtype", [torch.float16, F32])
@pytest.mark.parametrize(
    ("head_dim", "sizes"),
    [
        (80, dict(blocks=(128, 0, 1), windows=(64, 16))),
        (64, dict(blocks=(16, 1, 1), windows=(16, 16), num_selected=40)),
        (96, dict(blocks=(48, 1, 2), windows=(32, 16))),
        (32, dict(blocks=(128, 1, 1), windows=(3, 1))),  # windows of a block in several pieces
    ],
    ids=str,
)
def test_other_sizes(head_dim, sizes, dtype):
    """Of packed sequences."""
    assert_equals_float64(make((700, 0, 37, 1, 900), 2, 5, head_dim, dtype, **sizes))


@pytest.mark.parametrize("lengths", [(2048,), (1000, 37, 0, 900)], ids=["one", "packed"])
def test_same_bits_in_every_run(lengths):
    """Of all queries at once, and of chunks."""
    call = make(lengths, 2, 3)
    for workspace_bytes in (WORKSPACE_BYTES, 2 * MIB):
        call = dataclasses.replace(call, workspace_bytes=workspace_bytes)
        first = [x.nan_to_num(-1) for x in run(call)]
        for turn in range(1, 20):
            for ours, theirs in zip(run(call), first, strict=True):
                assert torch.equal(ours.nan_to_num(-1), theirs), f"run {turn}"


def through_the_operator(call):
    tensors = (call.q.requires_grad_(), call.k, call.k_cmp.requires_grad_(), call.lse, call.lse_cmp)
    found = ops.block_divergence(
        *(*tensors, call.block_indices, call.sequences.cu_seqlens, call.sequences.max_seqlen),
        **call.windows._asdict(),
        **call.blocks._asdict(),
    )
    return found, torch.autograd.grad(found.divergence.mean(), (call.q, call.k_cmp))


def test_nothing_waits_for_the_gpu():
    """By the backend that "auto" takes; the third call of a kind is repeated from a tape."""
    calls = [make(lengths, 2, 3) for lengths in ((1000, 37, 0, 900), (50, 1400, 0, 487))]
    expected = [through_the_operator(call) for call in calls]
    with syncs_forbidden():
        found = [[through_the_operator(call) for call in calls] for _ in range(3)]
    for turn in found:
        for (ours, our_grads), (theirs, their_grads) in zip(turn, expected, strict=True):
            for x, y in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
                assert torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))


def test_cuda_graph():
    """Recorded once; replayed with other values and lengths it gives the same bits as running
    anew."""
    call = make((1000, 37, 0, 900), 2, 3)
    layout = call.sequences._replace(max_seqlen=1937)  # an upper bound for every way to cut rows
    call = dataclasses.replace(call, sequences=layout)
    graph, recorded = record(lambda: run(call))
    for seed, lengths in ((1, (1000, 37, 0, 900)), (2, (1937, 0, 0, 0)), (3, (0, 1, 64, 1872))):
        other = make(lengths, 2, 3, seed=seed)
        for name in ("q", "k", "k_cmp", "lse", "lse_cmp", "block_indices"):
            getattr(call, name).copy_(getattr(other, name))
        call.sequences.cu_seqlens.copy_(other.sequences.cu_seqlens)
        graph.replay()
        replayed = [x.clone() for x in recorded]
        for ours, theirs in zip(replayed, run(call), strict=True):
            assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)), lengths


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_takes_no_more_memory_than_it_may(direction):
    """Beside its results, and what says where rows and tiles lie; what all pairs give to all blocks
    would take 216 MiB here."""
    call = make((8192,), 3, 9)
    call = dataclasses.replace(call, workspace_bytes=64 * MIB)
    do = ones(call)

    def step():
        return TRITON.forward(call) if direction == "forward" else TRITON.backward(call, do)

    step()
    results, peak = extra(step)
    peak -= sum(x.nbytes for x in results)
    assert 32 * MIB < peak <= 66 * MIB, f"{peak / MIB:.0f} MiB"


@needs(60)
def test_offsets_past_2_31():
    """What pairs give to blocks is 2^32 numbers a side, in a workspace that has room for them; in
    chunks the same bits come out."""
    call = make((65536,), 16, 4, 64)
    whole = TRITON.forward(dataclasses.replace(call, workspace_bytes=2**40))
    for ours, theirs in zip(TRITON.forward(call), whole, strict=True):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))
