"""What selected attention is called with."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsa_fsa.ops.common.calls import AttentionCall, Blocks
from nsa_fsa.sequences import Length, Sequences

# The bit of `BlockIndex.num_sparse` for queries that are not in it, because their tile reads the
# union of its blocks instead.
BY_UNION = 1 << 30


class BlockIndex(NamedTuple):
    """Who chose which block, int32. Chosen blocks that no kernel treats as dense are sparse."""

    # [HKV, T * num_slots]: query row * num_slots + slot; a block's lie together, ascending.
    entries: Tensor
    first_entry: Tensor  # [HKV, num_blocks]: where a block's entries begin
    num_entries: Tensor  # [HKV, num_blocks]
    # [HKV, T]: sparse blocks of a query, which fill its slots from 0 on; bit 31: its own is chosen.
    num_sparse: Tensor
    rows: Tensor  # [4, T]: where the queries lie, as `RowTable`
    blocks: Tensor  # [6, num_blocks]: where the blocks lie, as `BlockTable`


@dataclass(frozen=True)
class SelectedCall(AttentionCall):
    """One call of selected attention."""

    blocks: Blocks
    block_indices: Tensor  # int32 [T, HKV, T_sel]
    block_counts: Tensor | None  # int32 [T, HKV]
    index: BlockIndex | None  # the inverse of block_indices, where a KV-major kernel is to read it

    @property
    def num_slots(self) -> int:
        """How many sparse blocks a query can have."""
        return num_slots(self.block_indices.shape[2], self.blocks)


def num_slots(num_indices: int, blocks: Blocks) -> int:
    """How many sparse blocks a query can have.

    The forced ones, which the caller promises to be there, are dense.
    """
    return max(num_indices - blocks.init_blocks - blocks.local_blocks, 0)


@dataclass(frozen=True)
class IndexCall:
    """One call of `block_index`."""

    block_indices: Tensor  # int32 [T, HKV, T_sel]
    block_counts: Tensor | None  # int32 [T, HKV]
    sequences: Sequences
    num_keys: Length  # rows of the keys, which are those of the queries unless these are the last
    blocks: Blocks
    workspace_bytes: int

    @classmethod
    def of(cls, call: SelectedCall) -> "IndexCall":
        """What makes the index of a call of selected attention."""
        indices, counts = call.block_indices, call.block_counts
        return cls(
            *(indices, counts, call.sequences, call.k.shape[0]),
            *(call.blocks, call.workspace_bytes),
        )


def empty_index(call: IndexCall, rows: Tensor, blocks: Tensor) -> BlockIndex:
    """A block index whose entries are to come, with tables of where rows and blocks lie."""
    indices, num_blocks = call.block_indices, blocks.shape[1]
    num_rows, num_heads, num_indices = indices.shape
    return BlockIndex(
        entries=indices.new_empty(num_heads, num_rows * num_slots(num_indices, call.blocks)),
        first_entry=indices.new_empty(num_heads, num_blocks),
        num_entries=indices.new_empty(num_heads, num_blocks),
        num_sparse=indices.new_empty(num_heads, num_rows),
        rows=rows,
        blocks=blocks,
    )
