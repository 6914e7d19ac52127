"""fla's parallel_nsa against plain loops: which branches run, which blocks they read, gates,
batches and packed sequences.
"""

import inspect
import re
from itertools import accumulate, pairwise

import pytest
import torch
from torch.testing import assert_close

from nsa_fsa.compat import parallel_nsa
from nsa_fsa.ops.common.backends import Backend
from tests.cases import BACKENDS, CORE, prefer
from tests.compat.loops import EXACT, assert_same, attend, keys_of_blocks, leaves
from tests.wrong_values import (
    NO_BACKENDS,
    assert_refused,
    instead_of_int,
    instead_of_number,
    instead_of_tensor,
)

HKV, D, DV, BLOCK_SIZE, S = 2, 5, 3, 4, 3


def sequences_of(batch_size, num_queries, num_keys, cu_seqlens):
    """(batch row, query rows, key rows) of every sequence."""
    if cu_seqlens is None:
        return [(b, range(num_queries), range(num_keys)) for b in range(batch_size)]
    pairs = (cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens),)
    bounds = [[range(*pair) for pair in pairwise(x.tolist())] for x in pairs[0]]
    return [(0, queries, keys) for queries, keys in zip(*bounds, strict=True)]


def best_blocks(t, block_size, score):
    """Every block up to the query's own, best first: own, the one before, the first,
    then by score.
    """
    own = t // block_size
    forced = [j for j in dict.fromkeys((own, own - 1, 0)) if j >= 0]
    return forced + sorted(set(range(own)) - set(forced), key=lambda j: -score[j])


def oracle(
    q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64,
    window_size=0, scale=None, cu_seqlens=None,
):  # fmt: skip
    batch_size, num_queries, num_heads, width = q.shape
    num_keys = k.shape[1]
    group_size = q.shape[2] // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    rows = {}
    for b, queries, keys in sequences_of(batch_size, num_queries, num_keys, cu_seqlens):
        for n, row in enumerate(queries):
            t = len(keys) - len(queries) + n
            whole_blocks = [
                slice(keys.start + j, keys.start + j + block_size)
                for j in range(0, t + 2 - block_size, block_size)
            ]
            for kv in range(k.shape[2]):
                heads = range(kv * group_size, (kv + 1) * group_size)
                own_k, own_v = k[b, keys.start : keys.stop, kv], v[b, keys.start : keys.stop, kv]
                means = [
                    torch.stack([x[b, s, kv].mean(0) for s in whole_blocks] or [x[b, 0, kv]])
                    for x in (k, v)
                ]
                means = [x[: len(whole_blocks)] for x in means]
                compressed = [attend(q[b, row, h], *means, scale) for h in heads]
                count = (
                    int(block_counts[b, row, kv])
                    if isinstance(block_counts, torch.Tensor)
                    else block_counts
                )
                if block_indices is None:
                    score = sum(weights for _, weights in compressed).tolist()
                    chosen = best_blocks(t, block_size, score)[: max(0, count)]
                else:
                    chosen = block_indices[b, row, kv].tolist()
                    if isinstance(block_counts, torch.Tensor):
                        chosen = chosen[: max(0, count)]
                selected = keys_of_blocks(chosen, block_size, t)
                window = slice(max(0, t + 1 - window_size), t + 1)
                for h, (o_cmp, _) in zip(heads, compressed, strict=True):
                    o = attend(q[b, row, h], own_k[selected], own_v[selected], scale)[0]
                    o = o if g_slc is None else o * g_slc[b, row, h]
                    if g_cmp is not None:
                        o = o + o_cmp * g_cmp[b, row, h]
                    if window_size > 0:
                        o = (
                            o
                            + attend(q[b, row, h], own_k[window], own_v[window], scale)[0]
                            * g_swa[b, row, h]
                        )
                    rows[b, row, h] = o
    order = [
        (b, row, h)
        for b in range(batch_size)
        for row in range(num_queries)
        for h in range(num_heads)
    ]
    return torch.stack([rows[key] for key in order]).view(
        batch_size, num_queries, num_heads, v.shape[3]
    )


def boundaries(*lengths):
    return torch.tensor([*accumulate(lengths, initial=0)])


