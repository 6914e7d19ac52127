"""The main job in one run: train a dense Llama and its NSA twin on real text, compare, save, load,
generate, and plot.

Two small Llama models (GQA group 4) start from the same seed; one is patched with Native Sparse
Attention. Both learn to predict the bytes of the Python standard library's source, on the same
batches. Takes a few minutes on two CPU cores; uses the GPU if there is one.
"""

import math
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import matplotlib
from progress import Steps  # beside this file; it wants to be imported before torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from nsa_fsa import NSAConfig, patch_model
from nsa_fsa.visualization import keys_attended, plot_block_selection, plot_gates, record

console = Console(width=100)
logging.set_verbosity_error()
logging.disable_progress_bar()

WORSE_AT_MOST = 1.05  # the NSA twin's validation loss relative to the dense one's
FALLS_TO = 0.6  # both losses relative to their start
NUM_VALIDATION_WINDOWS = 8


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps for each model.", min=1)] = 320,
    length: Annotated[int, typer.Option(help="Bytes per training sequence.", min=256)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 2,
    seed: Annotated[
        int, typer.Option(help="For the weights and the batches.", min=0, max=2**63 - 1)
    ] = 0,
    output: Annotated[
        Path, typer.Option(help="Where pictures and the NSA checkpoint go.", file_okay=False)
    ] = Path("demo_output"),
) -> None:
    """Trains a small dense Llama and its NSA twin side by side and compares them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, validation = standard_library_bytes()
    if length > len(validation) - 2:
        raise typer.BadParameter(
            f"{length:,} is more than the {len(validation):,} bytes of text.", param_hint="--length"
        )
    output.mkdir(parents=True, exist_ok=True)
    size = f"{len(train) + len(validation):,} bytes of Python's standard library"
    console.print(f"Text: {size}; device: {device}")

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4 * length,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    nsa_config = NSAConfig.from_pretrained_config(config, preset="tiny", gate_init="balanced")
    models = {"dense": new_llama(config, seed), "NSA": new_llama(config, seed)}
    patch_model(models["NSA"], nsa_config)

    history, seconds = train_side_by_side(
        models, train, validation, steps, length, batch_size, seed, device
    )
    with record(models["NSA"]) as records, torch.no_grad():
        models["NSA"](windows(validation, torch.tensor([0]), length)[:, :-1].to(device))

    keys, compressed = keys_attended(records[0])
    mean = f"{keys.mean():.0f} + {compressed.float().mean():.0f}"
    reads = {
        "dense": (f"{(length + 1) / 2:.0f}", f"{length}"),
        "NSA": (mean, f"{keys[-1]:.0f} + {compressed[-1]}"),
    }
    print_comparison(models, history, reads, seconds)
    continue_a_prompt(models["NSA"], validation, output / "nsa_llama", device)

    plot_losses(history, output / "loss.png")
    plot_inside(records, output / "selection_and_gates.png")
    console.print(f"Pictures: {output / 'loss.png'}, {output / 'selection_and_gates.png'}")
    if steps >= 100:
        check_that_both_learned(history)


def standard_library_bytes() -> tuple[Tensor, Tensor]:
    """All modules of the standard library as bytes, uint8; every 20th file is kept aside
    for validation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(x for x in root.rglob("*.py") if not skipped & set(x.relative_to(root).parts))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for number, path in enumerate(files):
        parts[number % 20 == 0].append(path.read_bytes())
    texts = (bytearray(b"\n".join(parts[kept])) for kept in (False, True))
    train, validation = (torch.frombuffer(text, dtype=torch.uint8) for text in texts)
    return train, validation


