"""What is decoded step by step is what the whole sequence gives, from pages in any order that hold
NaN wherever no token was written."""

import dataclasses

import pytest
import torch

from nsa_fsa.decode import Pages, Pooling, append_tokens, nsa_decode
from nsa_fsa.decode.call import AppendCall, DecodeCall
from nsa_fsa.decode.operator import DECODE
from nsa_fsa.decode.overlap import overlap
from nsa_fsa.decode.paged import pitch_of
from nsa_fsa.ops.common import triton_backends
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.ops.common.registration import Signature
from tests.decode.problems import NAN, Problem, Run, angles, small_shares

BACKENDS = ("triton", "reference")
MEAN = dict(rotary_dim=0, logits=False, embedding=False)  # of keys as they are
PROBLEMS = {
    "as it comes": Problem(),
    "one page": Problem(page_size=0),
    "several new": Problem(num_new=3, group_size=3, lengths=(0, 33, 61), gates="shared"),
    "most new": Problem(num_new=16, num_kv_heads=1, lengths=(7, 48), group_size=1),
    "widths": Problem(head_dim=24, v_head_dim=40, rotary_dim=24, lengths=(70,)),
    "mean": Problem(**MEAN, lengths=(15, 90)),
    "no forced": Problem(init_blocks=0, local_blocks=0, lengths=(100,), num_selected_blocks=2),
    "only forced": Problem(init_blocks=2, local_blocks=2, lengths=(100,)),
    "hops": Problem(
        kernel_size=12,
        kernel_stride=4,
        block_size=12,
        page_size=24,
        lengths=(83, 11),
        local_blocks=2,
    ),
    "blocks of one window": Problem(
        kernel_size=16, kernel_stride=16, block_size=16, lengths=(95, 160), num_selected_blocks=3
    ),
    "many lists": Problem(lengths=(700,), num_kv_heads=1, num_selected_blocks=5),
    "lists of lists": Problem(lengths=(1100,), num_kv_heads=1, num_selected_blocks=6),
    "dense below": Problem(dense_below=70, lengths=(0, 20, 69, 97)),
    "dense below, several new": Problem(dense_below=50, num_new=4, lengths=(48, 60), page_size=0),
    "all dense": Problem(dense_below=2**40, lengths=(5, 97), num_new=2),
    "wide window": Problem(lengths=(3, 60), window_size=2**31),
}


@pytest.fixture(autouse=True)
def shares(monkeypatch):
    small_shares(monkeypatch)


