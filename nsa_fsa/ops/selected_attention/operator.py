"""Selected attention as an operator.

`block_index` inverts the selection once; the KV-major kernels use it forward and backward,
so it is an operator of its own, whose result autograd saves like any other input.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_fsa.checks import check_ints, check_positive, check_tensor
from nsa_fsa.ops.common import profiler, triton_backends
from nsa_fsa.ops.common.attention_operator import (
    AttentionBackend,
    ReferenceBackend,
    define_attention,
)
from nsa_fsa.ops.common.backends import Backends
from nsa_fsa.ops.common.calls import (
    NOTHING,
    WORKSPACE_BYTES,
    AddTo,
    AttentionGradients,
    AttentionResult,
    Blocks,
    Softmax,
    check_attention,
    default_scale,
)
from nsa_fsa.ops.common.reference_attention import Chunk
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.common.sizes import aligned_rows
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors

# The operator's own calls, and its specification.
from nsa_fsa.ops.selected_attention.call import BlockIndex, IndexCall, SelectedCall, empty_index
from nsa_fsa.ops.selected_attention.reference import chunks
from nsa_fsa.sequences import Sequences

if TYPE_CHECKING:
    from nsa_fsa.ops.selected_attention.launch import Way

BLOCK_SIZES = (16, 32, 64, 128)
MAX_INDICES = 128
# Queries that follow a past go by blocks where sequences have so many of them or more on average.
# Not measured yet: of 256 queries with 13 sparse blocks each a tile of 64 pairs is full, at G = 1,
# where 52 blocks or fewer are chosen.
FEW_QUERIES = 256


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    block_counts: int | Tensor | None = None,
    init_blocks: int = 0,
    local_blocks: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Any:
    """Attention of every query over the keys of the blocks it selected (NSA paper, section 3.3.2;
    FSA paper, section 3).

    Query t of a group sees position p iff `p // block_size` is among its block indices
    and `p <= t`.

    Args:
        q: `[T, HQ, D]`, float16, bfloat16, float32 or float64; HQ is a multiple of HKV.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]` in q's dtype.
        block_indices: int32 `[T, HKV, T_sel]`, block numbers local to the sequence, in any order.
            An index that is negative or beyond the query's own block selects nothing; one that
            appears twice counts once.
        cu_seqlens: int32 `[B + 1]`; sequence b is rows `cu_seqlens[b] : cu_seqlens[b + 1]`.
        max_seqlen: an upper bound on the longest sequence.
        block_size: keys per block.
        block_counts: how many leading entries of block_indices count: an int, or int32 `[T, HKV]`;
            default all.
        init_blocks, local_blocks: the caller's promise that the first / last so many eligible
            blocks are among the indices of every query, as `select_blocks` guarantees; faster
            backends then treat them as dense.
        scale: softmax scale; default `D ** -0.5`.
        cu_seqlens_q, seqused_k: for queries that are only the last positions of their sequences;
            see `Sequences`.
        return_lse: also return the log-sum-exp.
        workspace_bytes: how much memory the KV-major kernels may take for partial results and, to
            make the block index, for a bitmap, at any length. Not counted are the index, which the
            backward needs again, and its entries once more in a forward before a backward; and what
            grows with the number of rows or blocks alone: 8 bytes a query and query head, and 3
            more for every 16 blocks that a query may choose, 16 a query and KV head, 36 a block and
            KV head, 2 to 4 a chosen block of every query and KV head while the index is made, and,
            of the sums of one head's dk and dv that a workspace needs in which its partial results
            do not fit, what is more than half of it.
        backend: which implementation runs: "triton_kv_major" (the loop order of FSA),
            "triton_query_major" (that of NSA), "triton" (whichever of their variants the profiler
            finds fastest on this GPU; that of NSA for few queries that follow a past), "reference",
            or "auto": "triton" on a GPU that can, and the reference elsewhere.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request the natural-log lse `[T, HQ]` in float32
        (float64 for float64 inputs), which is not differentiable. A query that sees nothing
        gets 0 and -inf.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sequence descriptors.
    """
    blocks = Blocks(block_size, init_blocks, local_blocks).check()
    check_positive(workspace_bytes=workspace_bytes)
    BACKENDS.check(backend)
    sequences = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    check_attention(q, k, v, sequences)
    sequences.check(q.device)
    scale = default_scale(q, scale)
    block_indices, counts = _check_selection(q, k, block_indices, block_counts)

    call = SelectedCall(
        q, k, v, sequences, scale, workspace_bytes, backend, blocks, block_indices, counts, None
    )
    o, lse = OPERATOR(with_index(call))
    return (o, lse) if return_lse else o


def _check_selection(
    q: Tensor, k: Tensor, block_indices: Tensor, block_counts: int | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The indices, cut to their number where that is one for all, and otherwise the numbers."""
    check_tensor("block_indices", block_indices, "int32 [T, HKV, T_sel]")
    rows, wanted = (q.shape[0], k.shape[1]), (torch.int32, q.device)
    shape, found = tuple(block_indices.shape), (block_indices.dtype, block_indices.device)
    if len(shape) != 3 or shape[:2] != rows or found != wanted:
        raise ValueError(
            f"block_indices is {block_indices.dtype} {shape} "
            f"on {block_indices.device}; it must be int32 [T, HKV, T_sel] = [{rows[0]}, "
            f"{rows[1]}, T_sel] on {q.device}. Fix: pass what select_blocks returns for this q."
        )

    if block_counts is None:
        return block_indices, None
    if isinstance(block_counts, int):
        check_ints(0, block_counts=block_counts)
        return block_indices[..., :block_counts], None
    check_tensor("block_counts", block_counts, "int32 [T, HKV], or an int")
    if block_counts.shape != rows or (block_counts.dtype, block_counts.device) != wanted:
        raise ValueError(
            f"block_counts is {block_counts.dtype} {tuple(block_counts.shape)} on "
            f"{block_counts.device}; it must be an int, or int32 [T, HKV] = {rows} on {q.device}."
        )
    return block_indices, block_counts


# The block index


def has_few_queries(call: SelectedCall) -> bool:
    """Whether queries that follow a past are so few that they go query by query: where few chose
    a block, a KV-major kernel loads its keys for tiles that are almost empty.
    """
    sequences = call.sequences
    if sequences.shares_rows:
        return False
    return call.q.shape[0] < FEW_QUERIES * (sequences.cu_seqlens.shape[0] - 1)


def wants_index(call: SelectedCall) -> bool:
    """Whether the backend will use a block index, as far as that can be told without
    running anything.

    "triton_query_major" would in backward, but has none to read forward, and makes its own.
    """
    chooses = call.backend == "triton" or (call.backend == "auto" and call.q.is_cuda)
    of_kv_major = call.backend == "triton_kv_major" or (chooses and not has_few_queries(call))
    if not of_kv_major or triton_backends.unavailable(call.device) is not None:
        return False
    return refuses_triton(call) is None


def with_index(call: SelectedCall) -> SelectedCall:
    """The call, with a block index where the backend will use one and a backward may come, which
    needs it, too. In inference a forward makes an index of those queries alone that need one."""
    if not torch.is_grad_enabled():
        return call
    return replace(call, index=INDEX_OPERATOR(IndexCall.of(call))) if wants_index(call) else call


def make_index(call: IndexCall) -> BlockIndex:
    """For every KV head and block the queries that chose it, by Triton."""
    from nsa_fsa.ops.selected_attention.block_index import build_block_index

    return build_block_index(call)


def _checked_index(call: IndexCall) -> BlockIndex:
    call.sequences.check_values(call.block_indices.shape[0], call.num_keys)
    return make_index(call)


def fake_index(call: IndexCall) -> BlockIndex:
    """Shapes and dtypes of a block index."""
    cu_seqlens, num_rows = call.sequences.cu_seqlens, call.block_indices.shape[0]
    num_blocks = call.num_keys // call.blocks.block_size + cu_seqlens.shape[0] - 1
    rows = aligned_rows(4, num_rows, dtype=torch.int32, device=cu_seqlens.device)
    blocks = aligned_rows(6, num_blocks, dtype=torch.int32, device=cu_seqlens.device)
    return empty_index(call, rows, blocks)


# Backends


def refuses_triton(call: SelectedCall) -> str | None:
    """Why neither loop order can run the forward of this call, or None."""
    if (reason := unsupported_tensors(call.q, call.v)) is not None:
        return reason
    if call.blocks.block_size not in BLOCK_SIZES:
        return f"block_size={call.blocks.block_size}; supported are {BLOCK_SIZES}"
    if (number := call.block_indices.shape[2]) > MAX_INDICES:
        return f"{number} block indices a query; supported are at most {MAX_INDICES}"
    if not call.scale > 0:
        return f"scale={call.scale}; it must be positive"
    return None


class SelectedTriton(TritonBackend[SelectedCall], AttentionBackend[SelectedCall]):
    """Whichever order and tiles the profiler finds fastest; without it the KV-major default, or
    query-major for few queries that follow a past."""

    def refuses(self, call: SelectedCall, *, backward: bool = False) -> str | None:
        return refuses_triton(call)

    def forward(self, call: SelectedCall) -> AttentionResult:
        ways = self.ways(call, "forward")
        return choose("forward", call, ways, methodcaller("forward", call)).forward(call)

    def backward(
        self, call: SelectedCall, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        ways = self.ways(call, "backward")
        if call.index is None:
            call = replace(call, index=make_index(IndexCall.of(call)))
        # Timed as they are; only the one that is taken may add to gradients.
        way = choose("backward", call, ways, methodcaller("backward", call, do, softmax, NOTHING))
        return way.backward(call, do, softmax, add_to)

    def ways(self, call: SelectedCall, direction: str) -> "Mapping[str, Way]":
        """The ways to run it that may be fastest, by name; the default comes first."""
        from nsa_fsa.ops.common import tuning
        from nsa_fsa.ops.selected_attention.launch import KVMajor, QueryMajor

        if has_few_queries(call):
            return {"query_major": QueryMajor()}
        configs = tuning.candidates(call.q, call.v, call.blocks.block_size, direction)
        return {
            **{name: KVMajor(config) for name, config in configs.items()},
            "query_major": QueryMajor(),
        }


class SelectedKVMajor(SelectedTriton):
    """The loop order of FSA with its default tiles, and so the same kernels in every process."""

    name = "triton_kv_major"

    def ways(self, call: SelectedCall, direction: str) -> "Mapping[str, Way]":
        from nsa_fsa.ops.common import tuning
        from nsa_fsa.ops.selected_attention.launch import KVMajor

        return {"kv_major": KVMajor(tuning.default_config(call.q, call.v, call.blocks.block_size))}


class SelectedQueryMajor(SelectedTriton):
    """The loop order of NSA."""

    name = "triton_query_major"

    def ways(self, call: SelectedCall, direction: str) -> "Mapping[str, Way]":
        from nsa_fsa.ops.selected_attention.launch import QueryMajor

        return {"query_major": QueryMajor()}


def choose(
    direction: str, call: SelectedCall, ways: "Mapping[str, Way]", run: Callable[..., Any]
) -> "Way":
    """The fastest of the ways for "forward" or "backward"; run: runs one of them."""
    name = next(iter(ways))
    if len(ways) > 1 and call.q.is_cuda and call.q.numel() > 0:
        from triton.errors import TritonError

        key = selected_key(call, direction)
        name = profiler.choose(key, ways, run, call.device, recoverable=(RuntimeError, TritonError))
    return ways[name]


def selected_key(call: SelectedCall, direction: str) -> str:
    """The kind of problem that the profiler remembers."""
    (block_size, init_blocks, local_blocks), num_indices = call.blocks, call.block_indices.shape[2]
    own = f"block={block_size} T_sel={num_indices} forced={init_blocks}+{local_blocks}"
    return profiler.problem_key("selected_attention", direction, call, own)


class Reference(ReferenceBackend[SelectedCall]):
    def chunks(self, call: SelectedCall) -> Iterator[Chunk]:
        rule = call.sequences._asdict() | call.blocks._asdict()
        return chunks(call.q, call.block_indices, block_counts=call.block_counts, **rule)


BACKENDS: Backends[SelectedCall] = Backends(
    "selected_attention", SelectedTriton(), SelectedKVMajor(), SelectedQueryMajor(), Reference()
)
OPERATOR = define_attention(BACKENDS, SelectedCall)
INDEX_OPERATOR = define_operator("block_index", IndexCall, BlockIndex, _checked_index, fake_index)
