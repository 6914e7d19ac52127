"""The pictures that pages show, each from a file in results/."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.published import FOLDER, GPU, frame, read
from benchmarks.tables import PARTS

PASSES = {"forward": "forward", "backward": "backward", "forward_backward": "both passes"}
TWO = ["forward", "backward"]
MARKERS = list("osD^vPX<>hp")
Picture = tuple[str, sns.FacetGrid, str]  # its name, its panels, its title
sns.set_theme(style="whitegrid", palette="colorblind", context="paper", font_scale=1.1)


def draw(suite: str, gpu: str = GPU, folder: Path = FOLDER) -> list[Path]:
    """The pictures of a suite's file, beside it; of most suites there are none."""
    document, paths = read(suite, gpu, folder), []
    for name, grid, title in PICTURES[suite](document) if suite in PICTURES else ():
        paths.append(folder / f"{name}_{gpu}.png")
        finish(grid, f"{title}, {document['gpu']}: 16 blocks of 64, D = 128", paths[-1])
    return paths


def finish(grid: sns.FacetGrid, title: str, path: Path) -> None:
    """The title above, the legend below, and the file."""
    below = dict(bbox_to_anchor=(0.5, 0.0), title=None, frameon=False)
    sns.move_legend(grid, "upper center", ncol=min(5, len(grid.legend.texts)), **below)
    grid.figure.tight_layout()
    letters = int(11 * grid.figure.get_figwidth())
    grid.figure.suptitle(textwrap.fill(title, letters), y=1.0, va="bottom", fontsize=11)
    grid.figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(grid.figure)


def lines(data: pd.DataFrame, what: str, **options: Any) -> sns.FacetGrid:
    """A line for each value of the column `what`, in panels."""
    looks = dict(hue=what, style=what, kind="line", dashes=False, palette="colorblind")
    marks = dict(markers=MARKERS[: data[what].nunique()], markeredgewidth=0, markersize=6)
    return sns.relplot(data, linewidth=1.8, **looks, **marks, **options)


def tokens_axis(ax: Any, lengths: Iterable[int]) -> None:
    """Logarithmic, with a mark at every length given."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(lengths), [f"{x // 1024}K" for x in lengths])
    ax.minorticks_off()


def plain_numbers(ax: Any) -> None:
    """Logarithmic, with marks at 1, 2, 5, 10 and so on."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def core(document: dict[str, Any]) -> Iterator[Picture]:
    """Latency against length, and below the speed-up over the faster full attention."""
    rows = frame(document)
    keys = ["num_tokens", "group_size", "pass"]
    fastest = rows[rows.kind == "full"].groupby(keys).ms.min()
    gain = (fastest / rows[rows.kind == "ours"].set_index(keys).ms).rename("y").reset_index()
    gain = gain[gain["pass"] != "backward"].assign(panel="speed-up")
    gain["what"] = "speed-up, " + gain["pass"].map(PASSES)
    times = rows[rows["pass"].isin(TWO)].assign(y=rows.ms, panel=rows["pass"], what=rows.label)
    grid = lines(
        pd.concat([times, gain]),
        "what",
        x="num_tokens",
        y="y",
        row="panel",
        col="group_size",
        row_order=[*TWO, "speed-up"],
        height=2.5,
        aspect=1.35,
        facet_kws=dict(sharey="row"),
    )
    grid.set_titles("{row_name}, G = {col_name}").set_xlabels("tokens (1K = 1,024)")
    for (panel, _), ax in grid.axes_dict.items():
        tokens_axis(ax, sorted(rows.num_tokens.unique()))
        if panel in TWO:
            plain_numbers(ax)
        else:
            ax.axhline(1, color="black", linewidth=1, linestyle="--")
            ax.set_ylim(0)
    grid.set_ylabels("ms, median")
    grid.axes[-1, 0].set_ylabel("full attention / NSA")
    yield "core", grid, "NSA beside full attention"


def crossover(document: dict[str, Any]) -> Iterator[Picture]:
    """The time of flash-attn 4 over that of NSA, against length."""
    data = pd.DataFrame(document["crossovers"])
    data["G"], data["which"] = "G = " + data.group_size.astype(str), data["pass"].map(PASSES)
    data["point"] = data.ratios.map(lambda ratios: list(ratios.items()))
    data = data.explode("point")
    data["tokens"], data["ratio"] = data.point.str[0].astype(int), data.point.str[1].astype(float)
    grid = lines(data, "G", x="tokens", y="ratio", col="which", height=3.6, aspect=1.25)
    grid.set_titles("{col_name}").set_axis_labels("tokens (1K = 1,024)", "flash-attn 4 / NSA")
    for ax in grid.axes.flat:
        tokens_axis(ax, [1024 << doubling for doubling in range(8)])
        plain_numbers(ax)
        ax.axhline(1, color="black", linewidth=1, linestyle="--")
    yield "crossover", grid, "Time of flash-attn 4 / time of NSA"


