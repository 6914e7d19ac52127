"""The commands of a conversion, `nsa-fsa convert` and `nsa-fsa convert-report`: options, and what
is printed. What they do imports transformers, and so is imported where it is done."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from nsa_fsa.config import PRESETS
from nsa_fsa.training import folder
from nsa_fsa.training.schedule import Schedule, Teaching

console = Console()
MODEL, DATA, LEARNING, RUN = "Model", "Text", "What is learned", "Run"
# How fast the second stage learns by default: adapters start at nothing, and have to go far.
RATE, RATE_OF_ADAPTERS = 2e-5, 2e-4


def option(panel: str, text: str | None = None, *names: str, **limits: Any) -> Any:
    """An option of a command that stands in a panel of its help; `limits` is for typer."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


Text = Annotated[
    list[str],
    option(DATA, "Files of text (any name) or tokens (.bin, .npy), or folders of text. Repeat."),
]
Config = Annotated[
    Path | None,
    option(MODEL, "Instead: YAML of an NSAConfig, as in configs/.", exists=True, dir_okay=False),
]
Dtype = Annotated[str, option(DATA, "Of .bin files: uint8, uint16, uint32, int32 or int64.")]
Precision = Annotated[str | None, option(RUN, "Of bf16, fp32. Default: bf16 on GPUs.")]
Overwrite = Annotated[bool, option(RUN, "Do away with what is in --output.", "--overwrite")]


