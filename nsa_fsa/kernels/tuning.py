"""Tile sizes, warps and stages of the Triton kernels."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How the KV-major kernels cut their work. Rows are (query, head of the group) pairs."""

    fwd_hopper: bool = False  # the Gluon kernel instead of its plain Triton twin
    fwd_m: int = 64  # rows of a tile
    fwd_warps: int = 4
    fwd_stages: int = 3  # of the plain kernel; the Gluon one has two
    fwd_item_rows: int = 4096  # rows that one program walks at most
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
    """Whether the Gluon kernels can take these tensors."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] == v.shape[2]
        and q.shape[2] in (64, 128)
        and block_size in (64, 128)
    )


def default_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    """The reproducible choice for q `[T, HQ, D]` and v `[T, HKV, DV]`; the profiler tries others."""
    if runs_hopper(q, v, block_size):
        return Config(fwd_hopper=True, bwd_hopper=True, bwd_m=64, bwd_warps=4 if block_size == 64 else 8, bwd_stages=2)
    return Config()


def candidates(q: Tensor, v: Tensor, block_size: int, direction: str) -> dict[str, Config]:
    """What the profiler tries for "forward" or "backward", by name; the default comes first."""
    default = default_config(q, v, block_size)
    plain = Config()
    changes: list[dict[str, Any]]
    if direction == "forward":
        changes = [dict(fwd_item_rows=2048), dict(fwd_hopper=False, fwd_m=128, fwd_stages=2, fwd_item_rows=8192)]
        changes += [dict(fwd_hopper=False, fwd_m=64, fwd_stages=stages) for stages in (2, 3)]
    else:
        changes = [dict(bwd_item_rows=rows) for rows in (2048, 8192, 16384)] + [dict(bwd_stages=1)]
        changes += [dict(bwd_hopper=False, bwd_m=plain.bwd_m, bwd_warps=plain.bwd_warps, bwd_stages=plain.bwd_stages)]
    found = {"kv_major": default}
    for change in changes:
        config = dataclasses.replace(default, **change)
        if config not in found.values():
            found["kv_major " + " ".join(f"{name}={value}" for name, value in change.items())] = config
    return found