def new_llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Stretches of `length` bytes and the one after, int64 `[len(starts), length + 1]`."""
    return text[starts[:, None] + torch.arange(length + 1)].long()


def loss_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train_side_by_side(
    models: dict[str, PreTrainedModel],
    train: Tensor,
    validation: Tensor,
    steps: int,
    length: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """Same batches, same optimiser, same schedule. Returns validation losses by step,
    and seconds spent training.
    """
    generator = torch.Generator().manual_seed(seed)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        decayed = 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(1, steps)))
        return min((step + 1) / warmup, decayed)

    optimizers, schedules = {}, {}
    for name, model in models.items():
        model.to(device).train()
        optimizers[name] = torch.optim.AdamW(
            model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1
        )
        schedules[name] = torch.optim.lr_scheduler.LambdaLR(optimizers[name], rate)
    starts = torch.linspace(0, len(validation) - length - 2, NUM_VALIDATION_WINDOWS).long()
    held_out = windows(validation, starts, length)
    history: dict[str, list[tuple[int, float]]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)

    with Steps(steps, console) as progress:
        for step in range(steps + 1):
            if step % max(1, steps // 8) == 0 or step == steps:
                for name, model in models.items():
                    history[name].append((step, evaluate(model, held_out, batch_size, device)))
                losses = (f"{name} {points[-1][1]:.3f}" for name, points in history.items())
                progress.report("loss " + ", ".join(losses))
            if step == steps:
                break
            starts = torch.randint(len(train) - length - 1, (batch_size,), generator=generator)
            batch = windows(train, starts, length).to(device)
            for name, model in models.items():
                begin = time.perf_counter()
                loss_of(model, batch).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[name].step()
                optimizers[name].zero_grad()
                schedules[name].step()
                seconds[name] += time.perf_counter() - begin
            progress.advance()
    return history, seconds


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, held_out: Tensor, batch_size: int, device: torch.device
) -> float:
    model.eval()
    losses = [loss_of(model, batch.to(device)).item() for batch in held_out.split(batch_size)]
    model.train()
    return sum(losses) / len(losses)


def print_comparison(
    models: dict[str, PreTrainedModel],
    history: dict[str, list[tuple[int, float]]],
    reads: dict[str, tuple[str, str]],
    seconds: dict[str, float],
) -> None:
    table = Table(
        title="Dense Llama and its NSA twin",
        caption="keys read by a query: own keys + compressed tokens",
    )
    read = ("keys read, mean", "last query")
    for heading in ("", "loss", "bits/byte", "parameters", *read, "training"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, model in models.items():
        first, last = history[name][0][1], history[name][-1][1]
        table.add_row(
            name,
            f"{first:.3f} → {last:.3f}",
            f"{last / math.log(2):.3f}",
            f"{model.num_parameters():,}",
            *reads[name],
            f"{seconds[name]:.0f} s",
        )
    console.print(table)
    if next(models["NSA"].parameters()).device.type == "cpu":
        console.print(
            "On a CPU, NSA runs its PyTorch reference, written to be read: "
            "slower than PyTorch's dense kernel."
        )


def continue_a_prompt(
    model: PreTrainedModel, validation: Tensor, folder: Path, device: torch.device
) -> None:
    """Saves the model, loads it back, and lets the loaded one continue a prompt with the cache."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    end = bytes(validation.tolist()).index(b"\n    def ", len(validation) // 3) + len(b"\n    def ")
    prompt = validation[end - 400 : end].long()[None].to(device)
    with torch.no_grad():
        same = torch.equal(loaded(prompt).logits, model.eval()(prompt).logits)
        assert same, "the checkpoint did not round-trip"
        torch.manual_seed(0)
        sampling = dict(do_sample=True, temperature=0.7, top_k=40)
        text = loaded.generate(prompt, max_new_tokens=200, use_cache=True, **sampling)[0].cpu()
    console.print(
        f"Saved to {folder} and loaded back: identical logits. The loaded model continues a prompt:"
    )
    given, continued = (
        bytes(x.tolist()).decode(errors="replace") for x in (text[250:400], text[400:])
    )
    console.print(given, style="dim", highlight=False, end="", markup=False)
    console.print(continued, style="bold", highlight=False, markup=False)


def plot_losses(history: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    looks = (dict(color="black", marker="o"), dict(color="#0072B2", marker="s"))
    for (name, points), look in zip(history.items(), looks, strict=True):
        label = f"{name}: {points[-1][1]:.3f}"
        ax.plot(*zip(*points, strict=True), label=label, markersize=4, **look)
    ax.set(xlabel="step", ylabel="validation loss (nats per byte)")
    ax.set_title("Bytes of Python's standard library")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_inside(records: list, path: Path) -> None:
    number = len(records) + 1
    figure, axes = plt.subplots(1, number, figsize=(5 * number, 4.6), layout="constrained")
    for ax, entry in zip(axes, records, strict=False):
        plot_block_selection(ax, entry)
    plot_gates(axes[-1], records)
    axes[-1].set_title("Gates (bar: mean, dots: heads)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def check_that_both_learned(history: dict[str, list[tuple[int, float]]]) -> None:
    last = {name: points[-1][1] for name, points in history.items()}
    fell = {name: points[-1][1] / points[0][1] for name, points in history.items()}
    ratio = last["NSA"] / last["dense"]
    ok = ratio <= WORSE_AT_MOST and max(fell.values()) <= FALLS_TO
    console.print(
        f"NSA's loss is {ratio:.3f} of the dense one's (allowed: {WORSE_AT_MOST}); they fell to "
        + " and ".join(f"{x:.0%} ({name})" for name, x in fell.items())
        + f" of their start (allowed: {FALLS_TO:.0%}): {'good' if ok else 'NOT good'}."
    )
    if not ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
