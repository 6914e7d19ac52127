"""The backward of compressed attention for Hopper, in Gluon: dq, and dk and dv, in the form that
`hopper_forward` describes.

The kernels of the same name without `hopper`, in `backward`, say what is computed. Measured on an
H200 (65,536 tokens, 64 heads, windows of 32 every 16): dq 9.3 to 10.2 ms, dk and dv 15.3; all three
in one pass 19.8, of which additions of dq are 2, and 1.4 around it to clear and to scale their
sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_fsa.ops.common.bundles import Heads
from nsa_fsa.ops.common.hopper import bulk_add, gluon_kernel, thread_barrier
from nsa_fsa.ops.common.locate import count_windows, load_tile

# The form of these kernels, which `hopper_forward` describes.
from nsa_fsa.ops.common.windowed_attention.hopper_forward import (
    FEW_ROWS,
    LN_2,
    QueryWork,
    copy_pairs,
    copy_windows,
    load_queries_then_windows,
    new_rings,
    store_tile,
)
from nsa_fsa.ops.common.windowed_attention.hopper_layouts import (
    allocate_numbers,
    allocate_tiles,
    product_layout,
)
from nsa_fsa.ops.common.windowed_attention.hopper_pipelines import (
    EITHER_WAY,
    LOADER_WARPS,
    WARPGROUP_ROWS,
    Signal,
    gluon_object,
    new_signal,
)
from nsa_fsa.ops.common.windowed_attention.tiles import key_tile_work, pairs_that_see


@gluon.jit
def gather_dq(
    work, queries, windows, statistics, dq_ptr, ADD: gl.constexpr, WARPGROUP: gl.constexpr
):
    """A computing warpgroup of dq."""
    G: gl.constexpr = work.SHAPE.G
    BLOCK_N: gl.constexpr = windows.k.shape[1]
    D: gl.constexpr = windows.k.shape[2]
    dtype: gl.constexpr = queries.q.dtype
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    dq_layout: gl.constexpr = product_layout(D)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    pair_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    pair = WARPGROUP * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, pair_of)
    none = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, s_layout)

    scale2 = statistics.scale2
    turn, count = 0, 0
    for number in range(gl.program_id(0), work.total, gl.num_programs(0)):
        head, tile = work.tile(number)
        steps, full_steps, visible = work.steps(tile, pair, BLOCK_N)

        inside = pair < tile.num_queries * G
        at = (head.to(gl.int64) * work.num_rows + tile.first_query) * G
        shift = gl.load(statistics.shift + at + pair, mask=inside, other=0.0) * scale2
        delta = gl.load(statistics.delta + at + pair, mask=inside, other=0.0)
        dq = gl.zeros([WARPGROUP_ROWS, D], gl.float32, dq_layout)
        q_tile = queries.q.index(queries.number(turn, WARPGROUP))
        do_tile = queries.do.index(queries.number(turn, WARPGROUP))
        queries.ready.wait(turn)

        for step in range(0, steps):
            windows.k_ready.wait(count)
            windows.v_ready.wait(count)
            if (step == 0) | (step >= full_steps):
                fence_async_shared()  # q, do and a sequence's last windows come by cp.async
            keys, values = windows.keys(count), windows.values(count)
            scores = warpgroup_mma(q_tile, keys.permute((1, 0)), none, use_acc=False, is_async=True)
            dp = warpgroup_mma(do_tile, values.permute((1, 0)), none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            # The exponentials stay before the wait for dp because a branch follows.
            p = gl.exp2(scores * scale2 + shift[:, None])
            if step >= full_steps:
                window = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
                p = gl.where(window[None, :] < visible[:, None], p, 0.0)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = (p * (dp + delta[:, None])).to(dtype)
            dq = warpgroup_mma(gl.convert_layout(ds, ds_layout), keys, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            windows.free.arrive(count)
            count += 1

        thread_barrier()  # all warps have read the scores' q
        at = (tile.first_query.to(gl.int64) * work.num_heads + head * G) * D
        first_pair, dq = WARPGROUP * WARPGROUP_ROWS, dq * statistics.scale
        store_tile(q_tile, dq_ptr + at, dq, work.num_heads, first_pair, tile.num_queries, G, ADD)
        queries.free.arrive(turn)
        turn += 1  # noqa: SIM113


@gluon_kernel
def compressed_bwd_dq_hopper_kernel(
    q,
    k,
    v,
    k_desc,
    v_desc,
    do,
    statistics,
    dq_ptr,
    tiles_ptr,
    num_heads,
    num_tiles,
    num_rows,
    num_sequences,
    num_work,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
    ADD: gl.constexpr,
):
    """dq of as many tiles as every program comes to."""

    queries, windows = new_rings(q, True, SHAPE, TILE)
    work = QueryWork(tiles_ptr, num_tiles, num_rows, num_sequences, num_work, num_heads, SHAPE)
    gl.warp_specialize(
        [
            (gather_dq, (work, queries, windows, statistics, dq_ptr, ADD, 0)),
            (gather_dq, (work, queries, windows, statistics, dq_ptr, ADD, 1)),
            (load_queries_then_windows, (work, q, do, k, v, k_desc, v_desc, queries, windows, 0)),
        ],
        [4, LOADER_WARPS],
        [TILE.REGISTERS, 504 - 2 * TILE.REGISTERS],
    )


@gluon_object
class PairRing:
    """Steps of pairs and their statistics, which the computing warpgroups of dk and dv share."""

    q: gl.shared_memory_descriptor  # [STAGES, BLOCK_M, D]
    do: gl.shared_memory_descriptor
    shift: gl.shared_memory_descriptor  # [STAGES, BLOCK_M], float32
    delta: gl.shared_memory_descriptor
    ready: Signal
    free: Signal
    BULK: gl.constexpr  # whether pairs come by bulk copies

    @gluon.jit
    def stage(self, step):
        return step % self.free.SIZE


@gluon.jit
def new_pair_ring(
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    D: gl.constexpr,
    dtype: gl.constexpr,
    BULK: gl.constexpr,
):
    q = allocate_tiles(dtype, STAGES, BLOCK_M, D)
    do = allocate_tiles(dtype, STAGES, BLOCK_M, D)
    shift = allocate_numbers(gl.float32, STAGES, BLOCK_M)
    delta = allocate_numbers(gl.float32, STAGES, BLOCK_M)
    ready, free = new_signal(STAGES, EITHER_WAY), new_signal(STAGES, 2)
    return PairRing(q, do, shift, delta, ready, free, BULK)


@gluon_object
class DsRing:
    """ds of two steps, which both computing warpgroups need of all keys, and dq of one, on its way
    to global memory.
    """

    ds: gl.shared_memory_descriptor  # [4, WARPGROUP_ROWS, BLOCK_M]: the halves of two steps
    dq: gl.shared_memory_descriptor  # [2, BLOCK_M, D // 2], float32: columns of each warpgroup
    ready: Signal
    free: Signal

    @gluon.jit
    def half(self, step, warpgroup):
        """A step's ds of the keys of a warpgroup."""
        return self.ds.index(2 * (step % 2) + warpgroup)


