"""The loss of a language model without its logits, which take 250 GiB for Llama 3 and a million
tokens: `lm_head` itself computes the loss, a few tokens at a time.

The chunks are inside the head's own forward because FSDP2 gathers its weight around one call of it:
a loop of calls, or a look at the weight from outside, finds a shard, or none of the hooks that
reduce its gradient.
"""

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput


def chunk_loss(model: PreTrainedModel, chunk_size: int = 2048) -> PreTrainedModel:
    """Has a model compute its loss in chunks of tokens, in place: wherever it is given `labels`, it
    never holds the logits of more than `chunk_size` tokens, in either pass.

    The loss is that of transformers, with its `shift_labels`, `num_items_in_batch` and
    `ignore_index`; the gradient of the head's weight is summed in float32 and rounded once.
    Backward computes the logits again. The output has no `logits` then; without labels nothing
    changes. Call it before the model is wrapped (DDP, FSDP, PEFT), and again to change the size.

    Args:
        model: any causal language model of transformers whose head is a plain `nn.Linear`.
        chunk_size: tokens whose logits are held at once.

    Returns:
        The model.

    Raises:
        ValueError: for another head, another loss, or a model that is sharded already. Its first
            forward with labels raises it if the model changes logits before the loss, such as by a
            soft cap.

    Example:
        >>> chunk_loss(model)
        >>> Trainer(model, arguments, train_dataset=dataset).train()
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be a positive number. Fix: 2048.")

    head: Any = model.get_output_embeddings()
    if isinstance(head, LossHead):
        head.chunk_size = chunk_size
        return model

    name = type(model).__name__
    if type(head) is not nn.Linear or hasattr(head.weight, "device_mesh"):
        raise ValueError(
            f"the head of {name} is a {type(head).__name__}, and only a plain nn.Linear that is "
            "not split computes its loss in chunks. Fix: call chunk_loss before the model is "
            "wrapped or sharded; with tensor parallelism leave it out."
        )
    if model.loss_function is not ForCausalLMLoss:
        loss = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise ValueError(
            f"{name} computes its loss by {loss}, and only ForCausalLMLoss is available in chunks. "
            "Fix: leave chunk_loss out."
        )

    answering: Any = head
    answering.__class__ = LossHead
    answering.chunk_size = chunk_size
    model.loss_function = answering.take_loss
    model.register_forward_pre_hook(_ask_for_loss, with_kwargs=True)
    model.register_forward_hook(_leave_out_logits, always_call=True)
    return model


class _Question(NamedTuple):
    """What a head is asked for the loss of."""

    labels: Tensor  # int64 [B, S], of every token the next one
    number: Tensor | int | None  # what the sum of losses is divided by; None: how many labels count
    ignore_index: int


class LossHead(nn.Linear):
    """An `lm_head` that answers with the loss where its model was given labels."""

    chunk_size: int
    _asked: _Question | None = None
    _answer: Tensor | None = None
    _is_checked = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, E]` -> logits `[B, S, V]`; or the loss, a scalar."""
        if self._asked is None:
            return super().forward(hidden_states)

        labels, number, ignore_index = self._asked
        rows = hidden_states.flatten(0, -2)  # [T, E]
        labels = labels.flatten().to(rows.device)
        if len(labels) != len(rows):
            raise ValueError(
                f"there are {len(labels)} labels for {len(rows)} tokens that reach the head. "
                "Fix: a label for every token, and no logits_to_keep beside labels."
            )

        if number is None:
            number = (labels != ignore_index).sum()
        elif isinstance(number, Tensor):
            if number.dtype.itemsize == 2 and number.is_floating_point():
                warnings.warn(
                    f"num_items_in_batch came in {number.dtype}, so the loss and its gradients are "
                    "off by up to 0.4%: FSDP2's mixed precision casts what a model is called "
                    "with. Fix: MixedPrecisionPolicy(..., cast_forward_inputs=False).",
                    stacklevel=2,
                )
            number = number.to(rows.device)

        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        options = (labels, self.chunk_size, ignore_index, dtype)
        loss = _SumOfLosses.apply(rows, self.weight, self.bias, *options) / number
        self._answer = loss.detach()
        return loss

    def take_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the model calls as its loss function, with what the head returned.

        Raises:
            ValueError: if the head was not asked, or, at the first call, if that is not what it
                returned.
        """
        answer, self._answer = self._answer, None
        if answer is None or logits.ndim:
            raise ValueError(
                "the model's loss was to come from its lm_head, which was replaced or wrapped "
                "since. Fix: call chunk_loss last, but before DDP, FSDP or PEFT wrap the model."
            )
        if not self._is_checked:  # waits for the device, so once
            given, returned = logits.detach().float(), answer.to(logits.dtype).float()
            if not torch.allclose(given, returned, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"the model made {given.item():.6g} of the {returned.item():.6g} that its "
                    "lm_head returned: it scales or caps its logits, and a loss in chunks would "
                    "be that of others. Fix: leave chunk_loss out."
                )
            self._is_checked = True
        return logits


class _SumOfLosses(torch.autograd.Function):
    """The summed cross-entropy of rows, whose logits are there one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """rows `[T, E]`, weight `[V, E]`, bias `[V]`, labels `[T]`; dtype: of the logits."""
        ctx.save_for_backward(rows, weight, bias, labels)
        ctx.options = chunk_size, ignore_index, dtype
        total = torch.zeros((), dtype=_sum_dtype(dtype), device=rows.device)
        w, b = _cast(weight, dtype), _cast(bias, dtype)
        for x, y in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True):
            total += _loss_of(x.to(dtype), w, b, y, ignore_index)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, labels = ctx.saved_tensors
        chunk_size, ignore_index, dtype = ctx.options
        needed = [i for i in range(3) if ctx.needs_input_grad[i]]
        parameters = [_cast(x, dtype) for x in (weight, bias)]
        for x in parameters:
            if x is not None:
                x.requires_grad_()
        found: list[Any] = [torch.empty_like(rows), *(_zeros_for_sum(x) for x in (weight, bias))]
        chunks = (x.split(chunk_size) for x in (rows, labels, found[0]))
        for x, y, dx in zip(*chunks, strict=True):
            leaves = [x.detach().to(dtype).requires_grad_(), *parameters]
            with torch.enable_grad():
                loss = _loss_of(leaves[0], leaves[1], leaves[2], y, ignore_index)
            wanted = [leaves[i] for i in needed]
            for i, part in zip(needed, torch.autograd.grad(loss, wanted, gradient), strict=True):
                if i == 0:
                    dx.copy_(part)
                else:
                    found[i] += part
        inputs = (rows, weight, bias)
        gradients = [found[i].to(inputs[i].dtype) if i in needed else None for i in range(3)]
        return (*gradients, None, None, None, None)


