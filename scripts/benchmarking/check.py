"""Is a result right? A few query rows and a few blocks of keys, computed again in float32 from the definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarking.settings import Setting

# Relative RMS errors, as docs/reliability.md has them for 16-bit outputs; gradients round once more (ds), so twice that.
# One block of 16 too few or too many is an error of several per cent.
TOLERANCE = {"o": 0.005, "dq": 0.01, "dk": 0.01, "dv": 0.01}
ROWS_AT_A_TIME = 1 << 26  # elements of gathered keys


class WrongResult(Exception):
    """An implementation computed something else; its time would mean nothing."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one setting; q, k and v require gradients."""

    setting: Setting
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    block_indices: Tensor
    cu_seqlens: Tensor


class Oracle:
    """Attention in float32, row by row, from the inputs of one setting; `full`: over all keys up to the query's own."""

    def __init__(self, inputs: Inputs, full: bool = False) -> None:
        self.inputs, self.full = inputs, full
        self.setting = inputs.setting
        self.scale = self.setting.head_dim**-0.5
        self._expected: dict[str, Tensor] | None = None

    def keys_of(self, queries: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """Key positions `[n, L]` of queries `[n]`, and which of them exist and are visible."""
        size = self.setting.block_size
        if self.full:
            position = torch.arange(self.setting.num_tokens, device=queries.device).expand(len(queries), -1)
            return position, position <= queries[:, None]
        block = self.inputs.block_indices[queries, head].long()
        position = (block[:, :, None] * size + torch.arange(size, device=queries.device)).flatten(1)
        seen = (block >= 0)[:, :, None].expand(-1, -1, size).flatten(1) & (position <= queries[:, None])
        return position.where(seen, 0), seen

    def chunks(self, queries: Tensor) -> tuple[Tensor, ...]:
        length = self.setting.num_tokens if self.full else self.setting.num_blocks * self.setting.block_size
        return queries.split(max(ROWS_AT_A_TIME // (length * self.setting.head_dim), 1))

    def rows(self, queries: Tensor, head: int) -> dict[str, Tensor]:
        """Everything about some queries `[n]` of one KV head: o, dq, q and do `[n, G, D]`, p and ds `[n, G, L]`."""
        x, group = self.inputs, slice(head * self.setting.group_size, (head + 1) * self.setting.group_size)
        q, do = x.q.detach()[queries, group].float(), x.do[queries, group].float()
        position, seen = self.keys_of(queries, head)
        k, v = x.k.detach()[:, head].float()[position], x.v.detach()[:, head].float()[position]  # [n, L, D]
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~seen[:, None], -torch.inf)
        p = scores.softmax(-1)
        o = p @ v
        ds = p * (do @ v.transpose(1, 2) - (o * do).sum(-1, keepdim=True)) * self.scale
        return dict(o=o, dq=ds @ k, p=p, ds=ds, q=q, do=do)

    def block_gradients(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        """dk and dv of the keys of one block and KV head, `[keys, D]`."""
        size, device = self.setting.block_size, self.inputs.do.device
        keys = torch.arange(block * size, min((block + 1) * size, self.setting.num_tokens), device=device)
        if self.full:
            queries = torch.arange(block * size, self.setting.num_tokens, device=device)
        else:
            queries = (self.inputs.block_indices[:, head] == block).any(-1).nonzero()[:, 0]
        dk = torch.zeros(len(keys), self.setting.head_dim, device=device)
        dv = torch.zeros_like(dk)
        for chunk in self.chunks(queries):
            rows = self.rows(chunk, head)
            for gradient, weight, value in ((dk, rows["ds"], rows["q"]), (dv, rows["p"], rows["do"])):
                if self.full:
                    weight = weight[..., block * size :]
                else:
                    slot = (self.inputs.block_indices[chunk, head] == block).int().argmax(-1)
                    weight = weight.unflatten(-1, (-1, size))[torch.arange(len(chunk), device=device), :, slot]
                gradient += torch.einsum("ngk,ngd->kd", weight[..., : len(keys)], value)
        return dk, dv

    def sampled_blocks(self) -> list[int]:
        last = (self.setting.num_tokens - 1) // self.setting.block_size
        return [last] if self.full else sorted({0, last // 2, last})  # full: every query sees block 0

    def expected(self) -> dict[str, Tensor]:
        """o and dq of sampled queries `[heads, n, G, D]`, dk and dv of sampled blocks, computed once."""
        if self._expected is None:
            rows = [[self.rows(chunk, head) for chunk in self.chunks(self.queries)] for head in self.heads]
            found = {name: torch.stack([torch.cat([part[name] for part in head]) for head in rows]) for name in ("o", "dq")}
            blocks = [self.block_gradients(block, head) for head in self.heads for block in self.sampled_blocks()]
            found |= {"dk": torch.cat([dk for dk, _ in blocks]), "dv": torch.cat([dv for _, dv in blocks])}
            self._expected = found
        return self._expected

    @property
    def heads(self) -> list[int]:
        return sorted({0, self.setting.num_kv_heads - 1})

    @property
    def queries(self) -> Tensor:
        """The first and last rows, those around a block's edge, and a few in between, always the same."""
        tokens, size = self.setting.num_tokens, self.setting.block_size
        edges = [0, 1, size - 1, size, tokens // 2, tokens - size - 1, tokens - 2, tokens - 1]
        spread = [tokens * (2 * i + 1) // 16 + i for i in range(8)]
        rows = sorted({row for row in edges + spread if 0 <= row < tokens})
        return torch.tensor(rows, device=self.inputs.do.device)

    def sample(self, name: str, result: Tensor) -> Tensor:
        """The part of a result that `expected` has."""
        size = self.setting.block_size
        if name in ("o", "dq"):
            picked = result.detach()[self.queries].unflatten(1, (self.setting.num_kv_heads, -1))
            return picked[:, self.heads].transpose(0, 1).float()
        parts = [result[block * size : (block + 1) * size, head] for head in self.heads for block in self.sampled_blocks()]
        return torch.cat(parts).float()

    def check(self, **results: Tensor) -> dict[str, float]:
        """Relative RMS errors of o, dq, dk and dv, as many as are given.

        Raises:
            WrongResult: for an error beyond its tolerance, or for what is not finite.
        """
        errors = {}
        for name, result in results.items():
            expected = self.expected()[name]
            error = float((self.sample(name, result) - expected).norm() / expected.norm().clamp(min=1e-20))
            if not error <= TOLERANCE[name]:
                raise WrongResult(
                    f"{name} differs from the float32 computation by {error:.2%} of its norm; allowed is {TOLERANCE[name]:.1%}"
                )
            errors[name] = error
        return errors
