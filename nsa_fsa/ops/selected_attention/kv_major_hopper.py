"""The two gather kernels of the KV-major order for Hopper, in Gluon.

The kernels of the same name without `hopper` are their plain Triton twins, for every other GPU,
shape and dtype, and say what is computed.

What Gluon adds is control over what waits for what. A program is one warpgroup (two for blocks of
128), two or three of them share a multiprocessor, and in the loop over tiles nothing waits for
global memory that was not asked for a tile earlier:

- Rows of q and do arrive by cp.async while the tile before is computed, and the entries that say
  where they lie a tile before that. Loads into registers instead spill, and a spill waits for its
  load: 19.5 ms instead of the backward's 16.4.
- Matrix products run asynchronously; k q^T and v do^T together, ds q beside dsT k.
- A result is staged in the buffer of the queries that it belongs to, which are no longer needed,
  and leaves in 16-byte stores.

Rows past the end of an item repeat its last one, so that nothing undefined is ever multiplied; they
are not stored.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_fsa.ops.common.hopper import copy_rows, gluon_kernel, thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_layouts import (
    allocate_numbers,
    allocate_tiles,
    product_layout,
    row_layout,
)
from nsa_fsa.ops.selected_attention.work import (
    buffers_of_unit,
    load_block,
    load_item,
    partials_of_unit,
)

# Elements of a 16-byte copy. Offsets of rows are multiples, and kept divided by it, in 32 bits.
VECTOR = gl.constexpr(8)
RING = gl.constexpr(4)  # tiles whose entries and statistics are kept


# Forward


@gluon.jit
def copy_entries(buffer, entries_ptr, row, last, num_dense, G: gl.constexpr):
    """Asynchronously, the entries of rows.

    entries_ptr is where the entry of row 0 would be if all rows had one.
    """
    nth = gl.minimum(row, last) // G
    async_copy.async_copy_global_to_shared(buffer, entries_ptr + nth, mask=nth >= num_dense)


@gluon.jit
def copy_queries(buffers, stage, q, q_ptr, entries, row, SHAPE: gl.constexpr, layout: gl.constexpr):
    """Asynchronously, the rows of q that the entries of rows of a tile name."""
    query = (entries.load(gl.SliceLayout(1, layout)) // SHAPE.NUM_SLOTS).to(gl.int64)
    member = (row % SHAPE.G).to(gl.int64)
    offset = query * q.stride_t + member * q.stride_h
    copy_rows(buffers.index(stage), q_ptr, offset, SHAPE.D, layout)


@gluon_kernel
def gather_fwd_hopper_kernel(
    q,
    k,
    v,
    index,
    blocks,
    partials,
    plan,
    place,
    first_head,
    num_tokens,
    item_queries,
    low_row,
    scale,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
):
    """A program walks an item."""

    number = gl.program_id(0)
    head, planned = first_head + gl.program_id(1), place + gl.program_id(1)
    # The block is loaded before the item is known to exist, so that the two loads overlap.
    block = load_block(plan, planned, number)
    if number >= gl.load(plan.num_items + planned):
        return
    G: gl.constexpr = SHAPE.G
    D: gl.constexpr = SHAPE.D
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    BLOCK_SIZE: gl.constexpr = SHAPE.BLOCK_SIZE
    WARPS: gl.constexpr = TILE.WARPS

    dtype: gl.constexpr = q.ptr.dtype.element_ty
    rows: gl.constexpr = row_layout(D, WARPS)
    row_of: gl.constexpr = gl.SliceLayout(1, rows)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    s_layout: gl.constexpr = product_layout(BLOCK_SIZE, WARPS)
    o_layout: gl.constexpr = product_layout(D, WARPS)

    k_s = allocate_tiles(dtype, 1, BLOCK_SIZE, D).index(0)
    v_s = allocate_tiles(dtype, 1, BLOCK_SIZE, D).index(0)
    q_s = allocate_tiles(dtype, 2, BLOCK_M, D)
    entry_s = allocate_numbers(gl.int32, RING, BLOCK_M)

    item = load_item(plan, planned, number, block, item_queries, G)
    last = item.num_rows - 1
    first_entry = head.to(gl.int64) * num_tokens * SHAPE.NUM_SLOTS
    first_entry += gl.load(plan.first_entry + item.at)
    entries_ptr = index.entries + (first_entry + item.first_query)
    q_ptr = q.ptr + head.to(gl.int64) * G * q.stride_h
    # Places of partial results count from the unit's first, and so fit 32 bits.
    partial = partials_of_unit(num_tokens, SHAPE.NUM_SLOTS * G)
    partial_o_ptr, partial_lse_ptr = partials.o + partial * D, partials.lse + partial
    low_entry = low_row * SHAPE.NUM_SLOTS if SHAPE.RANGED else 0

    key = (gl.load(blocks.first_row + block) + gl.arange(0, BLOCK_SIZE, row_of)).to(gl.int64)
    copy_rows(k_s, k.ptr + head.to(gl.int64) * k.stride_h, key * k.stride_t, D, rows)
    copy_rows(v_s, v.ptr + head.to(gl.int64) * v.stride_h, key * v.stride_t, D, rows)

    lane = gl.arange(0, BLOCK_M, line)
    row = gl.arange(0, BLOCK_M, row_of)
    s_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, rows))
    for i in gl.static_range(2):
        entry_s.index(i).store(gl.load(entries_ptr + gl.minimum(i * BLOCK_M + lane, last) // G))
    thread_barrier()
    copy_queries(q_s, 0, q, q_ptr, entry_s.index(0), row, SHAPE, rows)
    async_copy.commit_group()

    tile = 0
    for start in range(0, item.num_rows if TILE.STOP_EARLY else item_queries * G, BLOCK_M):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        q_tile = q_s.index(tile % 2)
        none = gl.zeros([BLOCK_M, BLOCK_SIZE], gl.float32, s_layout)
        scores = warpgroup_mma(q_tile, k_s.permute((1, 0)), none, use_acc=False, is_async=True)

        # The rows of the next tile, and the entries of the one after it.
        entries = entry_s.index((tile + 1) % RING)
        copy_queries(q_s, (tile + 1) % 2, q, q_ptr, entries, start + BLOCK_M + row, SHAPE, rows)
        ahead = start + 2 * BLOCK_M + lane
        copy_entries(entry_s.index((tile + 2) % RING), entries_ptr, ahead, last, 0, G)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(0, deps=(scores,))
        maximum = gl.max(scores, 1) * scale
        p = gl.exp2(scores * scale - maximum[:, None])
        total = gl.sum(p, 1)
        p = (p * (1.0 / total)[:, None]).to(dtype)
        p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2))
        o = gl.zeros([BLOCK_M, D], gl.float32, o_layout)
        o = warpgroup_mma(p, v_s, o, use_acc=False, is_async=True)

        entries = entry_s.index(tile % RING)
        s_target = (entries.load(gl.SliceLayout(1, s_layout)) - low_entry) * G + (start + s_row) % G
        lse = maximum + gl.log2(total)
        gl.store(partial_lse_ptr + s_target, lse, mask=start + s_row < item.num_rows)
        target = ((entries.load(row_of) - low_entry) * G + (start + row) % G).to(gl.int64)
        o = warpgroup_mma_wait(0, deps=(o,))

        # Every warp has waited for its scores, and reads only the rows of q_tile that it writes.
        q_tile.store(o.to(dtype))
        thread_barrier()
        out = partial_o_ptr + target[:, None] * D + column[None, :]
        exists = (start + row < item.num_rows)[:, None]
        gl.store(out, q_tile.load(rows), mask=exists, cache_modifier=".cs")
        tile += 1  # noqa: SIM113
    async_copy.wait_group(0)


# Backward


class VectorStrides(NamedTuple):
    """Strides of q and do, in vectors of VECTOR elements."""

    q_t: Any
    q_h: Any
    do_t: Any
    do_h: Any


class Walk(NamedTuple):
    """What holds for all pairs of an item."""

    last: Any  # pair
    entries_ptr: Any  # where the entry of pair 0 would be if all pairs had one
    num_dense: Any  # queries that see the block densely, which come first
    first_dense: Any  # row of the first of them
    query_row: Any  # of the block, as in `BlockTable`
    block_number: Any
    first_target: Any  # of query 0; it wraps around with the products that are added to it
    statistics: Any  # `ScaledStatistics`
    head: Any  # KV head
    num_heads: Any  # of q


class PairBuffers(NamedTuple):
    """What one thread a row works out, or asks for, and all threads need to know; shared memory."""

    entry: Any  # of two tiles
    q_offset: Any  # of two tiles
    do_offset: Any  # of two tiles
    target: Any  # of RING tiles, as what follows
    shift: Any
    delta: Any


class TileBuffers(NamedTuple):
    """Rows of q and do of NUM_STAGES tiles; shared memory."""

    q: Any
    do: Any


class Pairs(NamedTuple):
    """Where pairs of an item lie."""

    query: Any
    member: Any  # head of the group
    target: Any  # the row of its partial dq


@gluon.jit
def locate_pairs(walk, entry, row, SHAPE: gl.constexpr):
    """Where pairs of an item lie; `entry` counts where a pair does not see the block densely."""
    SLOTS: gl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS
    DIVISOR: gl.constexpr = max(SHAPE.NUM_SLOTS, 1)
    nth, member = gl.minimum(row, walk.last) // SHAPE.G, row % SHAPE.G
    dense = nth < walk.num_dense
    query = gl.where(dense, walk.first_dense + nth, entry // DIVISOR)

    local_slot = SHAPE.INIT_BLOCKS + (query - walk.query_row) // SHAPE.BLOCK_SIZE
    is_initial = walk.block_number < SHAPE.INIT_BLOCKS
    dense_slot = gl.where(is_initial, walk.block_number, local_slot)
    slot = gl.where(dense, SHAPE.NUM_SLOTS + dense_slot, entry % DIVISOR)
    target = walk.first_target + (query * SLOTS + slot) * SHAPE.G + member
    return Pairs(query, member, target)


@gluon.jit
def prepare_pairs(buffers, walk, vector_strides, entry, pair, two, ring, SHAPE: gl.constexpr):
    """Works out where pairs of a tile lie, and asks for their statistics.

    two, ring: where the tile's values go in the buffers of two tiles, and of RING.
    """
    pairs = locate_pairs(walk, entry, pair, SHAPE)
    strides, statistics = vector_strides, walk.statistics
    buffers.q_offset.index(two).store(pairs.query * strides.q_t + pairs.member * strides.q_h)
    buffers.do_offset.index(two).store(pairs.query * strides.do_t + pairs.member * strides.do_h)
    buffers.target.index(ring).store(pairs.target)
    at = pairs.query.to(gl.int64) * walk.num_heads + (walk.head * SHAPE.G + pairs.member)
    async_copy.async_copy_global_to_shared(buffers.shift.index(ring), statistics.shift + at)
    async_copy.async_copy_global_to_shared(buffers.delta.index(ring), statistics.delta + at)


@gluon.jit
def copy_tile(tiles, stage, q_ptr, do_ptr, buffers, pair, D: gl.constexpr, layout: gl.constexpr):
    """Asynchronously, the rows of q and do of a tile."""
    row_of: gl.constexpr = gl.SliceLayout(1, layout)
    q_offset = buffers.q_offset.index(pair).load(row_of).to(gl.int64) * VECTOR
    copy_rows(tiles.q.index(stage), q_ptr, q_offset, D, layout)
    do_offset = buffers.do_offset.index(pair).load(row_of).to(gl.int64) * VECTOR
    copy_rows(tiles.do.index(stage), do_ptr, do_offset, D, layout)


@gluon.jit
def seen_tile(
    walk,
    start,
    num_rows,
    masked_rows,
    flags_ptr,
    SHAPE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    layout: gl.constexpr,
):
    """Which keys the rows from `start` on see, `[BLOCK_SIZE, BLOCK_M]`.

    masked_rows: as many rows belong to queries inside this very block.
    flags_ptr: what the index says of the first query that sees the block densely.
    """
    G: gl.constexpr = SHAPE.G
    row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    key = gl.arange(0, SHAPE.BLOCK_SIZE, gl.SliceLayout(1, layout))
    # The dense run begins `first_dense - query_row` keys into the block, and what follows it lies
    # beyond the block.
    offset = key - (walk.first_dense - walk.query_row)
    seen = (row[None, :] >= (offset * G)[:, None]) & (row < num_rows)[None, :]
    if SHAPE.OWN_IS_OPTIONAL:
        here = (row < masked_rows) & (row < num_rows)
        seen = seen & (gl.load(flags_ptr + row // G, mask=here, other=-1) < 0)[None, :]
    return seen


@gluon.jit
def store_dkdv(
    dk,
    dv,
    blocks,
    scratch,
    plan,
    planned,
    number,
    head,
    num_tokens,
    item_queries,
    dk_tile,
    dv_tile,
    SHAPE: gl.constexpr,
    ADD: gl.constexpr,
    layout: gl.constexpr,
):
    """Writes dk and dv of an item, or adds to them; to a buffer where the block has several.

    Everything is looked up again, because what the loop does not need would spill if it
    lived through it.
    """
    BLOCK_SIZE: gl.constexpr = SHAPE.BLOCK_SIZE
    D: gl.constexpr = SHAPE.D
    SLOTS: gl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS
    block = load_block(plan, planned, number)
    at = planned * plan.stride_blocks + block
    key = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))

    if gl.load(plan.num_queries + at) > item_queries:  # one item of several
        nth = number - gl.load(plan.first_item + at)
        buffer = buffers_of_unit(num_tokens, item_queries, SLOTS)
        buffer += gl.load(plan.first_buffer + at) + nth
        offset = ((buffer * BLOCK_SIZE + key) * (2 * D))[:, None] + column[None, :]
        gl.store(scratch.dkdv + offset, dk_tile)
        gl.store(scratch.dkdv + offset + D, dv_tile)
    else:
        row = (gl.load(blocks.first_row + block) + key).to(gl.int64)
        exists = (key < gl.load(blocks.num_rows + block))[:, None]
        dk_ptr = dk.ptr + head.to(gl.int64) * dk.stride_h
        dv_ptr = dv.ptr + head.to(gl.int64) * dv.stride_h
        dk_ptr += (row * dk.stride_t)[:, None] + column[None, :]
        dv_ptr += (row * dv.stride_t)[:, None] + column[None, :]
        if ADD:
            dk_tile += gl.load(dk_ptr, mask=exists, other=0.0).to(gl.float32)
            dv_tile += gl.load(dv_ptr, mask=exists, other=0.0).to(gl.float32)
        gl.store(dk_ptr, dk_tile.to(dk.ptr.dtype.element_ty), mask=exists)
        gl.store(dv_ptr, dv_tile.to(dv.ptr.dtype.element_ty), mask=exists)


@gluon_kernel
def gather_bwd_hopper_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    statistics,
    index,
    blocks,
    scratch,
    plan,
    place,
    first_head,
    num_tokens,
    item_queries,
    low_row,
    num_heads,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
    ADD: gl.constexpr,
    STORE_DQ: gl.constexpr,
):
    """A program walks an item. STORE_DQ is there for the plain twin's sake, and always true."""

    gl.static_assert(STORE_DQ)

    number = gl.program_id(0)
    head, planned = first_head + gl.program_id(1), place + gl.program_id(1)
    # The block is loaded before the item is known to exist, so that the two loads overlap.
    block = load_block(plan, planned, number)
    if number >= gl.load(plan.num_items + planned):
        return
    G: gl.constexpr = SHAPE.G
    D: gl.constexpr = SHAPE.D
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    BLOCK_SIZE: gl.constexpr = SHAPE.BLOCK_SIZE
    NUM_STAGES: gl.constexpr = TILE.NUM_STAGES
    WARPS: gl.constexpr = TILE.WARPS
    SLOTS: gl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS

    dtype: gl.constexpr = q.ptr.dtype.element_ty
    rows: gl.constexpr = row_layout(D, WARPS)
    row_of: gl.constexpr = gl.SliceLayout(1, rows)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    s_layout: gl.constexpr = product_layout(BLOCK_M, WARPS)
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    d_layout: gl.constexpr = product_layout(D, WARPS)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    dq_instruction: gl.constexpr = [16, D * 4 // WARPS, 16]
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], dq_instruction)

    k_s = allocate_tiles(dtype, 1, BLOCK_SIZE, D).index(0)
    v_s = allocate_tiles(dtype, 1, BLOCK_SIZE, D).index(0)
    tiles = TileBuffers(
        allocate_tiles(dtype, NUM_STAGES, BLOCK_M, D), allocate_tiles(dtype, NUM_STAGES, BLOCK_M, D)
    )
    ds_s = allocate_tiles(dtype, 1, BLOCK_SIZE, BLOCK_M).index(0)
    buffers = PairBuffers(
        allocate_numbers(gl.int32, 2, BLOCK_M),
        allocate_numbers(gl.int32, 2, BLOCK_M),
        allocate_numbers(gl.int32, 2, BLOCK_M),
        allocate_numbers(gl.int32, RING, BLOCK_M),
        allocate_numbers(gl.float32, RING, BLOCK_M),
        allocate_numbers(gl.float32, RING, BLOCK_M),
    )

    item = load_item(plan, planned, number, block, item_queries, G)
    num_dense = gl.load(plan.num_dense + item.at) - item.first_query
    first_dense = gl.load(plan.first_dense + item.at) + item.first_query
    first_entry = gl.load(plan.first_entry + item.at) - num_dense
    query_row = gl.load(blocks.query_row + block)
    vector_strides = VectorStrides(
        gl.cast(q.stride_t // VECTOR, gl.int32),
        gl.cast(q.stride_h // VECTOR, gl.int32),
        gl.cast(do.stride_t // VECTOR, gl.int32),
        gl.cast(do.stride_h // VECTOR, gl.int32),
    )
    walk = Walk(
        item.num_rows - 1,
        index.entries + head.to(gl.int64) * num_tokens * SHAPE.NUM_SLOTS + first_entry,
        num_dense,
        first_dense,
        query_row,
        gl.load(blocks.number + block),
        (gl.program_id(1) * num_tokens - low_row) * (SLOTS * G),
        statistics,
        head,
        num_heads,
    )

    masked_rows = (query_row + BLOCK_SIZE - first_dense) * G  # of queries inside this very block
    q_ptr = q.ptr + head.to(gl.int64) * G * q.stride_h
    do_ptr = do.ptr + head.to(gl.int64) * G * do.stride_h

    # Keys past the end of a sequence are never seen: any row that exists will do.
    last_key = gl.load(blocks.num_rows + block) - 1
    first_row = gl.load(blocks.first_row + block)
    key = (first_row + gl.minimum(gl.arange(0, BLOCK_SIZE, row_of), last_key)).to(gl.int64)
    copy_rows(k_s, k.ptr + head.to(gl.int64) * k.stride_h, key * k.stride_t, D, rows)
    copy_rows(v_s, v.ptr + head.to(gl.int64) * v.stride_h, key * v.stride_t, D, rows)

    lane = gl.arange(0, BLOCK_M, line)
    row = gl.arange(0, BLOCK_M, row_of)
    column = gl.arange(0, D, gl.SliceLayout(0, rows))

    for i in gl.static_range(2):
        ahead = i * BLOCK_M + lane
        nth = gl.minimum(ahead, walk.last) // G
        entry = gl.load(walk.entries_ptr + nth, mask=nth >= num_dense, other=0)
        prepare_pairs(buffers, walk, vector_strides, entry, ahead, i, i, SHAPE)
    ahead = 2 * BLOCK_M + lane
    copy_entries(buffers.entry.index(0), walk.entries_ptr, ahead, walk.last, num_dense, G)
    thread_barrier()
    copy_tile(tiles, 0, q_ptr, do_ptr, buffers, 0, D, rows)
    async_copy.commit_group()

    dk_tile = gl.zeros([BLOCK_SIZE, D], gl.float32, d_layout)
    dv_tile = gl.zeros([BLOCK_SIZE, D], gl.float32, d_layout)
    for start in range(0, item.num_rows if TILE.STOP_EARLY else item_queries * G, BLOCK_M):
        tile = start // BLOCK_M
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        q_tile = tiles.q.index(tile % NUM_STAGES)
        do_tile = tiles.do.index(tile % NUM_STAGES)

        # The statistics are where the accumulators begin, so that they take no registers later.
        none = gl.zeros([BLOCK_SIZE, BLOCK_M], gl.float32, s_layout)
        shift = none + buffers.shift.index(tile % RING).load(s_column)[None, :]
        scores = warpgroup_mma(k_s, q_tile.permute((1, 0)), shift, is_async=True)
        minus_delta = none + buffers.delta.index(tile % RING).load(s_column)[None, :]
        dp = warpgroup_mma(v_s, do_tile.permute((1, 0)), minus_delta, is_async=True)

        # The rows of the next tile, the statistics of the one after it, the entries of the third.
        if NUM_STAGES > 1:
            stage = (tile + 1) % NUM_STAGES
            copy_tile(tiles, stage, q_ptr, do_ptr, buffers, (tile + 1) % 2, D, rows)
        two, ring = tile % 2, (tile + 2) % RING
        entry, ahead = buffers.entry.index(two).load(line), start + 2 * BLOCK_M + lane
        prepare_pairs(buffers, walk, vector_strides, entry, ahead, two, ring, SHAPE)
        ahead = start + 3 * BLOCK_M + lane
        entries = buffers.entry.index((tile + 1) % 2)
        copy_entries(entries, walk.entries_ptr, ahead, walk.last, num_dense, G)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(1, deps=(scores,))
        p = gl.exp2(scores * statistics.scale2)
        if (start < masked_rows) | (start + BLOCK_M > item.num_rows):
            flags_ptr = index.num_sparse + head.to(gl.int64) * num_tokens + first_dense
            seen = seen_tile(
                *(walk, start, item.num_rows, masked_rows, flags_ptr, SHAPE, BLOCK_M, s_layout)
            )
            p = gl.where(seen, p, 0.0)

        dp = warpgroup_mma_wait(0, deps=(dp,))
        # p stays in float32 until here: from 16 bits it would be converted one number at a time.
        ds = (p * dp * statistics.scale).to(dtype)
        p = gl.convert_layout(p.to(dtype), a_layout)
        dv_tile = warpgroup_mma(p, do_tile, dv_tile, is_async=True)

        # dk takes ds from shared memory too: from registers it would spill.
        ds_s.store(ds)
        fence_async_shared()
        thread_barrier()
        dk_tile = warpgroup_mma(ds_s, q_tile, dk_tile, is_async=True)
        dq = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
        dq = warpgroup_mma(ds_s.permute((1, 0)), k_s, dq, use_acc=False, is_async=True)
        dq, dk_tile, dv_tile = warpgroup_mma_wait(0, deps=(dq, dk_tile, dv_tile))

        thread_barrier()
        q_tile.store(dq.to(dtype))
        thread_barrier()
        out_row = buffers.target.index(tile % RING).load(row_of).to(gl.int64)
        out = scratch.dq + out_row[:, None] * D + column[None, :]
        exists = (start + row < item.num_rows)[:, None]
        gl.store(out, q_tile.load(rows), mask=exists, cache_modifier=".cs")
        if NUM_STAGES == 1:
            thread_barrier()
            copy_tile(tiles, 0, q_ptr, do_ptr, buffers, (tile + 1) % 2, D, rows)
            async_copy.commit_group()
    async_copy.wait_group(0)

    store_dkdv(
        *(dk, dv, blocks, scratch, plan, planned, number, head, num_tokens, item_queries),
        *(dk_tile, dv_tile, SHAPE, ADD, d_layout),
    )
