"""Decoding as two operators: one writes new tokens into pages, the other attends over them."""

import torch
from torch import Tensor

from nsa_fsa.checks import check_device, check_ints, check_positive, check_rows, check_tensor
from nsa_fsa.decode import reference
from nsa_fsa.decode.call import AppendCall, DecodeCall, Decoded, Pooling
from nsa_fsa.decode.pages import Pages
from nsa_fsa.ops.common.backends import Backend, Backends
from nsa_fsa.ops.common.calls import Blocks, Windows, default_scale
from nsa_fsa.ops.common.registration import define_mutation, define_operator
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors
from nsa_fsa.ops.common.windowed_attention.backend import MAX_GROUP_SIZE
from nsa_fsa.ops.gated_combine.operator import check_gates, unsupported_gates

MEAN = Pooling()
MOST_NEW = 16  # tokens of a sequence that `nsa_decode` takes at a time


def append_tokens(
    k: Tensor,
    v: Tensor,
    pages: Pages,
    lengths: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    pool_k: Pooling = MEAN,
    pool_v: Pooling = MEAN,
    turn: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    write: bool = True,
    compress: bool = True,
    backend: str = "auto",
) -> None:
    """Writes the new tokens of every sequence into its pages, and the compressed tokens of the
    windows that they complete.

    Args:
        k, v: `[T, HKV, D]` and `[T, HKV, DV]`, rotated, as many new tokens of every sequence, one
            after the other. Those of a sequence that has fewer are the last ones.
        pages: written in place.
        lengths: int32 `[B]`, how long the sequences are with the new tokens; nothing is written
            for 0.
        pool_k, pool_v: how windows are compressed.
        turn: `[2, l, rotary_dim / 2]`, cos and sin of the angles between a window's keys and its
            first one, where compressed keys stand there (`compress_rope="after"`). Keys are turned
            back by it before they are pooled. None: they are pooled as they are.
        rotation: cos and sin `[T, rotary_dim]` of the new tokens, which an embedding of keys that
            are turned back is rotated by.
        write: False where the pages have the tokens already.
        compress: False where the caller writes compressed tokens.
        backend: "triton", "reference", or "auto": the first of them that can, on a GPU.

    Raises:
        ValueError: for inconsistent shapes, dtypes or devices.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    pages.check(windows)
    check_new("k", k, pages.k, lengths, pages.table)
    check_new("v", v, pages.v, lengths, pages.table)
    width, v_width = pages.k.shape[3], pages.v.shape[3]
    for name, pooling, size in (("pool_k", pool_k, width), ("pool_v", pool_v, v_width)):
        _check_pooling(name, pooling, (pages.k.shape[1], kernel_size, size), k.device)
    _check_turn(turn, rotation, pool_k, k, kernel_size)
    cos, sin = (None, None) if rotation is None else rotation
    APPEND_BACKENDS.check(backend)
    call = AppendCall(
        *(k, v, pages, lengths, *pool_k, *pool_v, turn, cos, sin),
        *(windows, int(write), int(compress), backend),
    )
    if k.shape[0] and write:
        APPEND(call)
    elif k.shape[0]:
        COMPRESS(call)


def nsa_decode(
    q: Tensor,
    gate_logits: Tensor,
    pages: Pages,
    lengths: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int,
    dense_below: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Decoded:
    """What `nsa_attention` gives for the last tokens of every sequence, which its pages hold.

    Nothing is read back from the device, and what a sequence gets depends neither on its neighbours
    nor on the order of its pages, to the last bit.

    Args:
        q: `[T, HQ, D]`, rotated; of every sequence as many new tokens, 16 at most.
        gate_logits: `[T, HQ or 1, 3]`, before the sigmoid; compressed, selected, sliding.
        pages: which `append_tokens` has written the new tokens to.
        lengths: int32 `[B]`, how long the sequences are with the new tokens. What a query of a
            sequence that has fewer of them gets is 0.
        The other arguments are those of `nsa_attention`.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and the blocks that every query read; of a dense one, those
        that it would have chosen.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices or sizes, or too many tokens.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    blocks = Blocks(block_size, init_blocks, local_blocks).check()
    blocks.check_selection(windows, num_selected_blocks)
    check_positive(window_size=window_size)
    check_ints(0, dense_below=dense_below)
    pages.check(windows)
    check_new("q", q, pages.k, lengths, pages.table)
    check_gates(gate_logits, q, "q")
    if q.shape[0] > MOST_NEW * lengths.shape[0]:
        raise ValueError(
            f"q has {q.shape[0] // lengths.shape[0]} tokens for each of {lengths.shape[0]} "
            f"sequences; {MOST_NEW} at most are decoded at a time. Fix: nsa_attention for more."
        )
    BACKENDS.check(backend)
    scale = default_scale(q, scale)
    call = DecodeCall(
        *(q, gate_logits, pages, lengths, scale, windows, blocks, num_selected_blocks),
        *(window_size, dense_below, backend),
    )
    if q.shape[0] == 0:
        return _fake(call)
    return DECODE(call)


