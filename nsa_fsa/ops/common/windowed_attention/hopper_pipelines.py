"""What the warpgroups of the Gluon kernels hand to each other: rings of buffers in shared memory,
and when one may be used.

One warpgroup, the loader, fills the buffers of a ring in turn; two others compute with them. The
n-th use of a ring of SIZE buffers is that of buffer n % SIZE. Loader and computing warpgroups count
uses by themselves, and so meet without a word.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate
from triton.language.core import base_value
from typing_extensions import dataclass_transform

from nsa_fsa.ops.common.hopper import thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_layouts import allocate_tiles

WARPGROUP_ROWS = gl.constexpr(64)  # of the products of a computing warpgroup: pairs, or windows
LOADER_WARPS = gl.constexpr(4)
LOADER_THREADS = gl.constexpr(128)
# Arrivals that complete a buffer which is loaded by either way: of the loading threads, once their
# copies are there, and of the one that announces the bulk copy or its absence.
EITHER_WAY = gl.constexpr(129)


@dataclass_transform()
def gluon_object(cls: Any) -> Any:
    """A class of Gluon objects, made in a kernel of their members in the order of annotation."""
    names = tuple(cls.__annotations__)

    def __init__(self, *members):
        for name, x in zip(names, members, strict=True):
            setattr(self, name, x if isinstance(x, base_value) else gl.constexpr(x))

    cls.__init__ = gluon.constexpr_function(__init__)
    return aggregate(cls)


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon_object
class Signal:
    """A barrier for each buffer of a ring; uses of the ring are the phases of its barriers."""

    barriers: gl.shared_memory_descriptor
    SIZE: gl.constexpr

    @gluon.jit
    def of(self, use):
        """The barrier of a use's buffer."""
        return self.barriers.index(use % self.SIZE)

    @gluon.jit
    def wait(self, use):
        """Waits until the signal was given for this use."""
        mbarrier.wait(self.of(use), use // self.SIZE & 1)

    @gluon.jit
    def wait_for_last(self, use):
        """Waits for the signal of the use of the same buffer before this one, if there was any."""
        mbarrier.wait(self.of(use), use // self.SIZE & 1 ^ 1)

    @gluon.jit
    def arrive(self, use):
        """Gives the signal, or this warpgroup's half of it, once all of its threads are here."""
        thread_barrier()
        mbarrier.arrive(self.of(use), count=1)

    @gluon.jit
    def arrive_after_copies(self, use):
        """Gives the loading threads' part of the signal once their copies by cp.async are there."""
        async_copy.mbarrier_arrive(self.of(use), increment_count=False)

    @gluon.jit
    def complete(self, use):
        """All arrivals of a signal that counts EITHER_WAY, for a buffer that came by cp.async."""
        self.arrive_after_copies(use)
        mbarrier.arrive(self.of(use), count=1)


@gluon.jit
def new_signal(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """A signal that COUNT arrivals give."""
    return Signal(allocate_barriers(SIZE, COUNT), SIZE)


@gluon_object
class QueryRing:
    """Tiles of queries; a stage is two buffers, one for each computing warpgroup."""

    q: gl.shared_memory_descriptor  # [2 * QUERY_STAGES, WARPGROUP_ROWS, D]
    do: gl.shared_memory_descriptor | gl.constexpr  # the same; None for the forward
    ready: Signal
    free: Signal

    @gluon.jit
    def number(self, use, warpgroup):
        """Which buffer a computing warpgroup reads."""
        return 2 * (use % self.ready.SIZE) + warpgroup


@gluon.jit
def new_query_ring(
    QUERY_STAGES: gl.constexpr, D: gl.constexpr, HAS_DO: gl.constexpr, dtype: gl.constexpr
):
    q = allocate_tiles(dtype, 2 * QUERY_STAGES, WARPGROUP_ROWS, D)
    do = None
    if HAS_DO:
        do = allocate_tiles(dtype, 2 * QUERY_STAGES, WARPGROUP_ROWS, D)
    return QueryRing(q, do, new_signal(QUERY_STAGES, LOADER_THREADS), new_signal(QUERY_STAGES, 2))


@gluon_object
class WindowRing:
    """Steps of windows: compressed keys and values, which arrive apart and are free together."""

    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, D]
    v: gl.shared_memory_descriptor
    k_ready: Signal
    v_ready: Signal
    free: Signal

    @gluon.jit
    def stage(self, use):
        """Which buffers a use is of."""
        return use % self.free.SIZE

    @gluon.jit
    def keys(self, use):
        return self.k.index(self.stage(use))

    @gluon.jit
    def values(self, use):
        return self.v.index(self.stage(use))


@gluon.jit
def new_window_ring(
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, dtype: gl.constexpr
):
    k = allocate_tiles(dtype, STAGES, BLOCK_N, D)
    v = allocate_tiles(dtype, STAGES, BLOCK_N, D)
    k_ready, v_ready = new_signal(STAGES, EITHER_WAY), new_signal(STAGES, EITHER_WAY)
    return WindowRing(k, v, k_ready, v_ready, new_signal(STAGES, 2))


@gluon.jit
def bulk_copy_windows(desc, at, signal, use, buffer):
    """Asynchronously, windows of a head from `at` on, all of which exist, and the whole signal."""
    mbarrier.expect(signal.of(use), buffer.shape[0] * buffer.shape[1] * 2)
    tma.async_copy_global_to_shared(desc, at, signal.of(use), buffer)
    signal.arrive_after_copies(use)
