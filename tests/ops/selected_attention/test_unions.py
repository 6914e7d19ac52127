"""Tiles of neighbouring queries that read the union of their blocks: which these are, what their
unions are, and that it does not show in what a query gets."""

import dataclasses
import functools
import importlib
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention import operator as selected
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import BY_UNION, IndexCall, SelectedCall
from nsa_fsa.ops.selected_attention.unions import (
    find_unions,
    index_of_others,
    most_blocks,
    tile_of_neighbours,
)
from nsa_fsa.sequences import Sequences
from tests.cases import device_of, on_a_gpu_only, widest_dtype
from tests.guards import guarded, guarded_allocations
from tests.ops.selected_attention import test_cached_chunks as cached
from tests.ops.selected_attention import test_hostile_indices as hostile

BACKEND = "triton_kv_major"
DEVICE = device_of(BACKEND)
HEADS = 2  # KV heads
LENGTHS = (70, 0, 33, 101)
INFINITE = float("inf")
FORWARD = importlib.import_module("nsa_fsa.ops.selected_attention.kv_major_forward")


@pytest.fixture
def by_unions(monkeypatch):
    """Has the forward go by unions, as told; returns, of every forward since, how many tiles went
    by their unions and how many there were."""
    found = []

    def go(factor, **changes):
        def changed(make_config):
            def made(*args):
                changed = dict(union_factor=factor, union_m=32, union_hopper=False) | changes
                return dataclasses.replace(make_config(*args), **changed)

            return made

        for name in ("default_config", "plain_config"):
            monkeypatch.setattr(tuning, name, changed(getattr(tuning, name)))

    def watched(call, config):
        unions = find_unions(call, config)
        if unions is not None:
            owned = int((unions.tiles[1] > 0).sum()) * call.k.shape[1]
            found.append((int(unions.unions.num_work), owned))
        return unions

    monkeypatch.setattr(FORWARD, "find_unions", watched)
    return go, found


