"""Pictures of the whole core: against full attention, its parts, their floors, and where it begins to be faster."""

from pathlib import Path
from typing import Any

from nsa_fsa.benchmarking.core import NSA_FSA, PARTS
from nsa_fsa.benchmarking.crossover import STEP
from nsa_fsa.benchmarking.pictures import (
    BLOCK_STYLES,
    STYLES,
    THICK,
    THIN,
    Rows,
    finish,
    growth_axis,
    implementation_lines,
    length,
    named,
    pyplot,
    readable_heights,
    sizes_axis,
)
from nsa_fsa.benchmarking.report import Group, by_place, groups, label, rows_of, title

SPEEDUP_STYLES: dict[str, dict[str, Any]] = {
    "forward": dict(color="black", marker="o", linewidth=THICK),
    "forward_backward": dict(color="#D55E00", marker="s", linewidth=THICK),
}
# Black as a line is too heavy as an area.
PART_COLORS = {name: STYLES[name]["color"] for name in PARTS} | {"compressed_attention": "#E69F00"}
BOUND_COLORS = {"arithmetic": "#0072B2", "bytes": "#E69F00"}


def speedups(rows: Rows, group_size: int, name: str) -> list[tuple[int, float]]:
    """(tokens, time of the fastest full attention / time of the core), where both were timed."""
    points = []
    for tokens in sorted({r["num_tokens"] for r in rows}):
        here = [r for r in rows if (r["num_tokens"], r["group_size"], r["pass"]) == (tokens, group_size, name)]
        full, ours = ([r["ms"] for r in here if r["kind"] == kind] for kind in ("full", "ours"))
        if full and ours:
            points.append((tokens, min(full) / ours[0]))
    return points


def plot_core(document: dict[str, Any], stem: Path) -> list[Path]:
    """Latency against length, a column for each group size; below, the speed-up over the fastest full attention."""
    paths = []
    for group in groups(document["rows"]):
        rows = rows_of(document["rows"], group)
        sizes = sorted({r["group_size"] for r in rows})
        names = [name for name in ("forward", "backward") if any(r["pass"] == name for r in rows)] or ["forward_backward"]
        figure, axes = pyplot().subplots(
            len(names) + 1, len(sizes), figsize=(max(4.2 * len(sizes), 9.5), 0.8 + 3.0 * (len(names) + 1)), sharex=True,
            sharey="row", squeeze=False, layout="constrained",
        )  # fmt: skip
        for column, size in zip(axes.T, sizes, strict=True):
            for ax, name in zip(column, names, strict=False):
                for line in implementation_lines([r for r in rows if (r["group_size"], r["pass"]) == (size, name)]):
                    points = sorted((r["num_tokens"], r["ms"]) for r in line.rows)
                    ax.plot(*zip(*points, strict=True), label=line.label, **line.style)
                ax.set_title(f"{name.replace('_', ' + ')}, G = {size}", fontsize=10)
            for name, look in SPEEDUP_STYLES.items():
                if points := speedups(rows, size, name):
                    column[-1].plot(*zip(*points, strict=True), label=f"speed-up, {name.replace('_', ' + ')}", **look)
            column[-1].axhline(1, color="black", linewidth=THIN, linestyle="--")
            column[-1].set_title(f"speed-up, G = {size}", fontsize=10)
            growth_axis(column[-1], rows)
        for row_axes in axes:
            readable_heights(*row_axes)
        for ax in axes[:-1, 0]:
            ax.set_ylabel("milliseconds, median")
        axes[-1, 0].set_ylabel("full attention / nsa_fsa")
        paths.append(finish(figure, axes, title(document, group), named(stem, group)))
    return paths


def parts_of(rows: Rows, name: str) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """{(tokens, group size): {part or the whole: row}} of one pass."""
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for (tokens, group_size, implementation, _), passes in by_place(rows).items():
        if name in passes:
            found.setdefault((tokens, group_size), {})[implementation] = passes[name]
    return found


