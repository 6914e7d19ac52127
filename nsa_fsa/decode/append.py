"""Writes new tokens into pages, and pools the windows that they complete, in one kernel.

A program owns one new token of one KV head. It writes the token's row. If the token is the last one
of a window, it also reads the window's other tokens, those that are as new as its own from where
they came, since another program writes them to their page at the same time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.decode.call import AppendCall, Pooling
from nsa_fsa.decode.overlap import overlap, take_turn
from nsa_fsa.decode.paged import laid_out, offsets_of, page_rows, row_of
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import next_power_of_2, rows_contiguous


class Row(NamedTuple):
    """A tensor `[T, width]` whose rows are contiguous, in a kernel."""

    ptr: Any
    stride_t: Any


class Source(NamedTuple):
    """Keys or values: the new ones, and how windows of them are pooled."""

    new: Any  # `Heads`, of [T, HKV, width]
    logits_ptr: Any  # [HKV, l], or None
    embedding_ptr: Any  # [HKV, l, width], or None
    turn_ptr: Any  # [2, l, rotary_dim / 2], or None
    cos: Any  # `Row`, of the new tokens' [T, rotary_dim], where an embedding is rotated; or None
    sin: Any


class Sizes(NamedTuple):
    """What is alike in all programs of a launch; a constant of the kernel."""

    L: int  # tokens of a window
    PADDED_L: int
    STRIDE: int  # tokens from one window to the next
    D: int
    HALF_D: int  # padded, of half a key
    DV: int
    PADDED_DV: int
    HALF_ROTATED: int  # channels of half the rotation
    WRITE: bool
    COMPRESS: bool
    PAGE: int  # tokens of a page; 0: a sequence has one
    STATES: int  # states of a page; 0: a sequence has one


class Window(NamedTuple):
    """The tokens of a window that one program pools."""

    place: Any  # [PADDED_L], 0 to l - 1
    exists: Any
    is_new: Any
    new_row: Any  # int64, of those that are new
    old_ptr: Any  # [PADDED_L], where those that are not begin
    state_ptr: Any  # where the compressed token begins


@triton.jit
def load_window(source, window, head, column, inside):
    """Some columns of a window's tokens, float32 `[PADDED_L, columns]`."""
    at = window.old_ptr[:, None] + column[None, :]
    cached = (window.exists & ~window.is_new)[:, None] & inside[None, :]
    x = tl.load(at, mask=cached, other=0.0).to(tl.float32)
    new = source.new
    at = window.new_row * new.stride_t + head * new.stride_h
    fresh = (window.exists & window.is_new)[:, None] & inside[None, :]
    x += tl.load(new.ptr + at[:, None] + column[None, :], mask=fresh, other=0.0).to(tl.float32)
    return x


@triton.jit
def pooled_embedding(source, window, weight, head, column, inside, WIDTH: tl.constexpr, L):
    """Some columns of the embedding of a window's places, pooled as its tokens are."""
    at = source.embedding_ptr + ((head * L + window.place) * WIDTH)[:, None] + column[None, :]
    mask = window.exists[:, None] & inside[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32) * weight, 0)


@triton.jit
def weights(source, window, head, L: tl.constexpr):
    """What every token of a window weighs, float32 `[PADDED_L]`."""
    if source.logits_ptr is None:
        weight = tl.where(window.exists, 1.0 / L, 0.0)
    else:
        at = source.logits_ptr + head * L + window.place
        logits = tl.load(at, mask=window.exists, other=-float("inf")).to(tl.float32)
        weight = tl.exp(logits - tl.max(logits, 0))
        weight /= tl.sum(weight, 0)
    return weight


@triton.jit
def store_state(x, window, column, inside):
    """A compressed token's columns, to its state."""
    x = x.to(window.state_ptr.dtype.element_ty)
    tl.store(window.state_ptr + column, x, mask=inside)


