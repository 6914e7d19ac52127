"""Tiles that go by the unions of their blocks, for Hopper, in Gluon. The kernel of the same name
without `hopper` is its plain Triton twin, and says what is computed.

It is built as the forward of compressed attention (`hopper_forward.py` of windowed attention): a
loading warpgroup and two that compute 64 pairs each, with rings of buffers in between. A step is
two halves of 64 keys, whichever blocks they belong to, so that the softmax is rescaled once for 128
keys. Keys arrive by bulk copies, but for a sequence's last block if it is not full: where its rows
end, others may hold NaN, and zeros are read.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_fsa.ops.common.bundles import Heads, constants
from nsa_fsa.ops.common.hopper import gluon_kernel, thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_forward import (
    FEW_ROWS,
    LN_2,
    copy_windows,
    head_columns,
    load_query_tile,
    store_tile,
)
from nsa_fsa.ops.common.windowed_attention.hopper_layouts import allocate_tiles, product_layout
from nsa_fsa.ops.common.windowed_attention.hopper_pipelines import (
    EITHER_WAY,
    LOADER_WARPS,
    WARPGROUP_ROWS,
    Signal,
    gluon_object,
    new_query_ring,
    new_signal,
)
from nsa_fsa.ops.selected_attention.union_forward import load_neighbours

HALF = gl.constexpr(64)  # keys of half a step


class UnionRingTile(NamedTuple):
    """What the rings hold."""

    QUERIES: Any  # of a tile at most
    STAGES: Any  # of keys and values
    QUERY_STAGES: Any
    REGISTERS: Any  # a thread of the computing warpgroups


@gluon_object
class BlockRing:
    """Steps of keys and values, two halves each, which arrive apart and are free together."""

    k: gl.shared_memory_descriptor  # [2 * STAGES, HALF, D]
    v: gl.shared_memory_descriptor
    k_ready: Signal
    v_ready: Signal
    free: Signal

    @gluon.jit
    def half(self, use, nth):
        """The number of the buffer of a use's first or second half."""
        return 2 * (use % self.free.SIZE) + nth


@gluon.jit
def new_block_ring(STAGES: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr):
    k = allocate_tiles(dtype, 2 * STAGES, HALF, D)
    v = allocate_tiles(dtype, 2 * STAGES, HALF, D)
    k_ready, v_ready = new_signal(STAGES, EITHER_WAY), new_signal(STAGES, EITHER_WAY)
    return BlockRing(k, v, k_ready, v_ready, new_signal(STAGES, 2))


@gluon_object
class UnionWork:
    """The tiles, which the programs take in turn."""

    num_tiles: gl.tensor  # of a KV head
    capacity: gl.tensor
    num_heads: gl.tensor | gl.constexpr  # of q
    SHAPE: gl.constexpr
    QUERIES: gl.constexpr  # of a tile at most


