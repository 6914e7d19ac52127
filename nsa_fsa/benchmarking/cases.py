"""What is timed: a sequence of random numbers, and the passes of a function of it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.config import NSAConfig

PASSES = ("forward", "backward", "forward_backward")
Named = dict[str, Tensor]  # tensors by name
Pass = Callable[[], Named]
Options = dict[str, Any]  # keywords of an operator


@dataclass(frozen=True)
class Case:
    """One sequence, and the sizes of the layer that reads it."""

    config: NSAConfig
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    seed: int = 0
    selection: str = "independent"  # what the inputs are like; benchmarks/ has other kinds
    tensors: Named = field(default_factory=dict, init=False)  # those made so far
    truth: dict[Any, Any] = field(default_factory=dict, init=False)  # what checks have computed

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self.make(name)
        return self.tensors[name]

    def make(self, name: str) -> Tensor:
        """Standard normal numbers; NaN in compressed rows of no window, which nothing may read."""
        c, t = self.config, self.num_tokens
        if name == "cu_seqlens":
            return torch.tensor([0, t], dtype=torch.int32, device=self.device)
        shapes = dict(
            q=(t, c.num_heads, c.head_dim),
            k=(t, c.num_kv_heads, c.head_dim),
            v=(t, c.num_kv_heads, c.v_head_dim),
            do=(t, c.num_heads, c.v_head_dim),
            k_cmp=(t // c.kernel_stride, c.num_kv_heads, c.head_dim),
            v_cmp=(t // c.kernel_stride, c.num_kv_heads, c.v_head_dim),
            gate_logits=(t, c.num_heads, 3),
            x=(1, t, c.hidden_size),
            dy=(1, t, c.hidden_size),
        )
        made = self.normal(name, *shapes[name])
        if name in ("k_cmp", "v_cmp"):
            made[self.num_windows :] = torch.nan
        return made

    def normal(self, name: str, *shape: int) -> Tensor:
        """Depends on the seed and the name, and not on what was made before."""
        generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    @property
    def num_windows(self) -> int:
        return max(0, (self.num_tokens - self.config.kernel_size) // self.config.kernel_stride + 1)

    @property
    def layout(self) -> Options:
        queries = {x: y for x, y in self.tensors.items() if x == "cu_seqlens_q"}  # see `check.Part`
        return dict(cu_seqlens=self["cu_seqlens"], max_seqlen=self.num_tokens, **queries)

    @property
    def windows(self) -> Options:
        return dict(kernel_size=self.config.kernel_size, kernel_stride=self.config.kernel_stride)

    @property
    def blocks(self) -> Options:
        names = ("block_size", "num_selected_blocks", "init_blocks", "local_blocks")
        return {name: getattr(self.config, name) for name in names}

    def sizes(self, reads_blocks: bool = True) -> dict[str, Any]:
        """What a row of results says of the case; what reads no blocks is the same for all."""
        c, blocks = self.config, {x.replace("_selected", ""): y for x, y in self.blocks.items()}
        return dict(
            num_tokens=self.num_tokens,
            group_size=c.group_size,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            **(blocks if reads_blocks else dict.fromkeys(blocks, 0)),
            selection=self.selection,
            dtype=str(self.dtype).removeprefix("torch."),
            **self.windows,
            window_size=c.window_size,
        )


def passes_of(
    function: Callable[[], Any], leaves: Named, do: Tensor | None, outputs: tuple[str, ...] = ("o",)
) -> dict[str, Pass]:
    """Forward, backward and both of a function of leaves; without `do`, the gradient of the first
    output, there is only a forward. Each returns outputs, or gradients, by name."""
    graph: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        result = function()
        return (result,) if isinstance(result, Tensor) else result

    def forward() -> Named:
        with torch.no_grad():
            return dict(zip(outputs, run(), strict=False))  # a peer may return no lse

    def gradients(o: Tensor, **options: bool) -> Named:
        found = torch.autograd.grad(o, list(leaves.values()), do, **options)
        return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}

    def backward() -> Named:
        if not graph:  # one graph serves every call
            graph.append(run()[0])
        return gradients(graph[0], retain_graph=True)

    if do is None:
        return dict(forward=forward)
    for x in leaves.values():
        x.requires_grad_()
    passes: dict[str, Pass] = dict(forward=forward, backward=backward)
    return passes | dict(forward_backward=lambda: gradients(run()[0]))
