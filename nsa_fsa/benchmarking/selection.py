"""The run of `nsa-fsa bench selection`: the choice of blocks, beside compressed attention, which has the same keys to read."""

import functools

import torch
from rich.console import Console
from torch import Tensor

from nsa_fsa.benchmarking.calls import Calls, Implementation
from nsa_fsa.benchmarking.check import AttentionInputs
from nsa_fsa.benchmarking.check_windows import SelectionOracle
from nsa_fsa.benchmarking.compressed import (
    attention_implementation,
    attention_subject,
    make_inputs,
    no_such_backend,
    windows_of,
)
from nsa_fsa.benchmarking.measure import Meter
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.running import Prepared, Subject, run_implementations
from nsa_fsa.benchmarking.settings import WindowSetting, necessary_selection


def select(inputs: AttentionInputs, backend: str) -> Calls:
    """Scores and top-k; lse comes from compressed attention, before the clock starts."""
    from nsa_fsa import ops

    setting = inputs.setting
    assert isinstance(setting, WindowSetting)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    where, windows = (inputs.cu_seqlens, setting.num_tokens), windows_of(setting)
    _, lse = ops.compressed_attention(q, k, v, *where, **windows, return_lse=True, backend=backend)

    def forward() -> Tensor:
        return ops.select_blocks(
            q, k, lse, *where, **windows, block_size=setting.block_size, num_selected_blocks=setting.num_blocks,
            init_blocks=setting.init_blocks, local_blocks=setting.local_blocks, backend=backend,
        )  # fmt: skip

    return Calls(forward, outputs=("block_indices",))


def selection_implementations(backend: str) -> list[Implementation]:
    """Compressed attention first: a selection from a wrong lse says nothing."""
    return [
        attention_implementation(backend),
        Implementation(
            "select_blocks", "block selection", "ours", functools.partial(select, backend=backend),
            unsupported=functools.partial(no_such_backend, operator="select_blocks", backend=backend), distribution="nsa-fsa",
            notes="scores and top-k, lse given", facts=lambda inputs, name: dict(backend=backend),
        ),
    ]  # fmt: skip


SELECTION = {x.name: x for x in selection_implementations("triton")}


def run(
    settings: list[WindowSetting], implementations: list[Implementation], meter: Meter, results: Results, seed: int,
    device: torch.device, console: Console,
) -> None:  # fmt: skip
    """Block selection at every setting, and compressed attention once for all blocks of the same inputs."""

    def prepare(setting: WindowSetting) -> Prepared:
        inputs = make_inputs(setting, seed, device)
        subjects = {
            "compressed_attention": attention_subject(setting, inputs),
            "select_blocks": Subject(setting, SelectionOracle(inputs), necessary_selection(setting)),
        }
        return Prepared(inputs, lambda implementation: subjects[implementation.name])

    run_implementations(settings, implementations, ["forward"], meter, results, console, prepare)
