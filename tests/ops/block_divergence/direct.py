"""Block divergence once more, from whole matrices of S x S weights and spec.md's words."""

import torch

from tests.oracle import forced_blocks, overlap


def softmax_over(scores, seen):
    """Rows that see nothing are 0."""
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0.0)


def direct(q, k, k_cmp, chosen, c, scale, free_only=False):
    """The divergence, the mass in the chosen blocks, and the recall, each `[S, HKV]`, of one
    sequence q `[S, HQ, D]`, k `[S, HKV, D]`, k_cmp `[n, HKV, D]`, chosen `[S, HKV, T_sel]`.

    c: has the sizes.
    """
    length, group_size = len(q), q.shape[1] // k.shape[1]
    t = torch.arange(length)[:, None]
    num_blocks = -(-length // c.block_size)
    keys, windows = torch.arange(length), torch.arange(len(k_cmp))
    ends = windows * c.kernel_stride + c.kernel_size - 1
    sizes = (c.kernel_size, c.kernel_stride, c.block_size)
    shared = torch.tensor([[overlap(i, j, *sizes) for j in range(num_blocks)] for i in windows])
    shared = shared.reshape(len(k_cmp), num_blocks).to(q.dtype)
    in_block = torch.nn.functional.one_hot(keys // c.block_size, num_blocks).to(q.dtype)
    divergence, mass, recall = (q.new_zeros(length, k.shape[1]) for _ in range(3))
    for kv in range(k.shape[1]):
        of_keys, of_windows = 0, 0
        for h in range(kv * group_size, (kv + 1) * group_size):
            of_keys = of_keys + softmax_over(scale * q[:, h] @ k[:, kv].T, keys <= t)
            scores = scale * q[:, h] @ k_cmp[:, kv].T
            of_windows = of_windows + softmax_over(scores, ends <= t)
        dense = (of_keys @ in_block / group_size).detach()
        student = of_windows @ shared
        for row in range(length):
            own = row // c.block_size
            forced = forced_blocks(own, c.init_blocks, c.local_blocks)
            free = [j for j in range(own + 1) if j not in forced]
            compared = [j for j in range(num_blocks) if student[row, j] > 0]
            compared = [j for j in compared if not free_only or j in free]
            if compared:
                target, given = dense[row, compared], student[row, compared]
                target, given = target / target.sum(), given / given.sum()
                divergence[row, kv] = (target * (target / given).log()).sum()
            taken = [j for j in chosen[row, kv].tolist() if j >= 0]
            mass[row, kv] = dense[row, taken].sum()
            places = len([j for j in taken if j in free])
            best = sorted(free, key=lambda j: (-dense[row, j].item(), j))[:places]
            found = len({*best} & {*taken})
            has_choice = 0 < places < len(free)
            recall[row, kv] = found / places if has_choice else torch.nan
    return divergence, mass, recall
