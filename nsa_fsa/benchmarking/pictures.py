"""Pictures of a result file: latency against group size, and how time per token grows with length."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_fsa.benchmarking.report import Group, beside_compressed, groups, label, rows_of, title

Rows = list[dict[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart; ours are thick, full attention is dashed.
STYLES: dict[str, dict[str, Any]] = {
    "auto": dict(color="black", marker="D"),
    "triton_kv_major": dict(color="#0072B2", marker="o"),
    "triton_query_major": dict(color="#56B4E9", marker="s"),
    "fla_nsa": dict(color="#009E73", marker="^"),
    "nsa_triton": dict(color="#E69F00", marker="v"),
    "fsa": dict(color="#D55E00", marker="<"),
    "cudnn_nsa": dict(color="#CC79A7", marker=">"),
    "sdpa_cudnn": dict(color="#555555", marker="x"),
    "sdpa_flash": dict(color="#888888", marker="+"),
    "flash_attn_4": dict(color="#B8860B", marker="1"),
    "flash_attn_2": dict(color="#AAAAAA", marker="2"),
    "compressed_attention": dict(color="black", marker="o"),
    "flex_attention": dict(color="#E69F00", marker="v"),
    "pool_mean": dict(color="#009E73", marker="^"),
    "pool_weighted": dict(color="#56B4E9", marker="s"),
    "gather": dict(color="#CC79A7", marker=">"),
    "select_blocks": dict(color="#0072B2", marker="D"),
    "selected_attention": dict(color="#D55E00", marker="s"),
    "sliding_window_attention": dict(color="#009E73", marker="^"),
    "gated_combine": dict(color="#CC79A7", marker=">"),
    "nsa_fsa": dict(color="#0072B2", marker="o"),
    "cudnn": dict(color="#555555", marker="x"),
}
# Where one implementation has several lines: one for each shape of blocks, or for each pass.
BLOCK_STYLES = [
    dict(color="#0072B2", marker="D"), dict(color="#D55E00", marker="s"), dict(color="#009E73", marker="^"),
    dict(color="#CC79A7", marker="v"),
]  # fmt: skip
PASS_STYLES = {"forward": dict(color="black", marker="o"), "backward": dict(color="#D55E00", marker="s")}
THICK, THIN = 2.4, 1.2


@dataclass(frozen=True)
class Line:
    label: str
    rows: Rows
    style: dict[str, Any]


def line_of(implementation: str, rows: Rows) -> Line:
    kind = rows[0]["kind"]
    style = dict(linewidth=THICK if kind == "ours" else THIN, linestyle="--" if kind == "full" else "-", markersize=6)
    return Line(label(implementation), rows, style | STYLES[implementation])


def implementation_lines(rows: Rows) -> list[Line]:
    """One line for each implementation, in the order of STYLES."""
    by_name: dict[str, Rows] = {}
    for row in rows:
        by_name.setdefault(row["implementation"], []).append(row)
    return [line_of(name, by_name[name]) for name in STYLES if name in by_name]


def selection_lines(rows: Rows) -> list[Line]:
    """Compressed attention, and block selection once for each shape of blocks."""
    lines = implementation_lines([r for r in rows if not r["block_size"]])
    shapes = sorted({(r["block_size"], r["num_blocks"]) for r in rows if r["block_size"]})
    for (size, number), style in zip(shapes, BLOCK_STYLES * len(shapes), strict=False):
        chosen = [r for r in rows if (r["block_size"], r["num_blocks"]) == (size, number)]
        lines.append(Line(f"block selection, {number} blocks of {size}", chosen, dict(linewidth=THICK, markersize=6) | style))
    return lines


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return 'they need matplotlib. Fix: pip install "nsa-fsa[plot]"'
    return None


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def readable_heights(*axes: Any) -> None:
    """Axes that share their heights: from 0 where values are alike, since a part of the axis makes much of noise; else
    logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    heights = [y for ax in axes for line in ax.lines for y in line.get_ydata()]
    alike = max(heights, default=0) < 5 * min(heights, default=0)
    for ax in axes:
        if alike:
            ax.set_ylim(0, 1.15 * max(heights))
        else:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3, which="both")


