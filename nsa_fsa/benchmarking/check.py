"""Is a result right? A few query rows and a few blocks of keys, computed again in float32 from the definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_fsa.benchmarking.settings import Setting

# Relative RMS errors, as docs/reliability.md has them for 16-bit outputs; gradients round once more (ds), so twice that.
# One block of 16 too few or too many is an error of several per cent. lse is float32 and sees no 16-bit rounding but its
# inputs'; one compressed key of a thousand too few is 1.4e-4 of it. Gathered windows are copies.
TOLERANCE = {
    "o": 0.005, "lse": 1e-4, "dq": 0.01, "dk": 0.01, "dv": 0.01,
    "pooled": 0.005, "windows": 0.0, "dx": 0.01, "dweight": 0.01,
    "dk_cmp": 0.01, "dv_cmp": 0.01, "dgate_logits": 0.01, "do_cmp": 0.01, "do_slc": 0.01, "do_swa": 0.01,
}  # fmt: skip
ROWS = ("o", "dq", "lse")
ROWS_AT_A_TIME = 1 << 26  # elements of gathered keys


class WrongResult(Exception):
    """An implementation computed something else; its time would mean nothing."""


@dataclass(frozen=True)
class AttentionInputs:
    """Random inputs of one setting; q, k and v require gradients. Compressed keys and values stand in for k and v."""

    setting: Setting
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Inputs(AttentionInputs):
    """The same with selected blocks."""

    block_indices: Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the norm; infinite where only one of the two is, or they are so with different signs."""
    infinite = expected.isinf()
    if not torch.equal(found[infinite], expected[infinite]):
        return torch.inf
    difference, expected = (x.masked_fill(infinite, 0) for x in (found - expected, expected))
    return float(difference.norm() / expected.norm().clamp(min=1e-20))


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`[n, G, A]` times `[n, A, B]`, or times `[1, A, B]` as one product instead of n thin ones."""
    return rows @ matrix if len(matrix) > 1 else (rows.flatten(0, 1) @ matrix[0]).unflatten(0, rows.shape[:2])


class Check:
    """Compares a sample of every result with what float32 arithmetic gives for it."""

    def __init__(self) -> None:
        self._expected: dict[str, Tensor] = {}

    def compute(self, name: str) -> dict[str, Tensor]:
        """The expected sample of one result, and of others that come with it."""
        raise NotImplementedError

    def sample(self, name: str, result: Tensor) -> Tensor:
        """The part of a result that `compute` gives, in float32."""
        raise NotImplementedError

    def expected(self, name: str) -> Tensor:
        """Computed once, and only if something asks."""
        if name not in self._expected:
            self._expected |= self.compute(name)
        return self._expected[name]

    def check(self, **results: Tensor) -> dict[str, float]:
        """Relative RMS errors of as many results as are given.

        Raises:
            WrongResult: for an error beyond its tolerance, or for what is not finite.
        """
        errors = {}
        for name, result in results.items():
            error = relative_error(self.sample(name, result), self.expected(name))
            if not error <= TOLERANCE[name]:
                raise WrongResult(
                    f"{name} differs from the float32 computation by {error:.2%} of its norm; allowed is {TOLERANCE[name]:.2%}"
                )
            errors[name] = error
        return errors


class AttentionCheck(Check):
    """Attention row by row; a subclass says which keys a query sees, and which keys' gradients are compared."""

    edge: int  # rows around its multiples are sampled

    def __init__(self, inputs: AttentionInputs, gate: Tensor | None = None) -> None:
        """gate: what do `[T, HQ, D]` is multiplied by first, `[T, HQ]`."""
        super().__init__()
        self.inputs, self.setting, self.gate = inputs, inputs.setting, gate
        self.scale = self.setting.head_dim**-0.5

    def keys_of(self, queries: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """k and v `[n, L, D]`, n = 1 where all of these queries share them, and which are visible `[n, L]`."""
        raise NotImplementedError

    def chunks(self, queries: Tensor) -> tuple[Tensor, ...]:
        """As many queries at a time as memory allows."""
        raise NotImplementedError

    def key_gradients(self) -> dict[str, Tensor]:
        """dk and dv as `sample` takes them."""
        raise NotImplementedError

    def rows(self, queries: Tensor, head: int) -> dict[str, Tensor]:
        """Everything about queries `[n]` of one KV head: o, dq, q and do `[n, G, D]`, p and ds `[n, G, L]`, lse `[n, G]`."""
        x, group = self.inputs, slice(head * self.setting.group_size, (head + 1) * self.setting.group_size)
        q, do = x.q.detach()[queries, group].float(), x.do[queries, group].float()
        if self.gate is not None:
            do = do * self.gate[queries, group, None]
        k, v, seen = self.keys_of(queries, head)
        hidden = ~seen[:, None]
        scores = (product(q, k.transpose(1, 2)) * self.scale).masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1).masked_fill(hidden, 0)  # a query that sees nothing: 0, not NaN
        o = product(p, v)
        ds = p * (product(do, v.transpose(1, 2)) - (o * do).sum(-1, keepdim=True)) * self.scale
        return dict(o=o, lse=scores.logsumexp(-1), dq=product(ds, k), p=p, ds=ds, q=q, do=do)

    def compute(self, name: str) -> dict[str, Tensor]:
        """o, dq and lse of sampled queries `[heads, n, G, ...]`, or dk and dv of sampled keys."""
        if name in ("dk", "dv"):
            return self.key_gradients()
        heads = [self.rows_of_any(self.queries, head) for head in self.heads]
        return {x: torch.stack([rows[x] for rows in heads]) for x in heads[0]}

    def rows_of_any(self, queries: Tensor, head: int) -> dict[str, Tensor]:
        """o, dq and lse of any number of queries `[n]`: `[n, G, ...]`."""
        parts = [{x: y for x, y in self.rows(chunk, head).items() if x in ROWS} for chunk in self.chunks(queries)]
        return {x: torch.cat([part[x] for part in parts]) for x in ROWS}

    @property
    def heads(self) -> list[int]:
        return sorted({0, self.setting.num_kv_heads - 1})

    @property
    def queries(self) -> Tensor:
        """The first and last rows, those around an edge, and a few in between, always the same."""
        tokens, edge = self.setting.num_tokens, self.edge
        edges = [0, 1, edge - 2, edge - 1, edge, tokens // 2, tokens - edge - 1, tokens - 2, tokens - 1]
        spread = [tokens * (2 * i + 1) // 16 + i for i in range(8)]
        rows = sorted({row for row in edges + spread if 0 <= row < tokens})
        return torch.tensor(rows, device=self.inputs.do.device)

    def sample(self, name: str, result: Tensor) -> Tensor:
        picked = result.detach()[self.queries].unflatten(1, (self.setting.num_kv_heads, -1))
        return picked[:, self.heads].transpose(0, 1).float()


class BlockCheck(AttentionCheck):
    """The gradients of keys and values are compared in some blocks of them."""

    def block_gradients(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        """dk and dv of the keys of one block and KV head, `[keys, D]`."""
        raise NotImplementedError

    def keys_in(self, block: int) -> Tensor:
        size = self.setting.block_size
        return torch.arange(block * size, min((block + 1) * size, self.setting.num_tokens), device=self.inputs.do.device)

    def key_gradients(self) -> dict[str, Tensor]:
        blocks = [self.block_gradients(block, head) for head in self.heads for block in self.sampled_blocks()]
        return {"dk": torch.cat([dk for dk, _ in blocks]), "dv": torch.cat([dv for _, dv in blocks])}

    def sampled_blocks(self) -> list[int]:
        last = (self.setting.num_tokens - 1) // self.setting.block_size
        return sorted({0, last // 2, last})

    def sample(self, name: str, result: Tensor) -> Tensor:
        if name not in ("dk", "dv"):
            return super().sample(name, result)
        return torch.cat([result[self.keys_in(block), head] for head in self.heads for block in self.sampled_blocks()]).float()


class Oracle(BlockCheck):
    """Selected attention from the inputs of one setting; `full`: over all keys up to the query's own, whatever is selected."""

    inputs: Inputs

    def __init__(self, inputs: AttentionInputs, full: bool = False, gate: Tensor | None = None) -> None:
        super().__init__(inputs, gate)
        self.full, self.edge = full, self.setting.block_size

    def keys_of(self, queries: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (x.detach()[:, head].float() for x in (self.inputs.k, self.inputs.v))
        if self.full:
            position = torch.arange(self.setting.num_tokens, device=queries.device)
            return k[None], v[None], position <= queries[:, None]
        size, block = self.setting.block_size, self.inputs.block_indices[queries, head].long()
        position = (block[:, :, None] * size + torch.arange(size, device=queries.device)).flatten(1)
        seen = (block >= 0)[:, :, None].expand(-1, -1, size).flatten(1) & (position <= queries[:, None])
        position = position.where(seen, 0)
        return k[position], v[position], seen  # [n, L, D], [n, L]

    def chunks(self, queries: Tensor) -> tuple[Tensor, ...]:
        length = self.setting.num_tokens if self.full else self.setting.num_blocks * self.setting.block_size
        return queries.split(max(ROWS_AT_A_TIME // (length * self.setting.head_dim), 1))

    def block_gradients(self, block: int, head: int) -> tuple[Tensor, Tensor]:
        size, device, keys = self.setting.block_size, self.inputs.do.device, self.keys_in(block)
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
        return super().sampled_blocks()[-1:] if self.full else super().sampled_blocks()  # full: every query sees block 0
