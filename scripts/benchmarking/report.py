"""Tables and pictures of a result file."""

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarking.implementations import IMPLEMENTATIONS
from benchmarking.paper import FIGURE_9, FIGURE_9_SOURCE, TABLE_5_SOURCE

GIB = 2**30
# Okabe and Ito's colours, which colour-blind readers can tell apart; ours are filled and thick, full attention is dashed.
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
}


def label(implementation: str) -> str:
    return IMPLEMENTATIONS[implementation].label if implementation in IMPLEMENTATIONS else implementation


def groups(rows: list[dict[str, Any]]) -> list[tuple[int, int, int, str]]:
    """The (head width, block size, blocks, selection) that rows of selected attention come in."""
    found = {(r["head_dim"], r["block_size"], r["num_blocks"], r["selection"]) for r in rows if r["kind"] != "full"}
    return sorted(found) or sorted({(r["head_dim"], r["block_size"], r["num_blocks"], r["selection"]) for r in rows})


def rows_of(rows: list[dict[str, Any]], group: tuple[int, int, int, str]) -> list[dict[str, Any]]:
    """The rows of one such group; full attention, which has no blocks, belongs to all of its head width."""
    head_dim, block_size, num_blocks, selection = group
    return [
        r
        for r in rows
        if r["head_dim"] == head_dim
        and (r["kind"] == "full" or (r["block_size"], r["num_blocks"], r["selection"]) == (block_size, num_blocks, selection))
    ]


def by_place(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """{(tokens, group size, implementation, variant): {pass: row}}, ordered by tokens and group size."""
    places: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["num_tokens"], r["group_size"])):
        place = (row["num_tokens"], row["group_size"], row["implementation"], row["variant"])
        places.setdefault(place, {})[row["pass"]] = row
    return places


def latency_tables(document: dict[str, Any]) -> list[Table]:
    """One table for each group: medians with their quantiles, and what they come to."""
    tables = []
    for group in groups(document["rows"]):
        head_dim, block_size, num_blocks, selection = group
        table = Table(
            title=f"Selected attention, {document['gpu']}: {num_blocks} blocks of {block_size}, {selection}, D={head_dim}",
            caption="ms: median (20% - 80%). of floor: least possible time at the measured rates, as a part of the median. "
            "memory: GiB beyond the inputs at the peak.",
        )
        for heading in ("T", "G", "implementation", "forward ms", "backward ms", "both ms"):
            table.add_column(
                heading, justify="left" if heading == "implementation" else "right", no_wrap=heading != "implementation"
            )
        for heading in ("TFLOP/s f / b", "of floor f / b", "memory f / b"):
            table.add_column(heading, justify="right", no_wrap=True)
        previous = None
        for (tokens, group_size, implementation, _), passes in by_place(rows_of(document["rows"], group)).items():
            if previous not in (None, (tokens, group_size)):
                table.add_section()
            previous = tokens, group_size
            table.add_row(
                f"{tokens:,}", str(group_size), label(implementation),
                *(_milliseconds(passes.get(name)) for name in ("forward", "backward", "forward_backward")),
                *(
                    " / ".join(_format(passes.get(name), column, form) for name in ("forward", "backward"))
                    for column, form in (("tflops", "{:.0f}"), ("of_floor", "{:.0%}"), ("extra_gib", "{:.2f}"))
                ),
            )  # fmt: skip
        tables.append(table)
    return tables


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    digits = 2 if row["ms"] < 10 else 1 if row["ms"] < 100 else 0
    median, low, high = (f"{row[name]:.{digits}f}" for name in ("ms", "ms_20", "ms_80"))
    return f"{median} ({low} - {high})"


def _format(row: dict[str, Any] | None, column: str, form: str) -> str:
    return "-" if row is None or row.get(column) is None else form.format(row[column])


def ablation_table(document: dict[str, Any]) -> Table:
    """Each variant's time relative to the whole design."""
    table = Table(title=f"Without each part of the design, {document['gpu']}", caption=f"{FIGURE_9_SOURCE}: {FIGURE_9}")
    for heading in (
        "T",
        "G",
        "blocks",
        "selection",
        "variant",
        "forward ms",
        "backward ms",
        "forward",
        "backward",
        "workspace GiB",
    ):
        table.add_column(heading, justify="left" if heading in ("variant", "selection") else "right")
    whole = {}
    for group in groups(document["rows"]):
        for (tokens, group_size, _, variant), passes in by_place(rows_of(document["rows"], group)).items():
            if variant == "whole design":
                whole[group, tokens, group_size] = passes
            base = whole.get((group, tokens, group_size), {})
            relative = [
                f"{passes[name]['ms'] / base[name]['ms']:.2f}x" if name in passes and name in base else "-"
                for name in ("forward", "backward")
            ]
            workspace = " / ".join(_format(passes.get(name), "workspace_gib", "{:.2f}") for name in ("forward", "backward"))
            table.add_row(
                f"{tokens:,}", str(group_size), f"{group[1]}x{group[2]}", group[3], variant,
                *(_milliseconds(passes.get(name)) for name in ("forward", "backward")), *relative, workspace,
            )  # fmt: skip
    return table


