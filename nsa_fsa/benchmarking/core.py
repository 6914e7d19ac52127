"""The runs of `nsa-fsa bench core`: the whole core beside full attention; its parts; its memory; the FSA paper's table 7."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from nsa_fsa.benchmarking import compressed
from nsa_fsa.benchmarking.calls import Calls, Implementation, differentiated
from nsa_fsa.benchmarking.check import Oracle
from nsa_fsa.benchmarking.check_core import CombineOracle, CoreInputs, CoreOracle, WindowOracle
from nsa_fsa.benchmarking.check_windows import CompressedOracle, SelectionOracle
from nsa_fsa.benchmarking.compressed import windows_of
from nsa_fsa.benchmarking.implementations import IMPLEMENTATIONS, forced_blocks, ours
from nsa_fsa.benchmarking.measure import GIB, Meter
from nsa_fsa.benchmarking.paper import TABLE_7_SOURCE, table_7
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.running import Prepared, Subject, first_line, measure, progress_bar, run_implementations
from nsa_fsa.benchmarking.selection import select
from nsa_fsa.benchmarking.settings import (
    PASSES,
    CoreSetting,
    causal_pairs,
    full_attention_bytes,
    necessary,
    necessary_core,
    necessary_parts,
)
from nsa_fsa.config import BRANCHES

GRADIENTS = ("dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgate_logits")
# Peak memory of forward and backward, as a multiple of full attention's own tensors: with everything kept for the backward,
# and with the branches' outputs computed again.
MEMORY_BARS: dict[tuple[str, ...], float] = {(): 2.0, BRANCHES: 1.5}


def make_inputs(setting: CoreSetting, seed: int, device: torch.device) -> CoreInputs:
    """Those of compressed attention, and keys, values and a gate of every head and branch."""
    x = compressed.make_inputs(setting, seed, device)
    generator = torch.Generator(device).manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=setting.torch_dtype).requires_grad_()

    k, v = (normal(setting.num_tokens, setting.num_kv_heads, setting.head_dim) for _ in range(2))
    gate_logits = normal(setting.num_tokens, setting.num_heads, 3)
    return CoreInputs(setting, x.q, k, v, x.do, x.cu_seqlens, x.k, x.v, gate_logits)


# Implementations


def core_sizes(setting: CoreSetting) -> dict[str, Any]:
    blocks = dict(**forced_blocks(setting), num_selected_blocks=setting.num_blocks)
    return dict(**windows_of(setting), **blocks, window_size=setting.window_size)


def core(inputs: CoreInputs, **options: Any) -> Calls:
    """q, k, v, compressed k and v, and gates in; o out."""
    from nsa_fsa import ops

    setting = inputs.setting
    arguments: dict[str, Any] = core_sizes(setting) | options

    def attention(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gate_logits: Tensor) -> Tensor:
        return ops.nsa_attention(q, k, v, k_cmp, v_cmp, gate_logits, inputs.cu_seqlens, setting.num_tokens, **arguments)

    return differentiated(inputs.leaves, inputs.do, attention, GRADIENTS)


def sliding_window(inputs: CoreInputs) -> Calls:
    from nsa_fsa import ops

    setting = inputs.setting

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where = (inputs.cu_seqlens, setting.num_tokens)
        return ops.sliding_window_attention(q, k, v, *where, window_size=setting.window_size)

    return differentiated((inputs.q, inputs.k, inputs.v), inputs.do, attention)


def gated_combine(inputs: CoreInputs) -> Calls:
    from nsa_fsa import ops

    leaves, gradients = (inputs.gate_logits, *inputs.branches), ("dgate_logits", "do_cmp", "do_slc", "do_swa")
    return differentiated(leaves, inputs.do, ops.gated_combine, gradients)


@functools.lru_cache
def backends_of(setting: CoreSetting, device: str) -> dict[str, str]:
    """Which backend every operator of the core chooses."""
    import nsa_fsa

    config = nsa_fsa.NSAConfig(
        hidden_size=setting.num_heads * setting.head_dim, num_heads=setting.num_heads, num_kv_heads=setting.num_kv_heads,
        head_dim=setting.head_dim, **core_sizes(setting),
    )  # fmt: skip
    found = nsa_fsa.explain(config, setting.num_tokens, dtype=setting.torch_dtype, device=device)
    return {choice.operator: choice.backend for choice in found.choices if choice.operator in PARTS}


def part(name: str, label: str, prepare: Callable[[CoreInputs], Calls], notes: str) -> Implementation:
    def facts(inputs: CoreInputs, _: str) -> dict[str, Any]:
        return dict(backend=backends_of(inputs.setting, str(inputs.q.device))[name])

    return Implementation(name, label, "part", prepare, distribution="nsa-fsa", notes=notes, facts=facts)


NSA_FSA = Implementation(
    "nsa_fsa", "nsa_fsa, whole core", "ours", core, distribution="nsa-fsa",
    notes="nsa_attention: three branches, the choice of blocks, and gates",
    facts=lambda inputs, name: dict(backends=backends_of(inputs.setting, str(inputs.q.device))),
)  # fmt: skip
FULL = [
    IMPLEMENTATIONS["flash_attn_4"],
    dataclasses.replace(IMPLEMENTATIONS["sdpa_cudnn"], name="cudnn"),
]
CORE = {x.name: x for x in [NSA_FSA, *FULL]}
# In the order in which they run.
PARTS = {
    x.name: x
    for x in [
        part(
            "compressed_attention", "compressed attention", lambda x: compressed.attention(x.compressed, "auto"),
            "forward: with lse; backward: the registered operator",
        ),
        part("select_blocks", "block selection", lambda x: select(x.compressed, "auto"), "scores and top-k, lse given"),
        part(
            "selected_attention", "selected attention", lambda x: ours(x.selected, "auto"),
            "forward: with the block index; backward: the registered operator, the index given",
        ),
        part("sliding_window_attention", "sliding window", sliding_window, "of the keys and values of selected attention"),
        part("gated_combine", "gated combine", gated_combine, "of three random branches"),
    ]
}  # fmt: skip


# The runs


def core_subject(inputs: CoreInputs, **more: Any) -> Subject:
    return Subject(inputs.setting, CoreOracle(inputs), necessary_core(inputs.setting), **more)


def full_subject(inputs: CoreInputs) -> Subject:
    setting = inputs.setting
    return Subject(setting.without_blocks("full"), Oracle(inputs, full=True), necessary(setting, causal_pairs(setting), 0))


def prepare_times(setting: CoreSetting, seed: int, device: torch.device) -> Prepared:
    inputs = make_inputs(setting, seed, device)
    ours, full = core_subject(inputs), full_subject(inputs)
    return Prepared(inputs, lambda implementation: full if implementation.kind == "full" else ours)


def run_times(
    settings: list[CoreSetting], implementations: list[Implementation], passes: list[str], meter: Meter, results: Results,
    seed: int, device: torch.device, console: Console,
) -> None:  # fmt: skip
    """The whole core beside full attention."""
    prepare = functools.partial(prepare_times, seed=seed, device=device)
    run_implementations(settings, implementations, passes, meter, results, console, prepare)


def run_parts(
    settings: list[CoreSetting], passes: list[str], meter: Meter, results: Results, seed: int, device: torch.device,
    console: Console,
) -> None:  # fmt: skip
    """Every operator of the core alone, beside the whole; those that know no blocks once for all shapes of them."""

    def prepare(setting: CoreSetting) -> Prepared:
        inputs = make_inputs(setting, seed, device)
        without_blocks, works = setting.without_blocks(setting.selection), necessary_parts(setting)
        oracles: dict[str, tuple[Any, Any]] = {
            "compressed_attention": (without_blocks, CompressedOracle(inputs.compressed)),
            "select_blocks": (setting, SelectionOracle(inputs.compressed)),
            "selected_attention": (setting, Oracle(inputs.selected)),
            "sliding_window_attention": (without_blocks, WindowOracle(inputs)),
            "gated_combine": (without_blocks, CombineOracle(inputs)),
        }
        subjects = {name: Subject(*oracles[name], work) for name, work in works.items()}
        subjects[NSA_FSA.name] = core_subject(inputs)
        return Prepared(inputs, lambda implementation: subjects[implementation.name])

    run_implementations(settings, [NSA_FSA, *PARTS.values()], passes, meter, results, console, prepare)


def memory_facts(setting: CoreSetting, recompute: tuple[str, ...], peak: int) -> dict[str, Any]:
    """Peak bytes against what full attention's tensors take anyway."""
    full, bar = full_attention_bytes(setting), MEMORY_BARS[recompute]
    return dict(
        recompute=list(recompute), peak_gib=peak / GIB, full_attention_gib=full / GIB, of_full_attention=peak / full, bar=bar,
        within_bar=peak <= bar * full,
    )  # fmt: skip