@gluon.jit
def count_halves(tile, BLOCK_SIZE: gl.constexpr):
    """How many halves the blocks of a tile are, and how many steps."""
    halves = tile.num_blocks * (BLOCK_SIZE // HALF)
    return halves, gl.cdiv(halves, 2)


@gluon.jit
def place_of_half(tile, half, BLOCK_SIZE: gl.constexpr):
    """Where the block of a half stands; of halves behind the last, the last's."""
    return tile.place + gl.minimum(half // (BLOCK_SIZE // HALF), tile.num_blocks - 1)


@gluon.jit
def first_key_of_half(tile, unions, half, BLOCK_SIZE: gl.constexpr):
    """The position of the first key of a half; of one behind the last, of any in the last block."""
    block = gl.load(unions.blocks + place_of_half(tile, half, BLOCK_SIZE))
    return block * BLOCK_SIZE + half % (BLOCK_SIZE // HALF) * HALF


@gluon.jit
def bulk_copy_halves(desc, row_a, row_b, column, signal, use, buffers, half):
    """Asynchronously, both halves of a step, all of whose rows exist, and the whole signal."""
    mbarrier.expect(signal.of(use), 2 * HALF * buffers.shape[2] * 2)
    tma.async_copy_global_to_shared(desc, [row_a, column], signal.of(use), buffers.index(half))
    tma.async_copy_global_to_shared(desc, [row_b, column], signal.of(use), buffers.index(half + 1))
    signal.arrive_after_copies(use)


@gluon.jit
def copy_halves(x, tile, first_a, first_b, signal, use, buffers, half):
    """The same by cp.async, with zeros for the keys that the sequence does not have."""
    ptr = x.ptr + tile.first_key.to(gl.int64) * x.stride_t + tile.head * x.stride_h
    keys = Heads(ptr, x.stride_t, x.stride_h)
    copy_windows(buffers.index(half), keys, first_a, tile.num_keys, FEW_ROWS)
    copy_windows(buffers.index(half + 1), keys, first_b, tile.num_keys, FEW_ROWS)
    signal.complete(use)


@gluon.jit
def load_queries_then_blocks(work, tiles, unions, queries, blocks, q, k, v, k_desc, v_desc):
    """The loading warpgroup: of every tile its queries, then keys and values step by step. A step's
    keys are freed together with the values of the step before it."""
    G: gl.constexpr = work.SHAPE.G
    D: gl.constexpr = work.SHAPE.D
    BLOCK_SIZE: gl.constexpr = work.SHAPE.BLOCK_SIZE
    turn, count = 0, 0
    for number in range(gl.program_id(0), gl.load(unions.num_work), gl.num_programs(0)):
        tile = load_neighbours(tiles, unions, number, work.num_tiles, work.capacity)
        at, last = tile.first_query.to(gl.int64), tile.num_queries * G - 1
        queries.free.wait_for_last(turn)
        load_query_tile(queries.q, q, queries.number(turn, 0), at, tile.head, last, G)
        queries.ready.arrive_after_copies(turn)

        column = (tile.head * D).to(gl.int32)
        halves, steps = count_halves(tile, BLOCK_SIZE)
        if steps > 0:
            # Only the last block may not be full.
            end = first_key_of_half(tile, unions, halves, BLOCK_SIZE) + BLOCK_SIZE
            bulk_steps = gl.where(end <= tile.num_keys, steps, steps - 1)
            for step in range(0, bulk_steps):
                first_a = tile.first_key + first_key_of_half(tile, unions, 2 * step, BLOCK_SIZE)
                first_b = tile.first_key + first_key_of_half(tile, unions, 2 * step + 1, BLOCK_SIZE)
                half = blocks.half(count, 0)
                blocks.free.wait_for_last(count)
                bulk_copy_halves(
                    k_desc, first_a, first_b, column, blocks.k_ready, count, blocks.k, half
                )
                blocks.free.wait_for_last(count + 1)
                bulk_copy_halves(
                    v_desc, first_a, first_b, column, blocks.v_ready, count, blocks.v, half
                )
                count += 1

            if bulk_steps < steps:
                first_a = first_key_of_half(tile, unions, 2 * bulk_steps, BLOCK_SIZE)
                first_b = first_key_of_half(tile, unions, 2 * bulk_steps + 1, BLOCK_SIZE)
                half = blocks.half(count, 0)
                blocks.free.wait_for_last(count)
                copy_halves(k, tile, first_a, first_b, blocks.k_ready, count, blocks.k, half)
                blocks.free.wait_for_last(count + 1)
                copy_halves(v, tile, first_a, first_b, blocks.v_ready, count, blocks.v, half)
                count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def load_bits(unions, tile, half, query, BLOCK_SIZE: gl.constexpr, QUERIES: gl.constexpr):
    """The words with the bits of queries for the block of a half."""
    WORDS: gl.constexpr = (QUERIES + 31) // 32
    place = place_of_half(tile, half, BLOCK_SIZE)
    if WORDS == 1:
        return gl.load(unions.bits + place)
    else:
        return gl.load(unions.bits + place * WORDS + query // 32)


@gluon.jit
def union_weights(scores_a, scores_b, chose_a, chose_b, maximum, total, scale):
    """Weights of both halves of a step, the decay of those before, the new maximum (base 2) and
    total."""
    most_a = gl.where(chose_a, gl.max(scores_a, 1) * scale, float("-inf"))
    most_b = gl.where(chose_b, gl.max(scores_b, 1) * scale, float("-inf"))
    raised = gl.maximum(maximum, gl.maximum(most_a, most_b))
    shift = gl.where(raised == float("-inf"), 0.0, raised)  # a pair that has seen nothing yet
    p_a = gl.exp2(scores_a * scale + gl.where(chose_a, -shift, float("-inf"))[:, None])
    p_b = gl.exp2(scores_b * scale + gl.where(chose_b, -shift, float("-inf"))[:, None])
    decay = gl.exp2(maximum - shift)
    return p_a, p_b, decay, raised, total * decay + (gl.sum(p_a, 1) + gl.sum(p_b, 1))


@gluon.jit
def seen_scores(scores, first, position):
    """Scores, -inf of keys behind the pairs' queries."""
    layout: gl.constexpr = scores.type.layout
    key = first + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    return gl.where(key[None, :] <= position[:, None], scores, float("-inf"))


@gluon.jit
def attend_union(
    work, tiles, unions, queries, blocks, o_ptr, lse_ptr, scale, WARPGROUP: gl.constexpr
):
    """A computing warpgroup. The scores of a step are asked for together with the values of the
    step before, and the bits of a step while the step before is computed."""

    G: gl.constexpr = work.SHAPE.G
    D: gl.constexpr = work.SHAPE.D
    BLOCK_SIZE: gl.constexpr = work.SHAPE.BLOCK_SIZE
    QUERIES: gl.constexpr = work.QUERIES
    dtype: gl.constexpr = queries.q.dtype
    s_layout: gl.constexpr = product_layout(HALF)
    o_layout: gl.constexpr = product_layout(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    pair_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    pair = WARPGROUP * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, pair_of)
    query, bit = pair // G, pair // G % 32
    none = gl.zeros([WARPGROUP_ROWS, HALF], gl.float32, s_layout)

    turn, count = 0, 0
    for number in range(gl.program_id(0), gl.load(unions.num_work), gl.num_programs(0)):
        tile = load_neighbours(tiles, unions, number, work.num_tiles, work.capacity)
        halves, steps = count_halves(tile, BLOCK_SIZE)
        full_steps = tile.num_whole * (BLOCK_SIZE // HALF) // 2
        position = tile.position + query
        maximum = gl.full([WARPGROUP_ROWS], float("-inf"), gl.float32, pair_of)
        total = gl.zeros([WARPGROUP_ROWS], gl.float32, pair_of)
        acc = gl.zeros([WARPGROUP_ROWS, D], gl.float32, o_layout)
        q_tile = queries.q.index(queries.number(turn, WARPGROUP))
        queries.ready.wait(turn)

        if steps > 0:
            bits_a = load_bits(unions, tile, 0, query, BLOCK_SIZE, QUERIES)
            bits_b = load_bits(unions, tile, 1, query, BLOCK_SIZE, QUERIES)
            blocks.k_ready.wait(count)
            fence_async_shared()  # q came by cp.async
            half = blocks.half(count, 0)
            keys_a, keys_b = blocks.k.index(half), blocks.k.index(half + 1)
            scores_a = warpgroup_mma(
                q_tile, keys_a.permute((1, 0)), none, use_acc=False, is_async=True
            )
            scores_b = warpgroup_mma(
                q_tile, keys_b.permute((1, 0)), none, use_acc=False, is_async=True
            )
            chose_a = ((bits_a >> bit) & 1) != 0
            chose_b = (((bits_b >> bit) & 1) != 0) & (halves > 1)
            bits_a = load_bits(unions, tile, 2, query, BLOCK_SIZE, QUERIES)
            bits_b = load_bits(unions, tile, 3, query, BLOCK_SIZE, QUERIES)
            scores_a, scores_b = warpgroup_mma_wait(0, deps=(scores_a, scores_b))
            blocks.free.arrive(count)
            if full_steps == 0:
                first_a = first_key_of_half(tile, unions, 0, BLOCK_SIZE)
                first_b = first_key_of_half(tile, unions, 1, BLOCK_SIZE)
                scores_a = seen_scores(scores_a, first_a, position)
                scores_b = seen_scores(scores_b, first_b, position)
            p_a, p_b, decay, maximum, total = union_weights(
                scores_a, scores_b, chose_a, chose_b, maximum, total, scale
            )
            p_a = gl.convert_layout(p_a.to(dtype), p_layout)
            p_b = gl.convert_layout(p_b.to(dtype), p_layout)
            blocks.v_ready.wait(count)

            for step in range(1, steps):
                before = blocks.half(count, 0)
                count += 1
                blocks.k_ready.wait(count)
                if step >= full_steps:  # the last block of a sequence may come by cp.async
                    fence_async_shared()
                half = blocks.half(count, 0)
                keys_a, keys_b = blocks.k.index(half), blocks.k.index(half + 1)
                scores_a = warpgroup_mma(
                    q_tile, keys_a.permute((1, 0)), none, use_acc=False, is_async=True
                )
                scores_b = warpgroup_mma(
                    q_tile, keys_b.permute((1, 0)), none, use_acc=False, is_async=True
                )
                acc = warpgroup_mma(p_a, blocks.v.index(before), acc, is_async=True)
                acc = warpgroup_mma(p_b, blocks.v.index(before + 1), acc, is_async=True)
                chose_a = ((bits_a >> bit) & 1) != 0
                chose_b = (((bits_b >> bit) & 1) != 0) & (2 * step + 1 < halves)
                bits_a = load_bits(unions, tile, 2 * step + 2, query, BLOCK_SIZE, QUERIES)
                bits_b = load_bits(unions, tile, 2 * step + 3, query, BLOCK_SIZE, QUERIES)
                scores_a, scores_b = warpgroup_mma_wait(2, deps=(scores_a, scores_b))
                if step >= full_steps:
                    first_a = first_key_of_half(tile, unions, 2 * step, BLOCK_SIZE)
                    first_b = first_key_of_half(tile, unions, 2 * step + 1, BLOCK_SIZE)
                    scores_a = seen_scores(scores_a, first_a, position)
                    scores_b = seen_scores(scores_b, first_b, position)
                weights_a, weights_b, decay, maximum, total = union_weights(
                    scores_a, scores_b, chose_a, chose_b, maximum, total, scale
                )
                weights_a = gl.convert_layout(weights_a.to(dtype), p_layout)
                weights_b = gl.convert_layout(weights_b.to(dtype), p_layout)
                # Here and not where the values are needed: see `attend` of compressed attention.
                blocks.v_ready.wait(count)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                blocks.free.arrive(count)
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
                p_a, p_b = weights_a, weights_b

            half = blocks.half(count, 0)
            count += 1
            fence_async_shared()
            acc = warpgroup_mma(p_a, blocks.v.index(half), acc, is_async=True)
            acc = warpgroup_mma(p_b, blocks.v.index(half + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))

        seen_any = total > 0
        lse = gl.where(seen_any, (maximum + gl.log2(total)) * LN_2, float("-inf"))
        at = tile.first_query.to(gl.int64) * work.num_heads + tile.head * G
        inside = pair < tile.num_queries * G
        lse_at = lse_ptr + at + (pair // G).to(gl.int64) * work.num_heads + pair % G
        gl.store(lse_at, lse, mask=inside)

        factor = 1.0 / gl.where(seen_any, total, 1.0)  # acc is 0 where nothing was seen
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
        thread_barrier()  # all warps have read the scores' q
        first_pair, o_at, num_queries = WARPGROUP * WARPGROUP_ROWS, o_ptr + at * D, tile.num_queries
        store_tile(q_tile, o_at, acc, work.num_heads, first_pair, num_queries, G, False)
        queries.free.arrive(turn)
        turn += 1  # noqa: SIM113


@gluon_kernel
def union_fwd_hopper_kernel(
    q,
    k,
    v,
    k_desc,
    v_desc,
    tiles,
    unions,
    o_ptr,
    lse_ptr,
    num_tiles,
    capacity,
    num_heads,
    scale,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
):
    """o and lse of as many tiles as every program comes to."""

    dtype: gl.constexpr = q.ptr.dtype.element_ty
    queries = new_query_ring(TILE.QUERY_STAGES, SHAPE.D, False, dtype)
    blocks = new_block_ring(TILE.STAGES, SHAPE.D, dtype)
    work = UnionWork(num_tiles, capacity, num_heads, SHAPE, TILE.QUERIES)
    gl.warp_specialize(
        [
            (attend_union, (work, tiles, unions, queries, blocks, o_ptr, lse_ptr, scale, 0)),
            (attend_union, (work, tiles, unions, queries, blocks, o_ptr, lse_ptr, scale, 1)),
            (
                load_queries_then_blocks,
                (work, tiles, unions, queries, blocks, q, k, v, k_desc, v_desc),
            ),
        ],
        [4, LOADER_WARPS],
        [TILE.REGISTERS, 504 - 2 * TILE.REGISTERS],
    )


def union_ring_tile(queries: int, stages: int, query_stages: int, registers: int) -> UnionRingTile:
    """The tile of the kernel."""
    return constants(UnionRingTile(queries, stages, query_stages, registers))


__all__ = ["HALF", "head_columns", "union_fwd_hopper_kernel", "union_ring_tile"]
