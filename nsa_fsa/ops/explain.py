"""What backend="auto" would run, and why."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_fsa.config import NSAConfig
from nsa_fsa.ops import backends, profiler, triton_backends

OPERATORS = ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention", "gated_combine")


@dataclass(frozen=True)
class Choice:
    """One operator: what runs, what is known about it, and why each backend that comes before it cannot."""

    operator: str
    backend: str
    why: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend} ({self.why})"]
        return "\n".join(lines + [f"    not {name}: {reason}" for name, reason in self.passed_over.items()])


@dataclass(frozen=True)
class Explanation:
    """Every operator of the layer; printing it gives a readable page."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self.choices)


def explain(
    config: NSAConfig,
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> Explanation:
    """What the layer's operators would run for `num_tokens` packed tokens, without running anything.

    Args:
        config: the layer.
        num_tokens: rows of q, k and v.
        dtype: of q, k and v.
        device: default the GPU where there is one.

    Returns:
        An `Explanation`, to be printed or read.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with FakeTensorMode():
        q = torch.empty(num_tokens, config.num_heads, config.head_dim, dtype=dtype, device=device)
        k = torch.empty(num_tokens, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)
        v = torch.empty(num_tokens, config.num_kv_heads, config.v_head_dim, dtype=dtype, device=device)
        shape = (num_tokens, config.num_kv_heads, config.num_selected_blocks)
        block_indices = torch.empty(shape, dtype=torch.int32, device=device)
    selected = dict(
        block_indices=block_indices, block_size=config.block_size, init_blocks=config.init_blocks,
        local_blocks=config.local_blocks, scale=config.scale, cu_seqlens_q=None, seqused_k=None,
    )  # fmt: skip
    return Explanation(
        tuple(
            _explain(operator, config.backend, (q, k, v), selected if operator == "selected_attention" else {})
            for operator in OPERATORS
        )
    )


def _explain(operator, name, tensors, arguments) -> Choice:
    chosen = backends.resolve(operator, name, *tensors, **arguments).name
    if name != "auto":
        return Choice(operator, chosen, f"backend={name!r} was asked for", {})
    passed_over = backends.passed_over(operator, *tensors, **arguments)
    why = "the first that can run this"
    if chosen == "triton":
        why = "; ".join(_measured(tensors, arguments, direction) for direction in ("forward", "backward"))
    return Choice(operator, chosen, why, passed_over)


def _measured(tensors: tuple[Tensor, Tensor, Tensor], arguments: dict[str, Any], direction: str) -> str:
    entry = profiler.known(triton_backends.selected_key(*tensors, arguments, direction), tensors[0].device)
    if entry is None:
        return f"{direction}: the default tiles" + (", until it is first run and timed" if profiler.enabled() else "")
    return f"{direction}: {entry['choice']}, {entry['ms'][entry['choice']]:.2f} ms when timed on {entry['date']}"