def convert(
    # What is converted, of which text it learns, and where all goes.
    checkpoint: Annotated[
        str, typer.Argument(help="A dense one: a folder, a name on the hub, or a .gguf file.")
    ],
    text: Text,
    output: Annotated[Path, option(RUN, "Where all goes that is written.", file_okay=False)],
    # The sparse model that is made of it.
    preset: Annotated[
        str | None, option(MODEL, f"Of {', '.join(PRESETS)}. Default: fsa-64x16.")
    ] = None,
    config: Config = None,
    setting: Annotated[
        list[str] | None,
        option(MODEL, "A field of NSAConfig, as in num_selected_blocks=32. Repeat.", "--set"),
    ] = None,
    dense_layer: Annotated[
        list[int] | None,
        option(MODEL, "Index of a layer that stays dense; -1 is the last. Repeat."),
    ] = None,
    layer_set: Annotated[
        list[str] | None,
        option(MODEL, "A field of some layers, as in 3-10:num_selected_blocks=48. Repeat."),
    ] = None,
    twin: Annotated[
        bool,
        option(
            MODEL,
            "Train the dense model alike instead, and leave it dense, for comparison.",
            "--twin",
        ),
    ] = False,
    # How the text becomes batches.
    dtype: Dtype = "uint16",
    length: Annotated[int, option(DATA, "Tokens of a sequence.", min=2)] = 8192,
    separate: Annotated[
        bool,
        option(
            DATA,
            "Documents do not see each other. Else the text goes on from one to the next.",
            "--separate",
        ),
    ] = False,
    batch_size: Annotated[int, option(DATA, "Sequences at once.", min=1)] = 1,
    accumulate: Annotated[int, option(DATA, "Batches of a step.", min=1)] = 4,
    # What learns, how fast, and for how long.
    steps: Annotated[int, option(LEARNING, "In all.", min=1)] = 500,
    warm_up: Annotated[
        int | None,
        option(
            LEARNING,
            "Of these steps, the first, in which gates and compressors alone learn, from "
            "dense attention. Default: a fifth.",
            min=0,
        ),
    ] = None,
    fade: Annotated[
        float,
        option(
            LEARNING,
            "Share of the other steps after which outputs of layers need not match any more.",
            min=0,
            max=1,
        ),
    ] = 0.5,
    error: Annotated[
        float,
        option(
            LEARNING, "Weight of that, beside the model's own loss, where these steps begin.", min=0
        ),
    ] = 0.1,
    divergence: Annotated[
        float,
        option(
            LEARNING,
            "Weight, to the end, of choosing the blocks that dense attention looks at.",
            min=0,
        ),
    ] = 0.1,
    learning_rate: Annotated[
        float | None,
        option(
            LEARNING,
            f"At its highest, of what was there before. Default: {RATE:g}, or with --lora "
            f"{RATE_OF_ADAPTERS:g}.",
            min=0,
        ),
    ] = None,
    new_learning_rate: Annotated[
        float, option(LEARNING, "The same of gates and compressors.", min=0)
    ] = 3e-4,
    gate_learning_rate: Annotated[
        float | None, option(LEARNING, "Of gates alone. Default: as compressors'.", min=0)
    ] = None,
    ramp: Annotated[int, option(LEARNING, "Steps until that.", min=0)] = 10,
    weight_decay: Annotated[float, option(LEARNING, min=0)] = 0.1,
    lora: Annotated[
        int,
        option(
            LEARNING,
            "Rank of adapters that learn instead of what was there before, and are merged "
            "into it in the end.",
            min=0,
        ),
    ] = 0,
    seed: Annotated[int, option(LEARNING, "Of the order.", min=0, max=2**32 - 1)] = 0,
    precision: Precision = None,
    # How the run goes, and what it leaves on the disk.
    layer_inputs: Annotated[
        str,
        option(
            RUN, "Where layers keep their inputs, to compute all else again: none, device, host."
        ),
    ] = "device",
    loss_chunk: Annotated[
        int, option(RUN, "Tokens whose logits are held at once; 0: all.", min=0)
    ] = 2048,
    save_every: Annotated[
        int, option(RUN, "Steps between what a next call goes on from; 0: none.", min=0)
    ] = 100,
    log_every: Annotated[int, option(RUN, "Steps.", min=1)] = 1,
    dry_run: Annotated[
        bool,
        option(
            RUN, "Say what would be trained, and how long it takes. Writes nothing.", "--dry-run"
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Converts a dense checkpoint into a sparse one, which from_pretrained opens.

    Gates and compressors learn first, from the dense model itself, and then everything does. What
    was interrupted goes on when it is called again in the same way.
    """
    need("transformers", "accelerate")
    if preset is not None and config is not None:
        raise typer.BadParameter("give one of --preset and --config, or none.")
    from nsa_fsa.training import conversion

    quiet()
    with refused():
        schedule = Schedule(
            steps=steps,
            warm_up=steps // 5 if warm_up is None else warm_up,
            learning_rate=(
                learning_rate if learning_rate is not None else (RATE_OF_ADAPTERS if lora else RATE)
            ),
            new_learning_rate=new_learning_rate,
            gate_learning_rate=gate_learning_rate,
            ramp=ramp,
            fade=fade,
            then=Teaching(error=error, divergence=divergence),
        )

        plan = conversion.Plan(
            checkpoint=checkpoint,
            text=tuple(text),
            schedule=schedule,
            config=preset if config is None else str(config),
            overrides=_settings(setting or []),
            dense_layers=tuple(dense_layer or ()),
            by_layer=_settings_of_layers(layer_set or []),
            length=length,
            batch_size=batch_size,
            accumulate=accumulate,
            separate=separate,
            dtype=dtype,
            weight_decay=weight_decay,
            lora=lora,
            seed=seed,
            precision=precision_of(precision),
        )
        if twin:
            plan = plan.twin()

        way = conversion.Way(layer_inputs, loss_chunk, save_every, log_every)
        there = folder.Progress()
        if not (overwrite or dry_run):
            there = folder.progress_of(plan.written(), output)
        if there.is_finished:
            raise ValueError(
                f"{output / folder.MODEL} is there already, made with these options. Fix: "
                "another --output, or --overwrite."
            )

        possible = conversion.check(plan)
        if dry_run:
            if not twin:
                say(str(possible.report))
            _print_phases(conversion.rehearse(plan, possible, way))
            return

        if overwrite:
            folder.begin_in(plan.written(), output, anew=True)
        run = conversion.begin(plan, output, way=way, console=console, possible=possible)

    if not twin:
        say(str(dataclasses.replace(possible.report, dry_run=False)))
    sequences = plan.schedule.steps * batch_size * accumulate
    there_are = len(run.prepared.windows)
    say(
        f"The text is {there_are:,} sequences of {length:,} tokens; the conversion reads "
        f"{sequences:,}, each {sequences / there_are:.2g} times."
    )
    if there.done:
        say(f"Going on after step {there.done}.")
    say(f"Saved to {run.finish()}.")


def convert_report(
    # What is measured, on which text, and where the report goes.
    checkpoint: Annotated[
        str, typer.Argument(help="A sparse one, as DIR/model of `nsa-fsa convert`.")
    ],
    text: Text,
    output: Annotated[Path, option(RUN, "Where it goes.", file_okay=False)],
    # What it is compared with.
    dense: Annotated[
        str | None,
        option(MODEL, "What it is compared with. Default: the same weights with dense attention."),
    ] = None,
    # What is read of the text, and how much.
    dtype: Dtype = "uint16",
    length: Annotated[
        int | None,
        option(
            DATA,
            "Tokens of a window. Default: as many as the model was made for, at most 8192.",
            min=64,
        ),
    ] = None,
    windows: Annotated[int, option(DATA, "How many, evenly spaced.", min=1)] = 16,
    needles: Annotated[
        int,
        option(
            DATA, "Needles of every length and depth, and copies of every depth; 0: none.", min=0
        ),
    ] = 4,
    seed: Annotated[int, option(DATA, "Of needles.", min=0, max=2**32 - 1)] = 0,
    # How the run goes.
    precision: Precision = None,
    overwrite: Overwrite = False,
) -> None:
    """Measures a converted checkpoint beside the dense one, and writes a page with pictures.

    Loss by position, what layers choose of what dense attention would, gates, and needles in real
    text. Give it text that the model has not learned from.
    """
    need("transformers", "matplotlib", "seaborn")
    from nsa_fsa.training import report

    quiet()
    with refused():
        question = report.Question(
            checkpoint=checkpoint,
            text=tuple(text),
            dense=dense,
            length=length,
            windows=windows,
            needles=needles,
            dtype=dtype,
            seed=seed,
            precision=precision_of(precision),
        )
        if (output / report.DOCUMENT).exists() and not overwrite:
            raise ValueError(
                f"{output / report.DOCUMENT} is there already. Fix: another --output, or "
                "--overwrite."
            )
        possible = report.check(question)
        with tempfile.TemporaryDirectory() as scratch:
            found = report.answer(question, possible, Path(scratch) / "tokens.bin", console)
    for line in report.summary(found):
        say(line.removeprefix("- "))
    say(f"The report is in {report.write(found, output)[1]}.")


def _print_phases(phases: list[Any]) -> None:
    from nsa_fsa.training.conversion import about_seconds

    table = Table(title="What would be trained here, from one timed step of each kind")
    for heading in ("what learns", "steps", "parameters", "tokens", "a step", "in all"):
        table.add_column(heading, justify="left" if heading == "what learns" else "right")
    for x in phases:
        times = f"{x.seconds:.2f} s", about_seconds(x.steps * x.seconds)
        table.add_row(x.name, f"{x.steps:,}", f"{x.parameters:,}", f"{x.tokens:,}", *times)
    table.add_section()
    whole = about_seconds(sum(x.steps * x.seconds for x in phases))
    tokens, steps = sum(x.tokens for x in phases), sum(x.steps for x in phases)
    table.add_row("in all", f"{steps:,}", "", f"{tokens:,}", "", whole)
    console.print(table)


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def need(*packages: str) -> None:
    """Ends the program with the reason where a package is missing."""
    missing = [x for x in packages if importlib.util.find_spec(x) is None]
    if missing:
        raise typer.BadParameter(
            f"it needs {' and '.join(missing)}, which is not installed. "
            'Fix: pip install "nsa-fsa[train,plot,bench]".'
        )


def quiet() -> None:
    """Leaves transformers' own bars and remarks out."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def refused() -> Iterator[None]:
    """Ends the program with the reason where something cannot be done."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def precision_of(given: str | None) -> str:
    return given or ("bf16" if torch.cuda.is_available() else "fp32")


def _settings_of_layers(given: list[str]) -> dict[str, dict[str, Any]]:
    """["3-10:window_size=64"] -> {"3-10": {"window_size": 64}}"""
    found: dict[str, dict[str, Any]] = {}
    fault = "names no layers. Fix: --layer-set 3-10:window_size=64, for example."
    for text in given:
        layers, setting = _cut(text, ":", fault, "--layer-set")
        found.setdefault(layers, {}).update(_settings([setting]))
    return found


def _settings(given: list[str]) -> dict[str, Any]:
    """["window_size=64"] -> {"window_size": 64}"""
    fault = "is no setting. Fix: --set window_size=64, for example."
    pairs = (_cut(text, "=", fault, "--set") for text in given)
    return {name: yaml.safe_load(value) for name, value in pairs}


def _cut(text: str, sign: str, fault: str, option: str) -> tuple[str, str]:
    """What of an option's text stands before a sign and what behind it; a text without the sign
    ends the program with its fault."""
    before, found, behind = text.partition(sign)
    if not found:
        raise typer.BadParameter(f"{text!r} {fault}", param_hint=option)
    return before.strip(), behind