# A length of 0, two of less than a block, none a multiple of one.
PACKED = boundaries(9, 0, 3, 26, 1)
LAYOUTS = {
    "batch": dict(batch_size=2, num_queries=25, num_keys=25, cu_seqlens=None),
    "packed": dict(batch_size=1, num_queries=39, num_keys=39, cu_seqlens=PACKED),
    "last_queries": dict(batch_size=2, num_queries=5, num_keys=23, cu_seqlens=None),
    "packed_last_queries": dict(
        batch_size=1,
        num_queries=10,
        num_keys=39,
        cu_seqlens=(boundaries(1, 0, 3, 5, 1), boundaries(9, 0, 3, 26, 1)),
    ),
}


class Problem:
    """Random inputs for one layout; gates are any numbers, some of them 0 and 1."""

    def __init__(self, layout="batch", group_size=2):
        layout = LAYOUTS[layout]
        self.shape = (layout["batch_size"], layout["num_queries"])
        keys = (layout["batch_size"], layout["num_keys"], HKV)
        heads = (*self.shape, HKV * group_size)
        self.q, self.k, self.v, *gates = leaves(
            (*heads, D), (*keys, D), (*keys, DV), heads, heads, heads
        )
        with torch.no_grad():
            for g in gates:
                g.flatten()[::5], g.flatten()[1::5] = 0, 1
        self.gates = dict(zip(("g_cmp", "g_slc", "g_swa"), gates, strict=True))
        self.qkv = dict(q=self.q, k=self.k, v=self.v)
        self.inputs = (self.q, self.k, self.v, *gates)
        self.options = dict(block_size=BLOCK_SIZE, cu_seqlens=layout["cu_seqlens"])

    def indices(self, dtype=torch.int64):
        """Any S numbers from -1 up to past the last block: unsorted, repeated,
        some in the future.
        """
        return torch.randint(-1, 9, (*self.shape, HKV, S)).to(dtype)

    def counts(self, dtype=torch.int64):
        return torch.randint(-1, S + 3, (*self.shape, HKV)).to(dtype)

    def check(self, **arguments):
        arguments = self.qkv | self.options | arguments
        assert_same(parallel_nsa(**arguments), oracle(**arguments), self.inputs)


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
class TestAgainstLoops:
    """Output and gradients with respect to q, k, v and the gates."""

    def test_given_blocks(self, layout, group_size):
        """An int of block_counts says nothing about given indices."""
        x = Problem(layout, group_size)
        x.check(block_indices=x.indices(), block_counts=1, g_slc=x.gates["g_slc"], scale=0.3)

    def test_given_blocks_and_counts(self, layout, group_size):
        x = Problem(layout, group_size)
        gates = dict(g_slc=x.gates["g_slc"], g_swa=x.gates["g_swa"])
        x.check(
            block_indices=x.indices(torch.int32),
            block_counts=x.counts(torch.int32),
            window_size=6,
            **gates,
        )

    @pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
    def test_blocks_chosen_by_score(self, layout, group_size, count):
        x = Problem(layout, group_size)
        x.check(block_counts=count, window_size=3, scale=1.7, **x.gates)

    def test_blocks_chosen_by_score_and_counts(self, layout, group_size):
        x = Problem(layout, group_size)
        x.check(block_counts=x.counts(), **x.gates)

    def test_given_blocks_beside_compressed_attention(self, layout, group_size):
        x = Problem(layout, group_size)
        x.check(block_indices=x.indices(), window_size=1, **x.gates)


def test_without_gates_only_the_selected_branch():
    x = Problem()
    x.check(block_indices=x.indices())


def test_compressed_attention_without_a_gate_for_the_selected_branch():
    x = Problem()
    x.check(block_counts=2, g_cmp=x.gates["g_cmp"])


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(block_size):
    x = Problem("packed")
    x.options["block_size"] = block_size
    x.check(block_counts=4, window_size=50, **x.gates)


def test_the_gate_of_the_window_is_unused_without_a_window():
    x = Problem()
    indices = x.indices()
    o = parallel_nsa(**x.qkv, **x.options, block_indices=indices, g_swa=x.gates["g_swa"])
    assert torch.equal(o, parallel_nsa(**x.qkv, **x.options, block_indices=indices))


