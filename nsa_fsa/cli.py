"""The command line: `nsa-fsa info` (what is here, and what can run), `nsa-fsa explain` (what a
layer would run, and why), `nsa-fsa bench` (how long it takes, beside full attention),
`nsa-fsa bench decode` and `nsa-fsa bench prefill` (the same of a token and of a prompt),
`nsa-fsa crossover` (from which length on it is faster), `nsa-fsa serve` (an OpenAI API),
`nsa-fsa convert` (makes a dense checkpoint sparse), and `nsa-fsa convert-report` (what that did to
it)."""

import importlib.metadata
import os
import platform
import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import nsa_fsa
from nsa_fsa.benchmarking.cases import PASSES, Case
from nsa_fsa.benchmarking.decoding import FULL_DECODING, NSA_DECODE, DecodeCase
from nsa_fsa.benchmarking.implementations import FULL_ATTENTION, NSA_CORE, NSA_LAYER
from nsa_fsa.benchmarking.meter import CudaMeter
from nsa_fsa.benchmarking.prefill import prefill
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.runs import LENGTHS, Bench
from nsa_fsa.config import PRESETS, NSAConfig
from nsa_fsa.decode.operator import APPEND_BACKENDS, MOST_NEW
from nsa_fsa.decode.operator import BACKENDS as DECODE_BACKENDS
from nsa_fsa.integrations.vllm.serve import server_command
from nsa_fsa.modules.explain import GPUS
from nsa_fsa.modules.fused import quack_kernels
from nsa_fsa.ops.common.backends import Backends
from nsa_fsa.ops.compression.operator import GATHER_BACKENDS, POOL_BACKENDS
from nsa_fsa.ops.nsa_attention import OPERATORS as CORE_OPERATORS
from nsa_fsa.ops.sliding_window_attention.flash_attention import FLASH_ATTN_4
from nsa_fsa.training import commands

PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "transformers")
# In the order in which a layer calls them.
OPERATORS: tuple[Backends[Any], ...] = (
    POOL_BACKENDS,
    GATHER_BACKENDS,
    *CORE_OPERATORS,
    APPEND_BACKENDS,
    DECODE_BACKENDS,
)
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
app.command()(commands.convert)
app.command()(commands.convert_report)
console = Console()

