"""workspace_bytes is what the kernels' host functions allocate at most,
at sizes that only a large GPU could run.

On tensors that have a shape and no memory, with kernels that are not launched.
"""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.ops.common import locate, softmax_statistics, tuning
from nsa_fsa.ops.common.calls import NOTHING, WORKSPACE_BYTES, Blocks, Softmax
from nsa_fsa.ops.selected_attention import (
    block_index,
    kv_major_backward,
    kv_major_forward,
    union_forward,
    unions,
    work,
)
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall, SelectedCall
from nsa_fsa.ops.selected_attention.launch import KVMajor
from nsa_fsa.sequences import Sequences

MIB = 2**20
BLOCKS = Blocks(block_size=64, init_blocks=1, local_blocks=2)
AS_ON_HOPPER = tuning.Config(bwd_keys=64)  # whole blocks


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made meanwhile had in use at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (
            torch.ops.aten.empty,
            torch.ops.aten.empty_strided,
            torch.ops.aten.new_empty,
        ):
            storage = result.untyped_storage()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, number):
        self.now -= number


@pytest.fixture
def no_launches(monkeypatch):
    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **keywords: None

    for module in (
        block_index,
        kv_major_forward,
        kv_major_backward,
        union_forward,
        unions,
        work,
        softmax_statistics,
        locate,
    ):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(tuning, "is_cramped", lambda x: False)


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def index_call(indices, cu_seqlens, max_seqlen, workspace_bytes=WORKSPACE_BYTES):
    sequences, num_keys = Sequences(cu_seqlens, max_seqlen), indices.shape[0]
    return IndexCall(indices, None, sequences, num_keys, BLOCKS, workspace_bytes)


def selected_call(q, k, index_of, workspace_bytes, index):
    """Selected attention of k as keys and values, as `index_of` says."""
    indices, sequences = index_of.block_indices, index_of.sequences
    return SelectedCall(
        q, k, k, sequences, 0.1, workspace_bytes, "triton", BLOCKS, indices, None, index
    )