@pytest.mark.parametrize("count", range(1, 9))
def test_a_tensor_of_equal_counts_is_the_int(count):
    x = Problem("packed")
    counts = torch.full((*x.shape, HKV), count)
    o = [
        parallel_nsa(**x.qkv, **x.options, block_counts=c, g_cmp=x.gates["g_cmp"])
        for c in (count, counts)
    ]
    assert_close(*o, **EXACT)


@pytest.mark.parametrize(
    ("padding", "dtype"),
    [
        *((padding, torch.int32) for padding in (-(2**31), 25, 2**31 - 1)),
        *(
            (padding, torch.int64)
            for padding in (-1, -(2**63), 25, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
        ),
    ],
)
def test_padding(padding, dtype):
    """An int64 beyond int32 would wrap around to a block that exists."""
    x = Problem()
    indices = x.indices()
    padded = torch.where(indices < 0, padding, indices).to(dtype)
    given = padded.clone()
    o = parallel_nsa(**x.qkv, **x.options, block_indices=padded)
    assert torch.equal(o, parallel_nsa(**x.qkv, **x.options, block_indices=indices))
    assert torch.equal(padded, given), "the caller's indices were modified"


@pytest.mark.parametrize("count", [-(2**33), -1, 0])
@pytest.mark.parametrize("given", [True, False])
def test_nothing_selected_is_zero(count, given):
    x = Problem()
    counts = torch.full((*x.shape, HKV), count)
    chosen = (
        dict(block_indices=x.indices())
        if given
        else dict(g_cmp=torch.zeros(*x.gates["g_cmp"].shape))
    )
    o = parallel_nsa(**x.qkv, **x.options, block_counts=counts, **chosen)
    o.sum().backward()
    assert all(torch.equal(y, torch.zeros_like(y)) for y in (o, x.q.grad, x.k.grad, x.v.grad))


def test_arguments_and_their_order():
    """Calls written for fla pass any of these, by name or by place; only `backend` is ours."""
    parameters = inspect.signature(parallel_nsa).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == dict(
        **dict.fromkeys(("g_cmp", "g_slc", "g_swa", "block_indices")),  # None
        block_counts=16,
        block_size=64,
        window_size=0,
        scale=None,
        cu_seqlens=None,
        head_first=False,
        backend="auto",
    )
    assert [*parameters][:4] == ["q", "k", "v", "g_cmp"]
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == ["backend"]
    x = Problem("packed")
    names = (
        "q",
        "k",
        "v",
        "g_cmp",
        "g_slc",
        "g_swa",
        "block_indices",
        "block_counts",
        "block_size",
        "window_size",
        "scale",
    )
    values = (*x.qkv.values(), *x.gates.values(), x.indices(), x.counts(), BLOCK_SIZE, 6, 0.3)
    by_name = parallel_nsa(**dict(zip(names, values, strict=True)), cu_seqlens=PACKED)
    assert torch.equal(parallel_nsa(*values, PACKED), by_name)
    assert torch.equal(parallel_nsa(*values, PACKED.int(), False), by_name)


def test_transposed_inputs():
    """As they come from `[B, H, T, D]` by a transpose."""
    x = Problem()
    arguments = dict(block_counts=2, window_size=4, **x.options)
    tensors = x.qkv | x.gates
    strided = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in tensors.items()}
    assert not strided["q"].is_contiguous()
    assert torch.equal(parallel_nsa(**strided, **arguments), parallel_nsa(**tensors, **arguments))


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_low_precision(gate_dtype):
    """The output has q's dtype whatever the gates have; 0.005 is the bar of docs/reliability.md,
    row 1, for 16-bit.
    """
    x = Problem("packed")
    qkv = {name: y.detach().bfloat16() for name, y in x.qkv.items()}
    gates = {name: y.detach().to(gate_dtype) for name, y in x.gates.items()}
    arguments = dict(block_indices=x.indices(), window_size=6, **x.options)
    o = parallel_nsa(**qkv, **gates, **arguments)
    assert o.dtype == torch.bfloat16
    expected = oracle(**{name: y.double() for name, y in (qkv | gates).items()}, **arguments)
    assert (o.double() - expected).norm() <= 0.005 * expected.norm()


