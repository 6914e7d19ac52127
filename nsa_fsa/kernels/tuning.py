"""Tile sizes, warps and stages of the Triton kernels."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nsa_fsa.kernels.primitives import padded_dim

# Triton versions whose Gluon, an interface still on the move, the kernels are written for.
GLUON_VERSIONS = ("3.6.", "3.7.")

# (rows, warps, stages) of the plain gather forward, gather backward and merge forward, by bytes of an element, padded head
# width and block size: the first of a list from large to small that compiles for sm_80 and sm_90 without spilling. Sizes that
# are not here take SMALLEST, which for the backward of 16-bit heads wider than 128 and of float32 blocks of 64 x 128 spills.
SMALLEST = (16, 8, 1)
L, M = (64, 4, 3), (64, 8, 2)
PLAIN_TILES = {
    (2, 32, 16): (L, L, L), (2, 32, 32): (L, L, L), (2, 32, 64): (L, L, L), (2, 32, 128): (L, M, L),
    (2, 64, 16): (L, (64, 4, 2), L), (2, 64, 32): (L, (32, 4, 2), L), (2, 64, 64): (L, (32, 4, 2), L),
    (2, 64, 128): (L, (32, 8, 2), L), (2, 128, 16): (L, (16, 4, 2), L), (2, 128, 32): (L, (16, 4, 1), L),
    (2, 128, 64): (L, SMALLEST, L), (2, 128, 128): (L, SMALLEST, L), (2, 256, 16): (L, SMALLEST, M),
    (2, 256, 32): (L, SMALLEST, M), (2, 256, 64): ((64, 4, 2), SMALLEST, (32, 4, 2)),
    (2, 256, 128): ((32, 4, 2), SMALLEST, (32, 8, 2)),
    (4, 32, 16): (L, M, L), (4, 32, 32): (L, M, L), (4, 32, 64): (M, (32, 4, 2), L), (4, 32, 128): (M, (32, 8, 2), M),
    (4, 64, 16): (L, (32, 4, 2), L), (4, 64, 32): ((32, 4, 2), (32, 8, 2), M), (4, 64, 64): (M, (16, 4, 1), (32, 8, 2)),
    (4, 64, 128): ((32, 8, 2), SMALLEST, SMALLEST), (4, 128, 16): (L, (32, 8, 2), (32, 8, 2)),
    (4, 128, 32): (M, SMALLEST, SMALLEST), (4, 128, 64): ((32, 8, 2), SMALLEST, (32, 8, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How the KV-major kernels cut their work. Rows are (query, head of the group) pairs."""

    fwd_hopper: bool = False  # the Gluon kernel instead of its plain Triton twin
    fwd_m: int = 64  # rows of a tile
    fwd_warps: int = 4
    fwd_stages: int = 3  # of the plain kernel; the Gluon one has two
    fwd_item_rows: int = 2048  # rows that one program walks at most
    merge_m: int = 64
    merge_warps: int = 4
    merge_stages: int = 3
    bwd_hopper: bool = False
    bwd_m: int = 32
    bwd_warps: int = 4
    bwd_stages: int = 2
    bwd_item_rows: int = 4096
    dq_m: int = 32
    dq_warps: int = 4
    dq_stages: int = 4


def runs_hopper(q: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether the Gluon kernels can take these tensors, once their rows begin at multiples of 16 bytes."""
    return (
        q.is_cuda
        and triton.__version__.startswith(GLUON_VERSIONS)
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] == v.shape[2]
        and q.shape[2] in (64, 128)
        and block_size in (64, 128)
    )


def plain_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    """The tiles of the plain kernels for q `[T, HQ, D]` and v `[T, HKV, DV]`."""
    width = max(padded_dim(q.shape[2]), padded_dim(v.shape[2]), 32)
    tiles = PLAIN_TILES.get((q.element_size(), width, block_size), (SMALLEST,) * 3)
    (fwd_m, fwd_warps, fwd_stages), (bwd_m, bwd_warps, bwd_stages), (merge_m, merge_warps, merge_stages) = tiles
    return Config(
        fwd_m=fwd_m, fwd_warps=fwd_warps, fwd_stages=fwd_stages, bwd_m=bwd_m, bwd_warps=bwd_warps, bwd_stages=bwd_stages,
        merge_m=merge_m, merge_warps=merge_warps, merge_stages=merge_stages,
    )  # fmt: skip


def default_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    """The reproducible choice for q `[T, HQ, D]` and v `[T, HKV, DV]`; the profiler tries others."""
    plain = plain_config(q, v, block_size)
    if not runs_hopper(q, v, block_size):
        return plain
    return dataclasses.replace(
        plain, fwd_hopper=True, fwd_m=64, fwd_warps=4, bwd_hopper=True, bwd_m=64, bwd_stages=2,
        bwd_warps=4 if block_size == 64 else 8,
    )  # fmt: skip


def candidates(q: Tensor, v: Tensor, block_size: int, direction: str) -> dict[str, Config]:
    """What the profiler tries for "forward" or "backward", by name; the default comes first."""
    default = default_config(q, v, block_size)
    changes: list[dict[str, Any]]
    if direction == "forward":
        changes = [
            dict(fwd_item_rows=1024),
            dict(fwd_item_rows=4096),
            dict(fwd_hopper=False, fwd_m=128, fwd_stages=2, fwd_item_rows=8192),
        ]
        changes += [dict(fwd_hopper=False, fwd_m=64, fwd_stages=stages) for stages in (2, 3)]
    else:
        changes = [dict(bwd_item_rows=rows) for rows in (2048, 8192, 16384)] + [dict(bwd_stages=1)]
        changes += [dict(bwd_hopper=False, bwd_m=32, bwd_warps=4, bwd_stages=2)]
    found = {"kv_major": default}
    for change in changes:
        config = dataclasses.replace(default, **change)
        if config not in found.values():
            found["kv_major " + " ".join(f"{name}={value}" for name, value in change.items())] = config
    return found
