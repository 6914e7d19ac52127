"""Looking inside: which blocks were selected, how many keys that comes to,
and how the gates behave.

The plotting functions need matplotlib: `pip install "nsa-fsa[plot]"`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_fsa import checks
from nsa_fsa.config import BRANCHES
from nsa_fsa.modules.branches import Details, Record, windows_of
from nsa_fsa.modules.recording import is_run_again, recorded_by, sparse_layers
from nsa_fsa.reference import block_scores

# Colour-blind safe (Okabe and Ito): orange, blue, green.
BRANCH_COLORS = ("#E69F00", "#0072B2", "#009E73")
# What one query does with one key, in the order of the numbers in the picture of a selection. The
# selected branch is blue and the sliding branch green there as everywhere; a key that both read is
# darker than either.
KEY_KINDS = {
    "in the future": "#FFFFFF",
    "only as compressed tokens": "#E4E4E4",
    "selected, by score": BRANCH_COLORS[1],
    "selected, always": "#56B4E9",
    "sliding window": BRANCH_COLORS[2],
    "selected and in the window": "#08304B",
}
# Rows and columns of a picture, which leaves out queries and keys in between beyond that.
MAX_PIXELS = 2048


@contextmanager
def record(
    model: nn.Module, *, details: bool = False, max_queries: int = 512
) -> Iterator[list[Record]]:
    """Collects a `Record` of every forward of every NSA layer in the model,
    in the order in which they ran.

    A forward that gradient checkpointing computes again during backward is not recorded again.
    Layers without a `layer_idx` of their own are counted in the order of `model.modules()`.

    Args:
        model: holds at least one NSA layer.
        details: also keep `Record.details`: the scores of all blocks,
            and the output and log-sum-exp of each branch.
        max_queries: of at most so many queries of each forward, evenly spaced among its packed
            rows. What is kept of one forward is at most
            `max_queries * (HKV * blocks + 3 * HQ * (DV + 1))` numbers.

    Raises:
        ValueError: for a model without such a layer, or max_queries < 1.

    Example:
        >>> with record(model) as records:
        ...     model(input_ids)
        >>> records[0].block_indices  # int32 [T, HKV, T_sel]
    """
    layers = sparse_layers(model)
    checks.check_positive(max_queries=max_queries)
    records: list[Record] = []

    def keep(layer_idx: int, entry: Record) -> None:
        if is_run_again():
            return
        found = _details(entry, max_queries) if details else None
        kept = (entry.block_indices, entry.gates, entry.layout, entry.config)
        records.append(Record(layer_idx, *kept, details=found))

    with recorded_by(layers, keep):
        yield records


@torch.no_grad()
def _details(entry: Record, max_queries: int) -> Details:
    """The `Details` of at most `max_queries` evenly spaced rows of one forward."""
    assert entry.inside is not None
    inside, branches = entry.inside, entry.inside.branches
    layout, config = entry.layout, entry.config
    starts_q = layout.of_queries

    rows = torch.arange(int(starts_q[-1]), device=inside.q.device)
    if len(rows) > max_queries:
        last = len(rows) - 1
        rows = torch.linspace(0, last, max_queries, dtype=torch.float64, device=rows.device)
        rows = rows.round().long()

    sequence = torch.searchsorted(starts_q[1:].contiguous(), rows, right=True)
    position = rows - starts_q[sequence]
    # The last positions of what a cache holds.
    if layout.cu_seqlens_q is not None and layout.seqused_k is not None:
        position = position + layout.seqused_k[sequence] - starts_q.diff()[sequence]

    # Every query is given as a sequence of its own, which begins where its own does.
    scores = block_scores(
        inside.q[rows],
        inside.k_cmp,
        branches.lse_cmp[rows],
        torch.cat((layout.cu_seqlens[sequence], layout.cu_seqlens[-1:])),
        layout.max_seqlen,
        **windows_of(config),
        block_size=config.block_size,
        scale=inside.scale,
        cu_seqlens_q=torch.arange(len(rows) + 1, device=rows.device),
        seqused_k=position + 1,
    )  # [N, HKV, blocks]

    outputs = (branches.o_cmp, branches.o_slc, branches.o_swa)
    lses = (branches.lse_cmp, branches.lse_slc, branches.lse_swa)
    o, lse = (torch.stack([x[rows] for x in xs], dim=1) for xs in (outputs, lses))
    return Details(rows, o, lse, scores)


def by_layer(records: Sequence[Record]) -> dict[int | None, list[Record]]:
    """The records of each layer, in the order of the layers' first forwards."""
    layers: dict[int | None, list[Record]] = {}
    for entry in records:
        layers.setdefault(entry.layer_idx, []).append(entry)
    return layers