def sizes_axis(ax: Any, sizes: list[int], form: Callable[[int], str] = str) -> None:
    """Logarithmic, with a mark at what was measured and nowhere else."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [form(size) for size in sizes])
    ax.minorticks_off()


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def finish(figure: Any, axes: Any, heading: str, path: Path, ncols: int | None = None) -> Path:
    """One legend below all axes, the heading, and the file."""
    handles = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    ncols = ncols or (len(handles) if len(handles) <= 5 else 4)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, fontsize=9)
    letters = int(11 * figure.get_figwidth())  # at this size 11 take an inch
    lines = len(textwrap.wrap(heading, letters))
    # The narrowest lines that are no more, for the last one not to be a single word.
    narrowest = next(n for n in range(1, letters + 1) if len(textwrap.wrap(heading, n)) <= lines)
    figure.suptitle(textwrap.fill(heading, narrowest), fontsize=11)
    figure.align_ylabels(axes)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    return path


def named(stem: Path, group: Group, suffix: str = "") -> Path:
    """The file of one group beside the results; what has no blocks has none in its name."""
    head_dim, block_size, num_blocks, selection = group
    blocks = f"_{block_size}x{num_blocks}" if block_size else ""
    return stem.with_name(f"{stem.name}{suffix}{blocks}_{selection}_d{head_dim}.png")


def latency_picture(lines: list[Line], heading: str, path: Path) -> Path:
    """Latency against group size, a column a length, forward above backward; both in one only where nothing else was timed."""
    rows = [row for line in lines for row in line.rows]
    lengths, sizes = sorted({r["num_tokens"] for r in rows}), sorted({r["group_size"] for r in rows})
    measured = {r["pass"] for r in rows}
    names = [name for name in ("forward", "backward") if name in measured] or sorted(measured)
    figure, axes = pyplot().subplots(
        len(names), len(lengths), figsize=(max(3.2 * len(lengths), 9.5), 0.6 + 3.2 * len(names)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row_axes, name in zip(axes, names, strict=True):
        for ax, tokens in zip(row_axes, lengths, strict=True):
            for line in lines:
                here = [r for r in line.rows if (r["num_tokens"], r["pass"]) == (tokens, name)]
                points = sorted((r["group_size"], r["ms"]) for r in here)
                if points:
                    ax.plot(*zip(*points, strict=True), label=line.label, **line.style)
            sizes_axis(ax, sizes)
            readable_heights(ax)
            ax.set_title(f"{name}, {tokens:,} tokens", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("query heads per KV head (G)")
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds, median")
    return finish(figure, axes, heading, path)


def plot_latency(document: dict[str, Any], stem: Path) -> list[Path]:
    """One picture for each group."""
    return [
        latency_picture(
            implementation_lines(rows_of(document["rows"], group)), title(document, group), named(stem, group)
        )
        for group in groups(document["rows"])
    ]  # fmt: skip


def per_1024_tokens(row: dict[str, Any], column: str = "ms") -> float:
    """Microseconds."""
    return 1e3 * row[column] * 1024 / row["num_tokens"]


def growth(ax: Any, rows: Rows, column: str = "ms", **style: Any) -> None:
    points = sorted((r["num_tokens"], per_1024_tokens(r, column)) for r in rows)
    if points:
        ax.plot(*zip(*points, strict=True), **style)


def growth_axis(ax: Any, rows: Rows) -> None:
    sizes_axis(ax, sorted({r["num_tokens"] for r in rows}), length)
    ax.set_xlabel("tokens (1K = 1,024)")


def plot_compressed_growth(document: dict[str, Any], stem: Path) -> list[Path]:
    """Time per token against length, a column for each group size: forward and backward, others' and the floor of each."""
    paths = []
    for group in groups(document["rows"]):
        rows = [r for r in rows_of(document["rows"], group) if r["kind"] in ("ours", "peer")]  # compression is linear
        passes = {name: style for name, style in PASS_STYLES.items() if any(r["pass"] == name for r in rows)}
        sizes = sorted({r["group_size"] for r in rows})
        if not passes:
            continue
        figure, axes = pyplot().subplots(
            1, len(sizes), figsize=(max(4.2 * len(sizes), 6.5), 5.2), sharey=True, squeeze=False, layout="constrained"
        )
        for ax, size in zip(axes[0], sizes, strict=True):
            for name, style in passes.items():
                for line in implementation_lines([r for r in rows if (r["group_size"], r["pass"]) == (size, name)]):
                    ours = line.rows[0]["kind"] == "ours"
                    look = dict(linewidth=THICK, linestyle="-") if ours else dict(linewidth=THIN, linestyle="--", markersize=4)
                    growth(ax, line.rows, label=f"{line.label}, {name}", **line.style | style | look)
                    if ours:
                        dotted = dict(color=style["color"], linestyle=":", linewidth=THIN)
                        growth(ax, line.rows, "floor_ms", label=f"floor at the measured rates, {name}", **dotted)
            ax.set_title(f"G = {size}", fontsize=10)
            growth_axis(ax, rows)
        readable_heights(*axes[0])
        axes[0, 0].set_ylabel("microseconds per 1,024 tokens, median")
        paths.append(finish(figure, axes, title(document, group), named(stem, group, "_growth"), ncols=3))
    return paths


