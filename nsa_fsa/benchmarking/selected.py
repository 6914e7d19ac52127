"""The runs of `nsa-fsa bench selected`: times against peers, workspace memory, and ablations of the KV-major design."""

import dataclasses
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from nsa_fsa.benchmarking.calls import Calls, Implementation
from nsa_fsa.benchmarking.check import Inputs, Oracle
from nsa_fsa.benchmarking.implementations import forced_blocks, ours
from nsa_fsa.benchmarking.measure import GIB, Meter
from nsa_fsa.benchmarking.paper import TABLE_5, TABLE_5_SOURCE
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.running import Prepared, Subject, measure, progress_bar, run_implementations
from nsa_fsa.benchmarking.selections import correlated, neighbour_overlap, random_selection, realistic_selection
from nsa_fsa.benchmarking.settings import Setting, causal_pairs, necessary, visible_pairs

UNLIMITED = 1 << 50
Q_CORRELATION, K_CORRELATION = 0.99, 0.98  # of neighbouring queries and keys, for the realistic selection


def make_inputs(setting: Setting, seed: int, device: torch.device) -> Inputs:
    """Fresh random numbers; under "realistic" q and k change slowly along the sequence, and choose the blocks."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, width = setting.torch_dtype, setting.head_dim
    queries = (setting.num_tokens, setting.num_heads, width)
    keys = (setting.num_tokens, setting.num_kv_heads, width)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if setting.selection == "random":
        q, k = normal(queries), normal(keys)
        indices = random_selection(setting, generator)
    elif setting.selection == "realistic":
        q = correlated(queries, Q_CORRELATION, generator, dtype)
        k = correlated(keys, K_CORRELATION, generator, dtype)
        indices = realistic_selection(setting, q, k)
    else:
        raise ValueError(f"selection={setting.selection!r}: allowed are 'random' and 'realistic'.")
    v, do = normal(keys), normal(queries)
    cu_seqlens = torch.tensor([0, setting.num_tokens], dtype=torch.int32, device=device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Inputs(setting, q, k, v, do, cu_seqlens, indices)


def describe_selection(results: Results, inputs: Inputs) -> int:
    """Records how alike neighbours choose; returns how many (query, KV head, key) triples are visible."""
    setting = inputs.setting
    pairs = visible_pairs(inputs.block_indices, setting.block_size)
    overlap = neighbour_overlap(inputs.block_indices, setting)
    results.add_selection(
        setting, overlap_all=overlap["all"], overlap_sparse=overlap["sparse"],
        visible_keys_mean=pairs / (setting.num_tokens * setting.num_kv_heads),
    )  # fmt: skip
    return pairs


def run_times(
    settings: list[Setting], implementations: list[Implementation], passes: list[str], meter: Meter, results: Results,
    seed: int, device: torch.device, console: Console,
) -> None:  # fmt: skip
    """Every implementation at every setting; what cannot be imported is left out with its reason."""

    def prepare(setting: Setting) -> Prepared:
        inputs = make_inputs(setting, seed, device)
        pairs = describe_selection(results, inputs)
        selected = Subject(setting, Oracle(inputs), necessary(setting, pairs, setting.num_blocks))
        full = Subject(
            setting.without_blocks("full"), Oracle(inputs, full=True), necessary(setting, causal_pairs(setting), num_indices=0)
        )
        return Prepared(inputs, lambda implementation: full if implementation.kind == "full" else selected)

    run_implementations(settings, implementations, passes, meter, results, console, prepare)


def run_memory(
    settings: list[Setting],
    budgets: list[int],
    meter: Meter,
    results: Results,
    seed: int,
    device: torch.device,
    console: Console,
) -> None:
    """Workspace of the KV-major kernels at each budget, beside table 5 of the FSA paper."""
    with progress_bar(console, len(settings) * len(budgets)) as step:
        for setting in settings:
            inputs = make_inputs(setting, seed, device)
            describe_selection(results, inputs)
            for budget in budgets:
                variant = "unlimited" if budget >= UNLIMITED else f"{budget / GIB:g}"
                step(f"{setting}: workspace {variant}")
                calls = ours(inputs, "triton_kv_major", workspace_bytes=budget)
                quoted = TABLE_5.get((setting.block_size, setting.num_blocks), {}).get(setting.num_tokens)
                for name in ("forward", "backward"):
                    call = calls.of(name)
                    assert call is not None
                    call()  # compiles, and makes what the backward is given
                    memory = meter.memory(call)
                    results.add_row(
                        "triton_kv_major", "ours", name, setting, variant, workspace_bytes=budget,
                        extra_gib=memory.extra / GIB, workspace_gib=memory.workspace / GIB, index_gib=index_bytes(inputs) / GIB,
                        paper_gb=quoted, paper_source=TABLE_5_SOURCE if quoted is not None else None,
                    )  # fmt: skip
                del calls


def index_bytes(inputs: Inputs) -> int:
    """What the block index takes, which the forward keeps for the backward."""
    setting = inputs.setting
    blocks = (setting.block_size, setting.init_blocks, setting.local_blocks)
    index = torch.ops.nsa_fsa.block_index(inputs.block_indices, None, inputs.cu_seqlens, setting.num_tokens, *blocks)
    return sum(x.numel() * x.element_size() for x in index)


def ablations(inputs: Inputs) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """{variant: (options of the operator that change, options of the kernels that change)}."""
    from nsa_fsa.ops.common import tuning

    base = tuning.default_config(inputs.q, inputs.v, inputs.setting.block_size)
    one_tile = dataclasses.replace(base, fwd_item_rows=base.fwd_m, bwd_item_rows=base.bwd_m)
    late = dataclasses.replace(base, stop_early=False)
    return {
        "whole design": ({}, {}),
        "without the inner loop: a program per tile": ({}, dict(config=one_tile)),
        "without early return: every item as long as the longest may be": ({}, dict(config=late)),
        "without dense forced blocks": (dict(init_blocks=0, local_blocks=0), {}),
        "without a bound on the workspace": (dict(workspace_bytes=UNLIMITED), {}),
    }


def kv_major_calls(inputs: Inputs, options: dict[str, Any], kernel_options: dict[str, Any]) -> Calls:
    """The KV-major kernels called directly: forward with the block index, backward with the index given."""
    from nsa_fsa.ops.selected_attention import launch as kernels
    from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES

    setting = inputs.setting
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    common = dict(num_indices=setting.num_blocks, scale=setting.head_dim**-0.5, workspace_bytes=WORKSPACE_BYTES)
    arguments: dict[str, Any] = {**common, **forced_blocks(setting), **options}
    forced = {name: arguments[name] for name in ("block_size", "init_blocks", "local_blocks")}

    def attention() -> tuple[Any, Tensor, Tensor]:
        index = kernels.block_index(inputs.block_indices, None, inputs.cu_seqlens, setting.num_tokens, **forced)
        return index, *kernels.kv_major_forward(q, k, v, index, **kernel_options, **arguments)

    saved: list[Any] = []

    def backward() -> tuple[Tensor, ...]:
        if not saved:
            saved.extend(attention())
        index, o, lse = saved
        return kernels.kv_major_backward(inputs.do, q, k, v, o, lse, index, **kernel_options, **arguments)

    return Calls(lambda: attention()[1], backward)


def run_ablations(
    settings: list[Setting], meter: Meter, results: Results, seed: int, device: torch.device, console: Console
) -> None:
    """The KV-major design without each of its parts, as the FSA paper's figure 9 has it for its own."""
    with progress_bar(console, len(settings) * 5) as step:
        for setting in settings:
            inputs = make_inputs(setting, seed, device)
            pairs = describe_selection(results, inputs)
            oracle, work = Oracle(inputs), necessary(setting, pairs, setting.num_blocks)
            for variant, (options, kernel_options) in ablations(inputs).items():
                step(f"{setting}: {variant}")
                calls = kv_major_calls(inputs, options, kernel_options)
                measure(
                    results, meter, "triton_kv_major", "ours", calls, oracle, work, ["forward", "backward"], setting, console,
                    variant,
                )  # fmt: skip
                del calls