# Options that several commands have.
Config = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="YAML of an NSAConfig, as in configs/."),
]
Preset = Annotated[str | None, typer.Option(help=f"Of {', '.join(PRESETS)}. Default: fsa-64x16.")]
Heads = Annotated[int | None, typer.Option(min=1, help="Query heads. Default: 32.")]
HeadDim = Annotated[int | None, typer.Option(min=1, help="Head width. Default: 128.")]
KvHeads = Annotated[list[int] | None, typer.Option(min=1, help="KV heads; repeat. Default: 8.")]
HalfDtype = Annotated[str, typer.Option(help="Of bfloat16, float16.")]
Milliseconds = Annotated[float, typer.Option(min=0, help="Of each measurement; at least 5 runs.")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Of all random inputs.")]
Output = Annotated[Path, typer.Option(file_okay=False, help="Where the JSON goes.")]
FULL_LABELS = {x.label for x in FULL_DECODING}
IMPLEMENTATIONS = {x.name: x for x in (NSA_CORE, NSA_LAYER)} | FULL_ATTENTION
HALF = ("bfloat16", "float16")
MAX_TOKENS = 2**31 - 1  # as far as the int32 of cu_seqlens counts
RESULTS = Path("nsa_fsa_results")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_version(wanted: bool) -> None:
    if wanted:
        console.print(
            f"nsa_fsa {nsa_fsa.__version__}, PyTorch {torch.__version__}", highlight=False
        )
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Versions, GPUs, and which backends of every operator can run here, or why they cannot."""
    packages = Table(title="Environment", show_header=False)
    packages.add_row("nsa_fsa", nsa_fsa.__version__)
    packages.add_row("Python", platform.python_version())
    for package in PACKAGES:
        packages.add_row(package, version(package))
    packages.add_row("CUDA of PyTorch", torch.version.cuda or "none: a CPU build")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        packages.add_row(
            f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}"
        )
    if not torch.cuda.device_count():
        packages.add_row("GPUs", "none")
    fused = "PyTorch" if quack_kernels() is None else "quack, on GPUs from Hopper on"
    packages.add_row("RoPE and RMSNorm", fused)
    console.print(packages)

    table = Table(title='Backends, in the order in which backend="auto" asks them')
    for heading in ("operator", "backend", "can run here"):
        table.add_column(heading)
    for operator in OPERATORS:
        for name, reason in operator.available().items():
            runs = "yes" if reason is None else f"no: {escape(reason)}"
            table.add_row(operator.operator, name, runs)
        table.add_section()
    console.print(table)


def chosen(value: str, allowed: Any, option: str) -> str:
    if value not in allowed:
        message = f"{value!r} is not known: allowed are {', '.join(allowed)}."
        raise typer.BadParameter(message, param_hint=option)
    return value


def layer_of(
    config: Path | None,
    preset: str | None,
    heads: int | None,
    kv_heads: int | None,
    width: int | None,
) -> NSAConfig:
    """The layer that the options describe; a wrong one ends the program with its reason."""
    given = {"--preset": preset, "--heads": heads, "--kv-heads": kv_heads, "--head-dim": width}
    without_effect = [name for name, x in given.items() if x is not None and config is not None]
    if without_effect:
        options = f"{', '.join(without_effect)} would have no effect. Fix: leave either out."
        message = f"{config} says all of the layer, so {options}"
        raise typer.BadParameter(message, param_hint="--config")
    heads, width = heads or 32, width or 128
    sizes = dict(hidden_size=heads * width, num_heads=heads, num_kv_heads=kv_heads or 8)
    try:
        if config is not None:
            return NSAConfig.from_yaml(config)
        return NSAConfig.from_dict({"preset": preset or "fsa-64x16", **sizes, "head_dim": width})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def layers_of(
    config: Path | None,
    preset: str | None,
    heads: int | None,
    kv_heads: list[int] | None,
    width: int | None,
) -> list[NSAConfig]:
    """The layers that the options describe: one for each number of KV heads."""
    numbers: list[Any] = kv_heads or [None]
    return [layer_of(config, preset, heads, number, width) for number in numbers]


@app.command()
def explain(
    tokens: Annotated[int, typer.Option(min=1, help="Packed tokens of all sequences.")] = 8192,
    config: Config = None,
    preset: Preset = None,
    heads: Heads = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="KV heads. Default: 8.")] = None,
    head_dim: HeadDim = None,
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: a GPU if any.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--for", help=f"As on another GPU: of {', '.join(GPUS)}, or sm_90, ..."),
    ] = None,
) -> None:
    """What every operator of a layer would run, and why. Runs nothing and takes no memory.

    The layer is that of --config, or is made of --preset, --heads, --kv-heads and --head-dim.
    """
    chosen(dtype, DTYPES, "--dtype")
    layer = layer_of(config, preset, heads, kv_heads, head_dim)
    try:
        found = nsa_fsa.explain(layer, tokens, dtype=DTYPES[dtype], device=device, gpu=gpu)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    shape = f"{layer.num_heads} query heads of {layer.head_dim}, {layer.num_kv_heads} KV heads"
    console.print(f"{tokens:,} tokens, {shape}, {dtype}:", highlight=False)
    console.print(escape(str(found)), highlight=False, soft_wrap=True)


def need_a_gpu() -> None:
    """Ends the program with the reason where there is nothing to time."""
    reason = None
    if not torch.cuda.is_available():
        reason = f"PyTorch {torch.__version__} sees no CUDA GPU"
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        reason = "TRITON_INTERPRET is set, so the kernels would run on the CPU"
    if reason is not None:
        text = f"The benchmark times kernels on a CUDA GPU, and cannot run here: {reason}."
        console.print(text, style="red", highlight=False)
        raise typer.Exit(1)


def bench_of(name: str, output: Path, milliseconds: float) -> Bench:
    """What measures for a command and writes down the results, where there is something to time."""
    need_a_gpu()
    meter = CudaMeter(milliseconds)
    return Bench(meter, Results(output, name, meter.method), console)


bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MAX_TOKENS, help="Repeat. Default: 8192, 32768, 65536."),
    ] = None,
    config: Config = None,
    preset: Preset = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: HalfDtype = "bfloat16",
    implementation: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(IMPLEMENTATIONS)}; repeat. Default: all."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--pass", help=f"Of {', '.join(PASSES)}; repeat. Default: all."),
    ] = None,
    milliseconds: Milliseconds = 300.0,
    seed: Seed = 0,
    output: Output = RESULTS,
) -> None:
    """How long NSA takes here, beside full attention: its core, from q, k, v, compressed k and v
    and gates to o, and the whole layer. Every result is checked first; one sequence.

    The sizes are those of --config, or of --preset, --heads, --kv-heads and --head-dim.
    """
    if context.invoked_subcommand is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        if given := [x for x, y in sources.items() if y is not None and y.name == "COMMANDLINE"]:
            fix = f"Fix: nsa-fsa bench {context.invoked_subcommand} --{given[0]} ..."
            raise typer.BadParameter(f"options come behind the command's name. {fix}")
        return
    names = implementation or list(IMPLEMENTATIONS)
    implementations = [
        IMPLEMENTATIONS[chosen(x, IMPLEMENTATIONS, "--implementation")] for x in names
    ]
    passes = [chosen(x, PASSES, "--pass") for x in only or PASSES]
    layers = layers_of(config, preset, heads, kv_heads, head_dim)
    kind = DTYPES[chosen(dtype, HALF, "--dtype")]
    timed = bench_of("bench", output, milliseconds)
    for layer in layers:
        for length in tokens or (8192, 32768, 65536):
            case = Case(layer, length, kind, seed=seed)
            for by in implementations:
                timed.measure(case, by, passes)
    console.print(bench_table(timed.results.document))
    console.print(f"Results: {timed.results.path}")


@bench_app.command(name="decode")
def bench_decode(
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=64, max=MAX_TOKENS, help="Repeat. Default: 8192, 32768, 65536, 131072."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Repeat. Default: 1.")] = None,
    new: Annotated[
        int, typer.Option(min=1, max=MOST_NEW, help="New tokens of a sequence, as many as guessed.")
    ] = 1,
    config: Config = None,
    preset: Preset = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: HalfDtype = "bfloat16",
    milliseconds: Milliseconds = 100.0,
    seed: Seed = 0,
    output: Output = RESULTS,
) -> None:
    """How long the next token takes a layer here, appended and compressed, from a cache in pages,
    beside full attention. Of a CUDA graph with several layers, each of which is checked first.

    The sizes are those of --config, or of --preset, --heads, --kv-heads and --head-dim.
    """
    layers = layers_of(config, preset, heads, kv_heads, head_dim)
    kind = DTYPES[chosen(dtype, HALF, "--dtype")]
    timed = bench_of("bench_decode", output, milliseconds)
    for layer in layers:
        for number in batch or (1,):
            for length in tokens or (8192, 32768, 65536, 131072):
                case = DecodeCase(layer, length, kind, seed=seed, batch_size=number, num_new=new)
                for by in (NSA_DECODE, *FULL_DECODING):
                    timed.measure(case, by, ["forward"])
    console.print(decode_table(timed.results.document))
    console.print(f"Results: {timed.results.path}")


@bench_app.command(name="prefill")
def bench_prefill(
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=64, max=MAX_TOKENS, help="Repeat. Default: 32768, 65536, 131072."),
    ] = None,
    chunk: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens at a time. Repeat. Default: 16384.")
    ] = None,
    config: Config = None,
    preset: Preset = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: HalfDtype = "bfloat16",
    milliseconds: Milliseconds = 100.0,
    seed: Seed = 0,
    output: Output = RESULTS,
) -> None:
    """How long a prompt takes a layer here: by itself, into a cache, and in chunks into a cache.

    The sizes are those of --config, or of --preset, --heads, --kv-heads and --head-dim.
    """
    layers = layers_of(config, preset, heads, kv_heads, head_dim)
    kind = DTYPES[chosen(dtype, HALF, "--dtype")]
    timed = bench_of("bench_prefill", output, milliseconds)
    ways = [NSA_LAYER, *(prefill(x) for x in (None, *(chunk or (16384,))))]
    for layer in layers:
        for length in tokens or (32768, 65536, 131072):
            case = Case(layer, length, kind, seed=seed)
            for by in ways:
                timed.measure(case, by, ["forward"])
    console.print(bench_table(timed.results.document))
    console.print(f"Results: {timed.results.path}")


@app.command()
def crossover(
    config: Config = None,
    preset: Preset = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    dtype: HalfDtype = "bfloat16",
    against: Annotated[
        str | None,
        typer.Option(help=f"Of {', '.join(FULL_ATTENTION)}. Default: the first that can run here."),
    ] = None,
    milliseconds: Milliseconds = 100.0,
    seed: Seed = 0,
    output: Output = RESULTS,
) -> None:
    """From which sequence length on NSA's core is faster than full attention, for the forward and
    for both passes.

    The sizes are those of --config, or of --preset, --heads, --kv-heads and --head-dim.
    """
    full = chosen(against or first_peer(), FULL_ATTENTION, "--against")
    layers = layers_of(config, preset, heads, kv_heads, head_dim)
    kind = DTYPES[chosen(dtype, HALF, "--dtype")]
    timed = bench_of("crossover", output, milliseconds)
    for layer in layers:
        case = Case(layer, LENGTHS[0], kind, seed=seed)
        timed.crossover(case, FULL_ATTENTION[full])
    console.print(crossover_table(timed.results.document))
    console.print(f"Results: {timed.results.path}")


@app.command(
    context_settings=dict(allow_extra_args=True, ignore_unknown_options=True),
    options_metavar="[OPTIONS OF VLLM]",
)
def serve(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(help="Folder that save_pretrained of a patched model wrote.")
    ],
) -> None:
    """Serves a patched checkpoint with vLLM, by the OpenAI API.

    Whatever follows the checkpoint is vLLM's own, such as --port 8000 or --max-model-len 65536.
    """
    try:
        command = server_command(checkpoint, context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="serve") from error
    console.print(f"Starting {shlex.join(command)}", highlight=False, soft_wrap=True, markup=False)
    os.execv(command[0], command)  # so that signals and the exit code are the server's


def first_peer() -> str:
    reason = FLASH_ATTN_4.unavailable()
    if reason is not None:
        console.print(f"Against cuDNN, because {reason}.", style="yellow", markup=False)
    return "cudnn" if reason else "flash_attn_4"


def table_of(title: str, caption: str, left: tuple[str, ...], *right: str) -> Table:
    table = Table(title=title, caption=caption)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def bench_table(document: dict[str, Any]) -> Table:
    """A line for each implementation and case."""
    lines: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        place = row["num_heads"], row["num_heads"] // row["group_size"], row["num_tokens"]
        lines.setdefault((*place, row["label"]), {})[row["pass"]] = row
    table = table_of(
        f"One sequence, {document['gpu']}",
        "ms: median. memory: GiB beyond the inputs at the peak of both passes. host: ms until the "
        "call of the forward and of the backward returns.",
        ("heads / KV", "tokens", "what"),
        "forward ms",
        "backward ms",
        "both ms",
        "memory",
        "host",
    )
    before = None
    for (heads, kv_heads, tokens, label), passes in lines.items():
        if before not in (None, (heads, kv_heads, tokens)):
            table.add_section()
        before = heads, kv_heads, tokens
        times = (number(passes.get(name), "ms") for name in PASSES)
        host = " / ".join(number(passes.get(name), "host_ms") for name in PASSES[:2])
        memory = number(passes.get("forward_backward"), "extra_gib")
        table.add_row(f"{heads} / {kv_heads}", f"{tokens:,}", label, *times, memory, host)
    return table


def decode_table(document: dict[str, Any]) -> Table:
    """A line for each case: microseconds of a layer."""
    rows = document["rows"]
    names = list(dict.fromkeys(row["label"] for row in rows))
    table = table_of(
        f"The next tokens of sequences in a cache, {document['gpu']}",
        "us a layer: median. speed-up: over the fastest full attention.",
        ("heads / KV", "batch", "new", "tokens"),
        *names,
        "speed-up",
    )
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        place = row["num_heads"], row["group_size"], row["batch_size"], row["num_new"]
        lines.setdefault((*place, row["num_tokens"]), {})[row["label"]] = 1e3 * row["ms"]
    for (heads, group, batch, new, tokens), times in lines.items():
        ours, full = times.get(NSA_DECODE.label), [times[x] for x in times if x in FULL_LABELS]
        gain = "-" if ours is None or not full else f"{min(full) / ours:.2f}x"
        cells = [f"{times[name]:,.1f}" if name in times else "-" for name in names]
        place = f"{heads} / {heads // group}", str(batch), str(new), f"{tokens:,}"
        table.add_row(*place, *cells, gain)
    return table


def number(row: dict[str, Any] | None, column: str) -> str:
    """Three digits."""
    if row is None:
        return "-"
    return f"{row[column]:,.0f}" if row[column] >= 100 else f"{row[column]:.3g}"


def crossover_table(document: dict[str, Any]) -> Table:
    table = table_of(
        f"From which length on NSA's core is faster than full attention, {document['gpu']}",
        "speed-up: time of full attention / time of the core.",
        ("against", "heads / KV", "pass"),
        "faster from",
        "speed-up there",
        "at the longest length",
    )
    for entry in document.get("crossovers", []):
        ratios, start = entry["ratios"], entry["tokens"]
        shape = f"{entry['num_heads']} / {entry['num_heads'] // entry['group_size']}"
        line = [entry["against"], shape, entry["pass"].replace("_", " + ")]
        if not ratios:
            table.add_row(*line, "not measured", "-", "-")
            continue
        longest = max(ratios)
        first = f"{start or longest:,}"
        first = f"never, up to {first}" if start is None else first
        first += " or fewer" if start is not None and entry["slower_at"] is None else ""
        there = "-" if start is None else f"{ratios[start]:.2f}x"
        table.add_row(*line, first, there, f"{ratios[longest]:.2f}x at {longest:,}")
    return table


if __name__ == "__main__":
    app()