def memory_table(document: dict[str, Any]) -> Table:
    """Our workspace beside what the paper reports for its buffers."""
    table = Table(
        title=f"Memory beyond inputs and outputs, {document['gpu']}",
        caption=f"workspace: freed when the call returns; index: kept for the backward. Paper: {TABLE_5_SOURCE}.",
    )
    for heading in ("T", "G", "blocks", "budget GiB", "forward GiB", "backward GiB", "index GiB", "paper GB"):
        table.add_column(heading, justify="right")
    for group in groups(document["rows"]):
        for (tokens, group_size, _, variant), passes in by_place(rows_of(document["rows"], group)).items():
            forward, backward = passes.get("forward"), passes.get("backward")
            quoted = (forward or backward or {}).get("paper_gb")
            table.add_row(
                f"{tokens:,}", str(group_size), f"{group[1]}x{group[2]}", variant, _format(forward, "workspace_gib", "{:.2f}"),
                _format(backward, "workspace_gib", "{:.2f}"), _format(forward, "index_gib", "{:.2f}"),
                "-" if quoted is None else f"{quoted:.2f}",
            )  # fmt: skip
    return table


def left_out_table(document: dict[str, Any]) -> Table | None:
    """What was not timed, the same reason once however often it applied."""
    reasons: dict[tuple[str, str], int] = {}
    for entry in document["not_timed"]:
        place = label(entry["implementation"]), entry["reason"]
        reasons[place] = reasons.get(place, 0) + 1
    if not reasons:
        return None
    table = Table(title="Not timed")
    for heading in ("implementation", "times", "reason"):
        table.add_column(heading)
    for (implementation, reason), times in reasons.items():
        table.add_row(implementation, str(times), reason)
    return table


def plot_latency(document: dict[str, Any], stem: Path) -> list[Path]:
    """One picture for each group: latency against group size, a column a length, forward above backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    paths = []
    for group in groups(document["rows"]):
        rows = rows_of(document["rows"], group)
        head_dim, block_size, num_blocks, selection = group
        lengths, names = sorted({r["num_tokens"] for r in rows}), ("forward", "backward")
        figure, axes = plt.subplots(
            2, len(lengths), figsize=(max(3.2 * len(lengths), 6.5), 7), sharex=True, squeeze=False, layout="constrained"
        )
        sizes = sorted({r["group_size"] for r in rows})
        for row_axes, name in zip(axes, names, strict=True):
            for ax, length in zip(row_axes, lengths, strict=True):
                for implementation in [x for x in STYLES if any(r["implementation"] == x for r in rows)]:
                    points = sorted(
                        (r["group_size"], r["ms"])
                        for r in rows
                        if (r["implementation"], r["num_tokens"], r["pass"]) == (implementation, length, name)
                    )
                    if not points:
                        continue
                    kind = next(r["kind"] for r in rows if r["implementation"] == implementation)
                    ax.plot(
                        *zip(*points, strict=True), label=label(implementation), linewidth=2.4 if kind == "ours" else 1.2,
                        linestyle="--" if kind == "full" else "-", markersize=6, **STYLES[implementation],
                    )  # fmt: skip
                ax.set_xscale("log", base=2)
                ax.set_xticks(sizes, [str(size) for size in sizes])
                heights = [y for line in ax.lines for y in line.get_ydata()]
                if max(heights, default=0) < 5 * min(heights, default=0):  # from 0: a part of the axis makes much of noise
                    ax.set_ylim(0, 1.15 * max(heights))
                else:
                    ax.set_yscale("log")
                    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    ax.yaxis.set_major_formatter(ScalarFormatter())
                    ax.yaxis.set_minor_formatter(NullFormatter())
                ax.grid(alpha=0.3, which="both")
                ax.set_title(f"{name}, {length:,} tokens", fontsize=10)
        for ax in axes[-1]:
            ax.set_xlabel("query heads per KV head (G)")
        for ax in axes[:, 0]:
            ax.set_ylabel("milliseconds, median")
        handles = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
        figure.suptitle(
            f"Selected attention, {num_blocks} blocks of {block_size}, {selection} selection, D={head_dim}, {document['gpu']}"
        )
        path = stem.with_name(f"{stem.name}_{block_size}x{num_blocks}_{selection}_d{head_dim}.png")
        figure.savefig(path, dpi=130)
        plt.close(figure)
        paths.append(path)
    return paths
