"""Tables of a result file."""

from typing import Any

from rich.table import Table

from nsa_fsa.benchmarking.compressed import COMPRESSED
from nsa_fsa.benchmarking.core import CORE, PARTS
from nsa_fsa.benchmarking.implementations import IMPLEMENTATIONS
from nsa_fsa.benchmarking.paper import FIGURE_9, FIGURE_9_SOURCE, TABLE_5_SOURCE, TABLE_7_SOURCE
from nsa_fsa.benchmarking.selection import SELECTION

LABELS = {x.name: x.label for x in (IMPLEMENTATIONS | COMPRESSED | SELECTION | CORE | PARTS).values()}
TITLES = {
    "selected": "Selected attention", "compressed": "Compressed attention", "selection": "Block selection",
    "core": "The whole core", "core_branches": "The core and its parts", "crossover": "The whole core against full attention",
}  # fmt: skip
INPUTS = {
    "random": "random selection", "realistic": "realistic selection", "independent": "independent compressed keys",
    "window_means": "compressed keys that are means",
}  # fmt: skip
# Column of a row to how it is printed.
RATES = {"tflops": "{:.0f}", "of_floor": "{:.0%}", "extra_gib": "{:.2f}", "host_ms": "{:.2f}"}
PAPERS = ("fsa", "nsa", "full")  # of table 7
Group = tuple[int, int, int, str]


def label(implementation: str) -> str:
    return LABELS.get(implementation, implementation)


def groups(rows: list[dict[str, Any]]) -> list[Group]:
    """The (head width, block size, blocks, selection) that rows come in; block size 0 only where no row has blocks."""
    found = [(r["head_dim"], r["block_size"], r["num_blocks"], r["selection"]) for r in rows]
    return sorted({group for group in found if group[1]}) or sorted(set(found))


def rows_of(rows: list[dict[str, Any]], group: Group) -> list[dict[str, Any]]:
    """The rows of one such group; what has no blocks belongs to all of its inputs, and full attention to all."""
    head_dim, block_size, num_blocks, selection = group
    return [
        r
        for r in rows
        if r["head_dim"] == head_dim
        and (r["block_size"], r["num_blocks"]) in ((block_size, num_blocks), (0, 0))
        and (r["selection"] == selection or r["kind"] == "full")
    ]


def title(document: dict[str, Any], group: Group) -> str:
    """ "Selected attention, NVIDIA H200: 16 blocks of 64, random, D=128"; without blocks, the windows instead."""
    head_dim, block_size, num_blocks, selection = group
    row = document["rows"][0]
    windows = f"windows of {row['kernel_size']} every {row['kernel_stride']}" if "kernel_size" in row else ""
    blocks = f"{num_blocks} blocks of {block_size}" if block_size else ""
    details = ", ".join(x for x in (blocks, windows, INPUTS.get(selection, selection), f"D={head_dim}") if x)
    return f"{TITLES[document['benchmark']]}, {document['gpu']}: {details}"


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
        table = Table(
            title=title(document, group),
            caption="ms: median (20% - 80%). of floor: least possible time at the measured rates, as a part of the median. "
            "memory: GiB beyond the inputs at the peak. host: ms until the call returns.",
        )
        for heading in ("T", "G", "implementation", "forward ms", "backward ms", "both ms"):
            table.add_column(
                heading, justify="left" if heading == "implementation" else "right", no_wrap=heading != "implementation"
            )
        for heading in ("TFLOP/s f / b", "of floor f / b", "memory f / b", "host f / b"):
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
                    for column, form in RATES.items()
                ),
            )  # fmt: skip
        tables.append(table)
    return tables


def selection_tables(document: dict[str, Any]) -> list[Table]:
    """One table for each group: the choice of blocks beside compressed attention's forward on the same inputs."""
    tables = []
    for group in groups(document["rows"]):
        table = Table(
            title=title(document, group),
            caption="ms: median (20% - 80%). ratio: selection to compressed attention's forward. of floor: least possible time "
            "at the measured rates, as a part of the median. memory: GiB beyond the inputs at the peak. host: ms until the "
            "call returns.",
        )
        for heading in (
            "T", "G", "compressed ms", "selection ms", "ratio", "TFLOP/s", "of floor", "memory", "host", "score lost",
        ):  # fmt: skip
            table.add_column(heading, justify="right", no_wrap=True)
        for (tokens, group_size), (base, chosen) in beside_compressed(rows_of(document["rows"], group)).items():
            table.add_row(
                f"{tokens:,}", str(group_size), _milliseconds(base), _milliseconds(chosen),
                f"{chosen['ms'] / base['ms']:.2f}" if chosen and base else "-",
                *(
                    _format(chosen, column, form)
                    for column, form in RATES.items()
                ),
                f"{chosen['errors']['score_lost']:.1e}" if chosen else "-",
            )  # fmt: skip
        tables.append(table)
    return tables


