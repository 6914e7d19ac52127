"""Is a result of the compressed branch right? Compression, attention over compressed keys, and the choice of blocks.

Shapes: T tokens, N windows of l tokens every s, H = HKV heads, M blocks.
"""

import torch
from torch import Tensor

from nsa_fsa.benchmarking.check import ROWS_AT_A_TIME, AttentionCheck, AttentionInputs, Check, WrongResult
from nsa_fsa.benchmarking.settings import WindowSetting

SCORE_LOST = 0.005  # of the best possible sum of free blocks' scores; equal scores and float32 rounding cost less than 1e-5
QUERIES_AT_A_TIME = 8192


class CompressedOracle(AttentionCheck):
    """Attention over compressed keys; dk and dv are those of some compressed tokens and of rows that no window owns."""

    setting: WindowSetting

    def __init__(self, inputs: AttentionInputs, gate: Tensor | None = None) -> None:
        super().__init__(inputs, gate)
        self.edge = self.setting.kernel_size

    def keys_of(self, queries: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        stride, size = self.setting.kernel_stride, self.setting.kernel_size
        visible = min(max((int(queries[-1]) - size + 1) // stride + 1, 0), self.setting.num_windows)  # queries ascend
        k, v = (x.detach()[:visible, head].float()[None] for x in (self.inputs.k, self.inputs.v))
        last_token = torch.arange(visible, device=queries.device) * stride + size - 1
        return k, v, last_token <= queries[:, None]

    def chunks(self, queries: Tensor) -> tuple[Tensor, ...]:
        return queries.split(max(ROWS_AT_A_TIME // (max(self.setting.num_windows, 1) * self.setting.group_size), 1))

    @property
    def tokens(self) -> Tensor:
        """First, middle and last windows, and the rows after them."""
        windows, rows = self.setting.num_windows, self.setting.num_rows
        picked = {*range(2), windows // 2, *range(windows - 2, rows)}
        return torch.tensor(sorted(i for i in picked if 0 <= i < rows), device=self.inputs.do.device)

    def key_gradients(self) -> dict[str, Tensor]:
        owned = self.tokens[self.tokens < self.setting.num_windows]
        dk = torch.zeros(len(self.tokens), len(self.heads), self.setting.head_dim, device=owned.device)
        dv = torch.zeros_like(dk)
        everyone = torch.arange(self.setting.num_tokens, device=owned.device)
        for place, head in enumerate(self.heads):
            for chunk in self.chunks(everyone):
                rows = self.rows(chunk, head)
                near = owned[owned < rows["p"].shape[-1]]  # of those that this chunk sees
                dk[: len(near), place] += torch.einsum("ngk,ngd->kd", rows["ds"][..., near], rows["q"])
                dv[: len(near), place] += torch.einsum("ngk,ngd->kd", rows["p"][..., near], rows["do"])
        return {"dk": dk, "dv": dv}

    def sample(self, name: str, result: Tensor) -> Tensor:
        return result[self.tokens][:, self.heads].float() if name in ("dk", "dv") else super().sample(name, result)


class CompressionOracle(Check):
    """Pooled or gathered windows of x `[T, H, D]`, and their gradients given do `[T // s, H, D]` or `[T // s, H, l, D]`."""

    def __init__(self, setting: WindowSetting, x: Tensor, weight: Tensor | None, do: Tensor) -> None:
        super().__init__()
        self.setting, self.x, self.do = setting, x.detach(), do
        size = setting.kernel_size
        mean = torch.full((setting.num_kv_heads, size), 1 / size, device=x.device)
        self.weight = mean if weight is None else weight.detach().float()

    @property
    def rows(self) -> Tensor:
        """Some windows."""
        number = self.setting.num_windows
        spread = {0, 1, number - 1, *(number * i // 8 for i in range(8))}
        return self._positions(spread, number)

    @property
    def unowned(self) -> Tensor:
        """Rows after the last window, which gathering fills with zeros."""
        return torch.arange(self.setting.num_windows, self.setting.num_rows, device=self.x.device)

    @property
    def tokens(self) -> Tensor:
        number, size, stride = self.setting.num_tokens, self.setting.kernel_size, self.setting.kernel_stride
        edges = {*range(size + 1), *range(number - size - stride, number), *(number * i // 8 + i for i in range(8))}
        return self._positions(edges, number)

    def _positions(self, picked: set[int], number: int) -> Tensor:
        return torch.tensor(sorted(i for i in picked if 0 <= i < number), dtype=torch.long, device=self.x.device)

    def compute(self, name: str) -> dict[str, Tensor]:
        compute = {"pooled": self.pooled, "windows": self.gathered_and_zeros, "dx": self.dx, "dweight": self.dweight}
        return {name: compute[name]()}

    def sample(self, name: str, result: Tensor) -> Tensor:
        if name == "dweight":
            return result.float()
        rows = {"pooled": self.rows, "windows": torch.cat([self.rows, self.unowned]), "dx": self.tokens}[name]
        return result.detach()[rows].float()

    def gathered(self) -> Tensor:
        """The sampled windows `[n, H, l, D]`."""
        place = torch.arange(self.setting.kernel_size, device=self.x.device)
        return self.x[self.rows[:, None] * self.setting.kernel_stride + place].float().transpose(1, 2)

    def gathered_and_zeros(self) -> Tensor:
        gathered = self.gathered()
        return torch.cat([gathered, gathered.new_zeros(len(self.unowned), *gathered.shape[1:])])

    def pooled(self) -> Tensor:
        return torch.einsum("nhld,hl->nhd", self.gathered(), self.weight)

    def dx(self) -> Tensor:
        """Over the windows that cover a token; `[n, H, D]`."""
        size, stride, tokens = self.setting.kernel_size, self.setting.kernel_stride, self.tokens
        dx = torch.zeros(len(tokens), *self.x.shape[1:], device=self.x.device)
        for back in range(size // stride):
            window = tokens // stride - back
            there = (window >= 0) & (window < self.setting.num_windows)
            place, window = (tokens - window * stride)[there], window[there]
            if self.do.dim() == 4:
                dx[there] += self.do[window, :, place].float()
            else:
                dx[there] += self.do[window].float() * self.weight.t()[place][:, :, None]
        return dx

    def dweight(self) -> Tensor:
        """`[H, l]`, over every window."""
        number, stride = self.setting.num_windows, self.setting.kernel_stride
        do = self.do[:number].float()
        columns = (self.x[place::stride][:number].float() for place in range(self.setting.kernel_size))
        return torch.stack([torch.einsum("nhd,nhd->h", column, do) for column in columns], 1)


class SelectionOracle:
    """The rules of a selection for every query, and for some that no better-scored blocks were left out."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs, self.attention = inputs, CompressedOracle(inputs)
        self.setting: WindowSetting = self.attention.setting

    def check(self, block_indices: Tensor) -> dict[str, float]:
        """The largest part of the best score that a sampled query lost.

        Raises:
            WrongResult: naming the rule that is broken, or the loss.
        """
        for start in range(0, self.setting.num_tokens, QUERIES_AT_A_TIME):
            self.check_rules(block_indices[start : start + QUERIES_AT_A_TIME], start)
        lost = max(self.lost(block_indices, head) for head in self.attention.heads)
        if not lost <= SCORE_LOST:
            raise WrongResult(f"the chosen blocks' scores add up to {lost:.2%} less than the best; allowed is {SCORE_LOST:.1%}")
        return {"score_lost": lost}

    def check_rules(self, index: Tensor, start: int) -> None:
        """docs/spec.md, section 4, for some successive queries: index `[n, H, T_sel]`."""
        x, slot = self.setting, torch.arange(index.shape[-1], device=index.device)
        own = (start + torch.arange(len(index), device=index.device))[:, None, None] // x.block_size
        number = (own + 1).clamp(max=x.num_blocks)
        valid, init, local = slot < number, slot < x.init_blocks, slot >= number - x.local_blocks
        rules = {
            "its shape or dtype": index.dtype == torch.int32 and index.shape[1:] == (x.num_kv_heads, x.num_blocks),
            "how many blocks there are": ((index >= 0) == valid).all(),
            "padding with -1": (index[~valid.expand_as(index)] == -1).all(),
            "ascending order": ((index.diff(dim=-1) > 0) | ~valid[..., 1:]).all(),
            "no block of the future": (index <= own).all(),
            "the initial blocks": ((index == slot) | ~(valid & init)).all(),
            "the local blocks": ((index == own - (number - 1 - slot)) | ~(valid & local)).all(),
        }
        for rule, kept in rules.items():
            if not kept:
                raise WrongResult(f"block_indices break a rule: {rule} (queries {start} to {start + len(index) - 1})")

    def block_scores(self, queries: Tensor, head: int) -> Tensor:
        """The group's attention weights, each window's once for every stride that it shares with a block; `[n, M]`."""
        x = self.setting
        p = self.attention.rows(queries, head)["p"].sum(1)  # [n, N]
        span, units = x.kernel_size // x.kernel_stride, x.block_size // x.kernel_stride
        blocks = -(-x.num_tokens // x.block_size)
        mass = p.new_zeros(len(p), blocks * units)
        for shift in range(span):
            mass[:, shift : shift + p.shape[1]] += p
        return mass.unflatten(1, (blocks, units)).sum(-1)

    def lost(self, block_indices: Tensor, head: int) -> float:
        x, worst = self.setting, 0.0
        for queries in self.attention.chunks(self.attention.queries):
            scores = self.block_scores(queries, head)
            own, block = queries[:, None] // x.block_size, torch.arange(scores.shape[1], device=scores.device)
            free = (block >= x.init_blocks) & (block <= own - x.local_blocks)
            scores = scores * free
            index = block_indices[queries, head].long()
            found = scores.gather(1, index.clamp(min=0)).where(index >= 0, 0).sum(1)
            best = scores.topk(min(x.num_blocks - x.init_blocks - x.local_blocks, scores.shape[1]), dim=1).values.sum(1)
            worst = max(worst, float(((best - found) / best.clamp(min=1e-30)).max()))
        return worst
