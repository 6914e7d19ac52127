"""Compression: one token for every window of keys or values (docs/spec.md, section 1).

A `Compressor` adds the optional position embedding, asks the operators for pooled or gathered
windows, and applies phi. Every learned phi but the MLP starts out as the mean, so that block scores
make sense from the first step.

Shapes: T tokens, N = T // kernel_stride windows, H = HKV heads, l = kernel_size, D the head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa import ops, reference
from nsa_fsa.config import COMPRESSION_KINDS, NSAConfig
from nsa_fsa.decode.call import Pooling
from nsa_fsa.modules.start import assign
from nsa_fsa.ops.compression.operator import POOL_BACKENDS
from nsa_fsa.sequences import Sequences

POOLED = ("mean", "weighted")  # kinds that need no gathered windows


def _of_heads(parameter: Tensor, heads: slice | None) -> Tensor:
    """A parameter `[HKV, ...]` of some heads; None: of all that there are."""
    return parameter if heads is None else parameter[heads]


def _pool_gathered(windows: Tensor, weight: Tensor | None) -> Tensor:
    """Windows `[N, H, l, D]` and weights `[H, l]`, None for equal ones -> `[N, H, D]`."""
    if weight is None:
        return windows.mean(2)
    return torch.einsum("nhld,hl->nhd", windows.to(weight.dtype), weight).to(windows.dtype)


class PoolPhi(nn.Module):
    """A weighted mean over the window: learned softmax weights `[H, l]` per head, or equal ones."""

    def __init__(self, num_heads: int, kernel_size: int, learned: bool, **factory) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        logits = torch.empty(num_heads, kernel_size, **factory) if learned else None
        self.logits = None if logits is None else nn.Parameter(logits)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def extra_repr(self) -> str:
        return f"learned={self.logits is not None}"

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        pool: Callable[[Tensor, Tensor | None], Tensor] = _pool_gathered,
        heads: slice | None = None,
    ) -> Tensor:
        """x `[T, H, D]`, embedding `[H, l, D]` -> `[N, H, D]`. pool: the operator,
        of x and the weights `[H, l]`. heads: as of `Compressor`.

        Without an operator x is windows `[N, H, l, D]`, as other phis take them:
        so a phi around this one calls it.
        """
        weight = None
        if self.logits is not None:
            logits = _of_heads(self.logits, heads)
            wide = torch.promote_types(logits.dtype, torch.float32)
            weight = logits.to(wide).softmax(-1)
        pooled = pool(x, weight)
        if embedding is None:
            return pooled
        # Pooling is linear, so the embedding may be pooled by itself.
        if weight is None:
            shift = embedding.mean(1)
        else:
            shift = torch.einsum("hl,hld->hd", weight, embedding.to(weight.dtype))
        return pooled + shift.to(pooled.dtype)


class LinearPhi(nn.Module):
    """One linear map per head from the flattened window: `[N, H, l, D] -> [N, H, D]`."""

    def __init__(
        self, num_heads: int, kernel_size: int, head_dim: int, gain: float = 1.0, **factory
    ) -> None:
        super().__init__()
        self.kernel_size, self.gain = kernel_size, gain
        weight = torch.empty(num_heads, kernel_size * head_dim, head_dim, **factory)
        self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`gain` times the mean over the window."""
        eye = torch.eye(self.weight.shape[2], dtype=self.weight.dtype, device=self.weight.device)
        mean = eye.repeat(self.kernel_size, 1) * (self.gain / self.kernel_size)  # [l * D, D]
        assign(self.weight, mean.expand(self.weight.shape))

    def forward(self, windows: Tensor, heads: slice | None = None) -> Tensor:
        weight = _of_heads(self.weight, heads)
        return torch.einsum("nhi,hio->nho", windows.flatten(2), weight)