def _loss_of(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor:
    """As transformers has it: the logits are rounded to their dtype, and the rest is float32."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = nn.functional.linear(rows, weight, bias)  # [chunk_size, V]
        logits = logits.to(_sum_dtype(logits.dtype))
        return nn.functional.cross_entropy(
            logits, labels, reduction="sum", ignore_index=ignore_index
        )


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """A parameter that may be None, apart from its graph."""
    return None if x is None else x.detach().to(dtype)


def _zeros_for_sum(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x, dtype=_sum_dtype(x.dtype))


def _ask_for_loss(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before a model's forward: hands its labels to the head."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    head, labels = model.get_output_embeddings(), kwargs.get("labels")
    if labels is not None and isinstance(head, LossHead):
        ignore_index = kwargs.get("ignore_index", -100)
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        head._asked = _Question(shifted, kwargs.get("num_items_in_batch"), ignore_index)
    return (), kwargs


def _leave_out_logits(model: Any, args: Any, output: Any) -> Any:
    """After a model's forward, also where it raised: what its head returned are no logits."""
    head = model.get_output_embeddings()
    asked, head._asked, head._answer = getattr(head, "_asked", None), None, None
    if asked is None or not isinstance(output, ModelOutput):
        return output
    return type(output)(**{name: x for name, x in output.items() if name != "logits"})
