"""The command line of the benchmark: `nsa-fsa bench`, and scripts/benchmark.py in a checkout.

    nsa-fsa bench selected                             # every setting
    nsa-fsa bench selected --tokens 65536 --group 1 --group 4 --blocks 64x16 --selection random
    nsa-fsa bench selected --memory                    # workspace, beside the FSA paper's table 5
    nsa-fsa bench selected --ablations                 # what each part of the design brings
    nsa-fsa bench compressed                           # attention over compressed keys, and compressing them
    nsa-fsa bench selection                            # the choice of blocks, beside compressed attention
    nsa-fsa bench core                                 # all of it, beside full attention
    nsa-fsa bench core --branches                      # each part of it, beside the least time it could take
    nsa-fsa bench core --memory                        # peak memory, at a million tokens too
    nsa-fsa bench core --table7                        # beside the FSA paper's table 7
    nsa-fsa crossover                                  # from which length on it is faster than full attention

Results are JSON, written after every measurement, with pictures beside them; the tables are printed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nsa_fsa.benchmarking import compressed as compressed_run
from nsa_fsa.benchmarking import core as core_run
from nsa_fsa.benchmarking import crossover as crossover_run
from nsa_fsa.benchmarking import pictures, pictures_core, report
from nsa_fsa.benchmarking import selected as runs
from nsa_fsa.benchmarking import selection as selection_run
from nsa_fsa.benchmarking.calls import Implementation
from nsa_fsa.benchmarking.compressed import COMPRESSED
from nsa_fsa.benchmarking.core import CORE, FULL, MEMORY_BARS
from nsa_fsa.benchmarking.implementations import IMPLEMENTATIONS
from nsa_fsa.benchmarking.measure import GIB, RESULTS, CudaMeter
from nsa_fsa.benchmarking.results import CannotMerge, Results
from nsa_fsa.benchmarking.selection import SELECTION
from nsa_fsa.benchmarking.settings import PASSES, CoreSetting, Setting, WindowSetting
from nsa_fsa.config import NSAConfig
from nsa_fsa.ops.sliding_window_attention.flash_attention import INSTALL

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console(width=int(os.environ.get("COLUMNS", 160)))

TOKENS, GROUPS = (8192, 32768, 65536, 131072), (1, 2, 4, 8, 16)
MEMORY_TOKENS, MEMORY_GROUP = (32768, 65536, 131072, 262144), 4
ABLATION_TOKENS = (32768, 65536)
BLOCKS, SELECTIONS = ("64x16", "128x8"), ("random", "realistic")
WINDOW_TOKENS, WINDOW_GROUPS = (8192, 32768, 65536, 131072, 262144), (1, 4, 16)
COMPRESSED_KEYS = ("window_means", "independent")
CORE_TOKENS, CORE_GROUPS, CORE_BLOCKS = (8192, 12288, 32768, 65536, 131072), (1, 4, 16), ("64x16",)
PARTS_TOKENS = (8192, 65536)
TABLE_7_TOKENS, TABLE_7_GROUPS = (131072, 262144), (1, 2, 4, 8)
MEMORY_LENGTHS, MEMORY_GROUPS = (131072, 1 << 20), (16,)
ALL_KEPT = 1 << 18  # tokens beyond which nothing keeps all branches, for no GPU has the memory
DTYPES = ("bfloat16", "float16")
MAX_TOKENS = 2**31 - 1  # as far as the int32 of cu_seqlens counts
AGAINST = tuple(x.name for x in FULL)

# Options that several commands have
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
HeadDim = Annotated[list[int] | None, typer.Option(min=1, help="Head width; repeat for several. Default: 128.")]
Blocks = Annotated[list[str] | None, typer.Option(help=f"Block size x number; repeat. Default: {BLOCKS}.")]
Passes = Annotated[list[str] | None, typer.Option("--pass", help=f"Of {PASSES}; repeat. Default: all.")]
Milliseconds = Annotated[float, typer.Option(min=0, help="How long to repeat each measurement; at least five runs.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all random inputs.")]
Output = Annotated[Path, typer.Option(file_okay=False, help="Where JSON and pictures go.", show_default=str(RESULTS.name))]
Merge = Annotated[bool, typer.Option("--merge", help="Add to the file of an earlier run of the same code.")]
Commit = Annotated[str | None, typer.Option(help="The commit, where git here does not know it.")]
WindowTokens = Annotated[
    list[int] | None,
    typer.Option("--tokens", min=1, max=MAX_TOKENS, help=f"Sequence length; repeat. Default: {WINDOW_TOKENS}."),
]
WindowGroup = Annotated[
    list[int] | None, typer.Option("--group", min=1, help=f"Query heads per KV head; repeat. Default: {WINDOW_GROUPS}.")
]


@app.callback()
def main() -> None:
    """Benchmarks of nsa_fsa. Each command says what it times."""


def need_a_gpu() -> None:
    """Ends the program with the reason where there is nothing to time."""
    reason = None
    if not torch.cuda.is_available():
        reason = f"PyTorch {torch.__version__} sees no CUDA GPU (torch.cuda.is_available() is False)"
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        reason = "TRITON_INTERPRET is set, so the kernels would run on the CPU"
    if reason is not None:
        console.print(
            f"The benchmark times kernels on a CUDA GPU, and cannot run here: {reason}.", style="red", highlight=False
        )
        raise typer.Exit(1)


def allowed(values: list[Any] | None, default: tuple[Any, ...], known: tuple[Any, ...], option: str) -> list[Any]:
    for value in values or ():
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(map(str, known))}", param_hint=option)
    return list(values or default)


def block_shape(text: str) -> tuple[int, int]:
    """ "64x16" -> (64, 16): keys per block, and blocks."""
    size, _, number = text.partition("x")
    if not (size.isdecimal() and number.isdecimal() and int(size) and int(number)):
        raise typer.BadParameter(f"{text!r} is not of the form 64x16: keys per block, and blocks", param_hint="--blocks")
    return int(size), int(number)


def check(settings: Sequence[Setting]) -> None:
    """That a layer could have each of the settings; NSAConfig says what is wrong with one."""
    for x in settings:
        if x.num_heads % x.group_size:
            raise typer.BadParameter(f"{x.group_size} does not divide --heads {x.num_heads}", param_hint="--group")
        if not x.block_size:  # the benchmark has no blocks
            continue
        sizes: dict[str, Any] = dict(
            block_size=x.block_size, num_selected_blocks=x.num_blocks, init_blocks=x.init_blocks, local_blocks=x.local_blocks,
            kernel_size=getattr(x, "kernel_size", x.block_size), kernel_stride=getattr(x, "kernel_stride", x.block_size),
        )  # fmt: skip
        try:
            NSAConfig(
                hidden_size=x.num_heads, num_heads=x.num_heads, num_kv_heads=x.num_kv_heads, rope_parameters=None, **sizes
            )
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--blocks") from None


@app.command()
def selected(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_TOKENS, help=f"Sequence length; repeat for several. Default: {TOKENS}.")
    ] = None,
    group: Annotated[list[int] | None, typer.Option(min=1, help=f"Query heads per KV head; repeat. Default: {GROUPS}.")] = None,
    heads: Heads = 64,
    head_dim: HeadDim = None,
    blocks: Blocks = None,
    selection: Annotated[list[str] | None, typer.Option(help=f"Of {SELECTIONS}; repeat. Default: both.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(IMPLEMENTATIONS)}; repeat. Default: all.")
    ] = None,
    only: Passes = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure workspace, beside the FSA paper's table 5.")] = False,
    budget: Annotated[
        list[float] | None, typer.Option(min=2**-20, help="With --memory: workspace budget in GiB; repeat.")
    ] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Time the design without each of its parts.")] = False,
    milliseconds: Milliseconds = 300.0,
    seed: Seed = 0,
    output: Output = RESULTS,
    merge: Merge = False,
    commit: Commit = None,
) -> None:
    """Selected attention: forward (block index included), backward, and both; bf16, one sequence."""
    if memory and ablations:
        raise typer.BadParameter("--memory and --ablations are two runs; give one", param_hint="--memory")
    shapes = [block_shape(text) for text in blocks or BLOCKS]
    chosen = allowed(implementation, tuple(IMPLEMENTATIONS), tuple(IMPLEMENTATIONS), "--implementation")
    passes = allowed(only, PASSES, PASSES, "--pass")
    lengths = tokens or (MEMORY_TOKENS if memory else ABLATION_TOKENS if ablations else TOKENS)
    sizes = group or ((MEMORY_GROUP,) if memory else GROUPS)
    kinds = allowed(selection, ("random",) if memory else SELECTIONS, SELECTIONS, "--selection")
    settings = [
        Setting(length, size, heads, width, block_size, number, selection=kind)
        for width in head_dim or [128]
        for length in lengths
        for block_size, number in shapes
        for kind in kinds
        for size in sizes
    ]
    check(settings)
    need_a_gpu()

    benchmark = "selected_memory" if memory else "selected_ablations" if ablations else "selected"
    meter, device = CudaMeter(milliseconds), torch.device("cuda")
    timed = [] if memory or ablations else [IMPLEMENTATIONS[name] for name in chosen]
    with results_of(benchmark, timed, output, meter, seed, merge, commit) as results:
        if memory:
            budgets = [int(x * GIB) for x in budget] if budget else [GIB // 2, 2 * GIB, runs.UNLIMITED]
            runs.run_memory(settings, budgets, meter, results, seed, device, console)
        elif ablations:
            runs.run_ablations(settings, meter, results, seed, device, console)
        else:
            runs.run_times(settings, timed, passes, meter, results, seed, device, console)


@app.command()
def compressed(
    tokens: WindowTokens = None,
    group: WindowGroup = None,
    heads: Heads = 64,
    head_dim: HeadDim = None,
    implementation: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(COMPRESSED)}; repeat. Default: all.")] = None,
    only: Passes = None,
    milliseconds: Milliseconds = 300.0,
    seed: Seed = 0,
    output: Output = RESULTS,
    merge: Merge = False,
    commit: Commit = None,
) -> None:
    """Compressed attention and the compression of keys: forward, backward, and both; bf16, one sequence."""
    timed = [COMPRESSED[name] for name in allowed(implementation, tuple(COMPRESSED), tuple(COMPRESSED), "--implementation")]
    passes = allowed(only, PASSES, PASSES, "--pass")
    settings = [
        WindowSetting(length, size, heads, width, 0, 0, 0, 0, selection="independent")
        for width in head_dim or [128]
        for length in tokens or WINDOW_TOKENS
        for size in group or WINDOW_GROUPS
    ]
    check(settings)
    need_a_gpu()
    meter = CudaMeter(milliseconds)
    with results_of("compressed", timed, output, meter, seed, merge, commit) as results:
        compressed_run.run(settings, timed, passes, meter, results, seed, torch.device("cuda"), console)


@app.command()
def selection(
    tokens: WindowTokens = None,
    group: WindowGroup = None,
    heads: Heads = 64,
    head_dim: HeadDim = None,
    blocks: Blocks = None,
    keys: Annotated[
        list[str] | None, typer.Option(help=f"Compressed keys, of {COMPRESSED_KEYS}; repeat. Default: both.")
    ] = None,
    implementation: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SELECTION)}; repeat. Default: both.")] = None,
    milliseconds: Milliseconds = 300.0,
    seed: Seed = 0,
    output: Output = RESULTS,
    merge: Merge = False,
    commit: Commit = None,
) -> None:
    """The choice of blocks (scores and top-k), and compressed attention's forward, which it should not exceed; bf16, one
    sequence."""
    timed = [SELECTION[name] for name in allowed(implementation, tuple(SELECTION), tuple(SELECTION), "--implementation")]
    shapes = [block_shape(text) for text in blocks or BLOCKS]
    kinds = allowed(keys, COMPRESSED_KEYS, COMPRESSED_KEYS, "--keys")
    settings = [
        WindowSetting(length, size, heads, width, block_size, number, selection=kind)
        for width in head_dim or [128]
        for length in tokens or WINDOW_TOKENS
        for kind in kinds
        for size in group or WINDOW_GROUPS
        for block_size, number in shapes
    ]
    check(settings)
    need_a_gpu()
    meter = CudaMeter(milliseconds)
    with results_of("selection", timed, output, meter, seed, merge, commit) as results:
        selection_run.run(settings, timed, meter, results, seed, torch.device("cuda"), console)


@app.command()
def core(
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MAX_TOKENS, help=f"Sequence length; repeat. Default: {CORE_TOKENS}; with --branches: {PARTS_TOKENS}."
        ),
    ] = None,
    group: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Query heads per KV head; repeat. Default: {CORE_GROUPS}.")
    ] = None,
    heads: Heads = 64,
    head_dim: HeadDim = None,
    blocks: Annotated[list[str] | None, typer.Option(help=f"Block size x number; repeat. Default: {CORE_BLOCKS}.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CORE)}; repeat. Default: all.")] = None,
    only: Passes = None,
    branches: Annotated[bool, typer.Option("--branches", help="Time every part, beside its floor and the whole.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help=f"Measure peaks, with branches recomputed and without, at {MEMORY_LENGTHS} tokens.")
    ] = False,
    table7: Annotated[bool, typer.Option("--table7", help="Time the settings of the FSA paper's table 7, beside it.")] = False,
    milliseconds: Milliseconds = 300.0,
    seed: Seed = 0,
    output: Output = RESULTS,
    merge: Merge = False,
    commit: Commit = None,
) -> None:
    """The whole core: q, k, v, compressed k and v, and gates in, o out; beside full attention; bf16, one sequence."""
    if branches + memory + table7 > 1:
        raise typer.BadParameter("--branches, --memory and --table7 are runs of their own; give one", param_hint="core")
    timed = [CORE[name] for name in allowed(implementation, tuple(CORE), tuple(CORE), "--implementation")]
    passes = allowed(only, PASSES, PASSES, "--pass")
    lengths = tokens or (TABLE_7_TOKENS if table7 else PARTS_TOKENS if branches else MEMORY_LENGTHS if memory else CORE_TOKENS)
    sizes = group or (TABLE_7_GROUPS if table7 else MEMORY_GROUPS if memory else CORE_GROUPS)
    settings = [
        CoreSetting(length, size, heads, width, block_size, number, selection="independent")
        for width in head_dim or [128]
        for length in lengths
        for block_size, number in map(block_shape, blocks or (BLOCKS if table7 else CORE_BLOCKS))
        for size in sizes
    ]
    check(settings)
    need_a_gpu()

    benchmark = "core_branches" if branches else "core_memory" if memory else "core_table7" if table7 else "core"
    meter, device = CudaMeter(milliseconds), torch.device("cuda")
    peers = [] if branches or memory or table7 else timed
    with results_of(benchmark, peers, output, meter, seed, merge, commit) as results:
        if branches:
            core_run.run_parts(settings, passes, meter, results, seed, device, console)
        elif memory:
            cases = [(x, recompute) for x in settings for recompute in MEMORY_BARS if recompute or x.num_tokens <= ALL_KEPT]
            core_run.run_memory(cases, meter, results, seed, device, console)
        elif table7:
            core_run.run_table_7(settings, meter, results, seed, device, console)
        else:
            core_run.run_times(settings, timed, passes, meter, results, seed, device, console)


def crossover(
    group: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Query heads per KV head; repeat. Default: {CORE_GROUPS}.")
    ] = None,
    against: Annotated[str | None, typer.Option(help=f"Of {AGAINST}. Default: the first that runs here.")] = None,
    heads: Heads = 64,
    head_dim: Annotated[int, typer.Option(min=1, help="Head width.")] = 128,
    blocks: Annotated[str, typer.Option(help="Block size x number.")] = CORE_BLOCKS[0],
    dtype: Annotated[str, typer.Option(help=f"Of {DTYPES}.")] = DTYPES[0],
    milliseconds: Milliseconds = 100.0,
    seed: Seed = 0,
    output: Output = RESULTS,
    merge: Merge = False,
    commit: Commit = None,
) -> None:
    """From which sequence length on NSA's core is faster than full attention, forward and forward with backward."""
    candidates = [CORE[name] for name in allowed([against] if against else None, AGAINST, AGAINST, "--against")]
    allowed([dtype], DTYPES, DTYPES, "--dtype")
    settings = [
        CoreSetting(crossover_run.LENGTHS[0], size, heads, head_dim, *block_shape(blocks), selection="independent", dtype=dtype)
        for size in group or CORE_GROUPS
    ]
    check(settings)
    need_a_gpu()
    device = torch.device("cuda")
    full, reasons = crossover_run.first_that_runs(candidates, settings[0], seed, device)
    for name, reason in reasons.items():
        console.print(f"{CORE[name].label} cannot run here: {reason}", style="yellow", markup=False, highlight=False)
    if full is None:
        console.print(f"There is no full attention here to compare with. Fix: {INSTALL}", style="red", markup=False)
        raise typer.Exit(1)
    meter = CudaMeter(milliseconds)
    with results_of("crossover", [CORE["nsa_fsa"], full], output, meter, seed, merge, commit) as results:
        crossover_run.run(settings, full, meter, results, seed, device, console)