@functools.cache
def _alike(lengths, num_indices, block_size, init_blocks, local_blocks, change=0.1, seed=0):
    """Ascending choices with their forced blocks, whose free ones change from a query to the next
    with a probability."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((sum(lengths), HEADS, num_indices), -1, dtype=torch.int32)
    row, free = 0, num_indices - init_blocks - local_blocks
    for length in lengths:
        scores = torch.rand(HEADS, length // block_size + 1, generator=generator)
        for t in range(length):
            own = t // block_size
            anew = torch.rand(HEADS, generator=generator) < change
            scores[anew] = torch.rand(scores[anew].shape, generator=generator)
            forced = {
                *range(min(init_blocks, own + 1)),
                *range(max(own + 1 - local_blocks, 0), own),
            }
            forced |= {own} if local_blocks else set()
            for head in range(HEADS):
                order = scores[head, : own + 1].argsort(descending=True).tolist()
                chosen = sorted({*forced, *[b for b in order if b not in forced][:free]})
                indices[row, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            row += 1
    return indices


def starts(lengths):
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=DEVICE)


def make_call(indices, sequences, blocks, group_size, counts=None, num_keys=None, **changes):
    """A call whose choices matter and whose tensors do not."""
    q = torch.zeros(indices.shape[0], HEADS * group_size, 4, device=DEVICE)
    k = torch.zeros(indices.shape[0] if num_keys is None else num_keys, HEADS, 4, device=DEVICE)
    counts = None if counts is None else counts.to(DEVICE)
    shared = (sequences, 0.1, WORKSPACE_BYTES, BACKEND, blocks, indices.to(DEVICE), counts, None)
    return dataclasses.replace(SelectedCall(q, k, k, *shared), **changes)


def alike(lengths, *args, **kwargs):
    return _alike(tuple(lengths), *args, **kwargs).clone()


# Which tiles, and what their unions are


def check_found(call, factor, num_pairs=32):
    """What is found against loops over the queries; returns it, and how many tiles go by unions."""
    config = tuning.Config(union_factor=factor, union_m=num_pairs)
    with guarded_allocations():
        unions = find_unions(call, config)
    _, num_queries = tile_of_neighbours(call.group_size, num_pairs)
    assert unions.num_queries == num_queries
    num_rows, _, num_indices = call.block_indices.shape
    size, sequences = call.blocks.block_size, call.sequences
    positions = sequences.positions(num_rows).tolist()
    used = sequences.lengths.tolist()
    tiles = dict(
        zip(("first", "number", "position", "key", "keys"), unions.tiles.tolist(), strict=True)
    )
    work = unions.unions.work[: int(unions.unions.num_work)].tolist()
    assert len(set(work)) == len(work)
    words = -(-num_queries // 32)
    seen_rows, going = [], 0
    bounds = sequences.of_queries.tolist()
    for tile, number in enumerate(tiles["number"]):
        if number <= 0:
            continue
        rows = range(tiles["first"][tile], tiles["first"][tile] + number)
        (b,) = [
            b for b in range(len(bounds) - 1) if bounds[b] <= rows[0] and rows[-1] < bounds[b + 1]
        ]
        assert (rows[0] - bounds[b]) % num_queries == 0
        assert number == min(num_queries, bounds[b + 1] - rows[0])
        assert tiles["position"][tile] == positions[rows[0]]
        assert tiles["key"][tile] == sequences.cu_seqlens[b]
        assert tiles["keys"][tile] == used[b]
        seen_rows += rows
        for head in range(HEADS):
            choices, ascends, owns = [], True, []
            for row in rows:
                entries = call.block_indices[row, head].tolist()
                if call.block_counts is not None:
                    entries = entries[: max(0, int(call.block_counts[row, head]))]
                sees = 0 <= positions[row] < used[b]
                own = positions[row] // size if sees else -1
                owns += [own] if sees else []
                valid = [0 <= x <= own for x in entries]
                choice = [x for x, is_valid in zip(entries, valid, strict=True) if is_valid]
                ascends &= sorted(set(choice)) == choice and valid == sorted(valid, reverse=True)
                choices.append(choice)
            union = sorted({x for choice in choices for x in choice})
            goes = ascends and len(union) <= unions.capacity and len(owns) == number
            number_of_tile = head * len(tiles["number"]) + tile
            assert (number_of_tile in work) == goes, (tile, head)
            flags = unions.flags[head, rows[0] : rows[-1] + 1].tolist()
            before = (
                0 if call.index is None else call.index.num_sparse[head, rows[0] : rows[-1] + 1]
            )
            expected = [BY_UNION * goes] * number
            if call.index is not None:
                expected = [x | y for x, y in zip(expected, before.tolist(), strict=True)]
            assert flags == expected, (tile, head)
            if not goes:
                continue
            going += 1
            at = number_of_tile * unions.capacity
            assert int(unions.unions.num_blocks[number_of_tile]) == len(union)
            assert unions.unions.blocks[at : at + len(union)].tolist() == union
            whole = [x for x in union if x < min(owns)]
            assert int(unions.unions.num_whole[number_of_tile]) == len(whole)
            bits = unions.unions.bits.view(-1, words)[at : at + len(union)].tolist()
            for block, word in zip(union, bits, strict=True):
                for nth, choice in enumerate(choices):
                    assert (word[nth // 32] >> (nth % 32) & 1) == (block in choice), (block, nth)
    assert sorted(seen_rows) == [*range(num_rows)]
    assert unions.capacity <= max(factor * num_indices, 0)
    return unions, going


@pytest.mark.parametrize(
    ("group_size", "num_pairs"), [(1, 128), (1, 64), (2, 64), (3, 32), (16, 64)]
)
@pytest.mark.parametrize("factor", [1.0, 1.6, INFINITE])
def test_unions(factor, group_size, num_pairs):
    sequences = Sequences(starts(LENGTHS), max(LENGTHS))
    call = make_call(alike(LENGTHS, 5, 16, 1, 1), sequences, Blocks(16, 1, 1), group_size)
    _, going = check_found(call, factor, num_pairs)
    assert going > 0


def test_unions_of_a_chunk_after_a_past():
    """Also of queries before every key, and behind the last one in use."""
    chunk = cached.make_chunk(forced=(1, 1), free=2)
    layout = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in chunk.layout.items()
    }
    indices = chunk.block_indices.sort(-1, descending=True).values.flip(-1)
    indices = torch.where(indices < 0, 1 << 20, indices).sort(-1).values
    repeated = torch.nn.functional.pad(indices[..., 1:] == indices[..., :-1], (1, 0))
    indices = torch.where(repeated, 1 << 20, indices).sort(-1).values.int()
    for sequences in (
        Sequences(**layout),
        Sequences(
            layout["cu_seqlens"], 80, layout["cu_seqlens_q"], layout["seqused_k"].clamp(max=7)
        ),
    ):
        call = make_call(indices, sequences, Blocks(16, 1, 1), 2, num_keys=len(chunk.k))
        _, going = check_found(call, 2.0, 8)
        assert going > 0


def test_unions_of_any_indices():
    """Unsorted, repeated, out of range, and with counts: by union goes what ascends."""
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([hostile.INT_MIN, -1, 0, 1, 1, 2, 3, 4, 2**28, hostile.INT_MAX])
    lengths, shape = (40, 0, 61), (101, HEADS, 3)
    indices = values[torch.randint(len(values), shape, generator=generator)].int()
    most = torch.tensor([hostile.INT_MIN, -1, 0, 1, 1, 2, 3, 4, hostile.INT_MAX]).int()
    counts = most[torch.randint(len(most), shape[:2], generator=generator)]
    sequences = Sequences(starts(lengths), 61)
    for given in (None, counts):
        call = make_call(indices, sequences, Blocks(16, 0, 0), 1, given)
        unions, going = check_found(call, 4.0, 2)
        assert 0 < going < HEADS * int((unions.tiles[1] > 0).sum()) - 20


def test_unions_beside_an_index():
    """The flags then have what the index says of a query, too; and the index of the others has
    their entries alone, as an index made for them has."""
    sequences = Sequences(starts(LENGTHS), max(LENGTHS))
    call = make_call(alike(LENGTHS, 5, 16, 1, 1), sequences, Blocks(16, 1, 1), 1)
    with_index = dataclasses.replace(call, index=build_block_index(IndexCall.of(call)))
    unions, going = check_found(with_index, 1.0, 8)
    assert 0 < going < unions.unions.work.numel()
    with guarded_allocations():
        kept = index_of_others(with_index, unions)
        unions, _ = check_found(call, 1.0, 8)
        made = index_of_others(call, unions)
    assert torch.equal(kept.num_entries, made.num_entries)
    assert 0 < int(kept.num_entries.sum()) < int(with_index.index.num_entries.sum())
    for head in range(HEADS):
        for block, number in enumerate(kept.num_entries[head].tolist()):
            entries = [x.entries[head, x.first_entry[head, block] :][:number] for x in (kept, made)]
            assert torch.equal(*entries), (head, block)
    others = (kept.num_sparse & BY_UNION) == 0
    assert torch.equal(kept.num_sparse[others], made.num_sparse[others])
    assert torch.equal(made.num_sparse & BY_UNION, kept.num_sparse & BY_UNION)


def test_bulk_copies_are_of_heads_that_lie_together():
    sequences = Sequences(starts(LENGTHS), max(LENGTHS))
    call = make_call(alike(LENGTHS, 5, 16, 1, 1), sequences, Blocks(16, 1, 1), 2)
    apart = dataclasses.replace(call, k=torch.cat((call.k, call.v), -1)[..., :4])
    plain = tuning.Config(union_factor=2.0)
    hopper = dataclasses.replace(plain, union_hopper=True)
    found = [[most_blocks(x, config) for x in (call, apart)] for config in (plain, hopper)]
    assert found == [[10, 10], [10, 0]]


@pytest.mark.parametrize(("group_size", "factor"), [(4, 3.0), (1, 0.0)])
def test_no_timing_turns_unions_off(group_size, factor, monkeypatch):
    """What the profiler times may be random, and is remembered for choices that are alike."""
    monkeypatch.setattr(tuning, "runs_hopper", lambda *_: True)
    q, v = (torch.zeros(8, heads, 128, dtype=torch.bfloat16) for heads in (2 * group_size, 2))
    configs = tuning.candidates(q, v, 64, "forward").values()
    assert next(iter(configs)).union_factor == factor
    assert {x.union_factor for x in configs} == {factor, 3.0}


@pytest.mark.parametrize("operator", ["selected_attention", "nsa_attention"])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_index_of_all_queries_is_made_before_a_backward_alone(operator, gradients, monkeypatch):
    """In inference the forward makes one of those queries that do not go by their unions."""
    made, make = [], selected.make_index
    monkeypatch.setattr(selected, "make_index", lambda call: made.append(call) or make(call))
    q, k = (torch.randn(40, heads, 16, device=DEVICE) for heads in (4, HEADS))
    arguments = dict(block_size=16, init_blocks=1, local_blocks=1, backend=BACKEND)
    packed = (starts((40,)), 40)
    with torch.set_grad_enabled(gradients):
        if operator == "selected_attention":
            indices = alike((40,), 3, 16, 1, 1).to(DEVICE)
            ops.selected_attention(q, k, k, indices, *packed, **arguments)
        else:
            sizes = dict(kernel_size=8, kernel_stride=8, num_selected_blocks=3, window_size=8)
            gates, cmp = torch.zeros(40, 4, 3, device=DEVICE), k[::8].contiguous()
            ops.nsa_attention(q, k, k, cmp, cmp, gates, *packed, **arguments, **sizes)
    assert len(made) == gradients


# What a query gets


def check_forward(indices, group_size, blocks, lengths=LENGTHS, counts=None, **extra):
    """With gradients and without: o and lse against the reference in float64, to ten times the
    rounding, as sums over a query's keys are elsewhere; with a width that is no power of two."""
    dtype, rounding = widest_dtype(BACKEND)
    generator = torch.Generator().manual_seed(5)
    total, close = sum(lengths), dict(rtol=10 * rounding, atol=10 * rounding)
    q, k, v = (
        torch.randn(total, heads, width, generator=generator, dtype=torch.float64)
        for heads, width in ((HEADS * group_size, 16), (HEADS, 16), (HEADS, 24))
    )
    arguments = dict(blocks._asdict(), max_seqlen=max(lengths), return_lse=True)
    cu_seqlens = starts(lengths)
    expected = ops.selected_attention(
        q,
        k,
        v,
        indices,
        cu_seqlens=cu_seqlens.cpu(),
        block_counts=counts,
        backend="reference",
        **arguments,
    )
    tensors = [guarded(x.to(DEVICE, dtype))[0] for x in (q, k, v)]
    given = None if counts is None else counts.to(DEVICE)
    results = []
    for gradients in (False, True):
        for x in tensors:
            x.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients), guarded_allocations():
            found = ops.selected_attention(
                *tensors,
                guarded(indices.to(DEVICE))[0],
                cu_seqlens=cu_seqlens,
                block_counts=given,
                backend=BACKEND,
                **arguments,
                **extra,
            )
        results.append([x.detach() for x in found])
    for name, a, b, c in zip(("o", "lse"), *results, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), c, **close, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(a, b), f"{name} is another one with gradients"
    return results[0]


