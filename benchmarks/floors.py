"""The least time that anything could take: arithmetic and bytes that cannot be done without.

A floor is the larger of two times: the necessary products at the rate of a large matrix product,
and the bytes of inputs and outputs at the rate of a large copy. Both rates are measured in the same
run. Everything here follows from the sizes in a row of results.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nsa_fsa.ops.nsa_attention import OPERATORS

# Products of size [queries, keys, head width]: q k and p v; backward q k again, dp, dv, dk, dq.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS, SCORE_PRODUCTS = 2, 5, 1
CORE_PARTS = tuple(x.operator for x in OPERATORS)
Row = Mapping[str, Any]


class Work(NamedTuple):
    flops: int
    bytes: int


def num_windows(row: Row) -> int:
    return max(0, (row["num_tokens"] - row["kernel_size"]) // row["kernel_stride"] + 1)


def num_kv_heads(row: Row) -> int:
    return row["num_heads"] // row["group_size"]


# How many (query, key) pairs of a KV head see each other


def full_pairs(row: Row) -> int:
    return row["num_tokens"] * (row["num_tokens"] + 1) // 2


def compressed_pairs(row: Row) -> int:
    """Every query from a window's last token on sees the window."""
    windows, stride = num_windows(row), row["kernel_stride"]
    seen = windows * (row["num_tokens"] - row["kernel_size"] + 1)
    return seen - stride * windows * (windows - 1) // 2