def check_new(name: str, x: Tensor, like: Tensor, lengths: Tensor, table: Tensor) -> None:
    """Raises ValueError unless x `[T, heads, width]` has rows for every sequence, as pages do."""
    check_rows(name, x, 3, "[T, heads, width]")
    check_tensor("lengths", lengths, "int32 [B]")
    number = table.shape[0]
    if lengths.dtype != torch.int32 or lengths.shape != (number,):
        raise ValueError(
            f"lengths is {lengths.dtype} {tuple(lengths.shape)}; the table asks for int32 "
            f"[{number}]. Fix: one length for every sequence, lengths.int()."
        )
    heads = like.shape[1]
    of_heads = x.shape[1] == heads
    if name == "q":
        of_heads = x.shape[1] > 0 and x.shape[1] % heads == 0
    of_rows = x.shape[0] % number == 0 if number else x.shape[0] == 0
    if not of_rows or not of_heads or x.shape[2] != like.shape[3]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, which does not fit {number} sequences in pages of "
            f"{heads} KV heads of {like.shape[3]}. Fix: as many rows for every sequence."
        )
    if x.dtype != like.dtype:
        raise ValueError(
            f"{name} has dtype {x.dtype} but the pages have {like.dtype}. Fix: cast it to theirs."
        )
    for what, tensor in (("lengths", lengths), ("table", table)):
        check_device(what, tensor, x.device)


def _check_pooling(
    name: str, pooling: Pooling, shape: tuple[int, int, int], device: torch.device
) -> None:
    for part, x, expected in (
        ("logits", pooling.logits, shape[:2]),
        ("embedding", pooling.embedding, shape),
    ):
        if x is None:
            continue
        check_tensor(f"{part} of {name}", x, str(expected))
        if x.shape != expected:
            raise ValueError(
                f"{part} of {name} has shape {tuple(x.shape)}; it must be {expected}. "
                "Fix: one row for every KV head and token of a window."
            )
        check_device(f"{part} of {name}", x, device)


def _check_turn(
    turn: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    pool_k: Pooling,
    k: Tensor,
    kernel_size: int,
) -> None:
    if turn is None:
        return

    check_tensor("turn", turn, "[2, l, rotary_dim / 2]")
    fits = turn.ndim == 3 and turn.shape[:2] == (2, kernel_size)
    if not fits or 2 * turn.shape[2] > k.shape[2]:
        raise ValueError(
            f"turn has shape {tuple(turn.shape)}; it must be [2, {kernel_size}, at most "
            f"{k.shape[2] // 2}]. Fix: cos and sin of the positions 0 to {kernel_size - 1}."
        )
    check_device("turn", turn, k.device)

    if pool_k.embedding is not None and rotation is None:
        raise ValueError(
            "keys are turned back and have an embedding, but rotation is None. "
            "Fix: rotation=(cos, sin) of the new tokens."
        )

    for name, x in zip(("cos", "sin"), rotation or (), strict=False):
        check_tensor(f"{name} of rotation", x, "[T, rotary_dim]")
        expected = (k.shape[0], 2 * turn.shape[2])
        if x.shape != expected:
            raise ValueError(
                f"{name} of rotation has shape {tuple(x.shape)}; it must be {expected}. "
                "Fix: one row for every new token, as wide as what is rotated."
            )
        check_device(f"{name} of rotation", x, k.device)


class TritonAppend(TritonBackend[AppendCall]):
    def refuses(self, call: AppendCall, *, backward: bool = False) -> str | None:
        return unsupported_tensors(call.new_k, call.new_v, name="k")

    def forward(self, call: AppendCall) -> None:
        from nsa_fsa.decode import append

        append.append_tokens(call)


class ReferenceAppend(Backend[AppendCall]):
    name = "reference"

    def forward(self, call: AppendCall) -> None:
        reference.append_tokens(call)


def unsupported_heads(q: Tensor, v: Tensor, group_size: int) -> str | None:
    """Why no Triton kernel can decode rows `[T, heads, width]` in groups of so many query heads, or
    None."""
    if (reason := unsupported_tensors(q, v)) is not None:
        return reason
    if group_size > MAX_GROUP_SIZE:
        return f"{group_size} query heads a KV head; supported are at most {MAX_GROUP_SIZE}"
    return None


class Triton(TritonBackend[DecodeCall]):
    def refuses(self, call: DecodeCall, *, backward: bool = False) -> str | None:
        reason = unsupported_heads(call.q, call.pages.v, call.group_size)
        return reason or unsupported_gates(call.q, call.gate_logits)

    def forward(self, call: DecodeCall) -> Decoded:
        from nsa_fsa.decode import launch

        return launch.nsa_decode(call)


class Reference(Backend[DecodeCall]):
    name = "reference"

    def forward(self, call: DecodeCall) -> Decoded:
        return Decoded(*reference.nsa_decode(call))


def _fake(call: DecodeCall) -> Decoded:
    q, v = call.q, call.pages.v
    shape = (q.shape[0], v.shape[1], call.num_selected_blocks)
    return Decoded(q.new_empty(*q.shape[:2], v.shape[3]), q.new_empty(shape, dtype=torch.int32))


APPEND_BACKENDS = Backends("append_tokens", TritonAppend(), ReferenceAppend())
BACKENDS = Backends("nsa_decode", Triton(), Reference())
APPEND = define_mutation("append_tokens", AppendCall, APPEND_BACKENDS.run, Pages._fields[:4])
# Where keys and values are only read, so that a compiler need not copy them before.
COMPRESS = define_mutation("compress_tokens", AppendCall, APPEND_BACKENDS.run, Pages._fields[2:4])
DECODE = define_operator("nsa_decode", DecodeCall, Decoded, BACKENDS.run, _fake)
