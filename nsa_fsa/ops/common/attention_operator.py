"""What the three attention branches share as operators: one schema, one autograd formula, one dispatch.

A branch adds only the arguments that say who sees what. Its backends are called as
`forward(q, k, v, **layout, **arguments) -> (o, lse)` and `backward(do, q, k, v, o, lse, **layout, **arguments)`, to which
`nsa_attention` adds `delta` and `add_to`: see `adding`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.registration import define_operator

_LAYOUT = "Tensor cu_seqlens, SymInt max_seqlen, Tensor? cu_seqlens_q, Tensor? seqused_k, float scale"
_LAYOUT_NAMES = ("cu_seqlens", "max_seqlen", "cu_seqlens_q", "seqused_k", "scale")


def define_attention(name: str, arguments: str, check_values: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers `nsa_fsa::<name>` and `nsa_fsa::<name>_backward` with torch.library.

    Args:
        name: the operator's name, also in the backend registry.
        arguments: torch.library schema of the branch's own arguments, such as "int window_size".
        check_values: called as `check_values(q, k, <layout and own arguments>)` on real tensors before anything runs.

    Returns:
        `operator(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, scale, *own arguments, backend) -> (o, lse)`,
        differentiable in q, k and v.
    """
    names = (*_LAYOUT_NAMES, *(argument.split()[-1] for argument in arguments.split(",")))
    tail = f"{_LAYOUT}, {arguments}, str backend"
    num_tail = len(names) + 1

    def run_forward(q, k, v, *rest):
        *values, backend = rest
        keywords = dict(zip(names, values, strict=True))
        check_values(q, k, **keywords)
        return backends.to_run(name, backend, q, k, v, **keywords).forward(q, k, v, **keywords)

    def run_backward(do, q, k, v, o, lse, *rest):
        *values, backend = rest
        keywords = dict(zip(names, values, strict=True))
        return backends.to_run(name, backend, q, k, v, backward=True, **keywords).backward(do, q, k, v, o, lse, **keywords)

    def forward_fake(q, k, v, *rest):
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)

    def backward_fake(do, q, k, v, *rest):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        q, k, v, *rest = inputs
        o, lse = output
        ctx.tensors = [isinstance(x, Tensor) for x in rest]
        ctx.others = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.save_for_backward(q, k, v, o, lse, *(x for x in rest if isinstance(x, Tensor)))
        ctx.mark_non_differentiable(lse)

    def vjp(ctx, do, dlse):
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        rest = [next(saved) if is_tensor else x for is_tensor, x in zip(ctx.tensors, ctx.others, strict=True)]
        return *backward(do, q, k, v, o, lse, *rest), *[None] * num_tail

    backward = define_operator(
        f"{name}_backward", run_backward, backward_fake,
        schema=f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {tail}) -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    return define_operator(
        name, run_forward, forward_fake, schema=f"(Tensor q, Tensor k, Tensor v, {tail}) -> (Tensor, Tensor)",
        setup_context=setup_context, vjp=vjp,
    )  # fmt: skip


def adding(backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A backward that makes new gradients, as one that can add them to others.

    Every backend's backward takes two more keywords. `delta`: sum(o * do), `[T, HQ]`, where the caller has it; then o may be
    None, except for the FlashAttention libraries, and the weights exp(s - lse) need not add up to 1, as with a gated lse.
    `add_to`: up to three contiguous gradients, of q, k and v, to add to in place; None for those that are to be new. The
    gradients are returned either way.
    """

    def run(*tensors: Tensor, add_to: tuple[Tensor | None, ...] = triton_backends.NOTHING, **arguments: Any):
        grads = backward(*tensors, **arguments)
        return tuple(grad if total is None else total.add_(grad) for total, grad in zip(add_to, grads, strict=True))

    return run


def reference_backend(forward: Callable[..., Any], backward: Callable[..., Any], *unused: str) -> backends.Backend:
    """The reference of a branch. unused: keywords of the operator that its functions do not have."""

    def without(run: Callable[..., Any]) -> Callable[..., Any]:
        def called(*tensors: Tensor | None, **arguments: Any) -> Any:
            return run(*tensors, **{name: value for name, value in arguments.items() if name not in unused})

        return called

    return backends.Backend("reference", without(forward), adding(without(backward)))


def check_token_rows(q: Tensor, k: Tensor, *, cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k, **_) -> None:
    """Raises ValueError for sequence descriptors whose values do not fit a branch with tokens as keys."""
    checks.check_layout_values(q.shape[0], k.shape[0], cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
