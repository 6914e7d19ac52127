"""Decoding in plain PyTorch, sequence by sequence, by the references of the operators."""

import torch
from torch import Tensor

from nsa_fsa.decode.call import AppendCall, DecodeCall, Pooling
from nsa_fsa.decode.pages import read_rows
from nsa_fsa.ops.block_selection import reference as block_selection
from nsa_fsa.ops.common.reference_attention import compute_dtype
from nsa_fsa.ops.compressed_attention import reference as compressed_attention
from nsa_fsa.ops.gated_combine import reference as gated_combine
from nsa_fsa.ops.selected_attention import reference as selected_attention
from nsa_fsa.ops.sliding_window_attention import reference as sliding_window_attention


def append_tokens(call: AppendCall) -> None:
    """Writes new tokens, and the compressed tokens of the windows that they complete."""
    pages, (kernel_size, kernel_stride) = call.pages, call.windows
    hops = kernel_size // kernel_stride
    for b, total in enumerate(call.lengths.tolist()):
        table, old = pages.table[b], total - call.num_new
        rows = slice(b * call.num_new, (b + 1) * call.num_new)
        for position in range(max(old, 0), total):
            if call.write:
                page, row = table[position // pages.page_size], position % pages.page_size
                pages.k[page, :, row] = call.new_k[rows][position - old]
                pages.v[page, :, row] = call.new_v[rows][position - old]

            first = position + 1 - kernel_size
            if first < 0 or first % kernel_stride or not call.compress:
                continue
            state = first // kernel_stride + hops - 1
            per_page = pages.k_cmp.shape[2]
            page, row = pages.table_of_states[b, state // per_page], state % per_page
            for source, target, pooling in (
                (pages.k, pages.k_cmp, call.pool_k),
                (pages.v, pages.v_cmp, call.pool_v),
            ):
                window = read_rows(source, table, first, position + 1)
                if source is pages.k and call.turn is not None:
                    window = turned_back(window, call.turn)
                    if pooling.embedding is not None:
                        pooling = pooling._replace(embedding=_rotated(call, rows, position - old))
                target[page, :, row] = pool(window, pooling).to(target.dtype)


def turned_back(window: Tensor, turn: Tensor) -> Tensor:
    """A window's keys `[l, HKV, D]`, each as if it stood where the first one does.

    turn: `[2, l, rotary_dim / 2]`, cos and sin of the angles by which they are turned further.
    """
    cos, sin = turn[:, :, None].to(compute_dtype(window)).unbind(0)
    half = cos.shape[-1]
    a, b, rest = window.to(cos.dtype).split((half, half, window.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def _rotated(call: AppendCall, rows: slice, last: int) -> Tensor:
    """The embedding of a window's places as it is rotated where the window begins, whose last token
    is the new token `last` of some rows."""
    turn, embedding = call.turn, call.k_embedding
    assert turn is not None
    assert embedding is not None
    assert call.cos is not None
    assert call.sin is not None
    half, wide = turn.shape[2], compute_dtype(embedding)
    cos, sin = (x[rows][last, :half].to(wide) for x in (call.cos, call.sin))
    back_cos, back_sin = turn[:, -1].to(wide)
    cos, sin = cos * back_cos + sin * back_sin, sin * back_cos - cos * back_sin
    a, b, rest = embedding.to(wide).split((half, half, embedding.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def pool(window: Tensor, pooling: Pooling) -> Tensor:
    """`[l, HKV, D] -> [HKV, D]`."""
    window = window.to(compute_dtype(window)).transpose(0, 1)  # [HKV, l, D]
    if pooling.embedding is not None:
        window = window + pooling.embedding.to(window.dtype)
    if pooling.logits is None:
        return window.mean(1)
    weight = pooling.logits.to(window.dtype).softmax(-1)
    return torch.einsum("hl,hld->hd", weight, window)


def nsa_decode(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """o `[T, HQ, DV]` and block_indices int32 `[T, HKV, T_sel]`."""
    q, pages, (kernel_size, kernel_stride) = call.q, call.pages, call.windows
    hops = kernel_size // kernel_stride
    o = q.new_zeros(*q.shape[:2], pages.v.shape[3])
    indices = torch.full(
        (q.shape[0], pages.k.shape[1], call.num_selected_blocks), -1, dtype=torch.int32
    ).to(q.device)
    for b, total in enumerate(call.lengths.tolist()):
        new = min(call.num_new, total)
        if new <= 0:
            continue
        table, of_states = pages.table[b], pages.table_of_states[b]
        rows = slice((b + 1) * call.num_new - new, (b + 1) * call.num_new)
        k, v = (read_rows(x, table, 0, total) for x in (pages.k, pages.v))
        states = max(total // kernel_stride, hops - 1)
        k_cmp, v_cmp = (
            read_rows(x, of_states, hops - 1, states) for x in (pages.k_cmp, pages.v_cmp)
        )
        # The operators' layout has a row for every hop; the last ones are nobody's.
        missing = total // kernel_stride - k_cmp.shape[0]
        k_cmp, v_cmp = (torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in (k_cmp, v_cmp))

        ends = torch.tensor([0, total], dtype=torch.int32, device=q.device)
        of_queries = torch.tensor([0, new], dtype=torch.int32, device=q.device)
        where: dict = dict(cu_seqlens=ends, max_seqlen=total, cu_seqlens_q=of_queries)
        attend: dict = dict(**where, scale=call.scale)
        windows = call.windows._asdict()

        o_cmp, lse = compressed_attention.compressed_attention(
            q[rows], k_cmp, v_cmp, **attend, **windows
        )
        chosen = block_selection.select_blocks(
            q[rows],
            k_cmp,
            lse,
            **attend,
            **windows,
            **call.blocks._asdict(),
            num_selected_blocks=call.num_selected_blocks,
        )
        o_slc, _ = selected_attention.selected_attention(
            q[rows], k, v, chosen, **attend, block_size=call.blocks.block_size
        )
        o_swa, _ = sliding_window_attention.sliding_window_attention(
            q[rows], k, v, **attend, window_size=call.window_size
        )

        gates = call.gate_logits[rows]
        o[rows] = gated_combine.gated_combine(gates, o_cmp, o_slc, o_swa)

        if total - new < call.dense_below:
            is_dense = torch.arange(total - new, total, device=q.device) < call.dense_below
            o_dense, _ = sliding_window_attention.sliding_window_attention(
                q[rows], k, v, **attend, window_size=total
            )
            o[rows] = torch.where(is_dense[:, None, None], o_dense, o[rows])

        indices[rows] = chosen

    return o, indices