def run_memory_case(
    setting: CoreSetting, recompute: tuple[str, ...], variant: str, meter: Meter, results: Results, seed: int,
    device: torch.device, console: Console,
) -> None:  # fmt: skip
    """Peak first, for which there may be no other inputs than its own; then times."""

    def train() -> Any:
        """All that a training step holds: its inputs too."""
        inputs = make_inputs(setting, seed, device)
        call = core(inputs, recompute=recompute).forward_backward
        assert call is not None
        return inputs, call()

    train()  # compiles
    facts = memory_facts(setting, recompute, meter.memory(train).extra)
    inputs = make_inputs(setting, seed, device)
    subject, calls = core_subject(inputs), core(inputs, recompute=recompute)
    measure(
        results, meter, NSA_FSA.name, NSA_FSA.kind, calls, subject.oracle, subject.work, list(PASSES), setting, console,
        variant, facts=lambda name, ms: facts if name == "forward_backward" else {},
    )  # fmt: skip


def run_memory(
    cases: list[tuple[CoreSetting, tuple[str, ...]]], meter: Meter, results: Results, seed: int, device: torch.device,
    console: Console,
) -> None:  # fmt: skip
    """Peak memory and time of every (setting, what is computed again in backward)."""
    with progress_bar(console, len(cases)) as step:
        for setting, recompute in cases:
            variant = f"computes again: {', '.join(recompute)}" if recompute else "keeps everything"
            step(f"{setting}: {variant}")
            try:
                run_memory_case(setting, recompute, variant, meter, results, seed, device, console)
            except torch.OutOfMemoryError as error:
                results.leave_out(NSA_FSA.name, first_line(error), **dataclasses.asdict(setting), variant=variant)
                console.print(f"[yellow]not measured:[/] {setting}, {variant}: {escape(first_line(error))}")


def beside_table_7(setting: CoreSetting, name: str, ms: float) -> dict[str, Any]:
    """The paper's seconds of the same cell, and whether ours are fewer than FSA's."""
    paper = table_7((setting.block_size, setting.num_blocks), setting.group_size, setting.num_tokens, name)
    if paper is None:
        return {}
    return dict(paper_s=paper, paper_source=TABLE_7_SOURCE, faster_than_fsa=ms / 1e3 < paper["fsa"])


def run_table_7(
    settings: list[CoreSetting], meter: Meter, results: Results, seed: int, device: torch.device, console: Console
) -> None:
    """The core where the FSA paper's table 7 has figures of an H200."""

    def prepare(setting: CoreSetting) -> Prepared:
        inputs = make_inputs(setting, seed, device)
        subject = core_subject(inputs, beside=functools.partial(beside_table_7, setting))
        return Prepared(inputs, lambda implementation: subject)

    run_implementations(settings, [NSA_FSA], ["forward", "forward_backward"], meter, results, console, prepare)
