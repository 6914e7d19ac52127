"""Inputs of the suites: blocks at random, sequences whose neighbours are alike, and the rest.

`selection` of a case says what its inputs are like:

independent   all tensors are independent random numbers
window_means  compressed keys are means of windows of random keys, of which neighbours share some
random        every query reads random blocks
realistic     queries and keys change slowly along the sequence, and choose their blocks
recorded      every query reads the blocks that one of a real model reads, of a real text
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.operators import compressed_attention, pool_windows, select_blocks
from nsa_fsa.benchmarking import recorded
from nsa_fsa.benchmarking.cases import Case

SELECTIONS = ("independent", "window_means", "random", "realistic", "recorded")
CORRELATION = {"q": 0.99, "k": 0.98}  # of neighbours in a realistic sequence
# Means of 32 normal keys have a standard deviation of 0.18; times 6, their scores spread as those
# of single normal keys do.
MEAN_GAIN = 6
CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class SuiteCase(Case):
    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            what = f"selection={self.selection!r} is not known: allowed are {SELECTIONS}"
            raise ValueError(f"{what}. Fix: one of them in suites.yaml.")

    def make(self, name: str) -> Tensor:
        c, t = self.config, self.num_tokens
        rows = t // c.kernel_stride
        if name in ("o_cmp", "o_slc", "o_swa"):
            return self.normal(name, t, c.num_heads, c.v_head_dim)
        if name in ("dpooled", "dwindows"):  # NaN where no window is: ignored by every backward
            width = (c.head_dim,) if name == "dpooled" else (c.kernel_size, c.head_dim)
            made = self.normal(name, rows, c.num_kv_heads, *width)
            made[self.num_windows :] = torch.nan
            return made
        if name == "weight":  # float32, as the layer's softmax gives it; [l, HKV]
            return self.normal(name, c.kernel_size, c.num_kv_heads).float().softmax(0)
        if name == "lse":
            with torch.no_grad():
                return compressed_attention(self, self["q"], self["k_cmp"], self["v_cmp"])[1]
        if name == "block_indices" and self.selection == "random":
            return random_blocks(self)
        if name == "block_indices" and self.selection == "recorded":
            return recorded_blocks(self)
        if name == "block_indices":
            return select_blocks(self, self["q"], self["k_cmp"])
        if self.selection == "realistic" and name in CORRELATION:
            return correlated(super().make(name), CORRELATION[name])
        if self.selection == "realistic" and name == "k_cmp":
            with torch.no_grad():
                return pool_windows(self, self["k"])
        if self.selection == "window_means" and name == "k_cmp":
            return self.window_means()
        return super().make(name)

    def window_means(self) -> Tensor:
        """The mean of a stride's keys is normal too, so that the keys themselves need not exist."""
        c, rows = self.config, self.num_tokens // self.config.kernel_stride
        span = c.kernel_size // c.kernel_stride
        strides = self.normal("strides", rows + span - 1, c.num_kv_heads, c.head_dim).float()
        windows = torch.stack([strides[shift : shift + rows] for shift in range(span)]).sum(0)
        windows *= MEAN_GAIN * c.kernel_stride**0.5 / c.kernel_size
        windows[self.num_windows :] = torch.nan
        return windows.to(self.dtype)


def random_blocks(case: Case) -> Tensor:
    """What `select_blocks` returns, but for its choice: distinct blocks, each as likely as another,
    independent from query to query and head to head."""
    c, device = case.config, case.device
    total = max(-(-case.num_tokens // c.block_size), c.num_selected_blocks)
    generator = torch.Generator(device).manual_seed(case.seed)
    block, chunks = torch.arange(total, device=device), []
    rows = max(CHUNK_BYTES // (4 * c.num_kv_heads * total), 1)
    for tokens in torch.arange(case.num_tokens, device=device).split(rows):
        own = tokens[:, None, None] // c.block_size
        shape = (len(tokens), c.num_kv_heads, total)
        scores = torch.rand(shape, generator=generator, device=device)
        forced = (block < c.init_blocks) | (block > own - c.local_blocks)
        scores = scores.masked_fill(forced, 2).masked_fill(block > own, -1)
        best, chosen = scores.topk(c.num_selected_blocks)
        chosen = chosen.masked_fill(best < 0, total).sort().values
        chunks.append(chosen.masked_fill(chosen == total, -1).int())
    return torch.cat(chunks)


def recorded_blocks(case: Case) -> Tensor:
    """Of as many heads as the case has; raises ValueError for other sizes than were recorded."""
    known = dict(
        block_size=recorded.BLOCK_SIZE,
        num_selected_blocks=recorded.NUM_BLOCKS,
        init_blocks=recorded.INIT_BLOCKS,
        local_blocks=recorded.LOCAL_BLOCKS,
    )
    if case.blocks != known:
        raise ValueError(f"choices of {case.blocks} were not recorded, but of {known} alone")
    heads = recorded.heads_of(recorded.read(), case.config.num_kv_heads)
    return recorded.lengthened(heads, case.num_tokens, case.seed).to(case.device)


def correlated(noise: Tensor, correlation: float) -> Tensor:
    """Standard normal numbers, of which neighbours along the first axis correlate (an AR(1)).

    x[t] = sum of correlation^s noise[t - s]; every step doubles the length of the sum, until what
    it leaves out is below 1e-4.
    """
    x, shift, decay = noise.float(), 1, correlation
    while shift < len(x) and decay > 1e-4:
        x[shift:] += decay * x[:-shift].clone()
        shift, decay = 2 * shift, decay * decay
    return x.div_(x.std()).to(noise.dtype)