def plot_parts(document: dict[str, Any], stem: Path) -> list[Path]:
    """Stacked bars of the parts for each group size, forward above backward, a column a length; a mark for the whole."""
    paths = []
    for group in groups(document["rows"]):
        rows = rows_of(document["rows"], group)
        lengths, sizes = (sorted({r[x] for r in rows}) for x in ("num_tokens", "group_size"))
        names = [name for name in ("forward", "backward") if any(r["pass"] == name for r in rows)]
        if not names:
            continue
        figure, axes = pyplot().subplots(
            len(names), len(lengths), figsize=(max(4.2 * len(lengths), 9.5), 0.8 + 3.4 * len(names)), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row_axes, name in zip(axes, names, strict=True):
            measured = parts_of(rows, name)
            for ax, tokens in zip(row_axes, lengths, strict=True):
                here = [measured.get((tokens, size), {}) for size in sizes]
                base = [0.0] * len(sizes)
                for part in PARTS:
                    heights = [x[part]["ms"] if part in x else 0.0 for x in here]
                    if any(heights):
                        ax.bar(range(len(sizes)), heights, 0.6, base, label=label(part), color=PART_COLORS[part])
                    base = [low + height for low, height in zip(base, heights, strict=True)]
                whole = {place: x[NSA_FSA.name]["ms"] for place, x in enumerate(here) if NSA_FSA.name in x}
                for place, ms in whole.items():
                    ax.plot([place - 0.38, place + 0.38], [ms, ms], color="black", linewidth=THICK, label=label(NSA_FSA.name))
                ax.set_ylim(0, 1.15 * max(*base, *whole.values(), 1e-3))
                ax.set_xticks(range(len(sizes)), [f"G = {size}" for size in sizes])
                ax.set_title(f"{name}, {tokens:,} tokens", fontsize=10)
                ax.grid(alpha=0.3, axis="y")
                ax.set_axisbelow(True)
            row_axes[0].set_ylabel("milliseconds, median")
        paths.append(finish(figure, axes, title(document, group), named(stem, group), ncols=3))
    return paths


def bound_of(document: dict[str, Any], row: dict[str, Any]) -> str:
    """What a row's floor counts: the arithmetic or the bytes that are necessary, whichever takes longer."""
    ceilings = document["runs"][row["run"]]["ceilings"]
    arithmetic = row["necessary_tflop"] * 1e12 / ceilings["matmul_flop_per_s"]
    return "arithmetic" if arithmetic > row["necessary_gb"] * 1e9 / ceilings["copy_bytes_per_s"] else "bytes"


def plot_roofline(document: dict[str, Any], stem: Path) -> list[Path]:
    """Time of every part and of the whole above its floor, forward above backward; one picture for each length."""
    paths = []
    for group in groups(document["rows"]):
        for tokens in sorted({r["num_tokens"] for r in rows_of(document["rows"], group)}):
            rows = [r for r in rows_of(document["rows"], group) if r["num_tokens"] == tokens]
            sizes = sorted({r["group_size"] for r in rows})
            names = [name for name in ("forward", "backward") if any(r["pass"] == name for r in rows)]
            if not names:
                continue
            figure, axes = pyplot().subplots(
                len(names), len(sizes), figsize=(max(4.4 * len(sizes), 11.5), 0.9 + 2.6 * len(names)), sharex="row",
                squeeze=False, layout="constrained",
            )  # fmt: skip
            for row_axes, name in zip(axes, names, strict=True):
                measured = parts_of(rows, name)
                shown = [x for x in (*PARTS, NSA_FSA.name) if any(x in here for here in measured.values())][::-1]
                for ax, size in zip(row_axes, sizes, strict=True):
                    here = measured.get((tokens, size), {})
                    for place, part in enumerate(shown):
                        if part in here:
                            roofline_bar(ax, place, here[part], bound_of(document, here[part]))
                    ax.set_xlim(0, 1.25 * max(r["ms"] for x in measured.values() for r in x.values()))
                    ax.set_yticks(range(len(shown)), [label(x) for x in shown])
                    ax.tick_params(labelleft=ax is row_axes[0])
                    ax.set_ylim(-0.6, len(shown) - 0.4)
                    ax.set_title(f"{name}, G = {size}", fontsize=10)
                    ax.grid(alpha=0.3, axis="x")
                    ax.set_axisbelow(True)
            for ax in axes[-1]:
                ax.set_xlabel("milliseconds, median")
            heading = f"{title(document, group)}; {tokens:,} tokens; numbers: floor / time"
            paths.append(finish(figure, axes, heading, named(stem, group, f"_roofline_{length(tokens).lower()}")))
    return paths


def roofline_bar(ax: Any, place: int, row: dict[str, Any], bound: str) -> None:
    ax.barh(place, row["ms"], 0.7, color="#DDDDDD", label="time")
    ax.barh(place, row["floor_ms"], 0.7, color=BOUND_COLORS[bound], label=f"floor: {bound} at the measured rate")
    ax.text(row["ms"], place, f" {row['of_floor']:.0%}", va="center", fontsize=9)


def plot_crossover(document: dict[str, Any], stem: Path) -> list[Path]:
    """Time of full attention over time of the core against length: forward, and forward with backward; a line a group size."""
    comparisons: dict[Group, list[dict[str, Any]]] = {}
    for entry in document.get("crossovers", []):
        comparisons.setdefault(tuple(entry[x] for x in ("head_dim", "block_size", "num_blocks", "against")), []).append(entry)
    paths = []
    for group, entries in comparisons.items():
        head_dim, block_size, num_blocks, against = group
        names = list(dict.fromkeys(x["pass"] for x in entries))
        figure, axes = pyplot().subplots(
            1, len(names), figsize=(max(5 * len(names), 7), 4.6), sharey=True, squeeze=False, layout="constrained"
        )
        marked = sorted({int(tokens) for x in entries for tokens in x["ratios"] if (int(tokens) // STEP).bit_count() == 1})
        for ax, name in zip(axes[0], names, strict=True):
            here = [x for x in entries if x["pass"] == name]
            for entry, style in zip(here, BLOCK_STYLES * len(here), strict=False):
                points = [(int(tokens), ratio) for tokens, ratio in entry["ratios"].items()]
                ax.plot(*zip(*points, strict=True), label=f"G = {entry['group_size']}", linewidth=THIN, markersize=5, **style)
            ax.axhline(1, color="black", linewidth=THIN, linestyle="--")
            ax.set_title(name.replace("_", " + "), fontsize=10)
            ax.set_xlabel("tokens (1K = 1,024)")
            sizes_axis(ax, marked, length)
        readable_heights(*axes[0])
        axes[0, 0].set_ylabel("time of full attention / of the core")
        where = f"{document['gpu']}: {num_blocks} blocks of {block_size}, D={head_dim}"
        heading = f"Speed-up over full attention by {label(against).removeprefix('full: ')}, {where}"
        paths.append(finish(figure, axes, heading, named(stem, group)))
    return paths