@pytest.mark.parametrize("group_size", range(1, 17))
@pytest.mark.parametrize("factor", [1.0, INFINITE])
def test_forward(by_unions, factor, group_size):
    """Some tiles by their unions and some not, and all of them."""
    if group_size not in (1, 3, 4, 5):
        on_a_gpu_only(BACKEND, "triton_kv_major")
    block_size = (16, 32, 16, 64, 16, 128)[group_size % 6]
    lengths = [n * block_size // 16 for n in LENGTHS] if DEVICE == "cuda" else LENGTHS
    go, found = by_unions
    go(factor, union_m=16)
    indices = alike(lengths, 4, block_size, 1, 1)
    check_forward(indices, group_size, Blocks(block_size, 1, 1), lengths)
    assert len(found) == 2
    for going, number in found:
        assert going == number if factor == INFINITE else 0 < going <= number
        assert factor == INFINITE or block_size > 16 or group_size > 4 or going < number


@pytest.mark.parametrize("forced", [(0, 0), (1, 0), (0, 1), (2, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("factor", [1.2, INFINITE])
def test_forced_blocks(by_unions, factor, forced):
    """Without local blocks a query need not choose its own. Tiles of 32 queries lie across up to
    three blocks of 16."""
    if forced not in ((0, 0), (2, 2)):
        on_a_gpu_only(BACKEND, "triton_kv_major")
    go, found = by_unions
    go(factor)
    check_forward(alike(LENGTHS, sum(forced) + 2, 16, *forced, change=0.05), 1, Blocks(16, *forced))
    assert found[0][0] > 0


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 60_000])
def test_a_small_workspace_does_not_show(by_unions, workspace_bytes):
    """The others are done in ranges of queries; as many tiles go by unions as with a large one."""
    if workspace_bytes != 20_000:
        on_a_gpu_only(BACKEND, "triton_kv_major")
    go, found = by_unions
    go(1.0, union_m=8)
    indices = alike(LENGTHS, 6, 16, 1, 1)
    small = check_forward(indices, 2, Blocks(16, 1, 1), workspace_bytes=workspace_bytes)
    large = check_forward(indices, 2, Blocks(16, 1, 1))
    assert len(found) == 4
    assert len({*found}) == 1
    assert 0 < found[0][0] < found[0][1]
    assert all(torch.equal(x, y) for x, y in zip(small, large, strict=True))


def test_counts(by_unions):
    go, found = by_unions
    go(1.5, union_m=8)
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(-1, 7, (sum(LENGTHS), HEADS), generator=generator, dtype=torch.int32)
    check_forward(alike(LENGTHS, 4, 16, 0, 0), 1, Blocks(16, 0, 0), counts=counts)
    assert 0 < found[0][0] < found[0][1]


def test_steps_of_less_than_a_block(by_unions):
    go, found = by_unions
    go(2.0, union_keys=16)
    check_forward(alike(LENGTHS, 3, 64, 0, 1), 2, Blocks(64, 0, 1))
    assert found[0][0] > 0


@pytest.mark.parametrize("factor", [2.0, INFINITE])
@pytest.mark.parametrize("entries", [(0, 0), (1, 2), (2, 0, 4, 1), (0, 1, 3, 9)], ids=str)
def test_hostile_indices(by_unions, entries, factor):
    """Against the oracle, forward and backward, with guards around everything."""
    go, found = by_unions
    go(factor, union_m=8)
    hostile.check(BACKEND, hostile.indices_of(*entries))
    ascends = sorted(set(entries)) == [*entries]
    assert (found[0][0] > 0) == ascends


def test_nothing_valid(by_unions):
    """Output 0 and lse -inf of tiles whose unions are empty."""
    go, found = by_unions
    go(2.0)
    o, lse, _ = hostile.check(BACKEND, hostile.indices_of(-1, -1))
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    assert found[0][0] == found[0][1]


@pytest.mark.parametrize("workspace_bytes", [1, 2**30])
@pytest.mark.parametrize("group_size", [1, 4])
def test_chunks_after_their_pasts(by_unions, group_size, workspace_bytes):
    """Forward and backward over a cache with NaN where it is not in use."""
    if workspace_bytes == 1:
        on_a_gpu_only(BACKEND, "triton_kv_major")
    go, found = by_unions
    go(3.0, union_m=8)
    chunk = cached.make_chunk(group_size, (1, 2), free=2)
    indices = torch.where(chunk.block_indices < 0, 1 << 20, chunk.block_indices).sort(-1).values
    repeated = torch.nn.functional.pad(indices[..., 1:] == indices[..., :-1], (1, 0))
    indices = torch.where(repeated, 1 << 20, indices).sort(-1).values
    cached.check(
        BACKEND, dataclasses.replace(chunk, block_indices=indices), workspace_bytes=workspace_bytes
    )
    if workspace_bytes > 1:
        assert found[0][0] > 0


def test_rows_that_are_not_in_use(by_unions):
    """Queries in the rows of the keys, of which those behind the ones in use see nothing."""
    go, found = by_unions
    go(3.0, union_m=8)
    lengths, used = (40, 33), torch.tensor([23, 0], dtype=torch.int32, device=DEVICE)
    q, k = (torch.randn(73, heads, 16, device=DEVICE) for heads in (4, HEADS))
    for start, stop in ((23, 40), (40, 73)):
        q[start:stop] = k[start:stop] = torch.nan
    indices = alike(lengths, 3, 16, 1, 1).to(DEVICE)
    arguments = dict(cu_seqlens=starts(lengths), max_seqlen=40, seqused_k=used, return_lse=True)
    arguments |= dict(block_size=16, init_blocks=1, local_blocks=1)
    with torch.no_grad():
        results = [
            ops.selected_attention(q, k, k, indices, backend=backend, **arguments)
            for backend in (BACKEND, "reference")
        ]
    for found_one, expected in zip(*results, strict=True):
        torch.testing.assert_close(found_one, expected, rtol=1e-5, atol=1e-5)
    assert found[0][0] > 0


def test_a_sequence_alone_and_among_others(by_unions):
    """Tiles begin with their sequences, so that the same ones go by their unions."""
    go, _ = by_unions
    go(1.5)
    dtype, _ = widest_dtype(BACKEND)
    indices = alike(LENGTHS, 5, 16, 1, 1).to(DEVICE)
    q, k, v = (torch.randn(sum(LENGTHS), h, 16, device=DEVICE, dtype=dtype) for h in (4, 2, 2))
    arguments = dict(block_size=16, init_blocks=1, local_blocks=1, backend=BACKEND)
    with torch.no_grad():
        packed = ops.selected_attention(q, k, v, indices, starts(LENGTHS), 101, **arguments)
        for b in (0, 2, 3):
            rows = slice(sum(LENGTHS[:b]), sum(LENGTHS[: b + 1]))
            tensors, ends = [x[rows] for x in (q, k, v, indices)], starts(LENGTHS[b : b + 1])
            alone = ops.selected_attention(*tensors, ends, LENGTHS[b], **arguments)
            assert torch.equal(alone, packed[rows]), b


def test_what_neighbours_chose_does_not_show(by_unions):
    """A query gets the same bits whatever the other queries of its tile chose."""
    go, found = by_unions
    go(INFINITE)
    lengths, dtype = (96,), widest_dtype(BACKEND)[0]
    indices = alike(lengths, 4, 16, 1, 1)
    other = alike(lengths, 4, 16, 1, 1, change=1.0, seed=1)
    other[::3] = indices[::3]
    q, k, v = (torch.randn(96, h, 16, device=DEVICE, dtype=dtype) for h in (4, 2, 2))
    arguments = dict(block_size=16, init_blocks=1, local_blocks=1, backend=BACKEND)
    with torch.no_grad():
        a, b = (
            ops.selected_attention(q, k, v, x.to(DEVICE), starts(lengths), 96, **arguments)
            for x in (indices, other)
        )
    assert torch.equal(a[::3], b[::3])
    assert not torch.equal(a, b)
    assert all(going == number for going, number in found)