def inputs_of(document: dict[str, Any]) -> list[tuple[Group, Rows]]:
    """The rows of each head width and kind of inputs, whatever their blocks; the group named has no blocks."""
    found: dict[Group, Rows] = {}
    for row in document["rows"]:
        found.setdefault((row["head_dim"], 0, 0, row["selection"]), []).append(row)
    return sorted(found.items(), key=lambda item: item[0])


def plot_selection_latency(document: dict[str, Any], stem: Path) -> list[Path]:
    """One picture for each kind of inputs, all block shapes in it."""
    return [
        latency_picture(selection_lines(rows), title(document, group), named(stem, group))
        for group, rows in inputs_of(document)
    ]


def plot_selection_growth(document: dict[str, Any], stem: Path) -> list[Path]:
    """Time per token against length, a column for each group size; below, selection as a part of compressed attention."""
    paths = []
    for group, rows in inputs_of(document):
        sizes, lines = sorted({r["group_size"] for r in rows}), selection_lines(rows)
        figure, axes = pyplot().subplots(
            2, len(sizes), figsize=(max(4.2 * len(sizes), 6.5), 7), sharex=True, sharey="row", squeeze=False,
            layout="constrained", height_ratios=[3, 2],
        )  # fmt: skip
        for column, size in zip(axes.T, sizes, strict=True):
            for line in lines:
                growth(column[0], [r for r in line.rows if r["group_size"] == size], label=line.label, **line.style)
                blocks = {(r["block_size"], r["num_blocks"]) for r in line.rows} - {(0, 0)}
                for block_size, num_blocks in blocks:
                    same = rows_of(rows, (group[0], block_size, num_blocks, group[3]))
                    pairs = beside_compressed([r for r in same if r["group_size"] == size])
                    points = [
                        (place[0], chosen["ms"] / base["ms"]) for place, (base, chosen) in pairs.items() if base and chosen
                    ]
                    if points:
                        column[1].plot(*zip(*sorted(points), strict=True), **line.style)
            column[1].axhline(1, color="black", linewidth=THIN, linestyle="--")
            column[0].set_title(f"G = {size}", fontsize=10)
            growth_axis(column[1], rows)
        readable_heights(*axes[0])
        for ax in axes[1]:
            ax.set_ylim(0, max(1.25, 1.15 * max(y for each in axes[1] for line in each.lines for y in line.get_ydata())))
            ax.grid(alpha=0.3)
        axes[0, 0].set_ylabel("microseconds per 1,024 tokens, median")
        axes[1, 0].set_ylabel("selection / compressed forward")
        paths.append(finish(figure, axes, title(document, group), named(stem, group, "_growth")))
    return paths