@gluon.jit
def new_ds_ring(BLOCK_M: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr):
    ds = allocate_tiles(dtype, 4, WARPGROUP_ROWS, BLOCK_M)
    dq = allocate_tiles(gl.float32, 2, BLOCK_M, D // 2)
    return DsRing(ds, dq, new_signal(2, 2), new_signal(2, 2))


@gluon_object
class KeyTile:
    """A tile of windows, half for each computing warpgroup, and where its gradients go."""

    k: gl.shared_memory_descriptor  # [2, WARPGROUP_ROWS, D]
    v: gl.shared_memory_descriptor
    dk_ptr: gl.tensor  # of the first window
    dv_ptr: gl.tensor
    stride_t: gl.tensor | gl.constexpr  # of both gradients
    number: gl.tensor  # of windows that exist
    # The first pair of the program's `PairPart` that sees the first window; may be negative.
    first_seen: gl.tensor


@gluon_object
class HeadRows:
    """`Heads` as a member of an object, which a bundle cannot be."""

    ptr: gl.tensor
    stride_t: gl.tensor | gl.constexpr
    stride_h: gl.tensor | gl.constexpr


@gluon_object
class PairPart:
    """The pairs that a program of dk and dv walks: those of one sequence, part and KV head."""

    q: HeadRows
    do: HeadRows
    shift_ptr: gl.tensor  # of the first pair, as delta_ptr
    delta_ptr: gl.tensor
    query: gl.tensor  # row of q
    head: gl.tensor  # of q
    number: gl.tensor  # of pairs
    SHAPE: gl.constexpr

    @gluon.jit
    def copy(self, ring, stage, start, COPIED: gl.constexpr):
        """Asynchronously, a step's pairs from `start` on, by cp.async."""
        last = self.number - 1
        copy_pairs(ring.q.index(stage), self.q, start, last, COPIED, self.SHAPE.G)
        copy_pairs(ring.do.index(stage), self.do, start, last, COPIED, self.SHAPE.G)

    @gluon.jit
    def copy_statistics(self, ring, stage, start):
        """Asynchronously, the statistics of these pairs."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [LOADER_WARPS], [0])
        pair = gl.minimum(start + gl.arange(0, ring.shift.shape[1], layout), self.number - 1)
        async_copy.async_copy_global_to_shared(ring.shift.index(stage), self.shift_ptr + pair)
        async_copy.async_copy_global_to_shared(ring.delta.index(stage), self.delta_ptr + pair)


@gluon.jit
def new_pair_part(q, do, statistics, first_query, head, seen_by, num_rows, SHAPE: gl.constexpr):
    """The pairs of one KV head that are a part of a sequence whose first query is given."""
    G: gl.constexpr = SHAPE.G
    first = seen_by.begin // G  # the part begins with a whole query
    row, wide_head = first_query.to(gl.int64), head.to(gl.int64)
    q_ptr = q.ptr + row * q.stride_t + wide_head * G * q.stride_h
    do_ptr = do.ptr + row * do.stride_t + wide_head * G * do.stride_h
    statistic = (wide_head * num_rows + row) * G
    return PairPart(
        HeadRows(q_ptr + first.to(gl.int64) * q.stride_t, q.stride_t, q.stride_h),
        HeadRows(do_ptr + first.to(gl.int64) * do.stride_t, do.stride_t, do.stride_h),
        statistics.shift + statistic + seen_by.begin,
        statistics.delta + statistic + seen_by.begin,
        first_query + first,
        head * G,
        gl.maximum(seen_by.end - seen_by.begin, 0),
        SHAPE,
    )


@gluon.jit
def load_pair_steps(pairs, ring, q_desc, do_desc):
    """The loading warpgroup of dk and dv: the program's pairs, the last first, so that all programs
    of a head walk together and share what they read. Bulk copies take whole tiles only; a last one
    that is none is there already.
    """
    BLOCK_M: gl.constexpr = ring.q.shape[1]
    D: gl.constexpr = ring.q.shape[2]
    G: gl.constexpr = pairs.SHAPE.G
    steps = gl.cdiv(pairs.number, BLOCK_M)
    for step in range(gl.minimum(pairs.number % BLOCK_M, 1) if ring.BULK else 0, steps):
        stage = ring.stage(step)
        start = (steps - 1 - step) * BLOCK_M
        ring.free.wait_for_last(step)
        pairs.copy_statistics(ring, stage, start)

        if ring.BULK:
            # In the buffers they lie as pairs do.
            shape: gl.constexpr = [BLOCK_M // G, G, D]
            at = [pairs.query + start // G, pairs.head, 0]
            barrier = ring.ready.of(step)
            mbarrier.expect(barrier, 2 * BLOCK_M * D * 2)
            q_tile = ring.q.index(stage)._reinterpret(q_desc.dtype, shape, q_desc.layout)
            tma.async_copy_global_to_shared(q_desc, at, barrier, q_tile)
            do_tile = ring.do.index(stage)._reinterpret(do_desc.dtype, shape, do_desc.layout)
            tma.async_copy_global_to_shared(do_desc, at, barrier, do_tile)
            ring.ready.arrive_after_copies(step)
        else:
            pairs.copy(ring, stage, start, FEW_ROWS)
            ring.ready.complete(step)


@gluon.jit
def product_dq(exchange, k_s, step, WARPGROUP: gl.constexpr):
    """A step's gradient of its pairs, half of the columns for each warpgroup, once both have left
    its ds in shared memory. Before the first step, a number that nobody needs.
    """
    BLOCK_M: gl.constexpr = exchange.dq.shape[1]
    HALF: gl.constexpr = exchange.dq.shape[2]
    none = gl.zeros([BLOCK_M, HALF], gl.float32, product_layout(HALF))
    buffer = (step + 2) % 2
    mbarrier.wait(exchange.ready.of(step + 2), (step + 2) // 2 - 1 & 1, pred=step >= 0)
    keys = k_s.index(0).slice(WARPGROUP * HALF, HALF, dim=1)
    ds = exchange.ds.index(2 * buffer).permute((1, 0))
    dq = warpgroup_mma(ds, keys, none, use_acc=False, is_async=True)
    keys = k_s.index(1).slice(WARPGROUP * HALF, HALF, dim=1)
    ds = exchange.ds.index(2 * buffer + 1).permute((1, 0))
    return warpgroup_mma(ds, keys, dq, is_async=True)


@gluon.jit
def add_dq(dq, pairs, exchange, dq_desc, step, steps, WARPGROUP: gl.constexpr):
    """Adds what `product_dq` gave to the sums that other programs add to as well."""
    G: gl.constexpr = pairs.SHAPE.G
    BLOCK_M: gl.constexpr = exchange.dq.shape[1]
    HALF: gl.constexpr = exchange.dq.shape[2]
    start = (steps - 1 - step) * BLOCK_M
    if step >= 0:
        if start + BLOCK_M > pairs.number:
            # The other pairs of a last tile may be another sequence's: nothing is added to them.
            pair = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, product_layout(HALF)))
            dq = gl.where((pair < pairs.number)[:, None], dq, 0.0)
        tma.store_wait(0)  # the buffer of the step before has been read
        exchange.free.arrive(step + 2)
        exchange.dq.index(WARPGROUP).store(dq)
        fence_async_shared()
        thread_barrier()
        shape: gl.constexpr = [BLOCK_M // G, G, HALF]
        at = [pairs.query + start // G, pairs.head, WARPGROUP * HALF]
        sums = exchange.dq.index(WARPGROUP)._reinterpret(gl.float32, shape, dq_desc.layout)
        bulk_add(dq_desc, at, sums)


@gluon.jit
def gather_dkdv(keys, pairs, ring, exchange, dq_desc, scale2, WARPGROUP: gl.constexpr):
    """A computing warpgroup of dk and dv: 64 windows. Scores are computed transposed, [windows,
    pairs], so that p and ds feed the matrix unit from registers. Pairs count from the program's
    first; what it does not need would spill.

    With a dq_desc also dq, which takes ds of all windows from shared memory, and a step later:
    neither warpgroup waits for the other.
    """
    PAIRS_A_WINDOW: gl.constexpr = pairs.SHAPE.KERNEL_STRIDE * pairs.SHAPE.G
    BLOCK_M: gl.constexpr = ring.q.shape[1]
    D: gl.constexpr = ring.q.shape[2]
    dtype: gl.constexpr = ring.q.dtype
    s_layout: gl.constexpr = product_layout(BLOCK_M)
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    d_layout: gl.constexpr = product_layout(D)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    dk = gl.zeros([WARPGROUP_ROWS, D], gl.float32, d_layout)
    dv = gl.zeros([WARPGROUP_ROWS, D], gl.float32, d_layout)
    none = gl.zeros([WARPGROUP_ROWS, BLOCK_M], gl.float32, s_layout)
    steps = gl.cdiv(pairs.number, BLOCK_M)
    FIRST: gl.constexpr = WARPGROUP * WARPGROUP_ROWS

    for step in range(0, steps):
        stage = ring.stage(step)
        ring.ready.wait(step)
        if not ring.BULK:
            fence_async_shared()  # the pairs came by cp.async
        q_tile, do_tile = ring.q.index(stage), ring.do.index(stage)
        scores = warpgroup_mma(
            keys.k.index(WARPGROUP), q_tile.permute((1, 0)), none, use_acc=False, is_async=True
        )
        dp = warpgroup_mma(
            keys.v.index(WARPGROUP), do_tile.permute((1, 0)), none, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(1, deps=(scores,))
        shift = ring.shift.index(stage).load(s_column) * scale2
        p = gl.exp2(scores * scale2 + shift[None, :])

        start = (steps - 1 - step) * BLOCK_M
        seen_by_all = keys.first_seen + (FIRST + WARPGROUP_ROWS - 1) * PAIRS_A_WINDOW
        if (start < seen_by_all) | (start + BLOCK_M > pairs.number):
            pair = start + gl.arange(0, BLOCK_M, s_column)
            window = FIRST + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, s_layout))
            seen = pair[None, :] >= (keys.first_seen + window * PAIRS_A_WINDOW)[:, None]
            p = gl.where(seen & (pair < pairs.number)[None, :], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        # p stays in float32 until here: read back from 16 bits it would be converted one number at
        # a time, in the unit that takes exponentials.
        ds = (p * (dp + ring.delta.index(stage).load(s_column)[None, :])).to(dtype)
        p = gl.convert_layout(p.to(dtype), a_layout)
        dv = warpgroup_mma(p, do_tile, dv, is_async=True)

        if dq_desc is not None:
            exchange.free.wait_for_last(step)
            exchange.half(step, WARPGROUP).store(ds)
            fence_async_shared()
            exchange.ready.arrive(step)
            dq = product_dq(exchange, keys.k, step - 1, WARPGROUP)
        dk = warpgroup_mma(gl.convert_layout(ds, a_layout), q_tile, dk, is_async=True)
        if dq_desc is not None:
            dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))  # dk goes on meanwhile
            add_dq(dq, pairs, exchange, dq_desc, step - 1, steps, WARPGROUP)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        ring.free.arrive(step)

    if dq_desc is not None:
        dq = product_dq(exchange, keys.k, steps - 1, WARPGROUP)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_dq(dq, pairs, exchange, dq_desc, steps - 1, steps, WARPGROUP)

    window = FIRST + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, d_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, d_layout))
    exists = (window < keys.number)[:, None]
    at = window.to(gl.int64)[:, None] * keys.stride_t + column[None, :]
    gl.store(keys.dk_ptr + at, (dk * (scale2 * LN_2)).to(keys.dk_ptr.dtype.element_ty), mask=exists)
    gl.store(keys.dv_ptr + at, dv.to(keys.dv_ptr.dtype.element_ty), mask=exists)
    if dq_desc is not None:
        tma.store_wait(0)  # shared memory may be another program's once this one has ended


@gluon_kernel
def compressed_bwd_dkdv_hopper_kernel(
    q,
    k,
    v,
    do,
    q_desc,
    do_desc,
    dq_desc,
    statistics,
    dk,
    dv,
    tiles_ptr,
    num_tiles,
    num_rows,
    num_sequences,
    part_rows,
    SHAPE: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dk and dv of a tile of windows, from a part of the pairs; with a dq_desc also dq / scale."""

    work = key_tile_work(num_tiles, HEADS)
    tile = load_tile(tiles_ptr, num_tiles, work.tile, num_rows, num_sequences, True)
    num_windows = count_windows(tile.num_keys, SHAPE.KERNEL_SIZE, SHAPE.KERNEL_STRIDE)
    first_window = tile.number * (2 * WARPGROUP_ROWS)
    if (tile.num_queries == 0) | (first_window >= num_windows):
        return

    BULK: gl.constexpr = q_desc is not None
    dtype: gl.constexpr = q.ptr.dtype.element_ty
    D: gl.constexpr = SHAPE.D
    k_s = allocate_tiles(dtype, 2, WARPGROUP_ROWS, D)
    v_s = allocate_tiles(dtype, 2, WARPGROUP_ROWS, D)
    ring = new_pair_ring(STAGES, BLOCK_M, D, dtype, BULK)
    if dq_desc is None:
        exchange: gl.constexpr = None
    else:
        exchange = new_ds_ring(BLOCK_M, D, dtype)

    seen_by = pairs_that_see(tile, first_window, work.part, part_rows, SHAPE)
    head = work.head.to(gl.int64)
    pairs = new_pair_part(q, do, statistics, tile.first_query, work.head, seen_by, num_rows, SHAPE)
    row = (tile.first_key // SHAPE.KERNEL_STRIDE + first_window).to(gl.int64)
    k = Heads(k.ptr + row * k.stride_t + head * k.stride_h, k.stride_t, k.stride_h)
    v = Heads(v.ptr + row * v.stride_t + head * v.stride_h, v.stride_t, v.stride_h)
    part = work.part.to(gl.int64)
    dk_ptr = dk.ptr + part * dk.stride_p + row * dk.stride_t + head * dk.stride_h
    dv_ptr = dv.ptr + part * dv.stride_p + row * dv.stride_t + head * dv.stride_h

    # What is loaded once, while there are registers for it: keys and values, and last pairs that do
    # not fill a tile.
    num_windows -= first_window
    for warpgroup in gl.static_range(2):
        first = warpgroup * WARPGROUP_ROWS
        copy_windows(k_s.index(warpgroup), k, first, num_windows, WARPGROUP_ROWS)
        copy_windows(v_s.index(warpgroup), v, first, num_windows, WARPGROUP_ROWS)
    if BULK:
        few_pairs = pairs.number % BLOCK_M
        if few_pairs > 0:
            pairs.copy(ring, 0, pairs.number - few_pairs, BLOCK_M)
            pairs.copy_statistics(ring, 0, pairs.number - few_pairs)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    if BULK:
        mbarrier.arrive(ring.ready.of(0), count=EITHER_WAY, pred=pairs.number % BLOCK_M > 0)

    first_seen = seen_by.first - seen_by.begin
    keys = KeyTile(k_s, v_s, dk_ptr, dv_ptr, dk.stride_t, num_windows, first_seen)
    gl.warp_specialize(
        [
            (gather_dkdv, (keys, pairs, ring, exchange, dq_desc, statistics.scale2, 0)),
            (gather_dkdv, (keys, pairs, ring, exchange, dq_desc, statistics.scale2, 1)),
            (load_pair_steps, (pairs, ring, q_desc, do_desc)),
        ],
        [4, LOADER_WARPS],
        [REGISTERS, 504 - 2 * REGISTERS],
    )
