"""This package's operators, each alone, and how each is checked."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa_fsa import ops
from nsa_fsa.benchmarking.cases import Case, Named, Options
from nsa_fsa.benchmarking.check import Part, WrongResult, parts_of
from nsa_fsa.benchmarking.implementations import NSA_CORE, Function, Implementation, core
from nsa_fsa.config import BRANCHES

# Of the best possible sum of scores; equal scores and float32 rounding cost less than 1e-5.
SCORE_LOST = 0.005


def options_of(case: Case, options: Options) -> Options:
    return case.layout | dict(scale=case.config.scale, backend=case.config.backend) | options


def compressed_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """o and lse, as the choice of blocks wants it."""
    options = case.windows | options_of(case, options)
    return ops.compressed_attention(q, k, v, return_lse=True, **options)


def selected_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    sizes = {x: y for x, y in case.blocks.items() if x != "num_selected_blocks"}
    options = sizes | options_of(case, options)
    return ops.selected_attention(q, k, v, case["block_indices"], **options)


def sliding_window_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    window, options = case.config.window_size, options_of(case, options)
    return ops.sliding_window_attention(q, k, v, window_size=window, **options)


def gated_combine(case: Case, *tensors: Tensor, **options: Any) -> Tensor:
    return ops.gated_combine(*tensors, **dict(backend=case.config.backend) | options)


def select_blocks(case: Case, q: Tensor, k_cmp: Tensor, **options: Any) -> Any:
    """Scores and top-k; the lse is given."""
    options = case.windows | case.blocks | options_of(case, options)
    return ops.select_blocks(q.detach(), k_cmp.detach(), case["lse"], **options)


def pool_windows(case: Case, k: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    options = dict(backend=case.config.backend) | case.windows | options
    weight = None if weight is None else weight.mT
    return ops.pool_windows(k, weight, case["cu_seqlens"], case.num_tokens, **options)


def gather_windows(case: Case, k: Tensor, **options: Any) -> Tensor:
    options = dict(backend=case.config.backend) | case.windows | options
    return ops.gather_windows(k, case["cu_seqlens"], case.num_tokens, **options)


class Selection(Implementation):
    def check(self, case: Case, name: str, results: Named) -> dict[str, float]:
        return check_selection(case, results["block_indices"])


def check_selection(case: Case, block_indices: Tensor) -> dict[str, float]:
    """The largest part of the best free blocks' scores that a query lost.

    Raises:
        WrongResult: for too large a part, or for a rule of docs/spec.md, section 4, that is broken.
    """
    c, worst = case.config, 0.0
    for part in parts_of(case):
        inputs = part.inputs("q", "k_cmp", "v_cmp")
        tensors = (inputs["q"], inputs["k_cmp"], inputs["v_cmp"])
        inputs.tensors["lse"] = compressed_attention(inputs, *tensors, backend="reference")[1]
        options = dict(backend="reference", return_scores=True)
        best, scores = select_blocks(inputs, inputs["q"], inputs["k_cmp"], **options)
        found = part.result(block_indices)
        if found.shape != best.shape or found.dtype != best.dtype:
            raise WrongResult(f"block_indices is {found.dtype} {tuple(block_indices.shape)}")
        own = torch.arange(case.num_tokens - part.rows, case.num_tokens, device=case.device)
        own = own[:, None, None] // c.block_size
        fixed = (best < c.init_blocks) | (best > own - c.local_blocks)  # padding, -1, among it
        rules = {
            "the forced blocks come first and last, and then -1": (found == best) | ~fixed,
            "blocks ascend": (found.diff(dim=-1) > 0) | (best[..., 1:] < 0),
            "none is of the future": found <= own,
        }
        if broken := [rule for rule, kept in rules.items() if not kept.all()]:
            raise WrongResult(f"block_indices break the rules: {'; '.join(broken)}")
        index = torch.stack((best, found)).long().clamp(min=0)
        most, got = scores.expand(2, -1, -1, -1).gather(3, index).masked_fill(fixed, 0).sum(-1)
        worst = max(worst, float(((most - got) / most.clamp(min=1e-30)).max()))
    if not worst <= SCORE_LOST:
        lost = f"the chosen blocks' scores add up to {worst:.2%} less than the best"
        raise WrongResult(f"{lost}; {SCORE_LOST:.1%} are allowed")
    return {"score_lost": worst}


class Pooling(Implementation):
    """Pooled rows that no window owns are unspecified, and not compared."""

    def check(self, case: Case, name: str, results: Named) -> dict[str, float]:
        return super().check(case, name, owned(case, results))

    def expected(self, part: Part, name: str) -> Named:
        return owned(part.case, super().expected(part, name))


def owned(case: Case, results: Named) -> Named:
    return {name: x[: case.num_windows] if name == "pooled" else x for name, x in results.items()}


def one(
    name: str,
    label: str,
    function: Function,
    leaves: tuple[str, ...],
    make: type[Implementation] = Implementation,
    **fields: Any,
) -> Implementation:
    reference = partial(function, backend="reference")
    return make(name, label, "part", function, reference, leaves, **fields)


SELECTED = one(
    "selected_attention",
    "selected attention",
    selected_attention,
    ("q", "k", "v"),
    others=("block_indices",),
)
# In the order in which the core runs them; then the compression of keys, by which a layer begins.
PARTS = [
    one(
        "compressed_attention", "compressed attention", compressed_attention,
        ("q", "k_cmp", "v_cmp"), outputs=("o", "lse"), reads_blocks=False,
    ),
    one(
        "select_blocks", "block selection", select_blocks, ("q", "k_cmp"), Selection,
        others=("lse",), outputs=("block_indices",), do=None,
    ),
    SELECTED,
    one(
        "sliding_window_attention", "sliding window", sliding_window_attention, ("q", "k", "v"),
        reads_blocks=False,
    ),
    one(
        "gated_combine", "gated combine", gated_combine, ("gate_logits", "o_cmp", "o_slc", "o_swa"),
        reads_blocks=False,
    ),
]  # fmt: skip
COMPRESSION = [
    one(name, label, function, leaves, make, outputs=(output,), do=f"d{output}", reads_blocks=False)
    for name, label, function, leaves, make, output in (
        ("pool_mean", "pooling, mean", pool_windows, ("k",), Pooling, "pooled"),
        ("pool_weighted", "pooling, weighted", pool_windows, ("k", "weight"), Pooling, "pooled"),
        ("gather", "gathering windows", gather_windows, ("k",), Implementation, "windows"),
    )
]
LOOP_ORDERS = [
    dataclasses.replace(
        SELECTED,
        name=backend,
        label=f"nsa_fsa {backend}",
        kind="ours",
        function=partial(selected_attention, backend=backend),
    )
    for backend in ("auto", "triton_kv_major", "triton_query_major")
]
RECOMPUTING = dataclasses.replace(
    NSA_CORE,
    name="nsa_fsa_recompute",
    label="nsa_fsa, branches computed again",
    function=partial(core, recompute=BRANCHES),
)
