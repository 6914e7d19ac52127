"""Continues a text with a sparse model, and says how fast: until the first token, and after it.

The model is one that was saved sparse, any dense one of transformers, which is patched first, or
one of a known shape with random weights. With --beside-dense the dense model does the same. On a
GPU the cache is static, for which transformers compiles a step by itself: there all is done once
before it is timed.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

from progress import Steps  # beside this file; it wants to be imported before torch

# isort: split
import torch
import typer
from rich.console import Console
from rich.table import Table
from shapes import ALLOWED, random_model, shape_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import nsa_fsa.integrations.transformers
from nsa_fsa import patch_model, unpatch_model
from nsa_fsa.config import PRESETS
from nsa_fsa.integrations.transformers import NSAAttention

console = Console()
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


class Watch(BaseStreamer):
    """Notes when each token came, and moves the progress."""

    def __init__(self, steps: Steps | None) -> None:
        self.steps, self.times = steps, [time.perf_counter()]
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.is_prompt:  # comes first
            self.is_prompt = False
            return
        self.times.append(time.perf_counter())
        if self.steps is not None:
            self.steps.advance()

    def end(self) -> None:
        pass


def main(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint, sparse or dense: a folder, or a name.")
    ] = None,
    random_init: Annotated[
        str | None, typer.Option(help=f"Instead: random weights. Of {ALLOWED}.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file of text.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the prompt, or random ones.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Compute the prompt in chunks of so many tokens.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"How a dense model is patched. Of {', '.join(PRESETS)}.")
    ] = "fsa-64x16",
    beside_dense: Annotated[bool, typer.Option("--beside-dense", help="Dense, too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures here.")
    ] = None,
) -> None:
    """Continues a text with a sparse model, and says how fast."""
    if (model is None) == (random_init is None):
        raise typer.BadParameter("give one of --model and --random-init.")
    if prompt is None and tokens is None:
        raise typer.BadParameter("there is nothing to continue: give --prompt or --tokens.")
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is not known: allowed are {', '.join(PRESETS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, tokenizer = load(model, random_init, device)
    ids = prompt_ids(made, tokenizer, prompt, tokens)
    if not any(isinstance(x, NSAAttention) for x in made.modules()):
        patch_model(made, preset)
    rows = [run("nsa_fsa", made, tokenizer, ids, new_tokens, chunk)]
    if beside_dense:
        rows.append(run("dense", unpatch_model(made), tokenizer, ids, new_tokens, chunk))
    console.print(table_of(rows, device))
    if output is not None:
        about = dict(device=torch.cuda.get_device_name() if device == "cuda" else "cpu")
        versions = dict(torch=torch.__version__, nsa_fsa=nsa_fsa.__version__)
        output.write_text(json.dumps(about | versions | dict(rows=rows), indent=1) + "\n")


def load(name: str | None, shape: str | None, device: str) -> tuple[Any, Any]:
    """The model, and its tokenizer, or None, as where weights are random: then tokens are bytes."""
    options = dict(dtype=DTYPES[device])
    if name is not None:
        made = AutoModelForCausalLM.from_pretrained(name, **options)
        return made.to(device).eval(), AutoTokenizer.from_pretrained(name)
    try:
        config = shape_config(str(shape))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--random-init") from error
    return random_model(config, device=device, **options).eval(), None


def prompt_ids(model: Any, tokenizer: Any, path: Path | None, number: int | None) -> Tensor:
    """int64 `[1, S]`."""
    if path is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, number or 0), generator=generator)
    elif tokenizer is None:
        ids = torch.tensor([[*path.read_bytes()]])
    else:
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids[:, :number]
    if ids.shape[1] == 0:
        raise typer.BadParameter(f"{path} is empty.", param_hint="--prompt")
    return ids.to(model.device)


def run(
    name: str, model: Any, tokenizer: Any, ids: Tensor, new_tokens: int, chunk: int | None
) -> dict[str, Any]:
    """Generates, prints the text, and returns the figures."""
    if model.device.type == "cuda":
        with console.status(f"{name}: compiling a step"):
            generate(model, ids, new_tokens, chunk, None)
    with Steps(new_tokens, console, name) as steps:
        found, times = generate(model, ids, new_tokens, chunk, steps)
    if tokenizer is None:
        text = repr(bytes(found.clamp(max=255).tolist()))
    else:
        text = tokenizer.decode(found)
    console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
    first, others = times[1] - times[0], times[-1] - times[1]
    return dict(
        name=name,
        prompt_tokens=ids.shape[1],
        new_tokens=len(found),
        text=text,
        first_token_s=first,
        prompt_tokens_per_s=ids.shape[1] / first,
        new_tokens_per_s=(len(times) - 2) / others if len(times) > 2 else None,
    )


def generate(
    model: Any, ids: Tensor, number: int, chunk: int | None, steps: Steps | None
) -> tuple[Tensor, list[float]]:
    """The new tokens, and when the call began and each of them came."""
    watch = Watch(steps)
    exactly = dict.fromkeys(("max_new_tokens", "min_new_tokens"), number)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **exactly,
        do_sample=False,
        pad_token_id=0,
        streamer=watch,
        cache_implementation="static" if model.device.type == "cuda" else "dynamic",
        prefill_chunk_size=chunk,
    )
    return found[0, ids.shape[1] :], watch.times


def table_of(rows: list[dict[str, Any]], device: str) -> Table:
    table = Table(title=f"One sequence, on {device}")
    for heading in ("", "prompt", "first token, s", "prompt tokens/s", "new tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = row["new_tokens_per_s"]
        cells = (f"{row['prompt_tokens']:,}", f"{row['first_token_s']:.3g}")
        cells += (f"{row['prompt_tokens_per_s']:,.0f}", "-" if speed is None else f"{speed:,.1f}")
        table.add_row(row["name"], *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
