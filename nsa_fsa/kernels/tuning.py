"""Tile sizes, warps and stages of the Triton kernels."""

from dataclasses import dataclass

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
