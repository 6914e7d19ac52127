"""The tables that pages quote, each from the files in results/."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import floors
from benchmarks.published import read, rows_of

GROUPS = (1, 4, 16)
PARTS = {
    "selected_attention": "selected attention",
    "compressed_attention": "compressed attention",
    "select_blocks": "block selection",
    "sliding_window_attention": "sliding window",
    "gated_combine": "gates",
}
# Tables of the FSA paper, in seconds, but the tenth, in milliseconds.
PAPER, PAPER_9, PAPER_10 = (
    pd.read_csv(Path(__file__).with_name(f"fsa_paper_table{number}.csv")) for number in (7, 9, 10)
)
WRITTEN = 512  # tokens after the prompt, in table 9


def ms(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def both(forward: float, backward: float) -> str:
    return f"{ms(forward)} / {ms(backward)}"


def between(values: Iterable[float], form: str = ".0%", unit: str = "%") -> str:
    """ "44 to 46%", or "45%": the range of some values, in one form."""
    low, high = (f"{x:{form}}".removesuffix(unit) for x in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def times(rows: pd.DataFrame, *names: str) -> Any:
    """Milliseconds by `names` and pass."""
    return rows.set_index([*names, "pass"]).ms


def speedups(suite: str) -> pd.DataFrame:
    """The time of flash-attn 4 over that of NSA for both passes: a row a length, a column a G."""
    rows = rows_of(suite)
    rows = rows[rows["pass"] == "forward_backward"]
    columns = ["implementation", "group_size"]
    wide = rows.pivot_table(index="num_tokens", columns=columns, values="ms")
    return wide["flash_attn_4"] / wide["nsa_fsa"]


def against_full() -> pd.DataFrame:
    """NSA beside flash-attn 4 at every length; the last column is the run of the crossover."""
    rows = rows_of("core")
    of = times(rows, "num_tokens", "group_size", "implementation")
    here, again = speedups("core"), speedups("crossover")

    def cell(tokens: int, group: int, name: str) -> str:
        return both(*(of[tokens, group, name, x] for x in ("forward", "backward")))

    def ratios(table: pd.DataFrame, tokens: int) -> str:
        row = table.reindex(here.index).loc[tokens]
        return ", ".join("-" if pd.isna(row[group]) else f"{row[group]:.2f}" for group in GROUPS)

    return pd.DataFrame(
        {
            "tokens": f"{tokens:,}",
            **{f"NSA, G = {group}": cell(tokens, group, "nsa_fsa") for group in GROUPS},
            "flash-attn 4, G = 4": cell(tokens, 4, "flash_attn_4"),
            "flash-attn 4 / NSA, both passes, G = 1, 4, 16": ratios(here, tokens),
            "in another run": ratios(again, tokens),
        }
        for tokens in here.index
    )


def crossover() -> pd.DataFrame:
    """From which length on NSA is faster than flash-attn 4."""
    found = pd.DataFrame(read("crossover")["crossovers"])
    names = {"forward_backward": "both passes", "forward": "forward alone"}
    found["NSA is faster from"] = found["pass"].map(names)
    found["tokens"] = found.tokens.map("{:,} tokens".format)
    wide = found.pivot(index="NSA is faster from", columns="group_size", values="tokens")
    return wide.rename(columns="G = {}".format).loc[[*names.values()]].reset_index()


def shares() -> pd.DataFrame:
    """Which part of the sum of all parts each part takes, and what that sum is of the whole."""
    rows = rows_of("core_branches")
    lines = []
    for tokens, name in [(t, p) for t in (8192, 65536) for p in ("forward", "backward")]:
        here = rows[(rows.num_tokens == tokens) & (rows["pass"] == name)]
        wide = here.pivot(index="group_size", columns="implementation", values="ms")
        parts = wide[[x for x in PARTS if x in wide]]
        share = parts.div(parts.sum(axis=1), axis=0)
        line = {"tokens": f"{tokens:,}", "pass": name}
        line |= {y: between(share[x]) if x in share else "-" for x, y in PARTS.items()}
        lines.append(line | {"all / whole": between(parts.sum(axis=1) / wide.nsa_fsa)})
    return pd.DataFrame(lines)


def of_floor() -> pd.DataFrame:
    """Which part of its time each part's floor is."""
    rows = rows_of("core_branches")
    columns = [(t, p) for t in (65536, 8192) for p in ("forward", "backward")]
    lines = []
    for part, label in {**PARTS, "nsa_fsa": "the whole"}.items():
        line = {"floor / time": label}
        for tokens, name in columns:
            here = rows[(rows.implementation == part) & (rows.num_tokens == tokens)]
            values = here[here["pass"] == name].of_floor
            line[f"{tokens:,}, {name}"] = between(values) if len(values) else "-"
        lines.append(line)
    return pd.DataFrame(lines)


