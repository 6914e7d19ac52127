"""Tile sizes, warps and stages of the Triton kernels."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nsa_fsa.ops.common.sizes import next_power_of_2, padded_dim

# Triton versions whose Gluon, an interface still on the move, the kernels are written for.
GLUON_VERSIONS = ("3.6.", "3.7.")

# Sizes of tiles: (pairs, warps, stages).
LARGE, WIDE = (64, 4, 3), (64, 8, 2)
# Bytes of shared memory that the plain tiles for heads of 129 to 256 in 16 bits take. GPUs of
# compute capability 8.6, 8.9 and 12.0 have 99 KiB for a program, and get smaller ones; those of
# 8.0, 9.0 and 10.0 have 163 or 227.
WIDE_SHARED = 112 * 1024
# Tiles of the plain gather backward in 16 bits, by padded head width, for blocks of 16, 32, 64 and
# 128 keys. Each is the largest that compiles for sm_80, sm_90 and sm_100 without spilling. None has
# one stage: on an H200 with Triton 3.6 dq is then wrong for blocks of 64 and more, whatever the
# rows and warps.
PLAIN_BWD = {
    32: (LARGE, LARGE, LARGE, WIDE),
    64: ((64, 4, 2), (32, 4, 2), (32, 4, 2), (32, 8, 2)),
    128: ((32, 4, 2),) * 4,
    256: ((32, 8, 2),) * 4,
}

# Up to which size of its union a tile goes by it, in blocks that a query may choose, with the Gluon
# kernel: on an H200 with choices of a real model (65,536 tokens, 64 heads of 128) the whole forward
# took 6.94, 6.13, 6.17 and 5.94 ms with 1.5, 2, 2.5 and 3 at G = 16, and 11.95 without; at G = 4
# 10.1, 9.10, 8.70 and 8.62, and 12.75 without. Smaller groups were not measured as a whole.
HOPPER_UNIONS, LEAST_GROUP = 3.0, 4
# With the plain kernel, which the profiler tries: as it was, it took 8.97 ms at G = 16, 11.5 at
# G = 4 and 14.1 at G = 1, where it was 13.98 without.
PLAIN_UNIONS = 1.5


def dot_precision(dtype: torch.dtype) -> str:
    """What tl.dot does with float32, as torch's own setting says;
    16-bit inputs are exact either way.

    `torch.set_float32_matmul_precision` and `allow_tf32` set what is read here, too. To read those
    instead raises an error once anybody has used the newer setting, as the Trainer does with
    tf32=True.
    """
    is_tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"


@dataclass(frozen=True)
class Config:
    """How the KV-major kernels cut their work."""

    fwd_hopper: bool = False  # the Gluon kernel instead of its plain Triton twin
    fwd_m: int = 64  # pairs of a tile
    fwd_keys: int = 128  # of a block, that a program of the plain kernel holds at most
    fwd_warps: int = 4
    fwd_stages: int = 3  # of the plain kernel; the Gluon one has two
    fwd_item_rows: int = 2048  # pairs that one program walks at most
    merge_m: int = 64
    merge_keys: int = 128  # of a step
    merge_warps: int = 4
    merge_stages: int = 3
    # A tile of neighbouring queries attends to the union of their blocks where this has at most so
    # many times as many blocks as a query may choose; 0: none does.
    union_factor: float = 0.0
    union_hopper: bool = False  # the Gluon kernel, of 128 pairs a tile and 128 keys a step
    union_m: int = 64  # pairs of such a tile
    union_keys: int = 64  # of a step of the plain kernel, as warps
    union_warps: int = 4
    union_stages: int = 3
    union_slots: int = 2  # buffers of the Gluon kernel for tiles of pairs
    union_registers: int = 224  # as fwd_registers of `CompressedConfig`
    bwd_hopper: bool = False
    bwd_m: int = 32
    bwd_keys: int = 128  # as fwd_keys
    bwd_warps: int = 4
    bwd_stages: int = 2
    bwd_item_rows: int = 4096
    dq_m: int = 32
    dq_warps: int = 4
    dq_stages: int = 4
    stop_early: bool = True  # at an item's last pair; the ablation walks as far as the largest item


@dataclass(frozen=True)
class CompressedConfig:
    """How the kernels of compressed attention cut their work.

    Tiles have m pairs and n compressed tokens.
    """

    # The Gluon kernels instead of their plain twins; their tiles are 128 wide, in two halves.
    hopper: bool = False
    fwd_m: int = 128
    fwd_n: int = 64
    fwd_warps: int = 8
    fwd_stages: int = 3
    # Buffers of the Gluon kernels for tiles of pairs: with two the next one arrives meanwhile.
    fwd_slots: int = 2
    # Registers per thread of each computing warpgroup of the Gluon kernels; the loader gets the
    # remaining 504 - 2 * fwd_registers.
    fwd_registers: int = 224
    dq_m: int = 64
    dq_n: int = 64
    dq_warps: int = 4
    dq_stages: int = 2
    dq_slots: int = 1
    dq_registers: int = 224
    dkdv_m: int = 64
    dkdv_n: int = 64
    dkdv_warps: int = 4
    dkdv_stages: int = 2
    dkdv_registers: int = 240
    dkdv_heads: int = 16  # done at a time

    # Pairs are cut into parts until there are so many programs, eight a multiprocessor of an H200,
    # or until a part has no more pairs than dkdv_part_rows.
    dkdv_programs: int = 1056
    dkdv_part_rows: int = 2048

    # Where the Gluon kernel of dk and dv adds up dq as well. On an H200, 64 heads, ms in two passes
    # / in one: 8,192 tokens 0.63 / 0.71; 16,384 1.8 / 2.0; 32,768 6.8 / 6.5; 65,536 25.4, 25.0,
    # 25.4 / 23.2, 22.4, 22.0 (G = 1, 4, 16); 131,072 100 / 88.
    one_pass_tokens: int = 49152  # a longest sequence from which on it does
    one_pass_stages: int = 2  # with 3 24.1 and 98.5 ms (65,536, 131,072; G = 4)
    # One head at a time, its pairs in parts: what its programs add to, and read, then stays in L2.
    # With 16 heads and parts as above 29.4, 26.7, 23.8 ms; with 2 heads 23.9, 22.3, 22.5.
    one_pass_part_rows: int = 32768
    one_pass_parts: int = 16  # at most, for the sake of memory
    # Bytes of sums of dq at a time, beyond one KV head's. With 2 GiB the core's backward at 131,072
    # tokens, G = 16, takes 152.5 instead of 155.5 ms, and its peak is 2.03 times full attention's
    # own tensors instead of 1.99 (one H200); at G = 4 six KV heads have 1.5 GiB.
    one_pass_sums: int = 3 << 29


def is_cramped(x: Tensor) -> bool:
    """Whether the GPU that x is on has too little shared memory for the tiles of wide heads."""
    if not x.is_cuda:
        return False
    # AMD's properties have no such number.
    available = getattr(
        torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", WIDE_SHARED
    )
    return available < WIDE_SHARED


def runs_gluon(q: Tensor, v: Tensor) -> bool:
    """True if Gluon kernels can take these tensors, once rows begin at multiples of 16 bytes."""
    return (
        q.is_cuda
        and torch.version.hip is None  # AMD's MI200 says (9, 0) as well
        and triton.__version__.startswith(GLUON_VERSIONS)
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] == v.shape[2]
        and q.shape[2] in (64, 128)
    )


def runs_hopper(q: Tensor, v: Tensor, block_size: int) -> bool:
    """True if the Gluon kernels of selected attention can take these tensors."""
    return block_size in (64, 128) and runs_gluon(q, v)


def padded_width(q: Tensor, v: Tensor) -> int:
    return max(padded_dim(q.shape[2]), padded_dim(v.shape[2]), 32)


def remembered(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes each choice once.

    A choice depends on dtype, head widths, the size of a group and the rest of its arguments only.
    It is asked for at every call of an operator, and making it takes longer than a launch (0.2 ms
    for the candidates).
    """
    found: dict[Any, Any] = {}

    @functools.wraps(choose)
    def recall(q: Tensor, v: Tensor, block_size: int, *rest: Any) -> Any:
        gpu = (runs_hopper(q, v, block_size), is_cramped(q))
        heads = (q.shape[1] // v.shape[1], q.shape[2], v.shape[2])
        key = (q.dtype, *heads, block_size, *rest, *gpu)
        if key not in found:
            found[key] = choose(q, v, block_size, *rest)
        return found[key]

    return recall


def fields(name: str, tile: tuple[int, int, int] | None = None, **sizes: int) -> Any:
    """The fields of a config that are named after a pass; tile: pairs, warps and stages."""
    if tile is not None:
        sizes |= zip(("m", "warps", "stages"), tile, strict=True)
    return {f"{name}_{size}": number for size, number in sizes.items()}


@remembered
def plain_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    """The tiles of the plain kernels for q `[T, HQ, D]` and v `[T, HKV, DV]`.

    A program of the gather forward holds at most 32 KiB of keys, one of the others 16 KiB or less;
    larger blocks are cut. `make resources` shows that none spills.
    """
    width = padded_width(q, v)
    cramped = width > 128 and is_cramped(q)
    keys = bwd_keys = merge_keys = 16384 // (width * q.element_size())
    if q.element_size() == 4:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        fwd, bwd, merge = (16 if cramped else 32, 8, 2), (16, 8, 2), (16, 8, 3)
        if min(keys, block_size) * width <= 1024:
            bwd = (16, 4, 2)  # with 8 warps ptxas prefers 24 bytes of stack to one register more
    else:
        fwd = LARGE if width <= 128 else (32, 8, 2) if cramped else WIDE
        bwd = PLAIN_BWD[width][block_size.bit_length() - 5]
        # 64 keys of 128 leave 16 to 250 bytes on the stack on sm_80, and in the merge 72 to 160 on
        # sm_100 where blocks have 128.
        bwd_keys = 32 if width >= 128 else keys
        merge = LARGE if width <= 128 else WIDE
        if width == 128 and block_size == 128:
            merge_keys = 32
        if cramped:
            merge_keys = 16  # 32 rows instead leave 40 bytes on the stack

    return Config(
        **fields("fwd", fwd, keys=2 * keys),
        **fields("merge", merge, keys=merge_keys),
        **plain_unions(width, q.element_size(), is_cramped(q)),
        **fields("bwd", bwd, keys=bwd_keys),
    )


def plain_unions(width: int, element_size: int, cramped: bool) -> dict[str, Any]:
    """The fields of a config that are about unions, for heads of a padded width.

    None goes by unions by default. With 64 keys of 128 a step 8 bytes are left on the stack on
    sm_80 and 96 on sm_100, and with 32 of 256 40 on sm_100.
    """
    if element_size == 4:
        return fields("union", (32, 8, 2), keys=max(2048 // width, 16))
    if width > 128:
        return fields("union", (64, 8, 2), keys=16)
    tile = (64, 4, 2 if cramped else 3)
    return fields("union", tile, keys=min(4096 // width, 64))


def compressed_config(
    q: Tensor, v: Tensor, group_size: int, plain: bool = False
) -> CompressedConfig:
    """The tiles of compressed attention for q `[T, HQ, D]` and v `[T // kernel_stride, HKV, DV]`.

    With plain, they are never those of the Gluon kernels.
    """
    gluon = not plain and runs_gluon(q, v)
    return _compressed_config(q.dtype, q.shape[2], v.shape[2], group_size, gluon, is_cramped(q))


@functools.cache
def _compressed_config(
    dtype: torch.dtype, head_dim: int, v_dim: int, group_size: int, gluon: bool, cramped: bool
) -> CompressedConfig:
    if gluon:
        return CompressedConfig(
            hopper=True,
            **fields("fwd", m=128, n=128, stages=2),
            **fields("dq", m=128, n=64, stages=3),
            **fields("dkdv", m=64, n=128, stages=3),
        )

    width = max(padded_dim(head_dim), padded_dim(v_dim), 32)
    group = next_power_of_2(group_size)  # a tile has whole groups
    if dtype == torch.float32:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        m = max(16, group)
        return CompressedConfig(
            **fields("fwd", (m, 8, 2), n=16),
            **fields("dq", (m, 8, 2), n=16),
            **fields("dkdv", (16, 8, 2), n=16),
        )

    # With 64 keys a step, and 4 warps for dq or, at a width of 128, for dk and dv, 24 to 80 bytes
    # are left on the stack on sm_80 or sm_100. 48 to 64 still are on sm_80 where values are 128
    # wide and keys at most 64, for dk and dv. The forward's third stage spares 8 of 24 bytes on
    # sm_100 (G = 16, packed sequences, Triton 3.6).
    dq_n = 64 if width <= 32 else 16 if width > 128 and cramped else 32
    m, half = max(128 if width <= 128 else 64, group), max(64, group)
    dkdv = (64, 4, 2) if width <= 64 else (32, 8, 2)
    return CompressedConfig(
        **fields("fwd", (m, 8, 3 if width <= 128 else 2), n=64 if width <= 64 else 32),
        **fields("dq", (half, 4 if width <= 32 else 8, 2), n=dq_n),
        **fields("dkdv", dkdv, n=64 if width <= 128 else 32),
    )


def query_major_tile(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Keys of a step at most, warps and stages of the query-major kernels.

    H200, 8,192 tokens, 16 blocks of 64 x 128, ms forward / dq at G = 1: 30.2 / 31.5; with 4 warps
    31.8 / 33.6, 3 stages 38.0 / 35.4, 32 keys 31.9 / 35.0, 32 keys and 1 warp and 3 stages
    27.8 / 34.9.
    """
    width = padded_width(q, v)
    if q.element_size() == 2:
        return 16 if width > 128 and is_cramped(q) else 8192 // width, 2 if width <= 128 else 4, 2
    return (2048 // width, 4, 2) if width <= 128 else (32, 8, 2)


@remembered
def default_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    """The default for q `[T, HQ, D]` and v `[T, HKV, DV]`; the profiler tries others."""
    plain = plain_config(q, v, block_size)
    if not runs_hopper(q, v, block_size):
        return plain
    return dataclasses.replace(
        plain,
        **fields("fwd", hopper=True, m=64, warps=4),
        union_factor=HOPPER_UNIONS if q.shape[1] // v.shape[1] >= LEAST_GROUP else 0.0,
        **fields("union", hopper=True, m=128, stages=2 if q.shape[2] == 128 else 4),
        merge_keys=8192 // padded_width(q, v),
        **fields("bwd", (64, 4 if block_size == 64 else 8, 2), hopper=True),
    )


@remembered
def candidates(q: Tensor, v: Tensor, block_size: int, direction: str) -> dict[str, Config]:
    """What the profiler tries for "forward" or "backward", by name; the default comes first.

    Tiles that spill inside a loop are left out.
    """
    default = default_config(q, v, block_size)
    width, half = padded_width(q, v), q.element_size() == 2
    changes: list[dict[str, Any]]
    if direction == "forward":
        changes = [dict(fwd_item_rows=rows) for rows in (1024, 4096)]
        if half and block_size <= 64 and block_size * width <= 8192:
            changes += [dict(fwd_hopper=False, fwd_m=128, fwd_stages=2, fwd_item_rows=8192)]
        # Where tiles go by their unions by default, no timing can speak against it: whether one
        # does depends on its queries, and what is timed may be anything.
        if half and width <= 128 and not default.union_factor:
            changes += [dict(union_factor=HOPPER_UNIONS if default.union_hopper else PLAIN_UNIONS)]
        if half and (width <= 128 or not is_cramped(q)):
            changes += [dict(fwd_hopper=False, fwd_m=64, fwd_stages=stages) for stages in (2, 3)]
    else:
        changes = [dict(bwd_item_rows=rows) for rows in (2048, 8192, 16384)] if half else []
        plain = dict(bwd_hopper=False, bwd_m=32, bwd_warps=4, bwd_stages=2)
        if default.bwd_hopper:
            changes += [dict(bwd_stages=1)]
            if (width, block_size) != (64, 128):  # 144 bytes of spills on sm_90
                changes += [plain]
        if half and width <= 128:
            changes += [plain | dict(bwd_keys=4096 // width)]

    found = {"kv_major": default}
    for change in changes:
        config = dataclasses.replace(default, **change)
        if config not in found.values():
            what = " ".join(f"{name}={value}" for name, value in change.items())
            found[f"kv_major {what}"] = config
    return found
