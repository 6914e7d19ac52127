"""The command line: `nsa-fsa info` (what is here, and what can run), `nsa-fsa explain` (what a layer would run, and why),
`nsa-fsa bench` (how long it takes, beside others) and `nsa-fsa crossover` (from which length on it is faster)."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import nsa_fsa
from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.config import PRESETS, NSAConfig
from nsa_fsa.modules.explain import GPUS
from nsa_fsa.modules.fused import quack_kernels
from nsa_fsa.ops.common import backends

PACKAGES = ("torch", "triton", "flash-attn-4", "quack-kernels", "transformers")
# In the order in which a layer calls them.
OPERATORS = (
    "pool_windows", "gather_windows", "compressed_attention", "select_blocks", "selected_attention",
    "sliding_window_attention", "gated_combine",
)  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(benchmark.app, name="bench")
app.command()(benchmark.crossover)
console = Console()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"nsa_fsa {nsa_fsa.__version__}, PyTorch {torch.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Versions, GPUs, and which backends of every operator can run here, with the reason where one cannot."""
    packages = Table(title="Environment", show_header=False)
    packages.add_row("nsa_fsa", nsa_fsa.__version__)
    packages.add_row("Python", platform.python_version())
    for package in PACKAGES:
        packages.add_row(package, version(package))
    packages.add_row("CUDA of PyTorch", torch.version.cuda or "none: a CPU build")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        packages.add_row(f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}")
    if not torch.cuda.device_count():
        packages.add_row("GPUs", "none")
    packages.add_row("RoPE and RMSNorm", "PyTorch" if quack_kernels() is None else "quack, on GPUs from Hopper on")
    console.print(packages)

    table = Table(title='Backends, in the order in which backend="auto" asks them')
    for heading in ("operator", "backend", "can run here"):
        table.add_column(heading)
    for operator in OPERATORS:
        for name, reason in backends.available(operator).items():
            table.add_row(operator, name, "yes" if reason is None else f"no: {escape(reason)}")
        table.add_section()
    console.print(table)


@app.command()
def explain(
    tokens: Annotated[int, typer.Option(min=1, help="Packed tokens: the sum of all sequences.")] = 8192,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="YAML of an NSAConfig, as in configs/.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Of {', '.join(PRESETS)}. Default: fsa-64x16.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads. Default: 32.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="KV heads. Default: 8.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Head width. Default: 128.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPU where there is one.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--for", help=f"What would run on another machine's GPU: of {', '.join(GPUS)}, or sm_90, ...")
    ] = None,
) -> None:
    """What every operator of a layer would run, and why. Runs nothing and takes no memory.

    The layer is that of --config, or is made of --preset, --heads, --kv-heads and --head-dim.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not known: allowed are {', '.join(DTYPES)}.", param_hint="--dtype")
    given = {"--preset": preset, "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim}
    without_effect = [option for option, value in given.items() if value is not None and config is not None]
    if without_effect:
        raise typer.BadParameter(
            f"{config} says all of the layer, so {', '.join(without_effect)} would have no effect. Fix: leave either out.",
            param_hint="--config",
        )
    heads, head_dim = heads or 32, head_dim or 128
    sizes = dict(hidden_size=heads * head_dim, num_heads=heads, num_kv_heads=kv_heads or 8, head_dim=head_dim)
    try:
        layer = (
            NSAConfig.from_dict({"preset": preset or "fsa-64x16", **sizes}) if config is None else NSAConfig.from_yaml(config)
        )
        found = nsa_fsa.explain(layer, tokens, dtype=DTYPES[dtype], device=device, gpu=gpu)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    shape = f"{layer.num_heads} query heads of {layer.head_dim}, {layer.num_kv_heads} KV heads"
    console.print(f"{tokens:,} tokens, {shape}, {dtype}:", highlight=False)
    console.print(escape(str(found)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