def rates() -> pd.DataFrame:
    """The two rates that the floors are made of."""
    found = read("core_branches")["runs"][0]["ceilings"]
    product, copy = found["matmul_flop_per_s"] / 1e12, found["copy_bytes_per_s"] / 1e12
    product, copy = f"{product:.0f} TFLOP/s", f"{copy:.2f} TB/s"
    return pd.DataFrame([{"large bfloat16 product": product, "large copy": copy}])


def table_7() -> pd.DataFrame:
    """Seconds, beside those of the FSA paper."""
    keys = ["block_size", "num_blocks", "group_size", "num_tokens"]
    wide = rows_of("core_table7").pivot(index=keys, columns="pass", values="ms") / 1e3
    lines = []
    for cell in PAPER.merge(wide.reset_index(), on=keys).sort_values(keys).itertuples():
        line: dict[str, Any] = {
            "blocks": f"{cell.block_size} x {cell.num_blocks}",
            "G": cell.group_size,
            "tokens": f"{cell.num_tokens // 1024}K",
        }
        for name, label in (("forward", "forward"), ("forward_backward", "both passes")):
            line[f"{label}: ours"] = f"{getattr(cell, name):.3f}"
            for who in ("FSA", "NSA", "full"):
                line[f"{label}: {who}"] = f"{getattr(cell, f'{who}_{name}'):.2f}"
        gain = cell.FSA_forward_backward / cell.forward_backward
        lines.append(line | {"FSA / ours": f"{gain:.1f}"})
    return pd.DataFrame(lines)


def decoding() -> pd.DataFrame:
    """A step of one token a sequence, in microseconds of a layer, beside the fastest full
    attention, and how many times as fast it is."""
    rows = rows_of("decode")
    rows = rows[(rows.num_new == 1) & (rows.kind != "layer")]
    keys = ["batch_size", "group_size", "num_tokens"]
    fastest = 1e3 * rows.pivot_table(index=keys, columns="kind", values="ms", aggfunc="min")
    lengths = sorted(rows.num_tokens.unique())

    def cell(batch: int, group: int, tokens: int) -> str:
        if (batch, group, tokens) not in fastest.index:
            return "-"
        ours, full = fastest.loc[batch, group, tokens][["ours", "full"]]
        return ms(ours) if pd.isna(full) else f"{ms(ours)} / {ms(full)} ({full / ours:.1f})"

    return pd.DataFrame(
        {"sequences": batch, "G": group}
        | {f"{tokens // 1024}K tokens": cell(batch, group, tokens) for tokens in lengths}
        for batch, group in sorted({x[:2] for x in fastest.dropna().index})
    )


def layer_seconds() -> pd.DataFrame:
    """Of a whole layer, a prompt and a step after it: columns by the name of the implementation."""
    keys = ["block_size", "num_blocks", "group_size", "num_tokens"]
    return rows_of("decode_paper").pivot(index=keys, columns="implementation", values="ms") / 1e3


def table_9() -> pd.DataFrame:
    """Seconds of a prompt and 512 new tokens, beside those of the FSA paper."""
    ours = layer_seconds()
    ours["seconds"] = ours.nsa_layer + WRITTEN * ours.layer_decode
    lines = []
    for cell in PAPER_9.merge(ours.seconds.reset_index()).itertuples():
        lines.append(
            {
                "blocks": f"{cell.block_size} x {cell.num_blocks}",
                "G": cell.group_size,
                "tokens": f"{cell.num_tokens // 1024}K",
                "ours": f"{cell.seconds:.3f}",
                **{who: f"{getattr(cell, who):.2f}" for who in ("FSA", "NSA", "full")},
                "FSA / ours": f"{cell.FSA / cell.seconds:.1f}",
            }
        )
    return pd.DataFrame(lines)


