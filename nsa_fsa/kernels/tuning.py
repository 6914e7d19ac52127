"""Tile sizes, warps and stages of the Triton kernels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How the KV-major kernels cut their work."""

    fwd_m: int = 64  # rows of a tile: (query, head of the group) pairs
    fwd_warps: int = 4
    fwd_stages: int = 3
    fwd_item_rows: int = 4096  # rows that one program walks at most
    merge_m: int = 64
    merge_warps: int = 4
    merge_stages: int = 3
    bwd_m: int = 32
    bwd_warps: int = 4
    bwd_stages: int = 2
    bwd_item_rows: int = 4096
    dq_m: int = 64
    dq_warps: int = 4
    dq_stages: int = 3


def default_config(q: Tensor, v: Tensor, block_size: int) -> Config:
    return Config()
