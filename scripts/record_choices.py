"""Records which blocks a model chooses on a real text, for `nsa-fsa bench` and benchmarks/.

A dense checkpoint is patched first, and so records what it chooses untrained. Several runs make one
file: --add keeps what is there.
"""

from pathlib import Path
from typing import Annotated

import progress  # beside this file; it wants to be imported before torch

# isort: split
import torch
import typer
from rich.console import Console
from rich.table import Table

from nsa_fsa import patch_model
from nsa_fsa.benchmarking import recorded
from nsa_fsa.benchmarking.recorded import TOKENS, Recorded
from nsa_fsa.integrations.transformers.checkpoint import Checkpoint
from nsa_fsa.visualization import record

NEIGHBOURS = (2, 4, 8, 16, 32, 64)
console = Console()


@torch.no_grad()
def main(
    checkpoint: Annotated[str, typer.Argument(help="SmolLM2-135M, dense or converted.")],
    text: Annotated[Path, typer.Argument(help="A file of some 8,192 tokens.", exists=True)],
    layer: Annotated[list[int] | None, typer.Option(help="Repeat. Default: 0, 14, 21.")] = None,
    output: Annotated[Path, typer.Option(dir_okay=False)] = recorded.FILE,
    add: Annotated[bool, typer.Option("--add", help="To what is in the file.")] = False,
) -> None:
    """Records one stage."""
    layers = sorted(layer or [0, 14, 21])
    source = Checkpoint.of(checkpoint)
    model = source.load().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    stage = "converted" if hasattr(model.config, "nsa") else "untrained"
    if stage == "untrained":
        patch_model(model, "fsa-64x16", verbose=False)
    ids = torch.tensor(source.tokenizer(text.read_text()).input_ids)[None, :TOKENS]
    if ids.shape[1] < TOKENS:
        raise typer.BadParameter(f"{text} has {ids.shape[1]:,} tokens. Fix: {TOKENS:,} or more.")

    decoder = model.base_model
    decoder.layers = decoder.layers[: layers[-1] + 1]  # nothing is asked of the others
    with progress.Steps(len(decoder.layers), console, "layers") as steps, record(model) as found:
        for x in decoder.layers:
            x.register_forward_hook(lambda *_: steps.advance())
        decoder(ids.to(model.device), use_cache=False)
    choices = {x.layer_idx: x.block_indices.cpu() for x in found}

    records = recorded.read(output) if add else []
    records = [x for x in records if x.stage != stage]
    records += [Recorded(stage, i, choices[i]) for i in layers]
    recorded.write(records, output)
    console.print(table(records))
    console.print(f"{output}: {output.stat().st_size / 1024:,.0f} KiB")


def table(records: list[Recorded]) -> Table:
    title = "Blocks that so many neighbours read together, over those of one: as recorded, and "
    shown = Table(title=title + "lengthened to 65,536 tokens")
    for heading in ("stage", "layer", *map(str, NEIGHBOURS)):
        shown.add_column(heading, justify="right")
    for x in records:
        both = x.block_indices, recorded.lengthened(x.block_indices, 65536)
        cells = (" ".join(f"{recorded.union_factor(y, n):.2f}" for y in both) for n in NEIGHBOURS)
        shown.add_row(x.stage, str(x.layer), *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)