def num_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize(
    ("tokens", "sequences", "num_kv_heads"),
    [(2**20, 1, 2), (1_600_000, 100_000, 2)],
    ids=["million", "short"],
)
def test_selected_attention_keeps_to_its_workspace(tokens, sequences, num_kv_heads):
    workspace_bytes = 256 * MIB
    q = new(tokens, num_kv_heads, 128)
    k = new(tokens, num_kv_heads, 128)
    lse = new(tokens, num_kv_heads, dtype=torch.float32)
    indices = new(tokens, num_kv_heads, 16, dtype=torch.int32)
    cu_seqlens = new(sequences + 1, dtype=torch.int32)
    longest, num_blocks = tokens // sequences, tokens // 64 + sequences
    # Grows with rows, or with blocks, alone.
    linear = 8 * tokens * num_kv_heads + 36 * num_blocks * num_kv_heads + 12 * tokens + 16 * MIB
    index_of = index_call(indices, cu_seqlens, longest, workspace_bytes)
    with Allocated() as of_index:
        index = build_block_index(index_of)
    table = 2 * tokens * num_kv_heads * 16  # the sparse blocks of every query
    assert of_index.peak <= num_bytes(index) + table + workspace_bytes + linear
    call = selected_call(q, k, index_of, workspace_bytes, index)
    way = KVMajor(tuning.default_config(q, k, 64))
    with Allocated() as forward:
        o = way.forward(call)
    assert forward.peak <= num_bytes(o) + workspace_bytes + linear, forward.peak / MIB
    with Allocated() as backward:
        grads = way.backward(call, q, Softmax(o.o, lse), NOTHING)
    sums = 4 * tokens * (128 + 128)  # of one head's dk and dv, where its partial results do not fit
    allowed = num_bytes(grads) + max(workspace_bytes, sums + workspace_bytes // 2) + linear
    assert backward.peak <= allowed, backward.peak / MIB


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("union_factor", [2.0, 3.0])
@pytest.mark.parametrize("tokens", [2**16, 2**20])
@pytest.mark.parametrize("indexed", [False, True])
def test_what_unions_take_grows_with_the_rows_alone(indexed, tokens, union_factor):
    """Lists of blocks, and before a backward the entries once more; neither depends on the
    workspace, which a tile would depend on then."""
    workspace_bytes, group_size = 256 * MIB, 4
    q, k = new(tokens, 4 * group_size, 128), new(tokens, 4, 128)
    indices, cu_seqlens = new(tokens, 4, 16, dtype=torch.int32), new(2, dtype=torch.int32)
    index_of = index_call(indices, cu_seqlens, tokens, workspace_bytes)
    index = build_block_index(index_of) if indexed else None
    call = selected_call(q, k, index_of, workspace_bytes, index)
    config = dataclasses.replace(tuning.default_config(q, k, 64), union_factor=union_factor)
    config = dataclasses.replace(config, union_m=128)
    found = unions.find_unions(call, config)
    lists = num_bytes([found.unions.blocks, found.unions.bits])
    assert lists == pytest.approx(8 * 16 * union_factor * tokens * 16 / 128, rel=0.001)
    entries = num_bytes([call.index.entries]) if indexed else 0
    with Allocated() as forward:
        o = KVMajor(config).forward(call)
    made = 0 if indexed else num_bytes(build_block_index(index_of)) + 2 * tokens * 4 * 16
    linear = (8 + 3) * tokens * 16 + 16 * tokens * 4 + 36 * tokens // 64 * 4 + 16 * MIB
    allowed = num_bytes(o) + workspace_bytes + entries + made + linear
    assert forward.peak <= allowed, (forward.peak / MIB, allowed / MIB)


@pytest.mark.usefixtures("no_launches")
def test_the_bitmap_does_not_grow_with_the_square_of_the_batch():
    """A block is chosen inside its own sequence alone: 8,192 of them once took 3.2 GB a head,
    cleared in six rounds.
    """
    tokens = 8192 * 128
    indices, cu_seqlens = new(tokens, 1, 16, dtype=torch.int32), new(8193, dtype=torch.int32)
    with Allocated() as of_index:
        index = build_block_index(index_call(indices, cu_seqlens, 128))
    table = 2 * tokens * 16  # the sparse blocks of every query
    assert of_index.peak <= num_bytes(index) + table + 2 * MIB


def units_of_launches(monkeypatch, tokens, num_kv_heads, workspace_bytes):
    """Of every launch of the plan's kernel, and of the backward's gather kernel."""
    found = {"plan_kernel": [], "gather_bwd_kernel": []}

    class Counting:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **keywords: found[self.name].append(grid[-1])

    monkeypatch.setattr(work, "plan_kernel", Counting("plan_kernel"))
    monkeypatch.setattr(kv_major_backward, "gather_bwd_kernel", Counting("gather_bwd_kernel"))
    q = new(tokens, 64, 128)
    k = new(tokens, num_kv_heads, 128)
    lse = new(tokens, 64, dtype=torch.float32)
    indices = new(tokens, num_kv_heads, 16, dtype=torch.int32)
    cu_seqlens = new(2, dtype=torch.int32)
    index_of = index_call(indices, cu_seqlens, tokens)
    call = selected_call(q, k, index_of, workspace_bytes, build_block_index(index_of))
    KVMajor(AS_ON_HOPPER).backward(call, q, Softmax(q, lse), NOTHING)
    return found.values()


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("num_kv_heads", [4, 16, 64])
def test_one_plan_serves_all_launches(monkeypatch, num_kv_heads):
    plans, gathers = units_of_launches(monkeypatch, 65_536, num_kv_heads, 2048 * MIB)
    assert len(gathers) > 4
    assert plans == [sum(gathers)]


@pytest.mark.usefixtures("no_launches")
def test_plans_are_cut_where_one_does_not_fit(monkeypatch):
    plans, gathers = units_of_launches(monkeypatch, 2**20, 64, 256 * MIB)
    assert sum(plans) == sum(gathers)
    assert 1 < len(plans) < len(gathers) / 8


@pytest.mark.usefixtures("no_launches")
def test_a_chunk_takes_memory_for_its_queries_and_not_for_the_past():
    """4,096 queries after 16 times as many keys: what grows are tables of blocks alone."""
    peaks = {}
    for num_keys in (2**16, 2**20):
        q, k = new(4096, 64, 128), new(num_keys, 4, 128)
        indices = new(4096, 4, 16, dtype=torch.int32)
        ends, used = new(2, dtype=torch.int32), new(1, dtype=torch.int32)
        sequences = Sequences(ends, num_keys, ends, used)
        shared = (BLOCKS, indices, None, None)
        call = SelectedCall(q, k, k, sequences, 0.1, WORKSPACE_BYTES, "triton", *shared)
        with Allocated() as found:
            call = dataclasses.replace(call, index=build_block_index(IndexCall.of(call)))
            KVMajor(tuning.default_config(q, k, 64)).forward(call)
        peaks[num_keys] = found.peak
    more_blocks = (2**20 - 2**16) // 64
    of_block = (6 + 2) * 4 * 4 + 5 * 4 + 4096 // 8  # plan and index, table, bits of the bitmap
    assert peaks[2**20] - peaks[2**16] <= more_blocks * of_block, peaks