def test_gates_are_applied_in_float32_and_the_sum_is_rounded_once():
    x = Problem()
    qkv = {name: y.detach().bfloat16() for name, y in x.qkv.items()}
    gates = {name: y.detach().float() for name, y in x.gates.items()}
    arguments = dict(block_indices=x.indices(), window_size=6, **qkv, **x.options)
    zero, one = (dict.fromkeys(gates, torch.full_like(gates["g_slc"], value)) for value in (0, 1))
    branches = {
        name: parallel_nsa(**(zero | {name: one[name]}), **arguments).float() for name in gates
    }
    weighted = {name: o * gates[name][..., None] for name, o in branches.items()}
    expected = (weighted["g_slc"] + weighted["g_cmp"] + weighted["g_swa"]).bfloat16()
    assert torch.equal(parallel_nsa(**gates, **arguments), expected)


def test_no_positions():
    gate = torch.zeros(2, 0, 4)
    qkv = (torch.zeros(2, 0, 4, 8), torch.zeros(2, 0, 2, 8), torch.zeros(2, 0, 2, 3))
    for counts in (16, torch.zeros(2, 0, 2, dtype=torch.int64)):
        assert parallel_nsa(*qkv, gate, gate, gate, block_counts=counts, window_size=8).shape == (
            2,
            0,
            4,
            3,
        )


def test_gradcheck():
    shapes = ((1, 7, 2, 2), (1, 7, 1, 2), (1, 7, 1, 2), (1, 7, 2), (1, 7, 2), (1, 7, 2))
    cu_seqlens = torch.tensor([0, 2, 7])

    def function(*inputs):
        return parallel_nsa(
            *inputs, block_counts=2, block_size=2, window_size=2, cu_seqlens=cu_seqlens
        )

    assert torch.autograd.gradcheck(function, leaves(*shapes))


@pytest.mark.parametrize("layout", ["batch", "packed", "packed_last_queries"])
def test_compiles_without_a_graph_break(layout):
    """And so reads nothing back from the device: only a tensor of counts with a selection
    by score does.
    """
    x = Problem(layout)
    compiled = torch.compile(parallel_nsa, backend="eager", fullgraph=True)
    tensors = {name: y.detach() for name, y in (x.qkv | x.gates).items()}
    for chosen in (dict(block_counts=3), dict(block_indices=x.indices(), block_counts=x.counts())):
        arguments = dict(window_size=6, **tensors, **x.options, **chosen)
        assert torch.equal(compiled(**arguments), parallel_nsa(**arguments))


class Recorder(Backend):
    """Keeps what its operator was called with, and runs the reference."""

    name = "recorder"

    def __init__(self, operator):
        self.reference, self.call = BACKENDS[operator].by_name["reference"], None

    def forward(self, call):
        self.call = call
        return self.reference.forward(call)


def recorded(monkeypatch, arguments):
    """What each operator was called with, for a backend that all of them have."""
    recorders = {operator: Recorder(operator) for operator in OPERATORS}
    for operator, recorder in recorders.items():
        prefer(monkeypatch, operator, recorder)
    with torch.no_grad():
        parallel_nsa(**arguments, backend="recorder")
    return {operator: recorder.call for operator, recorder in recorders.items()}


OPERATORS = ("pool_windows", *CORE[:4])  # gates are multiplied by PyTorch


def test_the_backend_reaches_every_operator(monkeypatch):
    x = Problem()
    calls = recorded(
        monkeypatch, dict(block_counts=x.counts(), window_size=6, **x.qkv, **x.gates, **x.options)
    )
    assert all(call is not None for call in calls.values())


