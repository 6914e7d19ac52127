"""The Triton backend against the reference, with tiles so small that short sequences are cut as
only long ones otherwise are: many steps, pieces, parts and chunks."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops
from nsa_fsa.ops.block_divergence import launch
from nsa_fsa.ops.block_divergence.launch import TileSizes
from nsa_fsa.ops.block_divergence.operator import BACKENDS, OPERATOR, DivergenceCall
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.sequences import Sequences
from tests.cases import device_of
from tests.ops.block_divergence.test_values import FULL, make

DEVICE = device_of("triton")
SMALL = TileSizes(
    **dict(weigh_m=16, weigh_n=16, weigh_warps=4, weigh_stages=2),
    **dict(dq_m=16, dq_n=16, dq_warps=4),
    **dict(dk_m=16, dk_n=16, dk_warps=4),
    **dict(rows=16, blocks=4, dk_part_pairs=40),
)
F16, F32 = torch.float16, torch.float32
# Of the largest number: rounding of the products in 16 bits, and of logarithms in float32.
TOLERANCE = {F16: 4e-3, F32: 2e-5}


def call_of(
    sizes, group_size, num_kv_heads, lengths, cached=(), free_only=0, dtype=F32, dim=16
):  # fmt: skip
    """A call, whose rows of k_cmp that no window owns are NaN."""
    tensors, rule = make(lengths, group_size, sizes, num_kv_heads, dim, dtype, cached)
    windows = Windows(sizes["kernel_size"], sizes["kernel_stride"])
    blocks = Blocks(*(sizes[name] for name in Blocks._fields))
    tensors["k_cmp"] = unowned_to_nan(tensors["k_cmp"], lengths, windows)
    layout = [rule.get(name) for name in Sequences._fields]
    layout = Sequences(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in layout))
    rest = (layout, rule["scale"], windows, blocks, free_only, 2**28, "triton")
    return DivergenceCall(*(x.to(DEVICE) for x in tensors.values()), *rest)


def unowned_to_nan(k_cmp, lengths, windows):
    owned, first = torch.zeros(len(k_cmp), dtype=torch.bool), 0
    for length in lengths:
        n = max(0, (length - windows.kernel_size) // windows.kernel_stride + 1)
        owned[first // windows.kernel_stride :][:n] = True
        first += length
    return k_cmp.masked_fill(~owned[:, None, None], torch.nan)


def assert_close(name, found, expected, tolerance):
    """tolerance: of the largest number."""
    largest = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        *(found.double(), expected.double()), rtol=0, atol=tolerance * max(largest, 1e-9),
        equal_nan=True, msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def assert_equals_reference(call, sizes=SMALL, tolerance=None):
    reference, dtype = BACKENDS.by_name["reference"], call.q.dtype
    tolerance = tolerance or TOLERANCE[dtype]
    do = torch.randn(call.q.shape[0], call.k.shape[1], device=DEVICE)
    found, expected = launch.block_divergence(call, sizes), reference.forward(call)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(name, ours, theirs, tolerance)
    grads = launch.block_divergence_backward(call, do, sizes)
    for name, ours, theirs in zip(grads._fields, grads, reference.backward(call, do), strict=True):
        assert ours.dtype == dtype
        assert_close(f"d{name}", ours, theirs, tolerance)
    return found, grads


def sizes_of(kernel_size, kernel_stride, block_size, init_blocks, local_blocks):
    return dict(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )


# Sizes, G, HKV, lengths, how many tokens of each sequence have no query, and free_only.
SETTINGS = {
    "two_hops": (sizes_of(4, 2, 4, 1, 1), 2, 2, (1, 0, 19, 3), (), 0),
    "one_hop": (sizes_of(4, 4, 4, 1, 2), 3, 1, (34,), (), 1),
    "odd_blocks": (sizes_of(6, 2, 12, 0, 1), 1, 1, (27, 27), (), 1),  # they need no table
    "pieces": (sizes_of(3, 1, 20, 0, 1), 1, 1, (45, 5), (), 0),
    "one_block": (sizes_of(8, 2, 64, 0, 1), 2, 1, (21, 9), (), 0),
    "past": (sizes_of(4, 2, 8, 1, 1), 5, 1, (20, 31), (12, 25), 1),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_reference(setting):
    assert_equals_reference(call_of(*SETTINGS[setting]))


@pytest.mark.parametrize("head_dim", [16, 24])
def test_in_sixteen_bits(head_dim):
    """With the tiles that are shipped, also for heads that these pad."""
    call = call_of(*SETTINGS["two_hops"], dtype=F16, dim=head_dim)
    assert_equals_reference(call, launch.tile_sizes(call.q, 2))


def test_rows_behind_the_used_ones_have_no_results():
    """Of a buffer whose sequences do not fill it, with NaN behind them."""
    call = call_of(sizes_of(4, 2, 8, 1, 1), 2, 1, (14, 22))
    used = torch.tensor([9, 22], dtype=torch.int32, device=DEVICE)
    layout = call.sequences._replace(seqused_k=used)
    call.k[9:14], call.q[9:14] = torch.nan, torch.nan
    call.lse[9:14] = call.lse_cmp[9:14] = -torch.inf
    (divergence, mass, recall), grads = assert_equals_reference(
        dataclasses.replace(call, sequences=layout)
    )
    assert (divergence[9:14] == 0).all()
    assert (mass[9:14] == 0).all()
    assert recall[9:14].isnan().all()
    assert (grads.q[9:14] == 0).all()


def test_chunks_and_parts_change_nothing():
    """To the last bit, but for what is summed over queries."""
    call = call_of(sizes_of(4, 2, 8, 1, 1), 2, 1, (5, 20))
    do = torch.randn(25, 1, device=DEVICE)
    chunked = dataclasses.replace(call, workspace_bytes=1)
    inputs = launch.inputs_of(chunked, SMALL)
    assert len([*launch.chunks_of(inputs, launch.workspace_of(inputs, 1))]) == 2
    assert launch.cut_keys(inputs, 1).num_parts == 1
    assert launch.cut_keys(inputs, 2**20).num_parts > 1

    wholes = launch.block_divergence(call, SMALL)
    for found, whole in zip(launch.block_divergence(chunked, SMALL), wholes, strict=True):
        assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))
    whole = launch.block_divergence_backward(call, do, SMALL)
    found = launch.block_divergence_backward(chunked, do, SMALL)
    assert torch.equal(found.q, whole.q)
    assert_close("dk_cmp", found.k_cmp, whole.k_cmp, TOLERANCE[F32])


@pytest.mark.parametrize("workspace_bytes", [1, 2**16, 2**20])
def test_the_workspace_is_as_large_as_it_may_be(workspace_bytes):
    """Or has room for 16 queries, or for all."""
    call = call_of(sizes_of(4, 2, 8, 1, 1), 3, 2, (5, 300))
    inputs = launch.inputs_of(call, SMALL)
    made = launch.workspace_of(inputs, workspace_bytes, numbers_per_pair=1)
    per_row = made.rows * 6 * 4  # what the caller makes
    taken = sum(x.nbytes for x in (*made.logs, *made.joined)) + per_row
    of_16 = 16 * taken // made.rows
    assert taken <= max(workspace_bytes, of_16)
    assert made.rows >= 305 or taken > workspace_bytes / 2 or made.rows == 16
    assert (made.rows >= 305) == (workspace_bytes == 2**20)


@pytest.mark.parametrize("setting", ["free", "pieces"])
def test_weights_too_small_for_float32_leave_it_finite(setting):
    """As in the reference, where their logarithms are kept. Scores are in the thousands, so their
    roundings are large, and softmax weights are off by those of a score and of its lse: here and in
    the reference, whose error against float64 is as large."""
    settings = {
        # Of some queries no free block has any mass.
        "free": (sizes_of(4, 2, 4, 1, 1), 2, 1, (30,), (), 1),
        # Blocks have far less weight than the ones before them.
        "pieces": (sizes_of(3, 1, 20, 0, 1), 1, 1, (61,), (), 0),
    }
    call = call_of(*settings[setting])
    call = with_queries(call, call.q * 300)
    # Which of two blocks has more mass is not to be compared where both have next to none.
    call = dataclasses.replace(call, block_indices=torch.full_like(call.block_indices, -1))
    tolerance = 4 * 2**-24 * call.lse.abs().max().item()
    assert tolerance < 2e-3
    (divergence, *_), grads = assert_equals_reference(call, tolerance=tolerance)
    assert 90 < divergence.max() < torch.inf
    assert grads.q.isfinite().all()


def test_where_no_mass_is_compared_nothing_is_learned():
    """As of a query whose free blocks have less mass than float32 can tell from 0."""
    call = call_of(sizes_of(4, 2, 4, 1, 1), 1, 1, (16,))
    call = dataclasses.replace(call, lse=call.lse + 1000)
    (divergence, *_), grads = assert_equals_reference(call)
    assert not divergence.any()
    assert not grads.q.any()
    assert not grads.k_cmp.any()


def with_queries(call, q):
    """The call of other queries, with what follows from these."""
    k_cmp = call.k_cmp.nan_to_num(0)
    where = dict(cu_seqlens=call.sequences.cu_seqlens, max_seqlen=call.sequences.max_seqlen)
    options = dict(scale=call.scale, return_lse=True, backend="reference", **where)
    _, lse = ops.sliding_window_attention(q, call.k, call.k, window_size=FULL, **options)
    _, lse_cmp = ops.compressed_attention(q, k_cmp, k_cmp, **call.windows._asdict(), **options)
    return dataclasses.replace(call, q=q, lse=lse, lse_cmp=lse_cmp)


def test_a_block_chosen_twice_counts_once():
    """And one that no query sees does not count, nor does a negative one. All keys are alike, and
    of blocks with the same mass the first ones are the best."""
    call = call_of(sizes_of(4, 2, 4, 1, 1), 1, 1, (40,))
    blocks = torch.tensor([0, 3, 3, 2, -1, 9, 3], dtype=torch.int32, device=DEVICE)
    call = dataclasses.replace(call, k=call.k[:1].expand(40, 1, 16).contiguous())
    call = with_queries(call, call.q)
    indices = blocks.expand(40, 1, 7).clone()
    (_, _, recall), _ = assert_equals_reference(dataclasses.replace(call, block_indices=indices))
    assert recall[20:36].tolist() == [[0.5]] * 16  # 2 of the blocks 1 and 2, instead of 3 as well
    assert recall[36:].tolist() == [[0.5]] * 4  # 9 is the own block now, and forced


def test_sizes_far_beyond_the_sequences_cost_nothing():
    call = call_of(sizes_of(4, 2, 8, 0, 1), 1, 1, (9,))
    layout = call.sequences._replace(max_seqlen=2**20)
    one_block = dataclasses.replace(call, sequences=layout, blocks=Blocks(2**20, 0, 1))
    for changed, num_blocks in ((dataclasses.replace(call, sequences=layout), 2), (one_block, 1)):
        inputs = launch.inputs_of(changed, SMALL)
        assert inputs.num_blocks == num_blocks
        assert int(inputs.dense.shape.BLOCK_HOPS) <= 32
    assert_equals_reference(one_block)


def test_no_queries_and_no_windows():
    for lengths in ((0, 0), (3,)):
        assert_equals_reference(call_of(sizes_of(4, 2, 8, 1, 1), 2, 1, lengths))


def test_through_the_operator():
    """By name, with gradients, and as torch.library sees it: of queries after a past, which all
    have a choice, because opcheck compares results and NaN is equal to none."""
    call = call_of(sizes_of(4, 2, 4, 1, 1), 2, 1, (20, 18), cached=(19, 17))
    call = dataclasses.replace(call, k_cmp=call.k_cmp.nan_to_num(0))
    names = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "local_blocks")
    rule = dict(zip(names, (*call.windows, *call.blocks), strict=True))
    q, k_cmp = call.q.requires_grad_(), call.k_cmp.requires_grad_()
    tensors = (q, call.k, k_cmp, call.lse, call.lse_cmp, call.block_indices)
    grads = []
    for backend in ("triton", "reference"):
        where = call.sequences._asdict()
        found = ops.block_divergence(*tensors, **where, **rule, scale=call.scale, backend=backend)
        grads.append(torch.autograd.grad(found.divergence.sum(), (q, k_cmp)))
    for name, *both in zip(("dq", "dk_cmp"), *grads, strict=True):
        assert_close(name, *both, TOLERANCE[F32])

    row = OPERATOR.call.flatten(call)
    torch.library.opcheck(torch.ops.nsa_fsa.block_divergence.default, row)
    row = [x.detach() if isinstance(x, torch.Tensor) else x for x in row]
    do = torch.randn(2, 1, device=DEVICE)
    torch.library.opcheck(torch.ops.nsa_fsa.block_divergence_backward.default, (do, *row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dtype=torch.float64), "dtype torch.float64; supported are"),
        (dict(dim=257), "head widths 257; supported are at most 256"),
        (dict(group_size=65), "65 query heads a KV head; supported are at most 64"),
    ],
)
def test_says_what_it_does_not_take(changes, message):
    options = dict(group_size=1, dtype=F32, dim=16) | changes
    call = call_of(sizes_of(4, 2, 8, 1, 1), num_kv_heads=1, lengths=(9,), **options)
    with pytest.raises(ValueError, match=message):
        OPERATOR(call)