class Queries(NamedTuple):
    """The queries of one sequence, at consecutive positions, and what they selected."""

    positions: Tensor  # int64 [N]
    block_indices: Tensor  # int32 [N, HKV, T_sel]


def queries_of(entries: Record | Sequence[Record], sequence: int = 0) -> Queries:
    """One sequence's queries in one forward of a layer, or in several:
    a prefill and the steps after it, say.

    Of several forwards, those from the last one on that began at the sequence's first token count;
    where a position was computed more than once, as after a crop, its last time does.

    Args:
        entries: a record, or records of one layer in the order in which they ran; see `by_layer`.
        sequence: its number in the batch.

    Raises:
        ValueError: for no records or those of several layers, a sequence that is not in every
            forward, or positions with gaps.
    """
    entries = [entries] if isinstance(entries, Record) else list(entries)
    layers = list(by_layer(entries))
    if not layers:
        raise ValueError(
            "there are no records. "
            "Fix: call the model within `with record(model) as records:`, and pass those."
        )
    if len(layers) != 1:
        raise ValueError(
            f"these are records of the layers {layers}; they must be of one. "
            f"Fix: by_layer(records)[{layers[0]}]."
        )

    position: list[Tensor] = []
    block_indices: list[Tensor] = []
    for entry in entries:
        begin, stop, first = _rows_of(entry, sequence)
        if first == 0:
            position, block_indices = [], []
        position.append(torch.arange(first, first + stop - begin))
        block_indices.append(entry.block_indices[begin:stop])

    found, order = torch.cat(position).sort(stable=True)
    last = torch.ones_like(found, dtype=torch.bool)
    last[:-1] = found.diff() != 0  # of those at one position
    found, order = found[last], order[last]

    if not len(found) or (found.diff() != 1).any():
        raise ValueError(
            f"{len(found)} positions of sequence {sequence} were recorded, and they must be "
            f"at least one and without gaps: found {found[:1].tolist()} to {found[-1:].tolist()}. "
            "Fix: pass the records of every forward."
        )

    chosen = torch.cat(block_indices)
    return Queries(found.to(chosen.device), chosen[order.to(chosen.device)])


def _rows_of(entry: Record, sequence: int) -> tuple[int, int, int]:
    """The packed rows `begin : stop` of a sequence's queries, and the position of the first."""
    layout = entry.layout
    starts = layout.of_queries.tolist()
    if not 0 <= sequence < len(starts) - 1:
        raise ValueError(
            f"sequence={sequence} must be among the {len(starts) - 1} of this forward, "
            "counted from 0. Fix: sequence=0."
        )
    begin, stop = starts[sequence], starts[sequence + 1]
    if layout.cu_seqlens_q is None or layout.seqused_k is None:
        return begin, stop, 0
    return begin, stop, int(layout.seqused_k[sequence]) - (stop - begin)


def selected_blocks(block_indices: Tensor, block_size: int, length: int | None = None) -> Tensor:
    """Block indices `[N, HKV, T_sel]` -> bool `[N, HKV, ceil((length or N) / block_size)]`."""
    num_blocks = -(-(block_indices.shape[0] if length is None else length) // block_size)
    index = block_indices.long()
    selected = torch.zeros(*index.shape[:2], num_blocks + 1, dtype=torch.bool, device=index.device)
    return selected.scatter_(2, index.where(index >= 0, num_blocks), True)[..., :num_blocks]


def keys_attended(entries: Record | Sequence[Record], sequence: int = 0) -> tuple[Tensor, Tensor]:
    """How much each query of one sequence read; `entries` and `sequence` as in `queries_of`.

    Returns:
        The number of distinct keys in its selected blocks and its window, averaged over KV heads,
        float `[N]`; and the number of compressed tokens it saw, int64 `[N]`. A dense query read all
        keys up to its own, and no compressed token.
    """
    positions, block_indices = queries_of(entries, sequence)
    config = _last(entries).config
    length = int(positions[-1]) + 1
    key = torch.arange(length, device=positions.device)
    counts = []
    # In chunks, so that nothing of size S x S exists.
    for chunk in torch.arange(len(positions), device=positions.device).split(256):
        t = positions[chunk, None]  # [256, 1]
        blocks = selected_blocks(block_indices[chunk], config.block_size, length)
        keys = blocks.repeat_interleave(config.block_size, dim=2)[..., :length]
        window = (key > t - config.window_size)[:, None]
        window |= (t < config.dense_below)[:, None]
        counts.append(((keys | window) & (key <= t)[:, None]).sum(-1).float().mean(-1))
    last = positions + 1 - config.kernel_size  # where the last complete window begins, at most
    complete = last.div(config.kernel_stride, rounding_mode="floor") + 1
    complete = complete.masked_fill(positions < config.dense_below, 0)
    return torch.cat(counts), complete.clamp(min=0)


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the plots need matplotlib, which is not installed. Fix: pip install "nsa-fsa[plot]".'
        ) from error