def parts(document: dict[str, Any]) -> Iterator[Picture]:
    """The parts upon each other, with a line where the whole is."""
    rows = frame(document).sort_values("group_size")
    rows["G"], rows["part"] = "G = " + rows.group_size.astype(str), rows.implementation.map(PARTS)
    rows = rows[rows["pass"].isin(TWO)]
    grid = sns.displot(
        rows[rows.part.notna()], x="G", weights="ms", hue="part", multiple="stack", alpha=1,
        hue_order=[*PARTS.values()][::-1], row="pass", row_order=TWO, col="num_tokens",
        kind="hist", shrink=0.6, height=2.9, aspect=1.6, palette="colorblind",
        facet_kws=dict(sharey=False, sharex=False),
    )  # fmt: skip
    grid.set_titles("{row_name}, {col_name:,} tokens").set_axis_labels("", "ms, median")
    for (name, tokens), ax in grid.axes_dict.items():
        here = rows[(rows["pass"] == name) & (rows.num_tokens == tokens)]
        for place, y in enumerate(here[here.implementation == "nsa_fsa"].ms):
            ax.hlines(y, place - 0.38, place + 0.38, color="black", linewidth=2.2)
        ax.grid(visible=False, axis="x")
    yield "parts", grid, "The parts of NSA, each timed alone; the line is the whole"


def floors(document: dict[str, Any]) -> Iterator[Picture]:
    """The time of every part and its floor, a picture a length."""
    names = {**PARTS, "nsa_fsa": "the whole"}
    rows = frame(document)
    rows = rows.assign(part=rows.implementation.map(names), bound="floor: " + rows.bound)
    order = dict(order=list(names.values()), y="part")
    bounds = dict(hue="bound", hue_order=["floor: arithmetic", "floor: bytes"], dodge=False)
    for tokens, data in rows[rows["pass"].isin(TWO)].groupby("num_tokens"):
        axes = dict(row="pass", row_order=TWO, col="group_size", sharex="row")
        grid = sns.FacetGrid(data, height=2.3, aspect=1.7, **axes)
        grid.map_dataframe(sns.barplot, x="ms", color="#DDDDDD", label="time", **order)
        grid.map_dataframe(sns.barplot, x="floor_ms", palette="colorblind", **bounds, **order)
        grid.add_legend().set_titles("{row_name}, G = {col_name}")
        grid.set_axis_labels("ms, median", "")
        for (name, group), ax in grid.axes_dict.items():
            ax.set_xlim(0, 1.25 * data[data["pass"] == name].ms.max())
            here = data[(data["pass"] == name) & (data.group_size == group)]
            for part, ms, share in zip(here.part, here.ms, here.of_floor, strict=True):
                place = order["order"].index(part)
                ax.text(ms, place, f" {share:.0%}", va="center", fontsize=9)
        yield f"floors_{tokens}", grid, f"{tokens:,} tokens: time, and floor as a part of it"


def selected(document: dict[str, Any]) -> Iterator[Picture]:
    """Latency of selected attention against group size, where there is something beside ours."""
    rows = frame(document)
    rows = rows[rows.implementation != "triton_kv_major"]  # which is what "auto" runs
    shape = rows.block_size.isin((0, 64)) & rows.selection.isin(("random", "full"))
    rows = rows[shape & (rows.head_dim == 128) & rows["pass"].isin(TWO)]
    rows = rows.groupby("num_tokens").filter(lambda here: here.label.nunique() > 1)
    grid = lines(
        rows,
        "label",
        x="group_size",
        y="ms",
        row="pass",
        row_order=TWO,
        col="num_tokens",
        height=2.8,
        aspect=1.5,
        facet_kws=dict(sharey=False),
    )
    grid.set_titles("{row_name}, {col_name:,} tokens")
    grid.set_axis_labels("query heads per KV head (G)", "ms, median")
    sizes = sorted(rows.group_size.unique())
    for ax in grid.axes.flat:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, sizes)
        plain_numbers(ax)
    yield "selected", grid, "Selected attention, random blocks"


def decode(document: dict[str, Any]) -> Iterator[Picture]:
    """A step's time against length, ours and the fastest full attention's."""
    rows = frame(document)
    rows = rows[(rows.num_new == 1) & (rows.kind != "layer")]
    keys = ["batch_size", "group_size", "num_tokens", "kind"]
    data = rows.groupby(keys).ms.min().mul(1e3).reset_index()
    data = data.groupby(keys[:2]).filter(
        lambda here: here.kind.nunique() > 1 and here.num_tokens.nunique() > 1
    )
    data["what"] = data.kind.map(dict(ours="NSA", full="full attention, the fastest"))
    grid = lines(
        data, "what", x="num_tokens", y="ms", row="batch_size", col="group_size",
        height=2.8, aspect=1.4, facet_kws=dict(sharey="row"),
    )  # fmt: skip
    grid.set_titles("sequences: {row_name}, G = {col_name}")
    grid.set_axis_labels("tokens of a sequence (1K = 1,024)", "microseconds of a layer")
    for ax in grid.axes.flat:
        tokens_axis(ax, sorted(data.num_tokens.unique()))
        plain_numbers(ax)
    yield "decode", grid, "A new token in the cache: NSA beside full attention"


def core_branches(document: dict[str, Any]) -> Iterator[Picture]:
    yield from parts(document)
    yield from floors(document)


PICTURES = {x.__name__: x for x in (core, crossover, core_branches, decode, selected)}
