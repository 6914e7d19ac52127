"""What `patch_model` says of what it did."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.layers import ModelExplanation
from nsa_fsa.modules.branches import PARTS


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` changed, or would change."""

    model_class: str  # before
    patched_class: str  # after: the class whose checkpoints round-trip
    config: NSAConfig  # of the first NSA layer
    layers: tuple[int, ...]  # layers that now have NSA attention
    dense_layers: tuple[int, ...]  # layers left as they were
    new_parameters: int  # in gates and compressors
    total_parameters: int  # of the patched model
    explanation: ModelExplanation  # of every attention module
    # What is new, by the names by which PEFT knows what to train and save whole beside adapters.
    modules_to_save: tuple[str, ...]
    dry_run: bool
    already_patched: bool
    configs: Mapping[int, NSAConfig]  # by layer
    # Parts of layers patched before that do not fit the new settings: "0.compress_k".
    started_anew: tuple[str, ...]

    def __str__(self) -> str:
        c = self.config
        changed = "was already" if self.already_patched else "is now"
        verb = "would become" if self.dry_run else changed
        reach = c.num_selected_blocks * c.block_size
        dense = f"; dense: {_ranges(self.dense_layers)}" if self.dense_layers else ""

        gates = c.gate_init
        if self.model_class == self.patched_class:
            gates = f"those that fit are kept as they are; new ones start {gates}"
        elif gates == "dense":
            gates += f", so outputs stay close up to {reach} tokens"

        lines = [
            f"{self.model_class} {verb} {self.patched_class} "
            f"(transformers {transformers.__version__})",
            f"  NSA layers: {_ranges(self.layers)}{dense}",
            f"  heads: {c.num_heads} query, {c.num_kv_heads} KV (group size {c.group_size}), "
            f"head dim {c.head_dim}",
            f"  each query reads: {c.num_selected_blocks} blocks of {c.block_size} keys = {reach}, "
            f"the last {c.window_size}, and one compressed token per {c.kernel_stride}"
            + (f"; below position {c.dense_below}: all keys" if c.dense_below else ""),
            f"  new parameters: {self.new_parameters:,} of {self.total_parameters:,} "
            f"({self.new_parameters / max(1, self.total_parameters):.2%}); "
            "all others are kept. With LoRA: "
            f"modules_to_save={list(self.modules_to_save)}, or they stay as they are",
            f"  gates: {gates}",
        ]

        if self.dry_run:
            lines += [f"  {line}" for line in str(self.explanation).split("\n")[1:]]
        if others := tuple(i for i in self.layers if self.configs[i] != c):
            lines.append(
                f"  layers with other settings than these, which are of layer {self.layers[0]}: "
                f"{_ranges(others)}"
            )
        if self.started_anew:
            lines.append(
                "  learned before, and started anew because the shape changed: "
                f"{', '.join(self.started_anew)}"
            )

        return "\n".join(lines)


def count_parts(layers: Iterable[Any]) -> int:
    """The parameters in gates and compressors."""
    parts = (getattr(layer, part) for layer in layers for part in PARTS)
    return sum(_numel(p) for part in parts for p in part.parameters())


def count(model: Any) -> int:
    """`num_parameters()`, which knows of packed weights, and what ZeRO-3 holds elsewhere."""
    return model.num_parameters() + sum(_numel(p) - p.numel() for p in model.parameters())


def _numel(parameter: nn.Parameter) -> int:
    """Also where DeepSpeed's ZeRO-3 leaves an empty tensor until its module runs."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return ", ".join(texts) or "none"
