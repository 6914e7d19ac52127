"""Is a result right? The reference computes two KV heads of it again, in float32."""

import dataclasses

import torch
from torch import Tensor

from nsa_fsa.benchmarking.cases import Case

# Relative RMS errors: docs/reliability.md allows 0.005 for 16-bit outputs; gradients round once
# more, so 0.01. lse is float32: one compressed key of a thousand too few is 1.4e-4 of it.
TOLERANCE, GRADIENT_TOLERANCE = {"o": 0.005, "lse": 1e-4, "pooled": 0.005, "windows": 0.0}, 0.01
# (query, key) pairs of a head that are computed again: all of them up to 131,072 tokens.
PAIRS = 1 << 34
OF_KEYS = ("k", "v")  # the tensors with a row a token that are not of queries


class WrongResult(Exception):
    """An implementation computed something else, so its time would mean nothing."""


def compare(name: str, found: Tensor, expected: Tensor, allowed: float | None = None) -> float:
    """The relative RMS error; raises WrongResult if it is beyond what is allowed."""
    found, expected, error = found.float(), expected.float(), torch.inf
    infinite = expected.isinf()  # the lse of a query that sees nothing
    if torch.equal(found[infinite], expected[infinite]):
        off, size = (x.masked_fill(infinite, 0).norm() for x in (found - expected, expected))
        error = float(off / size.clamp(min=1e-20))
    allowed = TOLERANCE.get(name, GRADIENT_TOLERANCE) if allowed is None else allowed
    if not error <= allowed:
        difference = f"differs from the reference by {error:.2%} of its norm"
        raise WrongResult(f"{name} {difference}; {allowed:.2%} are allowed")
    return error


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a case is compared: a KV head with its queries, and of these the last `rows`. No
    earlier query reads the keys of these rows, so that their gradients are whole."""

    case: Case
    head: int
    rows: int

    def inputs(self, *names: str) -> Case:
        """The part as a case of its own; 16 bits become float32."""
        part = dataclasses.replace(self.case)
        for name in names:
            x = self.of_head(self.case[name].detach())
            x = x[-self.rows :] if len(x) == self.case.num_tokens and name not in OF_KEYS else x
            part.tensors[name] = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.rows < self.case.num_tokens:
            part.tensors["cu_seqlens_q"] = self.case["cu_seqlens"].clamp(max=self.rows)
        return part

    def result(self, x: Tensor) -> Tensor:
        """What is compared of a result; of a compressed one the windows that end in these rows."""
        c, first, starts = self.case.config, self.case.num_tokens - self.rows, 0
        if len(x) == self.case.num_tokens:
            starts = first
        elif len(x) == self.case.num_tokens // c.kernel_stride:
            starts = max(0, -(-(first - c.kernel_size + 1) // c.kernel_stride))
        return self.of_head(x)[starts:]

    def of_head(self, x: Tensor) -> Tensor:
        """`[T, HQ or HKV, ...]` -> `[T, G or 1, ...]`."""
        return x.unflatten(1, (self.case.config.num_kv_heads, -1))[:, self.head]


def parts_of(case: Case) -> list[Part]:
    """The first and the last KV head, and as many rows as time allows."""
    rows = min(case.num_tokens, PAIRS // case.num_tokens)
    return [Part(case, head, rows) for head in sorted({0, case.config.num_kv_heads - 1})]
