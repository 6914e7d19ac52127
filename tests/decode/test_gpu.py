"""Decoding's kernels on a GPU: against the reference, in CUDA graphs, and without waiting."""

import dataclasses

import pytest
import torch

from nsa_fsa.decode import Pages, append_tokens, launch, nsa_decode
from nsa_fsa.ops.common import replay
from tests.decode.problems import Problem, Run
from tests.on_gpu import assert_rms_close, needs, record, syncs_forbidden

pytestmark = pytest.mark.gpu
GPU = Problem(
    lengths=(0, 700, 3001), num_kv_heads=2, group_size=4, head_dim=128, v_head_dim=128,
    kernel_size=32, kernel_stride=16, block_size=64, num_selected_blocks=16, local_blocks=2,
    window_size=512, page_size=64, rotary_dim=128, scale=128**-0.5, dtype=torch.bfloat16,
    device="cuda",
)  # fmt: skip
PROBLEMS = {
    "bfloat16": GPU,
    "float16": dataclasses.replace(GPU, dtype=torch.float16, num_new=3, gates="shared"),
    "float32": dataclasses.replace(GPU, dtype=torch.float32, group_size=3),
    "one head": dataclasses.replace(GPU, group_size=1, num_new=16),
    "large group": dataclasses.replace(GPU, group_size=64, num_kv_heads=1, num_new=2),
    "narrow": dataclasses.replace(GPU, head_dim=64, v_head_dim=96, rotary_dim=32, scale=0.125),
    "wide": dataclasses.replace(GPU, head_dim=192, v_head_dim=256, page_size=0),
    "dense below": dataclasses.replace(GPU, dense_below=2000, num_new=2),
    "all dense": dataclasses.replace(GPU, dense_below=2**40, dtype=torch.float32),
    "blocks of 128": dataclasses.replace(GPU, block_size=128, num_selected_blocks=8),
    "small blocks": dataclasses.replace(
        GPU, block_size=16, kernel_size=16, page_size=128, num_selected_blocks=32
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_reference(name):
    """Of the same blocks; scores in 16 bits may tie, and then another is as good."""
    run, expected = (Run(PROBLEMS[name], x) for x in ("triton", "reference"))
    for x, y in zip(run.pages[:4], expected.pages[:4], strict=True):
        x.copy_(y)  # what a prompt leaves is the same
    for _ in range(2):
        found, wanted = run.step(), expected.step()
        alike = (found.block_indices == wanted.block_indices).flatten(1).all(1)
        assert alike.float().mean() > 0.95
        assert_rms_close("o", found.o[alike], wanted.o[alike], run.problem.dtype)
        assert not found.o.isnan().any()
        for x, y in zip(run.pages[:4], expected.pages[:4], strict=True):
            assert torch.equal(x.isnan(), y.isnan())
            assert_rms_close("pages", x.nan_to_num(), y.nan_to_num(), run.problem.dtype)


def inputs_of(run):
    p, number = run.problem, len(run.sequences)
    heads = p.num_kv_heads * p.group_size
    made = (p.normal(number, heads, p.head_dim), p.normal(number, heads, 3))
    return (
        *made,
        p.normal(number, p.num_kv_heads, p.head_dim),
        p.normal(number, p.num_kv_heads, p.v_head_dim),
    )


def step_of(run, q, gates, k, v, lengths):
    p = run.problem
    cos = torch.ones(len(lengths), p.rotary_dim, device="cuda")
    rotation = (cos, torch.zeros_like(cos))
    pooling = dict(pool_k=run.pool_k, pool_v=run.pool_v, turn=run.turn, rotation=rotation)

    def step():
        append_tokens(k, v, run.pages, lengths, **p.windows, **pooling)
        return nsa_decode(q, gates, run.pages, lengths, **p.windows, **p.selection)

    return step


@pytest.fixture
def several_lists(monkeypatch):
    """Several programs list the best of their blocks, and the last one to do so chooses."""
    original = launch.default_config

    def config(*arguments):
        return dataclasses.replace(original(*arguments), ranked=64)

    monkeypatch.setattr(launch, "default_config", config)
    monkeypatch.setattr(replay, "ENABLED", False)


@pytest.mark.parametrize("dense_below", [0, 715])
def test_a_graph_is_replayed_at_other_lengths(several_lists, dense_below):
    run = Run(dataclasses.replace(GPU, dense_below=dense_below), "triton", num_steps=40)
    for x in run.pages[:4]:
        x.nan_to_num_(1.0)  # the tokens that are skipped
    q, gates, k, v = inputs_of(run)
    lengths = run.lengths + 1
    step = step_of(run, q, gates, k, v, lengths)
    graph, found = record(step)
    for grown in (0, 1, 14, 15, 30):
        lengths.copy_(run.lengths + 1 + grown)
        graph.replay()
        replayed = [x.clone() for x in found]
        with syncs_forbidden():
            direct = step()
        assert torch.equal(replayed[0], direct.o)
        assert torch.equal(replayed[1], direct.block_indices)


def test_runs_have_the_same_bits(several_lists):
    run = Run(GPU, "triton")
    step = step_of(run, *inputs_of(run), run.lengths + 1)
    first, different = step(), torch.zeros((), dtype=torch.bool, device="cuda")
    graph, found = record(step)
    for _ in range(10_000):
        graph.replay()
        different |= (found.o != first.o).any() | (found.block_indices != first.block_indices).any()
    assert not different


def test_neighbours_do_not_matter(several_lists):
    """To the last bit, whatever their lengths are."""
    run = Run(GPU, "triton")
    q, gates, k, v = inputs_of(run)
    lengths = run.lengths + 1
    whole = step_of(run, q, gates, k, v, lengths)().o
    for b in range(3):
        one = Run(GPU, "triton")
        one.pages = one.pages._replace(table=one.pages.table[b : b + 1].contiguous())
        rows = slice(b, b + 1)
        alone = step_of(one, q[rows], gates[rows], k[rows], v[rows], lengths[rows].clone())().o
        assert torch.equal(alone, whole[rows])


@needs(24)
@pytest.mark.parametrize("by_head", [False, True])
def test_offsets_beyond_two_to_the_31(by_head):
    """Of pages at the end of buffers of more elements, by page or by head."""
    number, heads = (1 << 31) // (2 * 64 * 128) + 64, 2
    shape = (heads, number) if by_head else (number, heads)
    problem = dataclasses.replace(GPU, lengths=(700,), num_kv_heads=heads)
    small = Run(problem, "triton")
    table = small.pages.table.flatten().long()
    pages = []
    for x in small.pages[:4]:
        large = torch.empty(*shape, *x.shape[2:], dtype=x.dtype, device="cuda")
        large = large.transpose(0, 1) if by_head else large
        large[number - 1 - table] = x[table]
        pages.append(large)
    found = Run(problem, "triton")
    found.pages = Pages(*pages, number - 1 - small.pages.table)
    assert pages[0].untyped_storage().nbytes() // 2 > 1 << 31
    for _ in range(2):
        ours, expected = found.step(), small.step()
        assert torch.equal(ours.o, expected.o)
        assert torch.equal(ours.block_indices, expected.block_indices)


def test_more_sequences_than_a_grid_has_rows():
    """65,536 new tokens: CUDA's grids have no more in their last two axes."""
    number = 4096
    pages = Pages.empty(
        *(1, 64, 1, 16, 16, 16), torch.zeros(number, 1, dtype=torch.int32, device="cuda")
    )
    for x in pages[:4]:
        x.normal_()
    q = torch.randn(number * 16, 2, 16, device="cuda", dtype=torch.bfloat16)
    gates = torch.randn(number * 16, 2, 3, device="cuda")
    lengths = torch.full((number,), 60, dtype=torch.int32, device="cuda")
    settings = dict(
        kernel_size=16, kernel_stride=16, block_size=16, num_selected_blocks=3, window_size=20
    )
    whole = nsa_decode(q, gates, pages, lengths, **settings)
    last = pages._replace(table=pages.table[:1])
    one = nsa_decode(q[-16:], gates[-16:], last, lengths[:1], **settings)
    assert torch.equal(whole.o[-16:], one.o)


def test_a_million_tokens():
    """Of one KV head, whose choice takes lists of lists, against the reference."""
    length, page = 1 << 20, 64
    torch.manual_seed(0)
    table = torch.randperm(length // page, device="cuda").int()[None]
    pages = Pages.empty(length // page, page, 1, 128, 128, 16, table)
    for x in pages[:4]:
        x.normal_()
    q = torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16)
    gates = torch.randn(1, 64, 3, device="cuda")
    lengths = torch.tensor([length - 5], dtype=torch.int32, device="cuda")
    settings = dict(
        kernel_size=32, kernel_stride=16, block_size=64, num_selected_blocks=16, window_size=512
    )
    found, wanted = (
        nsa_decode(q, gates, pages, lengths, **settings, backend=x) for x in ("auto", "reference")
    )
    assert torch.equal(found.block_indices, wanted.block_indices)
    assert_rms_close("o", found.o, wanted.o)
