"""Registers operators with torch.library.

`torch.library.custom_op` would do, but does more in Python at every call. With it, a compressed attention whose backend does
nothing took 140 microseconds forward with gradients and 236 forward and backward (one core, checks of values on the CPU
included); it takes 92 and 180 here. The kernels take 200 forward at 8,192 tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "nsa_fsa"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the GPU of its first tensor as the current one: that is where Triton launches.

    Setting the device where it is set already is no waste: it gives a thread that is new to CUDA a context, without which
    Triton cannot describe a bulk copy. Entering the guard takes 0.8 microseconds, setting the device 0.5 (an H100's host).
    """

    @functools.wraps(run)
    def guarded(*inputs: Any, **options: Any) -> Any:
        device = next(x for x in inputs if isinstance(x, torch.Tensor)).device
        if device.type != "cuda":
            return run(*inputs, **options)
        with torch.cuda.device(device):
            torch.cuda.set_device(device)
            return run(*inputs, **options)

    return guarded


def define_operator(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    schema: str | None = None,
    setup_context: Callable[..., None] | None = None,
    vjp: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Registers `nsa_fsa::<name>` for every device and returns it.

    Args:
        run: the operator on real tensors. It changes none of them and returns new ones, contiguous as those of `fake` are.
        fake: the shapes, dtypes and strides of the results, from arguments that have nothing else.
        schema: "(Tensor q, ...) -> Tensor"; default: from the annotations of `run`.
        setup_context, vjp: the gradient, as `torch.library.register_autograd` takes it; gradients of results that nobody
            used are None. Without them, a backward pass through the operator raises RuntimeError.
    """
    _LIBRARY.define(name + (schema or torch.library.infer_schema(run, mutates_args=())), tags=(torch.Tag.pt2_compliant_tag,))
    # The compiler of a model that calls operators between graph breaks is not to look into them.
    _LIBRARY.impl(name, torch._disable_dynamo(on_its_device(run)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.set_materialize_grads(False)  # zeros for a statistic's gradient would be one more launch
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if vjp is None:
                raise RuntimeError(f"{NAMESPACE}::{name} has no gradient. Fix: detach what goes into it.")
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return vjp(ctx, *grads)

    def autograd(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _LIBRARY.impl(name, torch._disable_dynamo(autograd), "Autograd")
    return operator
