"""Times nsa_fsa on a CUDA GPU, beside everything else that computes the same.

    python scripts/benchmark.py selected                             # every setting
    python scripts/benchmark.py selected --tokens 65536 --group 1 --group 4 --blocks 64x16 --selection random
    python scripts/benchmark.py selected --memory                    # workspace, beside the FSA paper's table 5
    python scripts/benchmark.py selected --ablations                 # what each part of the design brings

Results go to docs/results/ as JSON, after every measurement, with pictures beside them; the tables are printed.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarking import report
from benchmarking import selected as runs
from benchmarking.implementations import IMPLEMENTATIONS
from benchmarking.measure import RESULTS, CudaMeter
from benchmarking.results import CannotMerge, Results
from benchmarking.settings import PASSES, Setting

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console(width=int(os.environ.get("COLUMNS", 160)))

TOKENS, GROUPS = (8192, 32768, 65536, 131072), (1, 2, 4, 8, 16)
MEMORY_TOKENS, MEMORY_GROUP = (32768, 65536, 131072, 262144), 4
ABLATION_TOKENS = (32768, 65536)
BLOCKS, SELECTIONS = ("64x16", "128x8"), ("random", "realistic")


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
        console.print(f"benchmark.py times kernels on a CUDA GPU, and cannot run here: {reason}.", style="red", highlight=False)
        raise typer.Exit(1)


def allowed(values: list[Any] | None, default: tuple[Any, ...], known: tuple[Any, ...], option: str) -> list[Any]:
    for value in values or ():
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(map(str, known))}", param_hint=option)
    return list(values or default)


def block_shape(text: str) -> tuple[int, int]:
    """ "64x16" -> (64, 16): keys per block, and blocks."""
    size, _, number = text.partition("x")
    if not (size.isdigit() and number.isdigit()):
        raise typer.BadParameter(f"{text!r} is not of the form 64x16: keys per block, and blocks", param_hint="--blocks")
    return int(size), int(number)


@app.command()
def selected(
    tokens: Annotated[list[int] | None, typer.Option(help=f"Sequence length; repeat for several. Default: {TOKENS}.")] = None,
    group: Annotated[list[int] | None, typer.Option(help=f"Query heads per KV head; repeat. Default: {GROUPS}.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 64,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head width; repeat for several. Default: 128.")] = None,
    blocks: Annotated[list[str] | None, typer.Option(help=f"Block size x number; repeat. Default: {BLOCKS}.")] = None,
    selection: Annotated[list[str] | None, typer.Option(help=f"Of {SELECTIONS}; repeat. Default: both.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(IMPLEMENTATIONS)}; repeat. Default: all.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--pass", help=f"Of {PASSES}; repeat. Default: all.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure workspace, beside the FSA paper's table 5.")] = False,
    budget: Annotated[list[float] | None, typer.Option(help="With --memory: workspace budget in GiB; repeat.")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Time the design without each of its parts.")] = False,
    milliseconds: Annotated[float, typer.Option(help="How long to repeat each measurement; at least five runs.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of all random inputs.")] = 0,
    output: Annotated[Path, typer.Option(help="Where JSON and pictures go.")] = RESULTS,
    merge: Annotated[bool, typer.Option("--merge", help="Add to the file of an earlier run of the same code.")] = False,
    commit: Annotated[str | None, typer.Option(help="The commit, where git here does not know it.")] = None,
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
    need_a_gpu()

    benchmark = "selected_memory" if memory else "selected_ablations" if ablations else "selected"
    meter, device = CudaMeter(milliseconds), torch.device("cuda")
    peers = {} if memory or ablations else {name: IMPLEMENTATIONS[name].version() for name in chosen}
    try:
        results = Results(output, benchmark, meter, seed=seed, peers=peers, merge=merge, commit=commit)
    except CannotMerge as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(1) from None
    try:
        if memory:
            budgets = [int(x * report.GIB) for x in budget] if budget else [report.GIB // 2, 2 * report.GIB, runs.UNLIMITED]
            runs.run_memory(settings, budgets, meter, results, seed, device, console)
        elif ablations:
            runs.run_ablations(settings, meter, results, seed, device, console)
        else:
            timed = [IMPLEMENTATIONS[name] for name in chosen]
            runs.run_times(settings, timed, passes, meter, results, seed, device, console)
    finally:  # an interrupted run shows what it has
        show(results)


def show(results: Results) -> None:
    """Prints the tables of a result file, and draws its pictures beside it."""
    document = results.document
    if document["rows"]:
        if document["benchmark"] == "selected_memory":
            console.print(report.memory_table(document))
        elif document["benchmark"] == "selected_ablations":
            console.print(report.ablation_table(document))
        else:
            for table in report.latency_tables(document):
                console.print(table)
            for path in report.plot_latency(document, results.path.with_suffix("")):
                console.print(f"Picture: {path}")
    if (left_out := report.left_out_table(document)) is not None:
        console.print(left_out)
    console.print(f"Results: {results.path}")


if __name__ == "__main__":
    app()