def beside_compressed(rows: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[dict | None, dict | None]]:
    """{(tokens, group size): (compressed attention's forward, block selection)} of one group's rows."""
    found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for (tokens, group_size, implementation, _), passes in by_place(rows).items():
        if "forward" in passes:
            found.setdefault((tokens, group_size), {})[implementation] = passes["forward"]
    return {place: (x.get("compressed_attention"), x.get("select_blocks")) for place, x in found.items()}


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


def core_memory_table(document: dict[str, Any]) -> Table:
    """Peak of forward and backward beside what full attention's tensors take, with the bar that it is held to."""
    table = Table(
        title=f"Memory of the whole core, {document['gpu']}",
        caption="peak: one forward and backward, inputs, outputs and gradients included. full attention: q, k, v, o, lse, do, "
        "dq, dk and dv alone.",
    )
    for heading in (
        "T", "G", "variant", "forward ms", "backward ms", "both ms", "peak GiB", "full attention GiB", "ratio", "bar",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=heading != "variant")
    for (tokens, group_size, _, variant), passes in by_place(document["rows"]).items():
        both = passes.get("forward_backward")
        kept = "-" if both is None else f"{both['bar']}: {'kept' if both['within_bar'] else 'missed'}"
        table.add_row(
            f"{tokens:,}", str(group_size), variant,
            *(_milliseconds(passes.get(name)) for name in ("forward", "backward", "forward_backward")),
            *(_format(both, column, "{:.2f}") for column in ("peak_gib", "full_attention_gib", "of_full_attention")), kept,
        )  # fmt: skip
    return table


def table_7_table(document: dict[str, Any]) -> Table:
    """Our seconds in the cells of the paper's table 7."""
    rows = [row for row in document["rows"] if "paper_s" in row]
    faster = sum(row["faster_than_fsa"] for row in rows)
    table = Table(
        title=f"FSA paper, table 7: seconds, ours on {document['gpu']}",
        caption=f"ours is faster than FSA in {faster} of {len(rows)} cells. Paper: {TABLE_7_SOURCE}; FA: full attention.",
    )
    for heading in ("blocks", "G", "T"):
        table.add_column(heading, justify="right")
    for name in ("forward", "f + b"):
        for heading in (f"ours {name}", "FSA", "NSA", "FA", "faster than FSA"):
            table.add_column(heading, justify="right")
    for group in groups(rows):
        for (tokens, group_size, *_), passes in by_place(rows_of(rows, group)).items():
            cells = []
            for name in ("forward", "forward_backward"):
                row = passes.get(name)
                quoted = row["paper_s"] if row else {}
                cells += [f"{row['ms'] / 1e3:.3f}" if row else "-", *(f"{quoted[x]:.2f}" if row else "-" for x in PAPERS)]
                cells.append(
                    f"{'yes' if row['faster_than_fsa'] else 'no'}, {quoted['fsa'] / row['ms'] * 1e3:.1f}x" if row else "-"
                )
            table.add_row(f"{group[1]}x{group[2]}", str(group_size), f"{tokens:,}", *cells)
        table.add_section()
    return table


def crossover_table(document: dict[str, Any]) -> Table:
    """From how many tokens on the core is faster."""
    table = Table(
        title=f"From which length on the whole core is faster than full attention, {document['gpu']}",
        caption="speed-up: time of full attention / time of the core.",
    )
    for heading in ("against", "blocks", "D", "G", "pass", "faster from", "speed-up there", "at the longest length"):
        table.add_column(heading, justify="left" if heading in ("against", "pass") else "right")
    for entry in document.get("crossovers", []):
        ratios = {int(tokens): ratio for tokens, ratio in entry["ratios"].items()}
        tokens, longest = entry["tokens"], max(ratios)
        start = f"never, up to {longest:,}" if tokens is None else f"{tokens:,}"
        table.add_row(
            label(entry["against"]), f"{entry['block_size']}x{entry['num_blocks']}", str(entry["head_dim"]),
            str(entry["group_size"]), entry["pass"].replace("_", " + "),
            f"{start} or fewer" if tokens is not None and entry["slower_at"] is None else start,
            "-" if tokens is None else f"{ratios[tokens]:.2f}x", f"{ratios[longest]:.2f}x at {longest:,}",
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