@triton.jit
def pool_plain(source, window, weight, head, column, SIZES: tl.constexpr, WIDTH):
    """Pools some columns of a window's tokens, as they are."""
    inside = column < WIDTH
    pooled = tl.sum(load_window(source, window, head, column, inside) * weight, 0)
    if source.embedding_ptr is not None:
        pooled += pooled_embedding(source, window, weight, head, column, inside, WIDTH, SIZES.L)
    store_state(pooled, window, column, inside)


@triton.jit
def pool_rotated(keys, window, weight, head, token, SIZES: tl.constexpr):
    """Pools the columns of a window's keys that are rotated, turned back to its first token."""
    H: tl.constexpr = SIZES.HALF_ROTATED
    half = tl.arange(0, SIZES.HALF_D)
    inside = half < H
    a = load_window(keys, window, head, half, inside)
    b = load_window(keys, window, head, H + half, inside)
    angle = keys.turn_ptr + window.place[:, None] * H + half[None, :]
    mask = window.exists[:, None] & inside[None, :]
    cos = tl.load(angle, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(angle + SIZES.L * H, mask=mask, other=0.0).to(tl.float32)
    pooled_a = tl.sum((a * cos + b * sin) * weight, 0)
    pooled_b = tl.sum((b * cos - a * sin) * weight, 0)

    if keys.embedding_ptr is not None:
        # It is not rotated yet: the first token's angle is the last one's, turned back.
        at = keys.turn_ptr + (SIZES.L - 1) * H + half
        back_cos = tl.load(at, mask=inside, other=1.0).to(tl.float32)
        back_sin = tl.load(at + SIZES.L * H, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(keys.cos.ptr + token * keys.cos.stride_t + half, mask=inside, other=0.0)
        sin = tl.load(keys.sin.ptr + token * keys.sin.stride_t + half, mask=inside, other=0.0)
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        first_cos = cos * back_cos + sin * back_sin
        first_sin = sin * back_cos - cos * back_sin
        a = pooled_embedding(keys, window, weight, head, half, inside, SIZES.D, SIZES.L)
        b = pooled_embedding(keys, window, weight, head, H + half, inside, SIZES.D, SIZES.L)
        pooled_a += a * first_cos - b * first_sin
        pooled_b += b * first_cos + a * first_sin
    store_state(pooled_a, window, half, inside)
    store_state(pooled_b, window, H + half, inside)


@triton.jit
def pool_keys(keys, window, head, token, SIZES: tl.constexpr):
    weight = weights(keys, window, head, SIZES.L)[:, None]
    if keys.turn_ptr is not None:
        pool_rotated(keys, window, weight, head, token, SIZES)
    FIRST: tl.constexpr = 0 if keys.turn_ptr is None else 2 * SIZES.HALF_ROTATED
    if FIRST < SIZES.D:
        column = FIRST + tl.arange(0, 2 * SIZES.HALF_D)
        pool_plain(keys, window, weight, head, column, SIZES, SIZES.D)


@triton.jit
def pool_values(values, window, head, SIZES: tl.constexpr):
    weight = weights(values, window, head, SIZES.L)[:, None]
    column = tl.arange(0, SIZES.PADDED_DV)
    pool_plain(values, window, weight, head, column, SIZES, SIZES.DV)


@triton.jit
def copy_row(source, token, head, to_ptr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """One new token's key or value, to its page."""
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    new = source.new
    at = token * new.stride_t + head * new.stride_h
    x = tl.load(new.ptr + at + column, mask=inside)
    tl.store(to_ptr + column, x, mask=inside)


@kernel
def append_kernel(
    keys,
    values,
    cache,
    of_pages,
    compressed,
    of_compressed_pages,
    lengths_ptr,
    num_new,
    SIZES: tl.constexpr,
    PITCHES: tl.constexpr,
    COMPRESSED_PITCHES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (new token, KV head). keys and values are `Source`, cache and compressed are `Cache`,
    and the others `PagePitches` of these."""
    take_turn(OVERLAP)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(0) // num_new
    total = tl.load(lengths_ptr + sequence)
    old = total - num_new
    position = old + tl.program_id(0) % num_new
    if position < 0:
        return

    if SIZES.WRITE:
        page, row = row_of(cache.table, sequence, position, True, SIZES.PAGE)
        of_key, of_value = offsets_of(cache.k, cache.v, of_pages, page, row, head, PITCHES)
        copy_row(keys, token, head, cache.k.ptr + of_key, SIZES.D, 2 * SIZES.HALF_D)
        copy_row(values, token, head, cache.v.ptr + of_value, SIZES.DV, SIZES.PADDED_DV)

    if SIZES.COMPRESS:
        first = position + 1 - SIZES.L
        if (first >= 0) & (first % SIZES.STRIDE == 0):
            place = tl.arange(0, SIZES.PADDED_L)
            exists = place < SIZES.L
            of_window = first + place
            page, row = row_of(cache.table, sequence, of_window, exists, SIZES.PAGE)
            of_k, of_v = offsets_of(cache.k, cache.v, of_pages, page, row, head, PITCHES)
            new_row = (sequence * num_new + of_window - old).to(tl.int64)
            is_new = (of_window >= old) & SIZES.WRITE
            state = first // SIZES.STRIDE + SIZES.L // SIZES.STRIDE - 1
            page, row = row_of(compressed.table, sequence, state, True, SIZES.STATES)
            k, v = compressed.k, compressed.v
            to_k, to_v = offsets_of(k, v, of_compressed_pages, page, row, head, COMPRESSED_PITCHES)
            window = Window(place, exists, is_new, new_row, cache.k.ptr + of_k, k.ptr + to_k)
            pool_keys(keys, window, head, token, SIZES)
            window = Window(place, exists, is_new, new_row, cache.v.ptr + of_v, v.ptr + to_v)
            pool_values(values, window, head, SIZES)


def append_tokens(call: AppendCall) -> None:
    """Launches the kernel."""
    pages, num_heads = call.pages, call.pages.k.shape[1]
    (kernel_size, kernel_stride), width, v_width = call.windows, pages.k.shape[3], pages.v.shape[3]
    half_rotated = 0 if call.turn is None else call.turn.shape[2]
    rotation = [None if x is None else x.contiguous() for x in (call.turn, call.cos, call.sin)]
    turn, *rows = rotation

    def source(new: Tensor, pooling: Pooling, *others: Any) -> Source:
        parts = [None if x is None else x.contiguous() for x in pooling]
        return Source(heads(rows_contiguous(new)), *parts, *others)

    of_tokens = [None if x is None else Row(x, x.stride(0)) for x in rows]
    keys = source(call.new_k, call.pool_k, turn, *of_tokens)
    values = source(call.new_v, call.pool_v, None, None, None)
    cache, of_pages, pitches = laid_out(pages.k, pages.v, rows_contiguous(pages.table))
    compressed, of_compressed_pages, compressed_pitches = laid_out(
        pages.k_cmp, pages.v_cmp, rows_contiguous(pages.table_of_states)
    )
    sizes = Sizes(
        *(kernel_size, next_power_of_2(kernel_size), kernel_stride),
        *(width, max(next_power_of_2(width) // 2, 1), v_width, next_power_of_2(v_width)),
        *(half_rotated, bool(call.write), bool(call.compress)),
        *(page_rows(pages.table, pages.k), page_rows(pages.table_of_states, pages.k_cmp)),
    )
    append_kernel[(call.new_k.shape[0], num_heads)](
        *(keys, values, cache, of_pages, compressed, of_compressed_pages),
        *(rows_contiguous(call.lengths), call.num_new),
        *(constants(sizes), constants(pitches), constants(compressed_pitches)),
        **overlap(call.new_k.device),
    )
