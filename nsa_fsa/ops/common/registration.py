"""Registers operators with torch.library.

`torch.library.custom_op` would do, but does more in Python at every call. With it, a compressed attention whose backend does
nothing took 140 microseconds forward with gradients and 236 forward and backward (one core, checks of values on the CPU
included); it takes 92 and 180 here. The kernels take 200 forward at 8,192 tokens.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._C import _are_functorch_transforms_active as transformed
from torch._C._dynamo import eval_frame
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

NAMESPACE = "nsa_fsa"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)
for _key in ("CUDA", "XPU", "HPU", "MPS", "PrivateUse1"):
    _AUTOCAST |= DispatchKeySet(getattr(DispatchKey, f"Autocast{_key}"))


def in_its_precision(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` without autocast, which would turn the products of the reference's float32 scores into bfloat16.

    What goes into an operator may well have been cast; inside, the operator says itself in what it computes. Asking whether
    there is anything to leave out takes 0.1 microseconds, leaving it out another 1.2.
    """

    def called(*inputs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return run(*inputs)
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return run(*inputs)

    return called


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with the GPU of its first tensor as the current one: that is where Triton launches.

    Setting the device where it is set already is no waste: it gives a thread that is new to CUDA a context, without which
    Triton cannot describe a bulk copy. Entering the guard takes 0.8 microseconds, setting the device 0.5 (an H100's host).
    """

    def guarded(*inputs: Any, **settings: Any) -> Any:
        device = next(x for x in inputs if isinstance(x, torch.Tensor)).device
        if device.type != "cuda":
            return run(*inputs, **settings)
        with torch.cuda.device(device):
            torch.cuda.set_device(device)
            return run(*inputs, **settings)

    return guarded


def unseen_by_the_compiler(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, into which the compiler of a model that calls operators between graph breaks is not to look.

    It is what `torch._dynamo.skip_code` does, for callees too. `torch._disable_dynamo` would import the compiler at the first
    call of the first operator, which takes as long as importing torch itself (1.5 s of 3.0).
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(run.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return run


def has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


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
    called = unseen_by_the_compiler(in_its_precision(on_its_device(run)))
    _LIBRARY.impl(name, called, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def below_autograd(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.set_materialize_grads(False)  # zeros for a statistic's gradient would be one more launch
            # Below a level of torch.func there may be another, or plain autograd, for which gradients are still on.
            with torch.enable_grad() if transformed() else contextlib.nullcontext():
                output = below_autograd(*inputs)
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

    # Without `Function.apply`, which hands over to torch.func what has come through it: the dispatcher calls this once for
    # each of its transformations, with tensors of that level, and what is below is the dispatcher's to find.
    differentiate = super(torch.autograd.Function, Differentiable).apply

    def autograd(*inputs):
        if forward_ad._current_level >= 0 and any(map(has_tangent, inputs)):
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian; forward_ad). "
                "Fix: use reverse mode (torch.func.vjp, jacrev; backward), or detach what goes into it."
            )
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            with enable_single_level_autograd_function() if transformed() else contextlib.nullcontext():
                return differentiate(*inputs)
        return below_autograd(*inputs)

    _LIBRARY.impl(name, unseen_by_the_compiler(autograd), "Autograd")
    return operator
