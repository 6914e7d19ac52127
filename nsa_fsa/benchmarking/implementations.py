"""Who computes what: NSA's core, its layer, and full attention."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_fsa import NativeSparseAttention, ops
from nsa_fsa.benchmarking.cases import Case, Named, Options, Pass, passes_of
from nsa_fsa.benchmarking.check import Part, compare, parts_of

LAYER_TOLERANCE = 0.02  # its gradients pass two more matrix products in 16 bits
Function = Callable[..., Any]  # of a case and of tensors


@dataclass(frozen=True)
class Implementation:
    """One way to compute something, and how the reference does."""

    name: str
    label: str
    kind: str  # "ours", "full" for attention over all keys, or another word for what it is
    function: Function  # raises whatever says why it cannot
    reference: Function
    leaves: tuple[str, ...]  # names of the tensors that both are given, which get gradients
    others: tuple[str, ...] = ()  # names of the tensors that both take from the case
    outputs: tuple[str, ...] = ("o",)
    do: str | None = "do"  # name of the gradient of the first output; None: no backward
    reads_blocks: bool = True  # whether the selected blocks or their sizes matter
    distribution: str = "nsa-fsa"  # the package whose version is stated

    def where(self, case: Case) -> dict[str, Any]:
        """What tells a row of results from others, but for its pass."""
        where = dict(implementation=self.name, kind=self.kind, **case.sizes(self.reads_blocks))
        return where | (dict(selection="full") if self.kind == "full" else {})

    def repeats(self, case: Any) -> int:
        """How often a pass does what is timed, one after the other."""
        return 1

    def passes(self, case: Case, function: Function | None = None) -> dict[str, Pass]:
        """The passes of this implementation, or of another function in its place."""
        leaves = {name: case[name] for name in self.leaves}
        do, run = None if self.do is None else case[self.do], function or self.function
        return passes_of(lambda: run(case, *leaves.values()), leaves, do, self.outputs)

    def check(self, case: Case, name: str, results: Named) -> dict[str, float]:
        """The errors of what the pass `name` returned; raises WrongResult."""
        errors = dict.fromkeys(results, 0.0)
        for part in parts_of(case):
            expected = self.expected(part, "forward" if name == "forward" else "forward_backward")
            for key, result in results.items():
                found = part.result(result)
                error = compare(key, found, expected[key][-len(found) :])
                errors[key] = max(errors[key], error)
        return errors

    def expected(self, part: Part, name: str) -> Named:
        """What the reference computes, once for all who are held to it."""
        truth, key = part.case.truth, (self.reference, part.head, name)
        if key not in truth:
            names = (*self.leaves, *self.others, *([self.do] if self.do else []))
            truth[key] = self.passes(part.inputs(*names), self.reference)[name]()
        return truth[key]


def core(case: Case, q: Tensor, k: Tensor, v: Tensor, *others: Tensor, **options: Any) -> Any:
    """q, k, v, compressed k and v, and gates in; o out.

    The reference may choose other blocks where scores tie to rounding, of some 1e-4 of all queries:
    less than its tolerance, in the norm of o.
    """
    c, (k_cmp, v_cmp, gate_logits) = case.config, others
    sizes = case.windows | case.blocks | dict(window_size=c.window_size, scale=c.scale)
    options = case.layout | sizes | dict(backend=c.backend) | options
    return ops.nsa_attention(q, k, v, k_cmp, v_cmp, gate_logits, **options)


def layer(case: Case, backend: str | None = None) -> NativeSparseAttention:
    torch.manual_seed(case.seed)
    config = dataclasses.replace(case.config, backend=backend or case.config.backend)
    return NativeSparseAttention(config, device=case.device, dtype=case.dtype)


class Layer(Implementation):
    @classmethod
    def of(cls, name: str, label: str, make: Function) -> "Layer":
        """The layer that `make` makes of a case, and of the name of a backend."""
        reference = partial(make, backend="reference")
        return cls(name, label, "layer", make, reference, (), outputs=("y",))

    def passes(self, case: Case, function: Function | None = None) -> dict[str, Pass]:
        module = (function or self.function)(case)
        leaves = dict(x=case["x"], **dict(module.named_parameters()))
        return passes_of(lambda: module(leaves["x"]), leaves, case["dy"], self.outputs)

    def check(self, case: Case, name: str, results: Named) -> dict[str, float]:
        """Compares with the reference on so few tokens that every block is chosen: on more, blocks
        whose scores tie may differ. The check of the core is about all tokens."""
        few = min(case.num_tokens, case.config.block_size * case.config.num_selected_blocks)
        case = dataclasses.replace(case, num_tokens=few)
        found, expected = (self.passes(case, x)[name]() for x in (None, self.reference))
        return {x: compare(x, found[x], expected[x], LAYER_TOLERANCE) for x in found}


def full_reference(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = case.layout | dict(window_size=case.num_tokens, backend="reference")
    return ops.sliding_window_attention(q, k, v, scale=case.config.scale, **options)


def flash_attn_4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    o = function(q[None], k[None], v[None], causal=True, softmax_scale=case.config.scale)
    return (o[0] if isinstance(o, tuple) else o)[0]


def sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str = "CUDNN_ATTENTION") -> Tensor:
    q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # views [1, heads, T, D]
    options: Options = dict(scale=case.config.scale, enable_gqa=case.config.group_size > 1)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    return o.transpose(1, 2)[0]


NSA_CORE = Implementation(
    "nsa_fsa",
    "nsa_fsa, whole core",
    "ours",
    core,
    partial(core, backend="reference"),
    ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits"),
)

NSA_LAYER = Layer.of("nsa_layer", "nsa_fsa, whole layer", layer)


def full(name: str, label: str, function: Function, distribution: str = "torch") -> Implementation:
    """Full attention, by a function of a case, q, k and v."""
    about: Options = dict(reads_blocks=False, distribution=distribution)
    return Implementation(name, label, "full", function, full_reference, ("q", "k", "v"), **about)


CUDNN = full("cudnn", "full: cuDNN (SDPA)", sdpa)
FLASH_ATTN_4 = full("flash_attn_4", "full: flash-attn 4", flash_attn_4, "flash-attn-4")
SDPA_FLASH = full("sdpa_flash", "full: FA2 (SDPA)", partial(sdpa, backend="FLASH_ATTENTION"))

FULL_ATTENTION = {x.name: x for x in (FLASH_ATTN_4, CUDNN)}  # the first that runs is the peer