def table_10() -> pd.DataFrame:
    """Microseconds of a new token, beside those of the FSA paper."""
    steps = 1e6 * layer_seconds().layer_decode.xs((64, 16), level=("block_size", "num_blocks"))
    lines = []
    for cell in PAPER_10.itertuples():
        ours = steps.xs(cell.num_tokens, level="num_tokens")
        lines.append(
            {
                "tokens": f"{cell.num_tokens // 1024}K",
                **{f"ours, G = {group}": ms(x) for group, x in ours.items()},
                **{who: f"{1e3 * getattr(cell, who):,.0f}" for who in ("FSA", "NSA", "full")},
            }
        )
    return pd.DataFrame(lines)


def prompts() -> pd.DataFrame:
    """Milliseconds of a prompt through a layer: by itself, into a cache, and so in chunks."""
    ways = {
        "nsa_layer": "without a cache",
        "prefill": "into a cache",
        "prefill_16384": "in chunks of 16,384",
    }
    wide = rows_of("prefill").pivot(index="num_tokens", columns="implementation", values="ms")
    return pd.DataFrame(
        {
            "tokens": f"{tokens:,}",
            **{label: ms(wide.loc[tokens, way]) for way, label in ways.items()},
        }
        for tokens in wide.index
    )


def generation() -> pd.DataFrame:
    """Milliseconds of `generate`, sparse beside the fastest dense attention that was measured."""
    rows = pd.DataFrame(read("generate")["rows"])
    rows["sparse"] = rows.implementation == "nsa_fsa"
    keys = ["pass", "num_tokens", "batch_size"]
    wide = rows.pivot_table(index=keys, columns="sparse", values="ms", aggfunc="min").dropna()
    what = {
        "first_token": "the first token",
        "further_tokens": "each further token, static cache",
        "uncompiled_tokens": "each further token, dynamic cache",
    }
    return pd.DataFrame(
        {
            "ms": what[step],
            "tokens": f"{tokens:,}",
            "sequences": batch,
            "dense": ms(dense),
            "NSA": ms(ours),
            "dense / NSA": f"{dense / ours:.1f}",
        }
        for (step, tokens, batch), (dense, ours) in wide.iterrows()
    )


def serving() -> pd.DataFrame:
    """vLLM with the dense model and with the sparse one."""
    rows = pd.DataFrame(read("serving")["rows"])
    of = {name: found.set_index("implementation") for name, found in rows.groupby("pass")}
    lines = []

    def add(label: str, form: str, dense: float, ours: float, gain: float) -> None:
        values = (f"{x:{form}}" if form else ms(x) for x in (dense, ours))
        line = dict(zip(("vLLM", "dense", "NSA"), (label, *values), strict=True))
        lines.append(line | {"NSA is faster": f"{gain:.2f} times"})

    for (batch, tokens), found in of["decode"].groupby(["batch_size", "num_tokens"]):
        requests = f"{batch} requests of {tokens:,} tokens"
        for label, name in {
            f"new tokens/s while {requests} all decode": "tokens_per_s",
            "the same from the first request on, with their prompts": "with_prefill_tokens_per_s",
        }.items():
            dense, ours = found[name].dense, found[name].nsa_fsa
            add(label, ",.0f", dense, ours, ours / dense)
    first, load = of["first_token"], of["load"]
    length = f"{first.num_tokens.iloc[0]:,}"
    dense, ours = first.ms.dense, first.ms.nsa_fsa
    add(f"ms to the first token of {length}, alone", "", dense, ours, dense / ours)
    rate = load.variant.iloc[0].removesuffix("/s")
    for label, name in {
        "ms to the first token, of the fastest fifth at most": "ms_20",
        "ms to the first token, median": "ms",
        "ms to the first token, of 99 in 100 at most": "ms_99",
        "ms between tokens, median": "between_tokens_ms",
        "ms between tokens, of 99 in 100 at most": "between_tokens_ms_99",
    }.items():
        dense, ours = load[name].dense, load[name].nsa_fsa
        add(f"{label}, {rate} request/s", "", dense, ours, dense / ours)
    return pd.DataFrame(lines)