def selected_pairs(row: Row) -> int:
    """For any choice that keeps the rules: all blocks of a query but its own are whole."""
    size, number, tokens = row["block_size"], row["num_blocks"], row["num_tokens"]
    whole = [size * min(own, number - 1) for own in range(-(-tokens // size))]
    last = tokens - (len(whole) - 1) * size
    own = (len(whole) - 1) * (size * (size + 1) // 2) + last * (last + 1) // 2
    return size * sum(whole[:-1]) + last * whole[-1] + own


def window_pairs(row: Row) -> int:
    window = min(row["window_size"], row["num_tokens"])
    return row["num_tokens"] * window - window * (window - 1) // 2


# The work of each pass


def attention(row: Row, pairs: int, num_keys: int, num_indices: int = 0) -> dict[str, Work]:
    """q, k, v and indices in, o and lse out; backward also o, do and lse in, dq, dk and dv out."""
    tokens, width = row["num_tokens"], item_size(row) * row["head_dim"]
    product = 2 * row["head_dim"] * pairs * row["num_heads"]
    queries, keys = tokens * row["num_heads"] * width, num_keys * num_kv_heads(row) * width
    lse, indices = tokens * row["num_heads"] * 4, tokens * num_kv_heads(row) * num_indices * 4
    forward = Work(FORWARD_PRODUCTS * product, 2 * queries + 2 * keys + lse + indices)
    backward = Work(BACKWARD_PRODUCTS * product, 4 * queries + 4 * keys + lse + indices)
    return dict(forward=forward, backward=backward)


def selection(row: Row) -> dict[str, Work]:
    """q, compressed keys and lse in; block indices out."""
    tokens, width = row["num_tokens"], item_size(row) * row["head_dim"]
    flops = SCORE_PRODUCTS * 2 * row["head_dim"] * compressed_pairs(row) * row["num_heads"]
    keys = num_windows(row) * num_kv_heads(row) * width
    indices = tokens * num_kv_heads(row) * row["num_blocks"] * 4
    return dict(forward=Work(flops, tokens * row["num_heads"] * (width + 4) + keys + indices))


def compression(row: Row, gathered: bool = False, weighted: bool = False) -> dict[str, Work]:
    """x in, windows out; backward their gradients in, dx out, and x in again for the weights'."""
    token = num_kv_heads(row) * row["head_dim"] * item_size(row)
    x, windows = row["num_tokens"] * token, num_windows(row) * token
    windows *= row["kernel_size"] if gathered else 1
    return dict(forward=Work(0, x + windows), backward=Work(0, windows + (1 + weighted) * x))


def combination(row: Row) -> dict[str, Work]:
    """Gates and branches in, o out; backward those and do in, the gradients of both out."""
    rows = row["num_tokens"] * row["num_heads"] * item_size(row)
    o, gates = rows * row["head_dim"], rows * 3
    return dict(forward=Work(0, 4 * o + gates), backward=Work(0, 7 * o + 2 * gates))


def decoding(row: Row) -> dict[str, Work]:
    """All compressed tokens of every sequence, and of its last tokens the chosen blocks and the
    window, once for all new ones; of full attention all tokens. What a step writes is next to
    nothing."""
    keys = num_windows(row) + row["block_size"] * row["num_blocks"] + row["window_size"]
    if row["kind"] == "full":
        keys = row["num_tokens"]
    keys *= row["batch_size"] * num_kv_heads(row)
    width, pairs = row["head_dim"] * item_size(row), row["group_size"] * row["num_new"] * keys
    return dict(forward=Work(2 * FORWARD_PRODUCTS * row["head_dim"] * pairs, 2 * keys * width))


def core(row: Row) -> dict[str, Work]:
    """The arithmetic of all parts; but of the bytes only what goes in (backward also do) and what
    comes out, for what passes from one part to another need not reach memory."""
    parts = [work(row, part) for part in CORE_PARTS]
    tokens, width = row["num_tokens"], row["head_dim"] * item_size(row)
    queries = tokens * row["num_heads"] * width
    keys = (tokens + num_windows(row)) * num_kv_heads(row) * width
    inputs = queries + 2 * keys + tokens * row["num_heads"] * 3 * item_size(row)
    forward = Work(sum(part["forward"].flops for part in parts), inputs + queries)
    flops = sum(part["backward"].flops for part in parts if "backward" in part)
    return dict(forward=forward, backward=Work(flops, 2 * inputs + queries))


def item_size(row: Row) -> int:
    return getattr(torch, row["dtype"]).itemsize


def work(row: Row, implementation: str | None = None) -> dict[str, Work]:
    """The work of an implementation, forward and backward."""
    name, tokens = implementation or row["implementation"], row["num_tokens"]
    if "batch_size" in row:
        return decoding(row)
    if name.startswith("nsa_fsa"):
        return core(row)
    if row["kind"] == "full":
        return attention(row, full_pairs(row), tokens)
    if name in ("compressed_attention", "flex_attention"):
        return attention(row, compressed_pairs(row), num_windows(row))
    if name == "select_blocks":
        return selection(row)
    if name == "sliding_window_attention":
        return attention(row, window_pairs(row), tokens)
    if name == "gated_combine":
        return combination(row)
    if name in ("pool_mean", "pool_weighted", "gather"):
        return compression(row, gathered=name == "gather", weighted=name == "pool_weighted")
    return attention(row, selected_pairs(row), tokens, row["num_blocks"])


def floor(row: Row, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Milliseconds that the pass of a row cannot beat, and what takes them; one part of the work
    comes after the other."""
    names = ("forward", "backward") if row["pass"] == "forward_backward" else (row["pass"],)
    parts = [part for name, part in work(row).items() if name in names]
    products, copies = ceilings["matmul_flop_per_s"], ceilings["copy_bytes_per_s"]
    times = [(x.flops / products, x.bytes / copies) for x in parts]
    total = 1e3 * sum(max(time) for time in times)
    bound = "arithmetic" if sum(x for x, _ in times) > sum(x for _, x in times) else "bytes"
    return dict(floor_ms=total, of_floor=total / row["ms"], bound=bound)


def ceilings(meter: Any) -> dict[str, Any]:
    """Bytes a second of a large copy (read plus written), and operations a second of a large
    bfloat16 product."""
    size, width = 1 << 31, 8192
    source, target = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    copy = meter.time(lambda: target.copy_(source))["ms"]
    a, b = torch.randn(2, width, width, dtype=torch.bfloat16, device="cuda")
    return dict(
        copy_bytes_per_s=2e3 * size / copy,
        copy=f"device to device, {size / 2**30:.0f} GiB read and written",
        matmul_flop_per_s=2e3 * width**3 / meter.time(lambda: a @ b)["ms"],
        matmul=f"bfloat16, {width} x {width} x {width}, normal random numbers",
    )


def full_attention_bytes(row: Row) -> int:
    """What training full attention keeps: q, k, v, o, dq, dk, dv, do, and lse in float32."""
    heads, width = row["num_heads"] + num_kv_heads(row), row["head_dim"] * item_size(row)
    return row["num_tokens"] * (4 * heads * width + 4 * row["num_heads"])
