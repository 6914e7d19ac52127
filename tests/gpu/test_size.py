"""Row 10 of reliability.md: more than 2^31 elements, and a million tokens.
Samples are judged in float64.
"""

import dataclasses

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall
from nsa_fsa.sequences import Sequences
from tests.gpu.problems import BACKENDS, check_samples, make_problem, random_selection, starts

pytestmark = pytest.mark.gpu

GIB = 2**30


def needs(gib):
    """Skips unless the GPU has that much memory; one worker runs all of these tests,
    since no two of them fit at once.
    """
    total = (
        torch.cuda.get_device_properties("cuda").total_memory if torch.cuda.is_available() else 0
    )
    skips = pytest.mark.skipif(total < gib * GIB, reason=f"needs a GPU with {gib} GiB of memory")
    return lambda test: pytest.mark.xdist_group("memory")(skips(test))


def sampled_rows(lengths, number):
    """First, last and random rows of the sequences."""
    ends = torch.tensor(lengths).cumsum(0)
    rows = {0, 1, *(int(end) - 1 for end in ends), *(int(end) for end in ends[:-1])}
    return sorted(rows | set(torch.randint(int(ends[-1]), (number,)).tolist()))


def sampled_keys(rows, num_kv_heads):
    """(row, KV head): the sampled rows with a head each, the first and the last head among them."""
    heads = torch.randint(num_kv_heads, (len(rows),)).tolist()
    return [(rows[0], 0), (rows[-1], num_kv_heads - 1), *zip(rows, heads, strict=True)]


@needs(90)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(256, 1), (64, 4)], ids=["G1", "G4"])
@pytest.mark.parametrize(
    ("backend", "workspace_bytes"),
    [("triton_kv_major", 2 * GIB), ("triton_kv_major", 12 * GIB), ("triton_query_major", 2 * GIB)],
    ids=["kv_major", "kv_major_12_gib", "query_major"],
)
def test_offsets_past_2_31(backend, workspace_bytes, num_kv_heads, group_size):
    """q, o and their gradients, and with 12 GiB the partial results too,
    have more elements than an int32 counts.
    """
    lengths = (41_000, 0, 29_000)
    p = make_problem(lengths, num_kv_heads, group_size)
    assert p.q.numel() > 2**31
    rows = sampled_rows(lengths, 24)
    check_samples(
        p, p.run(backend, workspace_bytes=workspace_bytes), rows, sampled_keys(rows, num_kv_heads)
    )


def head_major(x):
    """The same numbers, laid out head by head: `[heads, T, D]` in memory."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(x.requires_grad)


HEAD_MAJOR = (150_000, 0, 120_000)  # x 64 heads x 128: the offset of the last head is past 2^31


@needs(70)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(64, 1), (4, 16)], ids=["G1", "G16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_heads_past_2_31(backend, num_kv_heads, group_size):
    p = make_problem(HEAD_MAJOR, num_kv_heads, group_size)
    p = dataclasses.replace(
        p, **{name: head_major(getattr(p, name)) for name in ("q", "k", "v", "do")}
    )
    assert p.q.stride(1) * 63 > 2**31
    rows = sampled_rows(HEAD_MAJOR, 24)
    check_samples(p, p.run(backend), rows, sampled_keys(rows, num_kv_heads))


@needs(70)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(64, 1), (4, 16)], ids=["G1", "G16"])
def test_heads_past_2_31_are_no_other_heads(num_kv_heads, group_size, deterministic_only):
    """Compressed attention, selection and gates get bit by bit what they get of tensors laid out
    token by token.
    """
    layout, windows = (starts(HEAD_MAJOR), max(HEAD_MAJOR)), dict(kernel_size=32, kernel_stride=16)
    generator = torch.Generator("cuda").manual_seed(0)
    total, heads = sum(HEAD_MAJOR), num_kv_heads * group_size

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, do = randn(total, heads, 128).requires_grad_(), randn(total, heads, 128)
    k, v = (randn(total // 16, num_kv_heads, 128).requires_grad_() for _ in range(2))
    found = []
    for place in (lambda x: x, head_major):
        leaves = [place(x) for x in (q, k, v)]
        o, lse = ops.compressed_attention(
            *leaves, *layout, **windows, return_lse=True, backend="triton"
        )
        grads = torch.autograd.grad(o, leaves, place(do))
        indices = ops.select_blocks(
            leaves[0].detach(), leaves[1].detach(), lse, *layout, **windows, block_size=64,
            num_selected_blocks=8, backend="triton",
        )  # fmt: skip
        found.append([x.sum(0, dtype=torch.float64) for x in (o.detach(), lse, *grads)] + [indices])
        del o, lse, grads, leaves
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs(90)
@pytest.mark.parametrize(
    "lengths", [(2**20,), (700_000, 0, 2**20 - 700_000)], ids=["one", "packed"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_tokens(backend, lengths):
    p = make_problem(lengths, num_kv_heads=2, group_size=4)
    results = p.run(backend)
    for result in results:
        assert torch.isfinite(result).all()
    rows = sampled_rows(lengths, 24)
    check_samples(p, results, rows, sampled_keys(rows, 2))


# 65,536 blocks of 16 keys, more than an int16 numbers; and 130 heads with 2^31 indices and more
# between them.
@needs(90)
@pytest.mark.parametrize(("num_kv_heads", "block_size"), [(2, 16), (130, 64)])
def test_block_index_of_a_million_tokens(num_kv_heads, block_size):
    length, num_indices, init_blocks, local_blocks = 2**20, 16, 1, 2
    slots = num_indices - init_blocks - local_blocks
    generator = torch.Generator("cuda").manual_seed(0)
    indices = random_selection(
        (length,), num_kv_heads, block_size, num_indices, init_blocks, local_blocks, generator
    )
    sequences = Sequences(starts((length,)), length)
    blocks = Blocks(block_size, init_blocks, local_blocks)
    index = build_block_index(IndexCall(indices, None, sequences, blocks, WORKSPACE_BYTES))
    entries, first_entry, num_entries, num_sparse, _, _ = index
    own = torch.arange(length, device="cuda") // block_size
    num_blocks = length // block_size
    for head in sorted({0, num_kv_heads // 2, num_kv_heads - 1}):
        of_head = indices[:, head]
        for block in (1, 2, num_blocks // 2 - 1, num_blocks // 2, num_blocks - 4, num_blocks - 3):
            expected = (
                ((of_head == block).any(-1) & (block <= own - local_blocks)).nonzero().flatten()
            )
            first, count = int(first_entry[head, block]), int(num_entries[head, block])
            assert torch.equal(entries[head, first : first + count].long() // slots, expected), (
                head,
                block,
            )
        ordered = of_head.sort(-1).values
        repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        sparse = (ordered >= init_blocks) & (ordered <= (own - local_blocks)[:, None]) & ~repeated
        assert torch.equal(num_sparse[head] & 0x7FFFFFFF, sparse.sum(-1).int()), head
        assert (num_sparse[head] < 0).all(), "every query chose its own block"