def same_tokens() -> pd.DataFrame:
    """How often vLLM, and transformers in the same dtype, choose as the model in float32 does."""
    entries = [x for name in ("serving_float32", "serving") for x in read(name)["agreement"]]
    names = {"dense": "dense", "nsa_fsa": "NSA"}
    return pd.DataFrame(
        {
            "dtype": x["dtype"],
            "layers": x["num_layers"],
            "model": names[x["implementation"]],
            "tokens of a prompt": f"{x['num_tokens']:,}",
            "positions": x["clear_positions"],
            "vLLM": f"{x['agreement']:.1%}",
            "transformers": f"{x['agreement_of_transformers']:.1%}",
        }
        for x in entries
    )


def shared_sequences() -> pd.DataFrame:
    """Both passes of the core on one GPU, and by context parallelism on several."""
    rows = rows_of("distributed")
    rows = rows[rows["pass"].isin(("alone", "shared")) & (rows.groups.fillna(1) == 1)]
    keys = ["num_heads", "group_size", "num_tokens", "num_gpus"]
    wide = rows.pivot(index=keys, columns="pass", values="ms").reset_index()
    return pd.DataFrame(
        {
            "query / KV heads": f"{x.num_heads} / {x.num_heads // x.group_size}",
            "tokens": f"{x.num_tokens:,}",
            "one GPU, ms": ms(x.alone),
            "GPUs": x.num_gpus,
            "these, ms": ms(x.shared),
            "of what they could": f"{x.alone / x.shared / x.num_gpus:.1%}",
        }
        for x in wide.itertuples()
    )


def memory() -> pd.DataFrame:
    """The peak of both passes beside the tensors of full attention."""
    rows = rows_of("core_memory")
    rows = rows[rows["pass"] == "forward_backward"]
    full = rows.apply(floors.full_attention_bytes, axis=1) / 2**30
    names = rows.implementation + rows.get("variant", "")
    recompute = names.str.contains("recompute|computes again")
    return pd.DataFrame(
        {
            "tokens": rows.num_tokens.map("{:,}".format),
            "kept": recompute.map({True: "`recompute` of all three branches", False: "everything"}),
            "peak, GiB": rows.peak_gib.map("{:.1f}".format),
            "full attention's tensors, GiB": full.map("{:.1f}".format),
            "ratio": (rows.peak_gib / full).map("{:.2f}".format),
            "both passes, ms": rows.ms.map("{:,.0f}".format),
        }
    )


def how_fast() -> pd.DataFrame:
    """README: the whole, its largest parts, and others, at 65,536 tokens."""
    quoted = [
        ("NSA, all of it", "core", "nsa_fsa"),
        ("full attention, flash-attn 4", "core", "flash_attn_4"),
        ("full attention, cuDNN", "core", "cudnn"),
        ("compressed attention", "core_branches", "compressed_attention"),
        ("the same by PyTorch's flex_attention", "compressed", "flex_attention"),
        ("choosing 16 blocks of 64, no gradient", "selection", "select_blocks"),
        ("selected attention, FSA's loop order: the default", "selected", "auto"),
        ("selected attention, NSA's loop order", "selected", "triton_query_major"),
    ]
    lines = []
    for label, suite, name in quoted:
        rows = rows_of(suite)
        inputs = rows.selection.isin(("independent", "random", "full")) & (rows.head_dim == 128)
        rows = rows[inputs & rows.num_blocks.isin((0, 16)) & (rows.num_tokens == 65536)]
        of = times(rows[rows.implementation == name], "group_size")
        line = {"ms, forward / backward": label}
        for group in GROUPS:
            there = [ms(of[group, x]) for x in ("forward", "backward") if (group, x) in of]
            line[f"G = {group}"] = " / ".join(there)
        lines.append(line)
    return pd.DataFrame(lines)


def speed_up_ranges() -> pd.DataFrame:
    """README: the speed-up of both passes, over all G and both runs."""
    both_runs = pd.concat([speedups("core"), speedups("crossover")])
    line = {"tokens": "flash-attn 4 / NSA, both passes"}
    for tokens in (8192, 12288, 65536, 131072):
        line[f"{tokens:,}"] = between(both_runs.loc[tokens].stack(), ".1f", "")
    return pd.DataFrame([line])
