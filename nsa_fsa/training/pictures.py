"""The pictures of a report: an optional part, which needs matplotlib, seaborn and pandas."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from nsa_fsa.config import BRANCHES
from nsa_fsa.training.report import Answer, short_number
from nsa_fsa.visualization import BRANCH_COLORS, plot_block_selection

DENSE, SPARSE = "#7F7F7F", "#0072B2"
COLORS = {"dense": DENSE, "sparse": SPARSE}
RUNS = 4  # points of a curve each time that the position doubles
GATES_SHOWN = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)  # on an axis on which 0 and 1 are far
Picture = tuple[str, str, Any]  # its name, what it shows, the figure


def draw(found: Answer, output: Path) -> dict[str, str]:
    """Writes the pictures of a report into a folder: their names, with what they show."""
    drawn = {}
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.15):
        for name, shows, figure in _pictures(found):
            figure.savefig(output / f"{name}.png", dpi=130, bbox_inches="tight")
            plt.close(figure)
            drawn[name] = shows
    return drawn


def _pictures(found: Answer) -> Iterator[Picture]:
    yield "loss", "Loss by position, dense beside sparse, and the gap", loss(found)
    yield "layers", "What every layer chooses, and its gates", layers(found)
    if found.needles is not None:
        yield "needles", "Which needles are found, by depth and length", needles(found)
    yield "selections", "Keys that queries read in some layers", selections(found)
    if found.history:
        yield "learning", "Loss, error and mass while it was trained", learning(found)


def loss(found: Answer) -> Any:
    """The loss at every position, in runs that grow with it, and the gap by bucket."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=(3, 2))
    first = max(1, found.loss[1].stop // 4)  # before that there are few tokens, and much noise
    number = round(RUNS * np.log2(found.length / first))
    edges = np.unique(np.geomspace(first, found.length, number + 1).round().astype(int))
    runs = list(itertools.pairwise(edges))
    for name, values in found.curve.items():
        means = [np.mean(values[a - 1 : b - 1]) for a, b in runs]
        middle = [np.sqrt(a * b) for a, b in runs]
        left.plot(middle, means, color=COLORS[name], label=name, linewidth=2)
    left.set_xscale("log", base=2)
    ticks = [first, 2 * first, *(x.first for x in found.loss[2:]), found.length]
    left.set_xticks(ticks, [short_number(int(x)) for x in ticks])
    left.set(xlabel="position", ylabel="nats per token", title="Loss by position")
    left.legend(frameon=False)

    rows = found.loss[1:]
    places = range(len(rows))
    errors = [0.0 if np.isnan(x.uncertainty) else x.uncertainty for x in rows]
    right.bar(places, [x.gap for x in rows], color=SPARSE, width=0.65)
    right.errorbar(
        places, [x.gap for x in rows], errors, fmt="none", ecolor="black", capsize=3, linewidth=1
    )
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(places, [f"{short_number(x.first)}\nto {short_number(x.stop)}" for x in rows])
    right.grid(axis="x", visible=False)
    right.set(xlabel="positions", ylabel="nats per token", title="Gap: sparse less dense")
    sns.despine(figure)
    figure.tight_layout()
    return figure


def layers(found: Answer) -> Any:
    """Mass and recall, error and divergence, and the gates of every layer."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    place = [x.layer for x in found.layers]
    shares, errors, gates = axes

    for name, color in (("mass", SPARSE), ("recall", "#D55E00")):
        values = [getattr(x, name) for x in found.layers]
        label = "mass in chosen blocks" if name == "mass" else "recall of the best free blocks"
        shares.plot(place, values, "o-", color=color, label=label, markersize=4)
    shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    shares.set(ylim=(0, 1.02), title="Chosen blocks, beside dense attention")

    for name, color in (("error", "#CC79A7"), ("divergence", "#009E73")):
        values = [getattr(x, name) for x in found.layers]
        errors.plot(place, values, "o-", color=color, label=name, markersize=4)
    errors.set(title="Distance from dense attention")
    errors.set_ylim(bottom=0)

    looks = zip(BRANCHES, BRANCH_COLORS, ("o-", "o-", "s--"), strict=True)
    for number, (name, color, look) in enumerate(looks):  # two gates may lie upon each other
        near = np.clip([x.gates[number] for x in found.layers], 0.0007, 0.9993)
        gates.plot(place, near, look, color=color, label=name, markersize=4)
    gates.set_yscale("logit")
    gates.yaxis.set_major_locator(FixedLocator(GATES_SHOWN))
    gates.yaxis.set_major_formatter(FuncFormatter(_plain))
    gates.yaxis.set_minor_locator(NullLocator())
    gates.set(ylim=(GATES_SHOWN[0] / 1.5, 1 - GATES_SHOWN[0] / 1.5), title="Mean gates")

    for ax in axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(ax)

    sns.despine(figure)
    figure.tight_layout()
    return figure


def _plain(value: float, _: Any) -> str:
    return f"{value:g}"


def _legend_below(ax: Any) -> None:
    ax.legend(
        frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3
    )


def needles(found: Answer) -> Any:
    """A heat map of each model."""
    assert found.needles is not None
    haystacks = found.needles.haystacks
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colors = sns.light_palette(SPARSE, as_cmap=True)
    for ax, name in zip(axes, ("dense", "sparse"), strict=True):
        table = pd.DataFrame(
            np.asarray(getattr(found.needles, name)).T,
            index=[f"{x:.0%}" for x in haystacks.depths],
            columns=[short_number(x) for x in haystacks.lengths],
        )
        options: dict[str, Any] = dict(vmin=0, vmax=1, cmap=colors, linewidths=1.5, annot=True)
        sns.heatmap(table, ax=ax, fmt=".0%", cbar=False, **options)
        ax.set(xlabel="tokens", title=name)
        ax.tick_params(axis="y", rotation=0)
    axes[0].set_ylabel("depth of the needle")
    figure.suptitle(f"Needles that are found, of {haystacks.samples} each")
    return figure


def selections(found: Answer) -> Any:
    """What the queries of the first window read in some layers."""
    number = len(found.records)
    figure, axes = plt.subplots(
        1, number, figsize=(4.6 * number, 5.2), squeeze=False, layout="constrained"
    )
    for ax, entry in zip(axes[0], found.records, strict=True):
        with plt.rc_context({"axes.grid": False}):
            plot_block_selection(ax, entry)
        ax.grid(visible=False)
        ax.set_title(f"layer {entry.layer_idx}, KV head 0")
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
        legend = ax.get_legend()
        handles = legend.legend_handles
        labels = [x.get_text() for x in legend.get_texts()]
        legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def learning(found: Answer) -> Any:
    """The model's own loss, and what lessons said, step by step."""
    logs = pd.DataFrame(found.history)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4))
    own = logs.get("nsa_own", pd.Series(np.nan, index=logs.index)).fillna(logs["loss"])
    panels = (
        (own, "Loss, nats per token", "black"),
        (logs.get("nsa_error"), "Error of layers' outputs", "#CC79A7"),
        (logs.get("nsa_mass"), "Dense attention's mass in chosen blocks", SPARSE),
    )
    for ax, (values, title, color) in zip(axes, panels, strict=True):
        if found.warm_up:
            ax.axvspan(
                *(0, found.warm_up + 0.5), color="#F0E442", alpha=0.25, linewidth=0, label="warm-up"
            )
        if values is not None:
            ax.plot(logs["step"], values, color=color, linewidth=1.2)
        ax.set(title=title, xlabel="step", xlim=(0, logs["step"].max()))
    if found.warm_up:
        axes[0].legend(frameon=False, fontsize="small")
    sns.despine(figure)
    figure.tight_layout()
    return figure
