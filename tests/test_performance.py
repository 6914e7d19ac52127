"""The figures of docs/performance.md are those of docs/results."""

import json
import re
from pathlib import Path

import pytest

from nsa_fsa.benchmarking.core import NSA_FSA, PARTS
from nsa_fsa.ops.common.tuning import CompressedConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/performance.md").read_text()
TEXT = " ".join(PAGE.split())
GROUPS = (1, 4, 16)


def document(benchmark):
    return json.loads((ROOT / f"docs/results/{benchmark}_nvidia_h200.json").read_text())


def section(heading):
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def tables(heading):
    """The lines of a section's table, without its headings."""
    return [line for line in section(heading).splitlines() if line.startswith("|")][2:]


def line(*cells):
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def ms(value):
    """Three digits, as the page has them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def test_against_full_attention():
    times = {(r["num_tokens"], r["group_size"], r["implementation"], r["pass"]): r["ms"] for r in document("core")["rows"]}

    def both(tokens, group, name):
        return " / ".join(ms(times[tokens, group, name, x]) for x in ("forward", "backward"))

    def ratio(tokens, group):
        full, ours = (times[tokens, group, name, "forward_backward"] for name in ("flash_attn_4", "nsa_fsa"))
        return f"{full / ours:.2f}"

    expected = [
        line(
            f"{tokens:,}", *(both(tokens, group, "nsa_fsa") for group in GROUPS), both(tokens, 4, "flash_attn_4"),
            ", ".join(ratio(tokens, group) for group in GROUPS),
        )
        for tokens in sorted({key[0] for key in times})
    ]  # fmt: skip
    assert tables("Against full attention") == expected


def test_two_runs_against_full_attention():
    """The rows that the core's and the crossover's run share: 12,288 tokens differ most, as flash-attn 4 does."""
    core, crossover = (
        {
            (r["num_tokens"], r["group_size"], r["implementation"]): r["ms"]
            for r in document(benchmark)["rows"]
            if r["pass"] == "forward_backward"
        }
        for benchmark in ("core", "crossover")
    )

    def ratio(ms, tokens, group):
        return ms[tokens, group, "flash_attn_4"] / ms[tokens, group, "nsa_fsa"]

    full = [(ms(crossover[12288, g, "flash_attn_4"]), ms(core[12288, g, "flash_attn_4"])) for g in (1, 4)]
    assert f"took {full[0][0]} instead of {full[0][1]} ms for both passes of 12,288 tokens at G = 1" in TEXT
    assert f"{full[1][0]} instead of {full[1][1]} ms at G = 4" in TEXT
    assert f"would be {ratio(crossover, 12288, 1):.2f} and {ratio(crossover, 12288, 4):.2f}" in TEXT
    for group in (1, 4):
        assert crossover[12288, group, "nsa_fsa"] == pytest.approx(core[12288, group, "nsa_fsa"], rel=0.005)
    shared = {key[:2] for key in core} & {key[:2] for key in crossover}
    off = {key: abs(ratio(crossover, *key) / ratio(core, *key) - 1) for key in shared}
    assert sorted(off, key=off.get)[-2:] in ([(12288, 1), (12288, 4)], [(12288, 4), (12288, 1)])


def test_crossover():
    found = {}
    for entry in document("crossover")["crossovers"]:
        found.setdefault(entry["pass"], set()).add(entry["tokens"])
    with_backward, forward = (f"{min(x):,} to {max(x):,}" for x in (found["forward_backward"], found["forward"]))
    assert f"faster from {with_backward} tokens on with backward, from {forward} forward alone" in TEXT


def parts():
    """{(tokens, pass): {part: [row for each group size]}}"""
    found = {}
    for row in sorted(document("core_branches")["rows"], key=lambda row: row["group_size"]):
        found.setdefault((row["num_tokens"], row["pass"]), {}).setdefault(row["implementation"], []).append(row)
    return found


def between(values):
    """ "44 to 46%", or "45%" """
    low, high = (f"{x:.0%}" for x in (min(values), max(values)))
    return low if low == high else f"{low[:-1]} to {high}"


def test_where_the_time_goes():
    shares = {}
    for place, rows in parts().items():
        if place[1] == "forward_backward":
            continue
        sums = [sum(rows[name][i]["ms"] for name in PARTS if name in rows) for i in range(len(GROUPS))]
        for total, whole in zip(sums, rows[NSA_FSA.name], strict=True):
            assert round(abs(total / whole["ms"] - 1), 2) <= 0.03
        for what, names in (
            ("selected", ["selected_attention"]),
            ("windows", [x for x in ("compressed_attention", "select_blocks") if x in rows]),
        ):
            here = [sum(rows[name][i]["ms"] for name in names) / total for i, total in enumerate(sums)]
            shares[(what, *place)] = between(here)
    assert "their sum is the whole to within 3%" in TEXT
    assert (
        f"selected attention is {shares['selected', 8192, 'forward']} of the forward and "
        f"{shares['selected', 8192, 'backward']} of the backward"
    ) in TEXT
    assert (
        f"it is {shares['selected', 65536, 'forward']} and {shares['selected', 65536, 'backward']}, and what compares with "
        f"every 16th token, compressed attention and the choice of blocks, {shares['windows', 65536, 'forward']} and "
        f"{shares['windows', 65536, 'backward']}."
    ) in TEXT


def of_floor(tokens, name, part):
    return between([row["of_floor"] for row in parts()[tokens, name][part]])


@pytest.mark.parametrize(
    "sentence",
    [
        "Compressed attention, forward: {65536 forward compressed_attention}.",
        "Compressed attention, backward: {65536 backward compressed_attention}.",
        "Block selection: {65536 forward select_blocks}.",
        "Selected attention: {65536 forward selected_attention} forward, {65536 backward selected_attention} backward.",
        "Sliding window (flash-attn 4): {65536 forward sliding_window_attention} forward, "
        "{65536 backward sliding_window_attention} backward.",
        "compressed attention ({8192 forward compressed_attention} and {8192 backward compressed_attention}) and the choice of "
        "blocks ({8192 forward select_blocks})",
    ],
)
def test_floors(sentence):
    def value(match):
        tokens, name, part = match[1].split()
        return of_floor(int(tokens), name, part)

    assert re.sub(r"\{([^}]*)\}", value, sentence) in TEXT


def test_floor_of_the_gates_and_rates():
    rows = [row for name in ("forward", "backward") for row in parts()[65536, name]["gated_combine"]]
    assert f"Gates: {between([row['of_floor'] for row in rows])}." in TEXT
    assert f"sequences of less than {CompressedConfig().one_pass_tokens:,} tokens" in TEXT
    ceilings = document("core_branches")["runs"][0]["ceilings"]
    rates = f"{ceilings['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s and {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    assert f"measured in the same run ({rates})" in TEXT


def test_table_7():
    cells = {(r["block_size"], r["group_size"], r["num_tokens"], r["pass"]): r for r in document("core_table7")["rows"]}
    expected = []
    for (block, group, tokens, name), forward in sorted(cells.items()):
        if name == "forward":
            both = cells[block, group, tokens, "forward_backward"]
            assert forward["faster_than_fsa"]
            assert both["faster_than_fsa"]
            seconds = [
                text
                for row in (forward, both)
                for text in (f"{row['ms'] / 1e3:.3f}", *(f"{row['paper_s'][x]:.2f}" for x in ("fsa", "nsa", "full")))
            ]
            gain = f"{both['paper_s']['fsa'] / both['ms'] * 1e3:.1f}"
            expected.append(line(f"{block} x {forward['num_blocks']}", group, f"{tokens // 1024}K", *seconds, gain))
    assert tables("Beside the FSA paper") == expected
    assert len(expected) == 16
    full = {(r["num_tokens"], r["group_size"], r["implementation"], r["pass"]): r["ms"] for r in document("core")["rows"]}
    slower = {
        f"{r['paper_s']['full'] * 1e3 / full[131072, group, 'flash_attn_4', 'forward']:.1f}"
        for (_, group, tokens, name), r in cells.items()
        if (tokens, name) == (131072, "forward") and group in GROUPS
    }
    assert slower == {"2.3"}
    assert "2.3 times as long as flash-attn 4 does here (128K tokens, forward)" in TEXT


def test_memory():
    expected = [
        line(
            f"{r['num_tokens']:,}", "`recompute` of all three branches" if r["recompute"] else "everything",
            f"{r['peak_gib']:.1f}", f"{r['full_attention_gib']:.1f}", f"{r['of_full_attention']:.2f}", f"{r['ms']:,.0f}",
        )
        for r in document("core_memory")["rows"]
        if "peak_gib" in r
    ]  # fmt: skip
    assert tables("Memory") == expected


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGE))))
def test_links(path):
    assert (ROOT / "docs" / path).exists()