def assert_as_the_whole(run, found, which=None):
    new = run.problem.num_new
    for b in range(len(run.sequences)) if which is None else which:
        rows = slice(b * new, (b + 1) * new)
        o, blocks = run.whole(b)
        assert torch.equal(found.block_indices[rows], blocks[-new:]), b
        torch.testing.assert_close(found.o[rows].double(), o[-new:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_whole_sequence(name, backend):
    run = Run(PROBLEMS[name], backend)
    for _ in range(2):
        assert_as_the_whole(run, run.step())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_of_fewer_tokens_than_are_new(backend):
    """The last ones count, and what the others give is 0."""
    run = Run(Problem(lengths=(3,), num_new=4), backend)
    of_sequence = (getattr(run.sequences[0], x) for x in ("q", "gate_logits", "k", "v"))
    q, gates, k, v = (torch.cat((torch.full_like(x[:1], NAN), x[:3])) for x in of_sequence)
    run.write(k, v, run.pages, run.lengths)
    settings = dict(**run.problem.windows, **run.problem.selection, backend=backend)
    found = nsa_decode(q, gates, run.pages, run.lengths, **settings)
    o, blocks = run.whole(0)
    torch.testing.assert_close(found.o[1:].double(), o, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.block_indices[1:], blocks)
    assert (found.o[0] == 0).all()
    assert (found.block_indices[0] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_below_zero(backend):
    """The first new token sees no window of the last share, so that its weights there are 0, beside
    a sum that is almost 0."""
    problem = Problem(
        lengths=(270,), num_new=2, num_selected_blocks=2, init_blocks=0, local_blocks=0, **MEAN
    )
    run = Run(problem, backend)
    run.sequences[0].q.fill_(1.0)
    run.sequences[0].k.mul_(0.3).sub_(30.0)[248:264] += 0.5  # a window that ends in the last block
    run.append(run.pages, [0], 0, run.lengths, 270)
    found = run.step()
    o, blocks = run.whole(0)
    assert torch.equal(found.block_indices, blocks[-2:])
    torch.testing.assert_close(found.o.double(), o[-2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_tables_may_have_any_strides(backend):
    whole, run = (Run(Problem(), backend) for _ in range(2))
    run.pages = run.pages._replace(table=run.pages.table.T.contiguous().T)
    run.lengths = torch.stack((run.lengths, run.lengths * 0), 1)[:, 0]
    found, expected = run.step(), whole.step()
    assert torch.equal(found.o, expected.o)
    assert torch.equal(found.block_indices, expected.block_indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_that_rest(backend):
    """They get 0, and nothing is read or written for them."""
    run = Run(Problem(lengths=(40, 50, 33)), backend)
    before = [x.clone() for x in run.pages[:4]]
    found = run.step(which=[1])
    assert_as_the_whole(run, found, which=[1])
    for rows in (slice(0, 1), slice(2, 3)):
        assert (found.o[rows] == 0).all()
        assert (found.block_indices[rows] == -1).all()
    own = run.pages.table[1].long()
    others = [i for i in range(run.pages.k.shape[0]) if i not in own.tolist()]
    for x, y in zip(before, run.pages[:4], strict=True):
        assert torch.equal(x[others].isnan(), y[others].isnan())
        assert torch.equal(x[others].nan_to_num(), y[others].nan_to_num())
    assert_as_the_whole(run, run.step(which=[0, 2]), which=[0, 2])


def test_neither_neighbours_nor_pages_matter():
    """To the last bit, also where the table has room for a neighbour ten times as long."""
    whole = Run(Problem(), "triton").step()
    for b in range(4):
        run = Run(Problem(), "triton")
        table = run.pages.table[b : b + 1]
        one, sequence, length = run.pages._replace(table=table), run.sequences[b], run.lengths[b]
        stop = int(length) + 1
        rows = slice(stop - 1, stop)
        run.append(one, [b], stop - 1, length[None] + 1, 1)
        found = nsa_decode(
            sequence.q[rows],
            sequence.gate_logits[rows],
            one,
            length[None] + 1,
            **run.problem.windows,
            **run.problem.selection,
            backend="triton",
        )
        assert torch.equal(found.o, whole.o[b : b + 1])
    wide = Run(Problem(), "triton")
    room = wide.pages.table.new_zeros(4, 40)
    wide.pages = wide.pages._replace(table=torch.cat((wide.pages.table, room), 1))
    for other in (
        Run(Problem(), "triton", page_order=torch.arange(16).flip(0)),
        Run(Problem(page_size=0), "triton"),
        wide,
    ):
        assert torch.equal(other.step().o, whole.o)


def test_pages_of_a_prefix_can_be_shared():
    """Compressed tokens that reach past a page lie in the page where they end."""
    problem = Problem(lengths=(64, 64), page_size=32)
    run = Run(problem, "triton", num_steps=10)
    first, second = run.sequences
    second.k[:64], second.v[:64] = first.k[:64], first.v[:64]
    run.pages.table[1, :2] = run.pages.table[0, :2]  # the first two pages are the other's
    for _ in range(10):
        found = run.step()
    assert_as_the_whole(run, found)


def test_tokens_are_taken_back_by_a_shorter_length():
    """And others written in their place, with the compressed tokens that they complete."""
    run = Run(Problem(lengths=(40, 97)), "triton", num_steps=12)
    for _ in range(10):
        run.step()
    run.lengths -= 9
    for sequence, length in zip(run.sequences, run.lengths.tolist(), strict=True):
        for x in vars(sequence).values():
            x[length:] = x[length:].roll(1, 0)
    for _ in range(9):
        found = run.step()
    assert_as_the_whole(run, found)


def test_what_others_compress_is_left_to_them():
    run = Run(Problem(lengths=(31, 40)), "triton")
    before = run.pages.k_cmp.clone(), run.pages.v_cmp.clone()
    k, v = (torch.cat([getattr(x, n)[-1:] for x in run.sequences]) for n in ("k", "v"))
    append_tokens(
        k, v, run.pages, run.lengths + 1, **run.problem.windows, compress=False, backend="triton"
    )
    for x, y in zip(before, (run.pages.k_cmp, run.pages.v_cmp), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_may_lie_elsewhere_than_compressed_ones(backend):
    """Every token in a page of its own, in any order, written by somebody else."""
    run = Run(Problem(lengths=(39, 95), page_size=0), backend)
    whole = run.step()
    k, v, k_cmp, v_cmp, table, _ = run.pages
    number, heads, rows = k.shape[:3]
    column = torch.stack([torch.randperm(rows) for _ in range(number)]).to(k.device)
    at = torch.arange(number, device=k.device)[:, None]
    moved = [torch.empty_like(x) for x in (k, v)]
    for x, y in zip((k, v), moved, strict=True):
        y[at, :, column] = x[at, :, torch.arange(rows, device=k.device)]
    pages = [
        y.as_strided(
            (number * heads * rows - (heads - 1) * rows, heads, 1, y.shape[3]),
            (y.shape[3], rows * y.shape[3], y.shape[3], 1),
        )
        for y in moved
    ]
    states, page = [x.clone() for x in (k_cmp, v_cmp)], table.long()[:, 0]
    of_last = (run.lengths // run.problem.kernel_stride - 1).long()  # what the step has made
    for x in states:
        x[page, :, of_last] = NAN
    place = (table * heads * rows + column[page]).int()
    apart = Pages(*pages, *states, place, table)
    p, pairs = run.problem, [*zip(run.sequences, run.lengths.tolist(), strict=True)]
    new_k, new_v, q, gates = (
        torch.cat([getattr(x, name)[end - 1 : end] for x, end in pairs])
        for name in ("k", "v", "q", "gate_logits")
    )
    cos, sin = (x[run.lengths.long() - 1].float() for x in angles(p, int(run.lengths.max())))
    append_tokens(
        new_k,
        new_v,
        apart,
        run.lengths,
        **p.windows,
        pool_k=run.pool_k,
        pool_v=run.pool_v,
        turn=run.turn,
        rotation=(cos, sin),
        write=False,
        backend=backend,
    )
    found = nsa_decode(q, gates, apart, run.lengths, **p.windows, **p.selection, backend=backend)
    assert torch.equal(found.block_indices, whole.block_indices)
    torch.testing.assert_close(found.o, whole.o)


def padded(x):
    """The same pages, which lie a few elements further apart than their rows ask for."""
    rows = x[0].numel()
    wide = x.new_full((x.shape[0], rows + 6), NAN)
    wide[:, :rows] = x.flatten(1)
    return wide[:, :rows].unflatten(1, x.shape[1:])


@pytest.mark.parametrize("v_head_dim", [16, 24])
def test_pages_may_lie_anyhow(v_head_dim):
    """Keys and values in one buffer, or further apart than a number of rows: the same bits."""
    runs = [Run(Problem(v_head_dim=v_head_dim), "triton") for _ in range(3)]
    whole, combined, apart = runs
    k, v = combined.pages.k, combined.pages.v
    both = torch.cat((k, v), dim=-1)
    of_k, of_v = both[..., : k.shape[3]], both[..., k.shape[3] :]
    combined.pages = combined.pages._replace(k=of_k, v=of_v)
    apart.pages = Pages(*(padded(x) for x in apart.pages[:4]), *apart.pages[4:])
    expected = whole.step()
    for run in (combined, apart):
        found = run.step()
        assert torch.equal(found.o, expected.o)
        assert torch.equal(found.block_indices, expected.block_indices)


def test_pages_that_cannot_be_counted_are_refused():
    pages = torch.empty(1, dtype=torch.bfloat16, device="meta")
    pages = pages.as_strided((2**20, 1, 64, 16), (2**20 + 1, 1024, 16, 1))
    with pytest.raises(ValueError, match=r"1048577 elements apart.*Fix: make the first a multiple"):
        pitch_of(pages)
    assert pitch_of(pages[: 2**10]) == 1
    rows = pages.as_strided((2**31, 1, 1, 16), (16, 16, 16, 1))
    assert pitch_of(rows) == 16
    with pytest.raises(ValueError, match="16 elements apart"):
        pitch_of(pages.as_strided((2**31 + 1, 1, 1, 16), (16, 16, 16, 1)))


# What torch.library sees


def call_of(run):
    p, number = run.problem, len(run.sequences)
    q, gates = (torch.cat([getattr(x, n)[:1] for x in run.sequences]) for n in ("q", "gate_logits"))
    assert q.shape[0] == number
    return (q, gates, run.pages, run.lengths), dict(**p.windows, **p.selection)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    run = Run(Problem(lengths=(40, 70)), backend)
    for x in run.pages[:4]:
        x.nan_to_num_(0.0)  # opcheck compares what comes before and after, and NaN differs
    (q, gates, pages, lengths), _settings = call_of(run)
    p = run.problem
    windows = Windows(p.kernel_size, p.kernel_stride)
    blocks = Blocks(p.block_size, p.init_blocks, p.local_blocks)
    call = DecodeCall(
        q,
        gates,
        pages,
        lengths,
        p.scale,
        windows,
        blocks,
        p.num_selected_blocks,
        p.window_size,
        p.dense_below,
        backend,
    )
    torch.library.opcheck(torch.ops.nsa_fsa.nsa_decode.default, DECODE.call.flatten(call))
    k, v = run.sequences[0].k[:2], run.sequences[0].v[:2]
    rotation = torch.rand(2, 2, p.rotary_dim, device=p.device).unbind(0)
    append = AppendCall(
        k, v, pages, lengths, *run.pool_k, *run.pool_v, run.turn, *rotation, windows, 1, 1, backend
    )
    row = Signature(AppendCall).flatten(append)
    torch.library.opcheck(torch.ops.nsa_fsa.append_tokens.default, row)
    row = Signature(AppendCall).flatten(dataclasses.replace(append, write=0))
    torch.library.opcheck(torch.ops.nsa_fsa.compress_tokens.default, row)


def test_a_step_compiles_to_one_graph():
    run = Run(Problem(lengths=(40, 70)), "reference")
    (q, gates, pages, lengths), settings = call_of(run)
    k, v = (torch.cat([getattr(x, n)[:1] for x in run.sequences]) for n in ("k", "v"))

    def step(q, gates, k, v, pages, lengths):
        append_tokens(k, v, pages, lengths, **run.problem.windows)
        return nsa_decode(q, gates, pages, lengths, **settings).o * 2

    copies = [Pages(*(x.clone() for x in pages[:5])) for _ in range(2)]
    expected = step(q, gates, k, v, copies[0], lengths)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(
        q, gates, k, v, copies[1], lengths
    )
    assert torch.equal(found, expected)
    for x, y in zip(copies[0][:5], copies[1][:5], strict=True):
        assert torch.equal(x.float().nan_to_num(7.0), y.float().nan_to_num(7.0))


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths=torch.ones(2)), "lengths is torch.float32"),
        (dict(lengths=torch.ones(3, dtype=torch.int32)), r"asks for int32 \[2\]"),
        (dict(lengths=[3, 4]), "lengths"),
        (dict(table=torch.zeros(2, 4)), "table is torch.float32"),
        (dict(k_cmp=torch.zeros(3, 2, 5, 16)), "k_cmp of the pages"),
        (dict(states=torch.zeros(3, 1, dtype=torch.int32)), "states has 3 rows and table 2"),
        (dict(states=torch.zeros(2, 1, dtype=torch.int32)), "4 states are too few"),
        (dict(v=torch.zeros(3, 1, 32, 16)), "v of the pages"),
        (dict(q=torch.zeros(3, 4, 16)), "q has shape"),
        (dict(q=torch.zeros(34, 4, 16), gate_logits=torch.zeros(34, 4, 3)), "16 at most"),
        (dict(q=torch.zeros(2, 0, 16), gate_logits=torch.zeros(2, 1, 3)), "q has shape"),
        (dict(k=torch.zeros(3, 2, 16)), "k of the pages has shape"),
        (dict(k=[1]), "k of the pages"),
        (
            dict(
                lengths=torch.zeros(0, dtype=torch.int32),
                table=torch.zeros(0, 2, dtype=torch.int32),
            ),
            "does not fit 0 sequences",
        ),
        (dict(q=torch.zeros(2, 4, 16, dtype=torch.float64)), "q has dtype torch.float64"),
        (dict(q=torch.zeros(2, 5, 16)), "KV heads"),
        (dict(gate_logits=torch.zeros(2, 3, 3)), "gate_logits has shape"),
        (dict(scale=NAN), "scale=nan"),
        (dict(backend="cuda"), "backend='cuda'"),
        (dict(window_size=0), "window_size=0"),
        (dict(kernel_stride=7), "kernel_size=16"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_is_refused(change, message):
    run = Run(Problem(lengths=(40, 70), device="cpu"), "reference")
    (q, gates, pages, lengths), settings = call_of(run)
    given = dict(q=q, gate_logits=gates, lengths=lengths, **settings)
    of_pages = {name: x for name, x in change.items() if name in Pages._fields}
    given |= {name: x for name, x in change.items() if name not in of_pages}
    with pytest.raises(ValueError, match=message):
        nsa_decode(pages=pages._replace(**of_pages), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(2, 3, 16)), "k has shape"),
        (dict(v=torch.zeros(2, 2, 8)), "v has shape"),
        (dict(pool_k=Pooling(torch.zeros(2, 15))), "logits of pool_k"),
        (dict(pool_v=Pooling(None, torch.zeros(2, 16, 8))), "embedding of pool_v"),
        (dict(turn=torch.zeros(2, 16, 9)), "turn has shape"),
        (dict(turn=torch.zeros(16, 4)), "turn has shape"),
        (
            dict(turn=torch.zeros(2, 16, 4), pool_k=Pooling(None, torch.zeros(2, 16, 16))),
            "rotation is None",
        ),
        (dict(turn=torch.zeros(2, 16, 4), rotation=(torch.zeros(2, 4),) * 2), "cos of rotation"),
        (dict(backend="gluon"), "backend='gluon'"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_tokens_are_refused(change, message):
    run = Run(Problem(lengths=(40, 70), device="cpu"), "reference")
    before = [x.clone() for x in run.pages[:5]]
    given = dict(k=torch.zeros(2, 2, 16), v=torch.zeros(2, 2, 16)) | change
    with pytest.raises(ValueError, match=message):
        append_tokens(pages=run.pages, lengths=run.lengths, **run.problem.windows, **given)
    for x, y in zip(before, run.pages[:5], strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_pages_know_their_sizes():
    run = Run(dataclasses.replace(Problem(), page_size=16), "reference")
    assert run.pages.page_size == 16
    assert run.pages.capacity == 16 * run.pages.table.shape[1] >= 99


# What is extreme


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("times", [0.0, 30.0])
def test_extreme_scores(backend, times):
    """Of keys that are all equal the lower blocks are chosen; large scores overflow nothing."""
    run = Run(Problem(lengths=(120, 100), num_selected_blocks=5), backend)
    for sequence in run.sequences:
        sequence.q *= max(times, 1.0)
        sequence.k *= times
    for x in (run.pages.k, run.pages.k_cmp):
        x *= times
    run.pool_k = run.pool_k._replace(embedding=None)
    expected = Run(run.problem, "reference")
    expected.sequences, expected.pool_k = run.sequences, run.pool_k
    for x, y in zip(expected.pages[:4], run.pages[:4], strict=True):
        x.copy_(y)
    expected.pages = expected.pages._replace(table=run.pages.table.to(expected.lengths.device))
    found, wanted = run.step(), expected.step()
    assert found.o.isfinite().all()
    torch.testing.assert_close(found.o, wanted.o)
    assert torch.equal(found.block_indices, wanted.block_indices)
    if times == 0:
        assert (found.block_indices[..., :4] == torch.arange(4, device=found.o.device)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    """Blocks that there are are chosen all the same, and the other sequence gets what it got."""
    fine = Run(Problem(lengths=(120, 700)), backend).step()
    run = Run(Problem(lengths=(120, 700)), backend)
    run.sequences[1].q.fill_(NAN)
    found = run.step()
    assert torch.equal(found.o[0], fine.o[0])
    assert torch.equal(found.block_indices[0], fine.block_indices[0])
    assert found.o[1].isnan().all()
    chosen = found.block_indices[1]
    assert (chosen.diff() > 0).all()
    assert ((chosen >= 0) & (chosen <= 700 // 16)).all()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_kernels_overlap_on_gpus_that_can(capability):
    with triton_backends.assuming(capability):
        options = overlap(torch.device("cuda"))
        assert overlap(torch.device("cpu")) == {"OVERLAP": False}
    assert options["OVERLAP"] == options.get("launch_pdl", False) == (capability >= (9, 0))
