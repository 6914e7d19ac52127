"""Choices of blocks that a real model made on real text, for sequences of any length.

`scripts/record_choices.py` records them: of SmolLM2-135M, 16 blocks of 64, in some layers, for
8,192 tokens. Neighbouring queries of a real text choose alike, which choices at random do not.

What is longer than the record repeats its queries from 1,024 on, which have more blocks than they
can choose: query t + 7,168 n chooses as query t does, and its local blocks are its own. A free
block that it chose beyond the first 1,024 keys is moved by 112 blocks, none to n times: by chance,
but by as much for all queries of one repetition, so that neighbours agree as much as before.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("recorded_blocks.npz")
TOKENS, BLOCK_SIZE, NUM_BLOCKS, INIT_BLOCKS, LOCAL_BLOCKS = 8192, 64, 16, 1, 2
KEPT = 1024  # tokens that every query reads whole, which are not repeated


class Recorded(NamedTuple):
    """One layer's choices."""

    stage: str  # "untrained", "converted"
    layer: int
    block_indices: Tensor  # int32 [8192, HKV, 16]


def write(records: list[Recorded], path: Path = FILE) -> None:
    """Keeps records in a small file: blocks as differences in bytes, and 255 for no block."""
    rows: dict[str, Any] = {}
    for x in records:
        blocks = x.block_indices.numpy()
        steps = np.diff(blocks, axis=2, prepend=0)
        rows[f"{x.stage}_{x.layer}"] = np.where(blocks < 0, 255, steps).astype(np.uint8)
    np.savez_compressed(path, **rows)


def read(path: Path = FILE) -> list[Recorded]:
    """What `write` wrote. Raises OSError where it is not."""
    found = []
    with np.load(path) as rows:
        for name in rows:
            stage, _, layer = name.partition("_")
            steps = rows[name].astype(np.int32)
            blocks = np.where(steps == 255, -1, np.where(steps == 255, 0, steps).cumsum(2))
            found.append(Recorded(stage, int(layer), torch.from_numpy(blocks.astype(np.int32))))
    return found


def heads_of(records: list[Recorded], number: int) -> Tensor:
    """So many KV heads, `[8192, number, 16]`: the first of every layer, then the second, and so on,
    and from the beginning where these are not enough."""
    every = torch.stack([x.block_indices for x in records], 2).flatten(1, 2)  # [T, HKV * layers, .]
    return every[:, torch.arange(number) % every.shape[1]]


def lengthened(recorded: Tensor, num_tokens: int, seed: int = 0) -> Tensor:
    """Choices of a sequence of any length, at least 1, as above: int32 `[8192, HKV, 16]` ->
    `[num_tokens, HKV, 16]`, ascending, with -1 behind. seed: of where free blocks are moved."""
    rows = torch.arange(num_tokens)
    repetition = (rows - KEPT).clamp(min=0) // (TOKENS - KEPT)
    rows = rows - repetition * (TOKENS - KEPT)
    blocks = recorded[rows]  # [T, HKV, 16]

    period, heads = (TOKENS - KEPT) // BLOCK_SIZE, torch.arange(recorded.shape[1])
    generator = torch.Generator().manual_seed(seed)
    most = int(repetition.max()) + 1
    draws = torch.rand(most, len(heads), TOKENS // BLOCK_SIZE, generator=generator)
    moved = (draws * torch.arange(1, most + 1)[:, None, None]).long()  # 0 .. repetition

    own, again = (rows // BLOCK_SIZE)[:, None, None], repetition[:, None, None]
    place = (again, heads[None, :, None], blocks.clamp(min=0).long())
    by = torch.where(blocks < KEPT // BLOCK_SIZE, 0, moved[place])
    by = torch.where(blocks > own - LOCAL_BLOCKS, again, by)
    blocks = torch.where(blocks < 0, 1 << 30, blocks + by * period).sort(-1).values
    return torch.where(blocks == 1 << 30, -1, blocks).int()


def union_factor(block_indices: Tensor, neighbours: int) -> float:
    """How many blocks so many neighbouring queries read together, over what one of them reads; the
    mean over tiles of as many queries that each have all blocks, and KV heads."""
    tiles = block_indices[KEPT:].unflatten(0, (-1, neighbours))  # [tiles, N, HKV, 16]
    together = tiles.movedim(1, 2).flatten(2).sort(-1).values  # [tiles, HKV, N * 16]
    distinct = 1 + (together.diff(dim=-1) > 0).sum(-1)
    return (distinct / block_indices.shape[2]).mean().item()
