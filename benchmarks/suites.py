"""Runs what suites.yaml says."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.ablations import ABLATIONS
from benchmarks.inputs import SuiteCase
from benchmarks.operators import COMPRESSION, LOOP_ORDERS, PARTS, RECOMPUTING
from benchmarks.patched import PATCHED
from benchmarks.peers import FLEX, FULL, PEERS
from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.decoding import FULL_DECODING, LAYER_DECODE, NSA_DECODE, DecodeCase
from nsa_fsa.benchmarking.implementations import NSA_CORE, NSA_LAYER
from nsa_fsa.benchmarking.prefill import prefill
from nsa_fsa.benchmarking.runs import Bench
from nsa_fsa.config import NSAConfig

IMPLEMENTATIONS = {
    x.name: x
    for x in (
        NSA_CORE, RECOMPUTING, *PARTS, *COMPRESSION, *LOOP_ORDERS, *FULL, *PEERS, FLEX, *ABLATIONS,
        *PATCHED, NSA_DECODE, LAYER_DECODE, NSA_LAYER, prefill(None), prefill(16384),
    )
}  # fmt: skip
DECODING = {x.name: x for x in FULL_DECODING}
Grid = dict[str, Any]


def load() -> dict[str, list[Grid]]:
    """The suites by name, their grids complete."""
    suites = yaml.safe_load(Path(__file__).with_name("suites.yaml").read_text())
    defaults = suites.pop("defaults")
    return {name: [defaults | grid for grid in grids] for name, grids in suites.items()}


def cases(grid: Grid, device: str, seed: int = 0, **fields: Any) -> Iterator[Case]:
    """fields: of NSAConfig, beside those that the grid has."""
    axes = ("head_dim", "tokens", "blocks", "selection", "groups")
    for width, tokens, blocks, selection, group in itertools.product(*(grid[x] for x in axes)):
        block_size, number = map(int, blocks.split("x"))
        heads = grid["heads"]
        config = NSAConfig(
            hidden_size=heads * width,
            num_heads=heads,
            num_kv_heads=heads // group,
            head_dim=width,
            block_size=block_size,
            num_selected_blocks=number,
            **fields,
        )
        dtype = getattr(torch, grid["dtype"])
        if "batch" not in grid:
            yield SuiteCase(config, tokens, dtype, device, seed, selection)
            continue
        for batch, new in itertools.product(grid["batch"], grid.get("new", [1])):
            yield DecodeCase(
                config, tokens, dtype, device, seed, selection, batch_size=batch, num_new=new
            )


def run(grids: list[Grid], bench: Bench, device: str = "cuda", **options: Any) -> None:
    """Measures every case by every implementation; what reads no blocks once for all of them.

    options: as for `cases`.
    """
    measured: list[dict[str, Any]] = []
    for grid in grids:
        known = IMPLEMENTATIONS | (DECODING if "batch" in grid else {})
        implementations = [known[name] for name in grid["implementations"]]
        if grid.get("search"):
            lengths = grid["tokens"]
            for case in cases(grid | dict(tokens=lengths[:1]), device, **options):
                for peer in implementations:
                    bench.crossover(case, peer, lengths)
            continue
        for case in cases(grid, device, **options):
            for by in implementations:
                if (where := by.where(case)) not in measured:
                    measured.append(where)
                    bench.measure(case, by, grid["passes"])
