"""The command line: `python -m benchmarks run`, `python -m benchmarks pages` and others."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import (
    conversion,
    distributed,
    floors,
    generation,
    pages,
    pictures,
    serving,
    suites,
    tuning,
)
from benchmarks.engine import MEASURED, Plan
from benchmarks.published import FOLDER, GPU, SuiteResults, rows_of
from nsa_fsa.benchmarking.meter import CudaMeter
from nsa_fsa.benchmarking.runs import Bench
from nsa_fsa.cli import need_a_gpu

SUITES = suites.load()
UNQUOTED = ("ablations", "patched")
QUOTED = [name for name in SUITES if name not in UNQUOTED]
SERVED = ["65536x8", "131072x6", "8192x32"]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(width=int(os.environ.get("COLUMNS", 160)))


@app.command()
def run(
    suite: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(SUITES)}. Default: what the pages quote."),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only these lengths; repeat.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="Only these sizes; repeat.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    milliseconds: Annotated[float, typer.Option(min=0, help="Of each measurement.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of all random inputs.")] = 0,
    output: Annotated[Path, typer.Option(file_okay=False, help="Where the files go.")] = FOLDER,
    merge: Annotated[bool, typer.Option("--merge", help="Add to files of the same code.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where git here does not know it.")] = None,
) -> None:
    """Measures suites on this machine's GPU, with the default of every choice (NSA_FSA_PROFILE=0),
    and draws their pictures; then `pages`, if this is the GPU that the pages quote."""
    only = dict(tokens=tokens, groups=group, implementations=implementation)
    chosen = {name: narrowed(name, only) for name in suite or QUOTED}
    need_a_gpu()
    os.environ.setdefault("NSA_FSA_PROFILE", "0")
    meter = CudaMeter(milliseconds)
    ceilings = floors.ceilings(meter)
    for name, grids in chosen.items():
        rates = dict(ceilings=ceilings, seed=seed)
        results = SuiteResults(output, name, meter, rates, merge=merge, commit=commit)
        try:
            suites.run(grids, Bench(meter, results, console), seed=seed)
        finally:  # an interrupted run shows what it has
            gpu = results.path.stem.removeprefix(f"{name}_")
            if results.document["rows"]:
                show(name, gpu, output)
    if gpu == GPU and output == FOLDER:
        pages.write()


def narrowed(name: str, only: dict[str, list | None]) -> list[suites.Grid]:
    """The grids of a suite with only what is asked for."""
    if name not in SUITES:
        raise typer.BadParameter(f"{name!r} is not known: allowed are {', '.join(SUITES)}.")
    grids = []
    for grid in SUITES[name]:
        kept = {x: [y for y in grid[x] if y in wanted] for x, wanted in only.items() if wanted}
        if all(kept.values()):
            grids.append(grid | kept)
    if not grids:
        raise typer.BadParameter(f"nothing of {name} is left: suites.yaml says what it has.")
    return grids


def show(suite: str, gpu: str, folder: Path) -> None:
    """Prints the medians of a file, and draws its pictures."""
    rows = rows_of(suite, gpu, folder)
    index = ["head_dim", "block_size", "selection", "num_tokens", "group_size", "implementation"]
    index += [name for name in ("batch_size", "num_new") if name in rows]
    wide = rows.pivot_table(index=index, columns="pass", values=["ms", "of_floor"])
    console.print(wide.to_string(float_format="{:.3g}".format), markup=False, highlight=False)
    for path in pictures.draw(suite, gpu, folder):
        console.print(f"Picture: {path}")


@app.command()
def generate(
    tokens: Annotated[
        list[int] | None, typer.Option(help="Of the prompt; repeat. Default: 32768, 65536.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeat. Default: 1, 8.")] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(help="Of the dense model, as transformers names it; repeat. Default: sdpa."),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(generation.MEASURED)}; repeat. Default: all."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; Llama-3-8B has 32.")] = 32,
    output: Annotated[Path, typer.Option(file_okay=False, help="Where the file goes.")] = FOLDER,
    merge: Annotated[bool, typer.Option("--merge", help="Add to a file of the same code.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where git here does not know it.")] = None,
) -> None:
    """Times `generate` of a Llama-3-8B with random weights, dense and sparse: the first token, and
    further ones over a static cache, for which transformers compiles a step."""
    parts = part or list(generation.MEASURED)
    if unknown := [x for x in parts if x not in generation.MEASURED]:
        known = ", ".join(generation.MEASURED)
        raise typer.BadParameter(f"--part {unknown[0]!r} is not known: allowed are {known}.")
    need_a_gpu()
    os.environ.setdefault("NSA_FSA_PROFILE", "0")
    meter = CudaMeter(60.0)
    meter.method = generation.METHOD
    rates = dict(ceilings=floors.ceilings(meter), seed=0)
    results = SuiteResults(output, "generate", meter, rates, merge=merge, commit=commit)
    model = generation.make_model(num_hidden_layers=layers)
    sizes = (tokens or [32768, 65536], batch or [1, 8], attention or ["sdpa"])
    generation.measure(results, console, *sizes, parts, model)
    console.print(f"Results: {results.path}")


@app.command(name="distributed")
def share(
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(distributed.PARTS)}; repeat. Default: all."),
    ] = None,
    output: Annotated[Path, typer.Option(file_okay=False, help="Where the file goes.")] = FOLDER,
    merge: Annotated[bool, typer.Option("--merge", help="Add to a file of the same code.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where git here does not know it.")] = None,
) -> None:
    """Times what the GPUs of one host share, in the processes that torchrun starts: `torchrun
    --nproc-per-node 4 -m benchmarks distributed`. Prefill takes 50 GB of disk."""
    wrong = [x for x in part or () if x not in distributed.PARTS]
    if wrong or "LOCAL_RANK" not in os.environ:
        known = ", ".join(distributed.PARTS)
        raise typer.BadParameter(
            f"--part {wrong[0]!r} is not known: allowed are {known}."
            if wrong
            else "torchrun starts it: torchrun --nproc-per-node 4 -m benchmarks distributed."
        )
    need_a_gpu()
    os.environ.setdefault("NSA_FSA_PROFILE", "0")
    results = None
    if os.environ["RANK"] == "0":
        meter = CudaMeter(60.0)
        meter.method = distributed.METHOD
        rates = dict(ceilings=floors.ceilings(meter), seed=0)
        results = SuiteResults(output, "distributed", meter, rates, merge=merge, commit=commit)
    distributed.measure(results, console, part or list(distributed.PARTS), "cuda")


@app.command(name="conversion")
def convert(
    checkpoint: Annotated[Path, typer.Option(help="A dense one: SmolLM2-135M.", exists=True)],
    text: Annotated[list[str], typer.Option(help="To learn from, as of nsa-fsa convert; repeat.")],
    held_out: Annotated[list[str], typer.Option(help="Other text, to measure on; repeat.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(conversion.SETTINGS)}; repeat. Default: all."),
    ] = None,
    steps: Annotated[int, typer.Option(min=8, help="Of 32,768 tokens, for each.")] = 100,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a sequence.")] = 8192,
    precision: Annotated[str, typer.Option(help="Of bf16, fp32.")] = "bf16",
    models: Annotated[
        Path | None, typer.Option(file_okay=False, help="Where models stay. Default: nowhere.")
    ] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Where the reports go.")
    ] = conversion.RESULTS,
    commit: Annotated[str | None, typer.Option(help="Where git here does not know it.")] = None,
) -> None:
    """Converts a real checkpoint with several settings, and says what each costs in quality."""
    names = setting or list(conversion.SETTINGS)
    if unknown := [x for x in names if x not in conversion.SETTINGS]:
        known = ", ".join(conversion.SETTINGS)
        raise typer.BadParameter(f"--setting {unknown[0]!r} is not known: allowed are {known}.")
    plan = dataclasses.replace(
        conversion.plan_of(checkpoint, text, steps), length=length, precision=precision
    )
    with tempfile.TemporaryDirectory() as folder:
        where = models or Path(folder)
        conversion.measure(plan, held_out, names, where, output, console, commit)
    console.print(conversion.table(output).to_string(index=False))


@app.command(name="serving")
def serve(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Prompts that decode together, as 65536x8; repeat. Default: {', '.join(SERVED)}."
        ),
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(serving.IMPLEMENTATIONS)}; repeat. Default: both."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(MEASURED)}; repeat. Default: all.")
    ] = None,
    first_token: Annotated[int, typer.Option(min=1, help="Length of its prompts.")] = 65536,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second of a load; repeat. Default: 1.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="In which a load's requests come.")] = 60.0,
    longest: Annotated[int, typer.Option(min=1024, help="Prompt of a load.")] = 65536,
    new_tokens: Annotated[int, typer.Option(min=16, help="Of every answer.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; Llama-3-8B has 32.")] = 32,
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(serving.DTYPES)}.")] = "bfloat16",
    chunk: Annotated[int, typer.Option(min=64, help="Tokens of prompts in a step.")] = 16384,
    requests: Annotated[int, typer.Option(min=1, help="At once, at most.")] = 64,
    memory: Annotated[float, typer.Option(min=0, max=1, help="Of the GPU, for vLLM.")] = 0.94,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds of a part; of a load after its last request.")
    ] = 300.0,
    engine: Annotated[
        str, typer.Option(help="""More of vLLM's arguments: '{"enforce_eager": true}'.""")
    ] = "{}",
    checkpoints: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Where both models stay. Default: until the end."),
    ] = None,
    output: Annotated[Path, typer.Option(file_okay=False, help="Where the file goes.")] = FOLDER,
    merge: Annotated[bool, typer.Option("--merge", help="Add to a file of the same code.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where git here does not know it.")] = None,
) -> None:
    """Serves a Llama-3-8B with random weights with vLLM, sparse and dense: tokens a second, the
    first token, a load, and whether the tokens are those of transformers. 33 GB of checkpoints."""
    names = implementation or list(serving.IMPLEMENTATIONS)
    try:
        kinds, cases = part or list(MEASURED), case or SERVED
        serving.need_known(names, serving.IMPLEMENTATIONS)
        serving.need_known([dtype], serving.DTYPES)
        parts = serving.parts_of(kinds, cases, first_token, rate or [1.0], longest)
        more = serving.options_of(engine)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    need_a_gpu()
    shape = generation.LLAMA_3_8B | dict(num_hidden_layers=layers)
    model = serving.Model(shape, dtype=serving.DTYPES[dtype])
    meter = CudaMeter(60.0)
    meter.method = serving.METHOD
    rates = dict(ceilings=floors.ceilings(meter), seed=0)
    serving.free_memory()
    suite = "serving" if dtype == "bfloat16" else f"serving_{dtype}"
    results = SuiteResults(output, suite, meter, rates, merge=merge, commit=commit)
    plan = Plan(
        parts=parts,
        engine=dict(
            max_model_len=max(x.num_tokens for x in parts) + new_tokens,
            max_num_batched_tokens=chunk,
            max_num_seqs=requests,
            gpu_memory_utilization=memory,
        )
        | more,
        vocab_size=model.shape["vocab_size"],
        new_tokens=new_tokens,
        seconds=seconds,
        limit=limit,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            where = checkpoints or Path(folder)
            serving.measure(results, console, model, plan, names, where)
        finally:  # an interrupted run shows what it has
            if results.document["rows"]:
                shown = serving.table(results.document)
                console.print(shown.to_string(float_format="{:.4g}".format, na_rep="-"))
            console.print(f"Results: {results.path}")


@app.command()
def tune(
    case: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(tuning.CASES)}; repeat. Default: all.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option(help="A word of its name; repeat. Default: all.")
    ] = None,
    milliseconds: Annotated[float, typer.Option(min=0, help="Of each measurement.")] = 20.0,
) -> None:
    """Times other ways to cut decoding's work than the default, in microseconds of a layer."""
    known = list(tuning.CHANGES)
    changes = [x for x in known if change is None or x == "default" or any(y in x for y in change)]
    need_a_gpu()
    cases = [x for x in tuning.CASES if case is None or x in case]
    table = tuning.run(CudaMeter(milliseconds), cases, changes)
    console.print(table.round(1).to_string(), markup=False, highlight=False)


@app.command(name="pages")
def write_pages() -> None:
    """Writes the tables that README.md and docs/performance.md quote, and draws their pictures,
    from what is in results/. Needs no GPU."""
    for suite in SUITES:
        if (FOLDER / f"{suite}_{GPU}.json").exists():
            pictures.draw(suite)
    for path in pages.write():
        console.print(f"Written: {path}")


if __name__ == "__main__":
    app()
