"""Looking inside: which blocks were selected, how many keys that comes to, and how the gates behave.

The plotting functions need matplotlib: `pip install "nsa-fsa[plot]"`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa.config import BRANCHES, NSAConfig
from nsa_fsa.modules.native_sparse_attention import NativeSparseAttention, Record

# Colour-blind safe (Okabe and Ito): orange, blue, green.
BRANCH_COLORS = ("#E69F00", "#0072B2", "#009E73")


@contextmanager
def record(model: nn.Module) -> Iterator[list[Record]]:
    """Collects a `Record` of every forward of every NSA layer in the model.

    Example:
        >>> with record(model) as records:
        ...     model(input_ids)
        >>> records[0].block_indices  # int32 [T, HKV, T_sel]
    """
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no NativeSparseAttention layer. Fix: patch_model(model) first.")
    records: list[Record] = []
    for layer in layers:
        layer.recorder = records.append
    try:
        yield records
    finally:
        for layer in layers:
            layer.recorder = None


def first_sequence_blocks(entry: Record) -> Tensor:
    """The block indices of the first sequence in a record of a forward without a cache, int32 `[S, HKV, T_sel]`.

    Raises:
        ValueError: for a record of a forward with a cache, whose queries are not a whole sequence.
    """
    if entry.layout.cu_seqlens_q is not None:
        raise ValueError("this record is of a forward with a cache. Fix: record a forward of whole sequences.")
    return entry.block_indices[: int(entry.layout.cu_seqlens[1])]


def selected_blocks(block_indices: Tensor, block_size: int) -> Tensor:
    """Block indices `[S, HKV, T_sel]` of one sequence -> bool `[S, HKV, ceil(S / block_size)]`."""
    num_blocks = -(-block_indices.shape[0] // block_size)
    index = block_indices.long()
    selected = torch.zeros(*index.shape[:2], num_blocks + 1, dtype=torch.bool, device=index.device)
    return selected.scatter_(2, index.where(index >= 0, num_blocks), True)[..., :num_blocks]


def keys_attended(entry: Record, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """How much each query of the first recorded sequence read.

    Returns:
        The number of distinct keys in its selected blocks and its window, averaged over KV heads, float `[S]`; and the
        number of compressed tokens it saw, int64 `[S]`.
    """
    blocks = selected_blocks(first_sequence_blocks(entry), config.block_size)
    length = blocks.shape[0]
    t = torch.arange(length, device=blocks.device)
    counts = []
    for start in range(0, length, 256):  # 256 queries at a time, so that nothing of size S x S exists
        q = t[start : start + 256, None]
        keys = blocks[start : start + 256].repeat_interleave(config.block_size, dim=2)[..., :length]
        window = (t > q - config.window_size)[:, None]
        counts.append(((keys | window) & (t <= q)[:, None]).sum(-1).float().mean(-1))
    compressed = ((t + 1 - config.kernel_size).div(config.kernel_stride, rounding_mode="floor") + 1).clamp(min=0)
    return torch.cat(counts), compressed


def plot_block_selection(ax: Any, entry: Record, config: NSAConfig, kv_head: int = 0) -> None:
    """Draws which blocks each query of the first recorded sequence selected, for one KV head, into a matplotlib axes."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    selected = selected_blocks(first_sequence_blocks(entry), config.block_size)[:, kv_head].cpu()  # [S, blocks]
    own = (torch.arange(selected.shape[0]) // config.block_size)[:, None]
    block = torch.arange(selected.shape[1])
    forced = (block <= own) & ((block < config.init_blocks) | (block > own - config.local_blocks))
    # 0: the future, 1: not read, 2: chosen by score, 3: always read
    kind = torch.where(block > own, 0, 1 + selected.int() + (selected & forced).int())
    colors = ("#FFFFFF", "#ECECEC", BRANCH_COLORS[1], "#E69F00")
    ax.imshow(kind, aspect="auto", interpolation="nearest", cmap=ListedColormap(colors), vmin=0, vmax=3)
    ax.set(xlabel=f"block of {config.block_size} keys", ylabel="query position")
    labels = ("not read", "chosen by score", "always read")
    ax.legend(handles=[Patch(color=c, label=x) for c, x in zip(colors[1:], labels, strict=True)], loc="upper right")


def plot_gates(ax: Any, records: list[Record]) -> None:
    """Draws the mean gate of each branch and layer as bars, and each head's mean as a dot, into a matplotlib axes."""
    for branch, (name, color) in enumerate(zip(BRANCHES, BRANCH_COLORS, strict=True)):
        for row, entry in enumerate(records):
            heads = entry.gates[..., branch].float().mean(0).cpu()  # [HQ or 1]
            x = row + (branch - 1) * 0.26
            ax.bar(x, heads.mean().item(), width=0.24, color=color, label=name if row == 0 else None)
            if len(heads) > 1:
                ax.scatter([x] * len(heads), heads, s=9, color="black", alpha=0.45, zorder=3, linewidths=0)
    ax.set(xlabel="layer", ylabel="mean gate", ylim=(0, 1), xticks=range(len(records)))
    ax.set_xticklabels([str(row if entry.layer_idx is None else entry.layer_idx) for row, entry in enumerate(records)])
    ax.legend(ncols=3, loc="upper center")