@contextmanager
def results_of(
    benchmark: str, timed: list[Implementation], output: Path, meter: CudaMeter, seed: int, merge: bool, commit: str | None
) -> Iterator[Results]:
    """The file that a run writes to; shown when the run ends, also if it is interrupted."""
    peers = {implementation.name: implementation.version() for implementation in timed}
    try:
        results = Results(output, benchmark, meter, seed=seed, peers=peers, merge=merge, commit=commit)
    except CannotMerge as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(1) from None
    try:
        yield results
    finally:
        show(results)


def show(results: Results) -> None:
    """Prints the tables of a result file, and draws its pictures beside it."""
    document, stem = results.document, results.path.with_suffix("")
    if document["rows"]:
        tables, plots = SHOWN[document["benchmark"]]
        for table in tables(document):
            console.print(table)
        if reason := pictures.missing():
            console.print(f"No pictures: {reason}", markup=False, highlight=False)
        for plot in plots if reason is None else ():
            for path in plot(document, stem):
                console.print(f"Picture: {path}")
    if (left_out := report.left_out_table(document)) is not None:
        console.print(left_out)
    console.print(f"Results: {results.path}")


SHOWN: dict[str, tuple[Callable[[dict[str, Any]], list[Table]], list[Callable[[dict[str, Any], Path], list[Path]]]]] = {
    "selected": (report.latency_tables, [pictures.plot_latency]),
    "selected_memory": (lambda document: [report.memory_table(document)], []),
    "selected_ablations": (lambda document: [report.ablation_table(document)], []),
    "compressed": (report.latency_tables, [pictures.plot_latency, pictures.plot_compressed_growth]),
    "selection": (report.selection_tables, [pictures.plot_selection_latency, pictures.plot_selection_growth]),
    "core": (report.latency_tables, [pictures_core.plot_core]),
    "core_branches": (report.latency_tables, [pictures_core.plot_parts, pictures_core.plot_roofline]),
    "core_memory": (lambda document: [report.core_memory_table(document)], []),
    "core_table7": (lambda document: [report.table_7_table(document)], []),
    "crossover": (lambda document: [report.crossover_table(document)], [pictures_core.plot_crossover]),
}