@pytest.mark.parametrize("count", [7, 2**40])
def test_counts_beyond_every_block_take_no_memory_of_their_own(count, monkeypatch):
    """The number of indices a query is bounded by the blocks of T keys,
    which is known without asking the device.
    """
    x = Problem("packed")
    calls = recorded(
        monkeypatch,
        x.qkv | x.gates | x.options | dict(block_counts=torch.full((*x.shape, HKV), count)),
    )
    assert calls["select_blocks"].num_selected_blocks == min(count, -(-x.shape[1] // BLOCK_SIZE))


@pytest.mark.parametrize(
    ("count", "promise"),
    [(1, (0, 1)), (2, (0, 2)), (3, (1, 2)), (16, (1, 2)), ("tensor", (0, 0)), ("given", (0, 0))],
)
def test_what_selected_attention_is_promised_is_true(count, promise, monkeypatch):
    """The reference does not use the promise of forced blocks, but faster backends read those
    blocks unasked.
    """
    x = Problem("packed")
    arguments = dict(
        block_counts=x.counts() if count == "tensor" else 16 if count == "given" else count
    )
    if count == "given":
        arguments["block_indices"] = x.indices()
    calls = recorded(monkeypatch, arguments | x.qkv | x.gates | x.options)
    selected = calls["selected_attention"]
    assert (selected.blocks.init_blocks, selected.blocks.local_blocks) == promise
    for start, stop in pairwise(PACKED.tolist()):
        for t in range(stop - start):
            eligible = range(t // BLOCK_SIZE + 1)
            forced = {*eligible[: promise[0]], *eligible[max(0, len(eligible) - promise[1]) :]}
            for kv in range(HKV):
                assert forced <= {*selected.block_indices[start + t, kv].tolist()}


B, T, HQ = 2, 8, 4
GATE = torch.zeros(B, T, HQ)
INDICES = torch.zeros(B, T, HKV, S, dtype=torch.int64)
GOOD = dict(
    q=torch.zeros(B, T, HQ, D),
    k=torch.zeros(B, T, HKV, D),
    v=torch.zeros(B, T, HKV, DV),
    **dict.fromkeys(("g_cmp", "g_slc", "g_swa"), GATE),
    block_indices=INDICES,
    block_size=BLOCK_SIZE,
    window_size=4,
)
ONE = {name: GOOD[name][:1] for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa", "block_indices")}
BAD = [
    (dict(head_first=True), r"head_first=True is not supported.*Fix"),
    (dict(q=torch.zeros(T, HQ, D)), rf"q has shape \({T}, {HQ}, {D}\); it must be \[B, T"),
    (dict(k=torch.zeros(T, HKV, D)), rf"k has shape \({T}, {HKV}, {D}\); it must be \[B, T"),
    (dict(v=torch.zeros(T, HKV, DV)), rf"v has shape \({T}, {HKV}, {DV}\); it must be \[B, T"),
    (dict(k=GOOD["k"].int()), r"k has dtype torch.int32"),
    (
        dict(k=torch.zeros(T, B, HKV, D), v=torch.zeros(T, B, HKV, DV)),
        rf"q, k and v have shapes .*\({T}, {B}, {HKV}, {D}\)",
    ),
    (dict(v=torch.zeros(T, B, HKV, DV)), rf"q, k and v have shapes .*\({T}, {B}, {HKV}, {DV}\)"),
    (dict(v=torch.zeros(B, T, 1, DV)), rf"q, k and v have shapes .*\({B}, {T}, 1, {DV}\)"),
    (dict(k=GOOD["k"][:, 1:], v=GOOD["v"][:, 1:]), rf"q has {T} positions and k has {T - 1}"),
    (dict(q=GOOD["q"].half()), r"k has dtype torch.float32 but q has torch.float16.*Fix"),
    (
        dict(q=torch.zeros(B, T, 3, D), g_cmp=None, g_slc=None, window_size=0, g_swa=None),
        r"q has 3 heads and k has 2",
    ),
    *(
        (dict([(name, torch.zeros(B, T, HKV))]), rf"{name} has shape .*\[B, TQ, HQ\]")
        for name in ("g_cmp", "g_slc", "g_swa")
    ),
    *(
        (dict([(name, GATE[..., None])]), rf"{name} has shape .*{HQ}, 1\).*\[B, TQ, HQ\]")
        for name in ("g_cmp", "g_slc", "g_swa")
    ),
    (dict(g_slc=GATE.int()), r"g_slc has dtype torch.int32"),
    (dict(g_swa=None), r"window_size=4 needs g_swa, which is None.*Fix"),
    (dict(window_size=-1), r"window_size=-1 must be an int >= 0"),
    (dict(window_size=4.0), r"window_size=4.0 must be an int >= 0"),
    (dict(block_size=0), r"block_size=0 must be an int >= 1"),
    (dict(g_cmp=None, block_indices=None), r"block_indices and g_cmp are both None.*Fix"),
    (
        dict(block_indices=INDICES[..., 0]),
        rf"block_indices has shape \({B}, {T}, {HKV}\); it must be \[B, TQ, HKV, S\]",
    ),
    (dict(block_indices=INDICES[:, :, :1]), rf"block_indices has shape \({B}, {T}, 1, {S}\)"),
    (
        dict(block_indices=INDICES.transpose(0, 1)),
        rf"block_indices has shape \({T}, {B}, {HKV}, {S}\)",
    ),
    (
        dict(block_indices=INDICES.float()),
        r"block_indices is torch.float32; it must be an int32 or int64",
    ),
    (
        dict(block_counts=INDICES[..., 0].transpose(0, 1)),
        rf"block_counts has shape \({T}, {B}, {HKV}\).*int or \[B, TQ, HKV\]",
    ),
    (
        dict(block_counts=INDICES[..., 0].float()),
        r"block_counts is torch.float32; it must be an int32 or int64",
    ),
    (dict(block_counts=0), r"block_counts=0 must be an int >= 1"),
    (dict(block_counts=None), r"block_counts=None must be an int >= 1"),
    (dict(cu_seqlens=torch.tensor([0, T])), rf"cu_seqlens needs B = 1, but q has B = {B}.*Fix"),
    (
        dict(**ONE, cu_seqlens=torch.tensor([0.0, T])),
        r"cu_seqlens is torch.float32; it must be an int32 or int64",
    ),
    (
        dict(**ONE, cu_seqlens=torch.tensor([0, T + 1])),
        rf"cu_seqlens=\[0, {T + 1}\] must rise from 0 to .*{T}",
    ),
    (
        dict(**ONE, cu_seqlens=(torch.tensor([0, T]), torch.tensor([0, 3, T]))),
        r"cu_seqlens_q has dtype .* shape \(2,\)",
    ),
    (
        dict(
            **{**ONE, "k": torch.zeros(1, 9, HKV, D), "v": torch.zeros(1, 9, HKV, DV)},
            cu_seqlens=torch.tensor([0, 9]),
        ),
        rf"q has {T} positions and k has 9, which one cu_seqlens cannot both describe.*Fix",
    ),
    (dict(backend="cudnn"), r"backend='cudnn' is not an implementation of"),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD, ids=[f"{n}-{message[:40]}" for n, (_, message) in enumerate(BAD)]
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        parallel_nsa(**{**GOOD, **changes})


def test_the_good_arguments_are_accepted():
    """Otherwise the table above would prove nothing."""
    assert parallel_nsa(**GOOD).shape == (B, T, HQ, DV)
    assert parallel_nsa(**{**GOOD, **ONE}, cu_seqlens=torch.tensor([0, 3, T])).shape == (
        1,
        T,
        HQ,
        DV,
    )


@pytest.mark.parametrize("name", inspect.signature(parallel_nsa).parameters)
def test_no_argument_fails_from_inside(name):
    one = {**GOOD, **ONE}
    cu_seqlens = torch.tensor([0, 3, T])
    values = {
        "block_size": instead_of_int(1),
        "window_size": instead_of_int(0),
        "scale": instead_of_number(),
        "backend": NO_BACKENDS,
        "head_first": [True, 1, "yes"],
        "cu_seqlens": [
            *instead_of_tensor(cu_seqlens, optional=True),
            (cu_seqlens,),
            (cu_seqlens, None),
            (cu_seqlens, [0, 3, T]),
            (cu_seqlens, cu_seqlens, cu_seqlens),
        ],
        "block_counts": [
            *instead_of_int(1)[:4],
            *instead_of_tensor(torch.ones(1, T, HKV, dtype=torch.int32))[6:],
            [8],
            None,
        ],
    }
    optional = name in ("g_cmp", "g_slc", "block_indices")
    for value in values.get(name) or instead_of_tensor(one[name], optional):
        assert_refused(lambda value=value: parallel_nsa(**{**one, name: value}), name, value)


def test_nothing_runs_before_everything_is_checked(monkeypatch):
    """Not even the pooling of keys, which comes first and would look at few of the arguments."""
    monkeypatch.setitem(
        parallel_nsa.__globals__, "pool_windows", lambda *_, **__: pytest.fail("ran")
    )
    for wrong in (
        dict(scale=float("nan")),
        dict(backend=None),
        dict(block_indices=INDICES.to("meta")),
        dict(g_slc=1.0),
    ):
        with pytest.raises(ValueError, match=r"must|Fix|allowed"):
            parallel_nsa(**{**GOOD, **wrong})