def plot_block_selection(
    ax: Any, entries: Record | Sequence[Record], kv_head: int = 0, sequence: int = 0
) -> None:
    """Draws which keys each query of one sequence read with one KV head, and why,
    into a matplotlib axes.

    `entries` and `sequence` are as in `queries_of`: the steps after a prefill are rows below it.
    Beyond 2,048 queries or keys, evenly spaced ones are drawn. Every query also reads all
    compressed tokens whose window lies in its past, which is all there is of a key in neither a
    selected block nor the sliding window. All blocks of a dense query are drawn as selected always.

    Raises:
        ImportError: without matplotlib.
        ValueError: as `queries_of` does, and for a KV head that there is not.

    Example:
        >>> figure, axes = matplotlib.pyplot.subplots(1, 2)
        >>> plot_block_selection(axes[0], by_layer(records)[0])
        >>> plot_gates(axes[1], records)
    """
    _check_matplotlib()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    positions, block_indices = (x.cpu() for x in queries_of(entries, sequence))
    num_heads, last = block_indices.shape[1], _last(entries)
    config = last.config
    if not 0 <= kv_head < num_heads:
        raise ValueError(
            f"kv_head={kv_head} must be among the layer's {num_heads}, counted from 0. "
            "Fix: kv_head=0."
        )

    first, length = int(positions[0]), int(positions[-1]) + 1
    rows = _evenly(len(positions))
    t, key = positions[rows, None], _evenly(length)
    own, block = t // config.block_size, key // config.block_size

    chosen = block_indices[rows, kv_head : kv_head + 1]
    selected = selected_blocks(chosen, config.block_size, length)[:, 0, block]
    forced = (block < config.init_blocks) | (block > own - config.local_blocks)
    is_dense = t < config.dense_below
    selected, forced = selected | is_dense, forced | is_dense
    window = (key > t - config.window_size) & ~is_dense
    kind = 1 + torch.where(selected, 1 + forced.int(), 0)  # 1 compressed only, 2 by score, 3 always
    kind = torch.where(window, torch.where(selected, 5, 4), kind).masked_fill(key > t, 0)

    ax.imshow(
        kind.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(list(KEY_KINDS.values())),
        vmin=0,
        vmax=5,
        extent=(0, length, length, first),
    )

    drawn = "" if last.layer_idx is None else f"layer {last.layer_idx}, "
    ax.set(
        xlabel=f"key position (blocks of {config.block_size})",
        ylabel="query position",
        title=f"Keys read: {drawn}KV head {kv_head} of {num_heads}, sequence {sequence}",
    )

    patches = [
        Patch(facecolor=color, edgecolor="#B0B0B0", label=name) for name, color in KEY_KINDS.items()
    ]
    ax.legend(handles=patches, loc="upper right", fontsize="small")


def _last(entries: Record | Sequence[Record]) -> Record:
    """The forward whose config counts: a cache, and so one text, has only one."""
    return entries if isinstance(entries, Record) else entries[-1]


def _evenly(number: int) -> Tensor:
    """At most MAX_PIXELS of 0 .. number - 1, evenly spaced."""
    return torch.arange(min(number, MAX_PIXELS)) * number // min(number, MAX_PIXELS)


def plot_gates(ax: Any, records: Sequence[Record]) -> None:
    """Draws the mean gate of each branch and layer as bars, and each head's mean as a dot, into
    a matplotlib axes; the mean is over all tokens of a layer's forwards. Raises ImportError
    without matplotlib."""
    _check_matplotlib()
    layers = by_layer(records)
    for row, entries in enumerate(layers.values()):
        gates = torch.cat([entry.gates.float() for entry in entries]).mean(0).cpu()  # [HQ or 1, 3]
        for branch, (name, color) in enumerate(zip(BRANCHES, BRANCH_COLORS, strict=True)):
            heads, x = gates[:, branch], row + (branch - 1) * 0.26
            label = name if row == 0 else None
            ax.bar(x, heads.mean().item(), width=0.24, color=color, label=label)
            if len(heads) > 1:
                ax.scatter(
                    [x] * len(heads), heads, s=9, color="black", alpha=0.45, zorder=3, linewidths=0
                )
    ax.set(xlabel="layer", ylabel="mean gate", ylim=(0, 1), xticks=range(len(layers)))
    ax.set_xticklabels([str(row if layer is None else layer) for row, layer in enumerate(layers)])
    ax.legend(ncols=3, loc="upper center")
