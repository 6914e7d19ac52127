"""Is a result of the whole core right? Its branches computed again, each from its definition, and mixed by the gates.

Shapes: T tokens, HQ query heads, G of them per KV head, n sampled queries; branch order is compressed, selected, sliding.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.benchmarking.check import ROWS_AT_A_TIME, AttentionInputs, BlockCheck, Check, Inputs, Oracle
from nsa_fsa.benchmarking.check_windows import CompressedOracle, SelectionOracle
from nsa_fsa.benchmarking.settings import CoreSetting


@dataclass(frozen=True)
class CoreInputs(AttentionInputs):
    """Random inputs of the whole core; all but do and cu_seqlens require gradients."""

    setting: CoreSetting
    k_cmp: Tensor
    v_cmp: Tensor
    gate_logits: Tensor  # [T, HQ, 3]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.k_cmp, self.v_cmp, self.gate_logits

    @property
    def compressed(self) -> AttentionInputs:
        return AttentionInputs(self.setting, self.q, self.k_cmp, self.v_cmp, self.do, self.cu_seqlens)

    @property
    def selected(self) -> Inputs:
        return Inputs(self.setting, self.q, self.k, self.v, self.do, self.cu_seqlens, self.block_indices)

    @functools.cached_property
    def block_indices(self) -> Tensor:
        """What the operators choose, as they do inside the core; the check does not take it on trust."""
        from nsa_fsa import ops

        x = self.setting
        where = (self.cu_seqlens, x.num_tokens)
        windows: dict[str, Any] = dict(kernel_size=x.kernel_size, kernel_stride=x.kernel_stride)
        with torch.no_grad():
            lse = ops.compressed_attention(self.q, self.k_cmp, self.v_cmp, *where, **windows, return_lse=True)[1]
            return ops.select_blocks(
                self.q, self.k_cmp, lse, *where, **windows, block_size=x.block_size, num_selected_blocks=x.num_blocks,
                init_blocks=x.init_blocks, local_blocks=x.local_blocks,
            )  # fmt: skip

    @functools.cached_property
    def branches(self) -> tuple[Tensor, ...]:
        """Something to mix; the sum does not care where it comes from."""
        generator = torch.Generator(self.q.device).manual_seed(0)
        return tuple(torch.empty_like(self.q).normal_(generator=generator).requires_grad_() for _ in range(3))


def combine(gate_logits: Tensor, branches: Tensor, do: Tensor) -> dict[str, Tensor]:
    """The gated sum and its gradients: gates `[n, heads, 3]`, branches `[n, heads, D, 3]`, do `[n, heads, D]`."""
    gates = gate_logits.float().sigmoid()
    weight = gates[:, :, None]
    of_branches = dict(zip(("do_cmp", "do_slc", "do_swa"), (weight * do[..., None]).unbind(-1), strict=True))
    dgate_logits = gates * (1 - gates) * (branches * do[..., None]).sum(-2)
    return dict(o=(weight * branches).sum(-1), dgate_logits=dgate_logits, **of_branches)


class WindowOracle(BlockCheck):
    """Sliding window attention."""

    setting: CoreSetting

    def __init__(self, inputs: AttentionInputs, gate: Tensor | None = None) -> None:
        super().__init__(inputs, gate)
        self.edge = self.setting.window_size

    def keys_of(self, queries: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        window = self.setting.window_size
        position = queries[:, None] - window + 1 + torch.arange(window, device=queries.device)
        seen = position >= 0
        position = position.where(seen, 0)
        k, v = (x.detach()[:, head].float() for x in (self.inputs.k, self.inputs.v))
        return k[position], v[position], seen  # [n, window, D], [n, window]

    def chunks(self, queries: Tensor) -> tuple[Tensor, ...]:
        return queries.split(max(ROWS_AT_A_TIME // (self.setting.window_size * self.setting.head_dim), 1))

    def block_gradients(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        window, keys = self.setting.window_size, self.keys_in(block)
        last = min(int(keys[-1]) + window, self.setting.num_tokens)
        dk = torch.zeros(len(keys), self.setting.head_dim, device=keys.device)
        dv = torch.zeros_like(dk)
        for chunk in self.chunks(torch.arange(int(keys[0]), last, device=keys.device)):
            rows = self.rows(chunk, head)
            column = keys - chunk[:, None] + window - 1  # where in its window a query sees each key
            there = (column >= 0) & (column < window)
            column = column.where(there, 0)[:, None].expand(-1, self.setting.group_size, -1)
            for gradient, weight, value in ((dk, rows["ds"], rows["q"]), (dv, rows["p"], rows["do"])):
                gradient += torch.einsum("ngk,ngd->kd", weight.gather(-1, column) * there[:, None], value)
        return dk, dv


class CombineOracle(Check):
    """The gated sum alone, at some queries."""

    def __init__(self, inputs: CoreInputs) -> None:
        super().__init__()
        self.inputs, self.queries = inputs, WindowOracle(inputs).queries

    def compute(self, name: str) -> dict[str, Tensor]:
        branches = torch.stack([self.sample(name, x) for x in self.inputs.branches], -1)
        return combine(self.sample(name, self.inputs.gate_logits), branches, self.sample(name, self.inputs.do))

    def sample(self, name: str, result: Tensor) -> Tensor:
        return result.detach()[self.queries].float()


class CoreOracle(BlockCheck):
    """The whole core. What it selects is held to the rules of a selection first."""

    inputs: CoreInputs
    setting: CoreSetting

    def __init__(self, inputs: CoreInputs) -> None:
        super().__init__(inputs)

    @functools.cached_property
    def branches(self) -> tuple[CompressedOracle, Oracle, WindowOracle]:
        compressed, selected, sliding = self.inputs.gate_logits.detach().float().sigmoid().unbind(-1)
        return (
            CompressedOracle(self.inputs.compressed, compressed),
            Oracle(self.inputs.selected, gate=selected),
            WindowOracle(self.inputs, sliding),
        )

    @functools.cached_property
    def selection(self) -> dict[str, float]:
        return SelectionOracle(self.inputs.compressed).check(self.inputs.block_indices)

    def check(self, **results: Tensor) -> dict[str, float]:
        return self.selection | super().check(**results)

    @functools.cached_property
    def queries(self) -> Tensor:
        return torch.cat([branch.queries for branch in self.branches]).unique()

    def compute(self, name: str) -> dict[str, Tensor]:
        compressed, _, _ = self.branches
        if name in ("dk", "dv"):
            return self.key_gradients()
        if name in ("dk_cmp", "dv_cmp"):
            return {f"{x}_cmp": gradient for x, gradient in compressed.key_gradients().items()}
        heads = [self.mixed(head) for head in self.heads]
        return {x: torch.stack([rows[x] for rows in heads]) for x in ("o", "dq", "dgate_logits")}

    def mixed(self, head: int) -> dict[str, Tensor]:
        """Everything about the sampled queries of one KV head, `[n, G, ...]`."""
        group = slice(head * self.setting.group_size, (head + 1) * self.setting.group_size)
        gate_logits, do = (x.detach()[self.queries, group].float() for x in (self.inputs.gate_logits, self.inputs.do))
        rows = [branch.rows_of_any(self.queries, head) for branch in self.branches]
        dq = torch.stack([x["dq"] for x in rows]).sum(0)
        return combine(gate_logits, torch.stack([x["o"] for x in rows], -1), do) | dict(dq=dq)

    def block_gradients(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        _, *of_tokens = self.branches
        dk, dv = zip(*(branch.block_gradients(block, head) for branch in of_tokens), strict=True)
        return sum(dk), sum(dv)

    def sample(self, name: str, result: Tensor) -> Tensor:
        if name in ("dk_cmp", "dv_cmp"):
            return self.branches[0].sample(name.removesuffix("_cmp"), result)
        return super().sample(name, result)