class MLPPhi(nn.Module):
    """The NSA paper's form: the flattened window through one hidden layer, per head."""

    def __init__(
        self, num_heads: int, kernel_size: int, head_dim: int, hidden_size: int, **factory
    ) -> None:
        super().__init__()
        up = torch.empty(num_heads, kernel_size * head_dim, hidden_size, **factory)
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(torch.empty(num_heads, hidden_size, head_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, windows: Tensor, heads: slice | None = None) -> Tensor:
        up, down = _of_heads(self.up, heads), _of_heads(self.down, heads)
        hidden = torch.einsum("nhi,him->nhm", windows.flatten(2), up)
        return torch.einsum("nhm,hmo->nho", nn.functional.gelu(hidden), down)


class GatedPhi(nn.Module):
    """Two linear maps of the flattened window, one through a sigmoid, multiplied."""

    def __init__(self, num_heads: int, kernel_size: int, head_dim: int, **factory) -> None:
        super().__init__()
        # The gate starts at sigmoid(0) = 1/2, so twice the mean times the gate is the mean.
        self.value_map = LinearPhi(num_heads, kernel_size, head_dim, gain=2.0, **factory)
        self.gate_map = LinearPhi(num_heads, kernel_size, head_dim, gain=0.0, **factory)

    def forward(self, windows: Tensor, heads: slice | None = None) -> Tensor:
        return self.value_map(windows, heads) * self.gate_map(windows, heads).sigmoid()


class Compressor(nn.Module):
    """Keys or values of a packed batch to compressed tokens:
    `[T, H, D] -> [T // kernel_stride, H, D]`.

    Args:
        config: window sizes, head count, position embedding and backend.
        kind: "mean", "weighted", "linear", "mlp" or "gated"; or an `nn.Module` mapping windows
            `[N, H, l, D]` to `[N, H, D]`. Rows of windows that no sequence owns hold tokens of the
            batch; what the module makes of them is not used.
        head_dim: D of the tensors to compress.

    Raises:
        ValueError: for another kind; in forward, for a module of your own that returns
            another shape.
    """

    def __init__(self, config: NSAConfig, kind: str | nn.Module, head_dim: int, **factory) -> None:
        super().__init__()
        self.kernel_size, self.kernel_stride = config.kernel_size, config.kernel_stride
        self.num_heads = config.num_kv_heads
        # Those of the KV heads that this rank has under tensor parallelism; None: all.
        self.heads: slice | None = None
        self.backend = POOL_BACKENDS.or_auto(config.backend)  # gather_windows has the same
        self.kind = None if isinstance(kind, nn.Module) else kind  # None: phi is the user's own
        self.phi: Any = (
            kind if self.kind is None else _make_phi(config, self.kind, head_dim, **factory)
        )
        if self.kind is not None:
            self.phi.made_as = self.kind  # type: ignore[union-attr]
        self.position_embedding = (
            nn.Parameter(torch.empty(config.num_kv_heads, config.kernel_size, head_dim, **factory))
            if config.compress_position_embedding
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.position_embedding is not None:
            nn.init.zeros_(self.position_embedding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, kernel_stride={self.kernel_stride}"

    def pooling(self) -> Pooling | None:
        """How tokens are pooled, for kernels that do it themselves; None where that takes this
        module: for other kinds, and for parameters that are elsewhere, in pieces, or wrapped."""
        phi: Any = self.phi
        parameters = (getattr(phi, "logits", None), self.position_embedding)
        at_hand = (x is None or (type(x) is nn.Parameter and not x.is_meta) for x in parameters)
        sizes_fit = all(x is None or x.numel() for x in parameters)  # ZeRO-3 leaves nothing behind
        hooked = any(hasattr(x, "_hf_hook") for x in (self, phi))
        if type(phi) is not PoolPhi or hooked or not (all(at_hand) and sizes_fit):
            return None
        return Pooling(*(None if x is None else _of_heads(x, self.heads) for x in parameters))

    @property
    def is_own(self) -> bool:
        """Whether phi is a module of the user's own rather than the kind that was asked for.
        So is one around that kind.
        """
        return self.kind is None or self._kind_now != self.kind

    @property
    def _kind_now(self) -> str | None:
        """What phi was made as, if a Compressor made it. A tool's wrapper shows the attributes
        of what it wraps, or has PEFT's `get_base_layer`; a module that merely has a phi inside
        does neither."""
        find = getattr(self.phi, "get_base_layer", None)
        return getattr(self.phi if find is None else find(), "made_as", None)

    def forward(self, x: Tensor, layout: Sequences, heads: slice | None = None) -> Tensor:
        """x `[T, H, D]` -> `[N, H, D]`. heads: which of the KV heads x has; None: all, or those of
        this rank.

        Raises:
            ValueError: for some heads where phi is a module of the user's own.
        """
        heads = self.heads if heads is None else heads
        if heads is not None and self.is_own:
            raise ValueError(
                f"a compressor of your own, {type(self.phi).__name__}, cannot be split by KV "
                "heads, as context_parallel does. Fix: one of the package's kinds, or leave "
                "context_parallel out."
            )

        sizes: dict[str, Any] = dict(
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            seqused_k=layout.seqused_k,
        )
        how = dict(
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            backend=self.backend,
            **sizes,
        )

        embedding: Tensor | None = self.position_embedding
        if embedding is not None:
            embedding = _of_heads(embedding, heads)

        if self._kind_now in POOLED:
            pool = functools.partial(ops.pool_windows, **how)
            return self.phi(x, embedding, pool, heads=heads)

        windows = ops.gather_windows(x, **how)  # [N, H, l, D]
        if is_own := self.is_own:
            # Where no sequence owns a window, windows are 0. A phi that divides by their norm would
            # make NaN of it, and 0 * NaN of its parameters' gradient: the first tokens of the batch
            # stand there instead.
            rows, owned = reference.window_rows(x, layout.cu_seqlens, **sizes)
            first = x.detach()[rows[:1]].transpose(1, 2)  # [1, H, l, D]
            windows = torch.where(owned[:, None, None, None], windows, first)

        if embedding is not None:
            windows = windows + embedding
        compressed = self.phi(windows) if is_own else self.phi(windows, heads=heads)  # [N, H, D]
        if is_own:
            _check_compressed(self.phi, windows, compressed)
        return compressed


def _check_compressed(phi: nn.Module, windows: Tensor, compressed: Any) -> None:
    """Raises ValueError unless a module of the user's own makes one token of every window."""
    expected = windows.shape[:2] + windows.shape[3:]
    if not isinstance(compressed, Tensor) or compressed.shape != expected:
        is_tensor = isinstance(compressed, Tensor)
        found = tuple(compressed.shape) if is_tensor else type(compressed).__name__
        raise ValueError(
            f"the compressor {type(phi).__name__} turned windows {tuple(windows.shape)} "
            f"into {found}; it must return a tensor [N, HKV, D] = {tuple(expected)}. "
            "Fix: make one token of every window, by reducing axis 2."
        )


def _make_phi(config: NSAConfig, kind: str, head_dim: int, **factory) -> nn.Module:
    if not isinstance(kind, str) or kind not in COMPRESSION_KINDS:
        raise ValueError(
            f"kind={kind!r} is no compression: it must be one of {COMPRESSION_KINDS}, "
            "or an nn.Module. Fix: pass a module that is built already, not its class."
        )
    heads, size = config.num_kv_heads, config.kernel_size
    if kind in POOLED:
        return PoolPhi(heads, size, learned=kind == "weighted", **factory)
    if kind == "linear":
        return LinearPhi(heads, size, head_dim, **factory)
    if kind == "mlp":
        return MLPPhi(heads, size, head_dim, config.compress_hidden_size, **factory)
    assert kind == "gated", kind
    return GatedPhi(heads, size, head_dim, **factory)
