"""One measured setting, and the arithmetic and memory traffic that it cannot do without: every floor comes from here."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Products of size [queries, keys, head width] that attention needs: q k and p v; backward q k again, dp, dv, dk, dq.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
SELECTION_PRODUCTS = 1  # q k
PASSES = ("forward", "backward", "forward_backward")


@dataclass(frozen=True)
class Setting:
    """One packed sequence and its block selection."""

    num_tokens: int
    group_size: int
    num_heads: int = 64
    head_dim: int = 128
    block_size: int = 64
    num_blocks: int = 16  # selected, forced ones included
    init_blocks: int = 1
    local_blocks: int = 2
    selection: str = "random"
    dtype: str = "bfloat16"

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.group_size

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        blocks = f" {self.block_size}x{self.num_blocks}" if self.block_size else ""
        return f"T={self.num_tokens:,} G={self.group_size}{blocks} {self.selection}"

    def without_blocks(self, selection: str) -> "Setting":
        """For what depends on no selected block: one row for all of them."""
        return replace(self, block_size=0, num_blocks=0, init_blocks=0, local_blocks=0, selection=selection)


@dataclass(frozen=True)
class WindowSetting(Setting):
    """One packed sequence and its compression windows; `selection` says what the compressed keys are like."""

    kernel_size: int = 32
    kernel_stride: int = 16

    @property
    def num_windows(self) -> int:
        return max(0, (self.num_tokens - self.kernel_size) // self.kernel_stride + 1)

    @property
    def num_rows(self) -> int:
        """Of packed compressed tensors: the last ones may belong to no window."""
        return self.num_tokens // self.kernel_stride


@dataclass(frozen=True)
class CoreSetting(WindowSetting):
    """Everything that the whole core is given."""

    window_size: int = 512  # keys of the sliding branch, the query's own included


@dataclass(frozen=True)
class Necessary:
    """What any implementation has to do: floating-point operations, and bytes read or written once."""

    flops: int
    bytes: int


def visible_pairs(block_indices: Tensor, block_size: int) -> int:
    """How many (query, KV head, key) triples the selection of one sequence makes visible: `[T, HKV, T_sel]`, no index twice."""
    num_tokens, total = block_indices.shape[0], 0
    for start in range(0, num_tokens, 8192):
        block = block_indices[start : start + 8192].long()
        position = torch.arange(start, start + block.shape[0], device=block.device)[:, None, None]
        keys = (position - block * block_size + 1).clamp(0, block_size)
        total += int(keys.where(block >= 0, 0).sum())
    return total


def causal_pairs(setting: Setting) -> int:
    """The same for full causal attention."""
    return setting.num_kv_heads * setting.num_tokens * (setting.num_tokens + 1) // 2


def compressed_pairs(setting: WindowSetting) -> int:
    """The same for compressed keys: window i is seen by every query from its last token on."""
    windows, stride = setting.num_windows, setting.kernel_stride
    seen = windows * (setting.num_tokens - setting.kernel_size + 1) - stride * windows * (windows - 1) // 2
    return setting.num_kv_heads * seen


def selected_pairs(setting: Setting) -> int:
    """The same for any selection that keeps the rules: all blocks of a query but its own are whole."""
    size, number, tokens = setting.block_size, setting.num_blocks, setting.num_tokens
    whole = [size * min(own, number - 1) for own in range(-(-tokens // size))]
    last = tokens - (len(whole) - 1) * size
    others = size * sum(whole[:-1]) + last * whole[-1]
    own = (len(whole) - 1) * (size * (size + 1) // 2) + last * (last + 1) // 2
    return setting.num_kv_heads * (others + own)


def window_pairs(setting: CoreSetting) -> int:
    """The same for a sliding window."""
    tokens, window = setting.num_tokens, min(setting.window_size, setting.num_tokens)
    return setting.num_kv_heads * (tokens * window - window * (window - 1) // 2)


def necessary(setting: Setting, pairs: int, num_indices: int, num_keys: int | None = None) -> dict[str, Necessary]:
    """Attention, for each pass: `num_indices` block indices are read per query and KV head, `num_keys` keys per KV head."""
    tokens, width = setting.num_tokens, setting.torch_dtype.itemsize * setting.head_dim
    per_product = 2 * setting.head_dim * pairs * setting.group_size
    queries = tokens * setting.num_heads * width
    keys = (tokens if num_keys is None else num_keys) * setting.num_kv_heads * width
    lse, indices = tokens * setting.num_heads * 4, tokens * setting.num_kv_heads * num_indices * 4
    # q, k, v in; o and lse out.
    forward = Necessary(FORWARD_PRODUCTS * per_product, 2 * queries + 2 * keys + lse + indices)
    # q, k, v, o, do and lse in; dq, dk, dv out.
    backward = Necessary(BACKWARD_PRODUCTS * per_product, 4 * queries + 4 * keys + lse + indices)
    return with_both(forward, backward)


def with_both(forward: Necessary, backward: Necessary) -> dict[str, Necessary]:
    both = Necessary(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "forward_backward": both}


def necessary_selection(setting: WindowSetting) -> dict[str, Necessary]:
    """q, compressed keys and lse in; block indices out."""
    tokens, width = setting.num_tokens, setting.torch_dtype.itemsize * setting.head_dim
    flops = SELECTION_PRODUCTS * 2 * setting.head_dim * compressed_pairs(setting) * setting.group_size
    keys, indices = setting.num_windows * setting.num_kv_heads * width, tokens * setting.num_kv_heads * setting.num_blocks * 4
    return {"forward": Necessary(flops, tokens * setting.num_heads * (width + 4) + keys + indices)}


def necessary_compression(setting: WindowSetting, *, gathered: bool = False, weighted: bool = False) -> dict[str, Necessary]:
    """Pooled, or gathered windows; bytes alone count, as there is no matrix product.

    Forward: x in, windows out. Backward: their gradient in, dx out; x in again only for the gradient of weights.
    """
    row = setting.num_kv_heads * setting.head_dim * setting.torch_dtype.itemsize
    x, windows = setting.num_tokens * row, setting.num_windows * row * (setting.kernel_size if gathered else 1)
    return with_both(Necessary(0, x + windows), Necessary(0, windows + (2 if weighted else 1) * x))


def necessary_combine(setting: Setting) -> dict[str, Necessary]:
    """The gated sum: gates and three branches in, o out; backward those and do in, gradients of gates and branches out."""
    rows = setting.num_tokens * setting.num_heads * setting.torch_dtype.itemsize
    o, gates = rows * setting.head_dim, rows * 3
    return with_both(Necessary(0, 4 * o + gates), Necessary(0, 7 * o + 2 * gates))


def necessary_parts(setting: CoreSetting) -> dict[str, dict[str, Necessary]]:
    """The operators of the core, in the order in which they run, each alone."""
    return {
        "compressed_attention": necessary(setting, compressed_pairs(setting), 0, setting.num_windows),
        "select_blocks": necessary_selection(setting),
        "selected_attention": necessary(setting, selected_pairs(setting), setting.num_blocks),
        "sliding_window_attention": necessary(setting, window_pairs(setting), 0),
        "gated_combine": necessary_combine(setting),
    }


def necessary_core(setting: CoreSetting) -> dict[str, Necessary]:
    """The arithmetic of all parts, but only what goes in (q, k, v, compressed k and v, gates; backward also do) and what
    comes out (o; backward the six gradients): what passes from one part to another need not reach memory."""
    item = setting.torch_dtype.itemsize
    queries = setting.num_tokens * setting.num_heads * setting.head_dim * item
    keys = (setting.num_tokens + setting.num_windows) * setting.num_kv_heads * setting.head_dim * item
    inputs = queries + 2 * keys + setting.num_tokens * setting.num_heads * 3 * item
    forward, backward = (
        sum(part[name].flops for part in necessary_parts(setting).values() if name in part) for name in ("forward", "backward")
    )
    return with_both(Necessary(forward, inputs + queries), Necessary(backward, 2 * inputs + queries))


def full_attention_bytes(setting: Setting) -> int:
    """The tensors that training full attention needs whatever computes it: q, k, v, o, dq, dk, dv, do, and lse in float32."""
    row = setting.head_dim * setting.torch_dtype.itemsize
    return setting.num_tokens * (4 * (setting.num_heads + setting.num_kv_heads) * row + 4 * setting.num_heads)


def floor_ms(parts: list[Necessary], matmul_flops: float, copy_bytes: float) -> float:
    """The time that no implementation can beat at these measured rates per second, one part after the other."""
    return sum(1e3 * max(part.flops / matmul_flops, part.bytes / copy_bytes) for part in parts)
