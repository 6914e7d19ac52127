"""Which blocks each query reads: at random, or as real scores of a sequence would choose them.

Both return what `nsa_fsa.ops.select_blocks` returns: int32 `[T, HKV, T_sel]`, ascending, padded at the end with -1, and the
first and last blocks up to the query's own always among them.
"""

import torch
from torch import Tensor

from nsa_fsa.benchmarking.settings import Setting

KERNEL_SIZE, KERNEL_STRIDE = 32, 16  # windows of the compressed keys, in tokens
CHUNK_BYTES = 1 << 28


def choose(scores: Tensor, own: Tensor, *, num_blocks: int, init_blocks: int, local_blocks: int) -> Tensor:
    """The best-scored eligible blocks, forced ones first: scores `[M, HKV, blocks]`, own `[M]` -> int32 `[M, HKV, num_blocks]`.

    Equal scores are resolved by whatever topk does.
    """
    width = scores.shape[-1]
    if width < num_blocks:
        scores = torch.nn.functional.pad(scores, (0, num_blocks - width))
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = own[:, None, None]
    forced = (block < init_blocks) | (block > own - local_blocks)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    best, number = scores.topk(num_blocks, dim=-1)
    number = number.masked_fill(best == -torch.inf, scores.shape[-1]).sort(dim=-1).values
    return number.masked_fill(number == scores.shape[-1], -1).int()


def random_selection(setting: Setting, generator: torch.Generator) -> Tensor:
    """Distinct eligible blocks, each as likely as any other, independent from query to query and head to head."""
    device, total = generator.device, -(-setting.num_tokens // setting.block_size)
    rows = max(CHUNK_BYTES // (4 * setting.num_kv_heads * total), 1)
    chunks = []
    for start in range(0, setting.num_tokens, rows):
        position = torch.arange(start, min(start + rows, setting.num_tokens), device=device)
        scores = torch.rand(len(position), setting.num_kv_heads, total, generator=generator, device=device)
        chunks.append(_choose(scores, position, setting))
    return torch.cat(chunks)


def correlated(shape: tuple[int, ...], correlation: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers whose first axis is an AR(1) process: neighbours correlate by `correlation`.

    x[t] = sum of correlation^s noise[t - s], the sum doubled in length at every step until what is left out is below 1e-4.
    """
    x = torch.randn(shape, generator=generator, device=generator.device)
    shift, decay = 1, correlation
    while shift < shape[0] and decay > 1e-4:
        x[shift:] += decay * x[:-shift].clone()
        shift, decay = 2 * shift, decay * decay
    return x.div_(x.std()).to(dtype)


def realistic_selection(setting: Setting, q: Tensor, k: Tensor) -> Tensor:
    """What NSA's scores choose (docs/spec.md, sections 3 and 4), with compressed keys that are means of their windows.

    q `[T, HQ, D]`, k `[T, HKV, D]`, one sequence whose length is a multiple of 16 and at least 32.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens % KERNEL_STRIDE or num_tokens < KERNEL_SIZE:
        raise ValueError(
            f"{num_tokens} tokens: realistic selection wants a multiple of {KERNEL_STRIDE}, at least {KERNEL_SIZE}."
        )
    strides = k.float().view(-1, KERNEL_STRIDE, num_kv_heads, head_dim).mean(1)
    k_cmp = ((strides[1:] + strides[:-1]) / 2).to(k.dtype).permute(1, 2, 0)  # [HKV, D, N]
    units, total = setting.block_size // KERNEL_STRIDE, -(-num_tokens // setting.block_size)
    last_key = torch.arange(k_cmp.shape[2], device=k.device) * KERNEL_STRIDE + KERNEL_SIZE - 1
    rows = max(CHUNK_BYTES // (4 * setting.num_heads * k_cmp.shape[2]), 1)
    chunks = []
    for start in range(0, num_tokens, rows):
        position = torch.arange(start, min(start + rows, num_tokens), device=q.device)
        visible = min(max((start + len(position) - KERNEL_SIZE) // KERNEL_STRIDE + 1, 1), k_cmp.shape[2])
        queries = q[start : start + rows].unflatten(1, (num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [HKV, M * G, D]
        scores = (queries @ k_cmp[..., :visible]).float().unflatten(1, (len(position), -1))  # [HKV, M, G, N]
        hidden = (last_key[:visible] > position[:, None])[:, None]  # [M, 1, N]
        p = (scores * head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0).sum(2)
        # Window i covers the strides i and i + 1, so a stride gets the mass of two windows, and a block that of its strides.
        mass = torch.nn.functional.pad(p, (0, 1)) + torch.nn.functional.pad(p, (1, 0))
        mass = torch.nn.functional.pad(mass, (0, total * units - mass.shape[-1])).unflatten(-1, (total, units)).sum(-1)
        chunks.append(_choose(mass.transpose(0, 1), position, setting))
    return torch.cat(chunks)


def _choose(scores: Tensor, position: Tensor, setting: Setting) -> Tensor:
    return choose(
        scores, position // setting.block_size, num_blocks=setting.num_blocks, init_blocks=setting.init_blocks,
        local_blocks=setting.local_blocks,
    )  # fmt: skip


def block_counts(block_indices: Tensor) -> Tensor:
    """How many leading indices are valid, int32 `[T, HKV]`."""
    return (block_indices >= 0).sum(-1, dtype=torch.int32)


def neighbour_overlap(block_indices: Tensor, setting: Setting) -> dict[str, float]:
    """Which part of a query's blocks its predecessor reads too, mean over queries and heads.

    "all" counts every block; "sparse" only those that are not forced, of queries that have any.
    """
    block = torch.arange(setting.num_tokens, device=block_indices.device) // setting.block_size
    sums = dict.fromkeys(("all", "sparse"), 0.0)
    counts = dict.fromkeys(("all", "sparse"), 0)
    rows = max(CHUNK_BYTES // (setting.num_kv_heads * setting.num_blocks**2), 1)
    for start in range(1, setting.num_tokens, rows):
        stop = min(start + rows, setting.num_tokens)
        index, before, own = block_indices[start:stop], block_indices[start - 1 : stop - 1], block[start:stop, None, None]
        shared = (index[..., None] == before[..., None, :]).any(-1)
        sparse = (index >= setting.init_blocks) & (index <= own - max(setting.local_blocks, 1))
        for name, counted in (("all", index >= 0), ("sparse", sparse)):
            number = counted.sum(-1)
            share = (shared & counted).sum(-1) / number.clamp(min=1)
            sums[name] += float(share.where(number > 0, 0).sum())
            counts[name] += int((number > 0).sum())
    return {name: sums[name] / max(counts[name], 1) for name in sums}
