"""Sequences that are decoded step by step, and what they give as a whole."""

import dataclasses
from dataclasses import dataclass

import torch

from nsa_fsa.decode import Pages, Pooling, append_tokens, launch, nsa_decode
from nsa_fsa.modules.rotary import apply_rotary
from nsa_fsa.ops import nsa_attention, pool_windows
from tests.cases import device_of

NAN = float("nan")
SHARES = dict(
    score_shares=4, score_least=1, shares=2, sliding_shares=2, score_windows=16, keys=16, ranked=32
)


@dataclass(frozen=True)
class Problem:
    """Sizes, and how the sequences are kept; `lengths` before the first step."""

    lengths: tuple = (0, 5, 40, 97)
    num_new: int = 1
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    kernel_size: int = 16
    kernel_stride: int = 8
    block_size: int = 16
    num_selected_blocks: int = 4
    init_blocks: int = 1
    local_blocks: int = 1
    window_size: int = 24
    dense_below: int = 0
    page_size: int = 32  # 0: one page for a sequence
    rotary_dim: int = 8  # 0: keys are compressed as they are
    logits: bool = True
    embedding: bool = True
    scale: float = 0.4
    gates: str = "per_head"
    dtype: torch.dtype = torch.float32
    device: str = device_of("triton")
    seed: int = 0

    @property
    def windows(self):
        return dict(kernel_size=self.kernel_size, kernel_stride=self.kernel_stride)

    @property
    def selection(self):
        names = ("block_size", "num_selected_blocks", "init_blocks", "local_blocks")
        return {x: getattr(self, x) for x in (*names, "window_size", "dense_below", "scale")}

    def normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64).to(self.dtype).to(self.device)


def angles(problem, length):
    """cos and sin `[length, rotary_dim]`, float64."""
    half = problem.rotary_dim // 2
    frequency = 100.0 ** -(torch.arange(half, device=problem.device).double() / max(half, 1))
    angle = torch.arange(length, device=problem.device).double()[:, None] * frequency
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


class Sequence:
    """All tokens of one sequence."""

    def __init__(self, problem, length):
        p, heads = problem, problem.num_kv_heads
        self.q = p.normal(length, heads * p.group_size, p.head_dim)
        self.k = p.normal(length, heads, p.head_dim)  # as it is cached
        self.v = p.normal(length, heads, p.v_head_dim)
        gates = heads * p.group_size if p.gates == "per_head" else 1
        self.gate_logits = p.normal(length, gates, 3)


class Run:
    """Sequences in pages, of which `step` decodes the next tokens."""

    def __init__(self, problem, backend, num_steps=2, shared=None, page_order=None):
        p = self.problem = problem
        self.backend = backend
        torch.manual_seed(p.seed)
        longest = max(p.lengths) + num_steps * p.num_new
        self.sequences = [Sequence(p, n + num_steps * p.num_new) for n in p.lengths]
        heads, shapes = p.num_kv_heads, (p.head_dim, p.v_head_dim)
        pooling = [
            Pooling(
                p.normal(heads, p.kernel_size) if p.logits else None,
                p.normal(heads, p.kernel_size, width) if p.embedding else None,
            )
            for width in shapes
        ]
        self.pool_k, self.pool_v = pooling
        self.turn = None
        if p.rotary_dim:
            half = p.rotary_dim // 2
            self.turn = torch.stack(angles(p, p.kernel_size))[..., :half].float()
        number = len(p.lengths)
        size = p.page_size or -(-longest // p.block_size) * p.block_size
        of_sequence = -(-longest // size)
        if page_order is None:
            page_order = torch.randperm(number * of_sequence)
        table = page_order.view(number, of_sequence).int().to(p.device)
        self.pages = Pages.empty(
            number * of_sequence + 1, size, heads, *shapes, p.kernel_stride, table, p.dtype
        )
        for x in self.pages[:4]:
            x.fill_(NAN)
        self.lengths = torch.tensor(p.lengths, dtype=torch.int32, device=p.device)
        for b in range(number):  # prompts of any length are appended alone
            if p.lengths[b]:
                one = self.pages._replace(table=table[b : b + 1])
                # The interpreter takes a hundredth of a second for a token.
                long = p.device == "cpu" and p.lengths[b] > 50
                self.backend = "reference" if long else backend
                self.append(one, [b], 0, self.lengths[b : b + 1], p.lengths[b])
        self.backend = backend

    def append(self, pages, which, start, lengths, num_new):
        """start: the first of the new tokens, where there is one sequence."""
        parts = [self.sequences[b] for b in which]
        begins = [int(n) - num_new for n in lengths] if len(which) > 1 else [start]
        pairs = list(zip(parts, begins, strict=True))
        k, v = (
            torch.cat([getattr(x, name)[n : n + num_new] for x, n in pairs]) for name in ("k", "v")
        )
        self.write(k, v, pages, lengths)

    def write(self, k, v, pages, lengths):
        """The new tokens of all sequences of some pages."""
        p, rotation = self.problem, None
        if p.rotary_dim:
            num_new = k.shape[0] // lengths.shape[0]
            cos, sin = angles(p, max(int(lengths.max()), 1))
            position = (lengths.long()[:, None] - num_new).clamp(min=0)
            position = (position + torch.arange(num_new, device=p.device)).flatten()
            rotation = tuple(x[position.clamp(max=len(x) - 1)].to(p.dtype) for x in (cos, sin))
        append_tokens(
            k,
            v,
            pages,
            lengths,
            **p.windows,
            pool_k=self.pool_k,
            pool_v=self.pool_v,
            turn=self.turn,
            rotation=rotation,
            backend=self.backend,
        )

    def step(self, which=None):
        """Decodes the next tokens of the sequences `which`, by default all; the others rest."""
        p, new = self.problem, self.problem.num_new
        which = list(range(len(self.sequences))) if which is None else which
        active = torch.zeros_like(self.lengths)
        for b in which:
            self.lengths[b] += new
            active[b] = self.lengths[b]
        given = {"q": [], "k": [], "v": [], "gate_logits": []}
        for b, sequence in enumerate(self.sequences):
            stop = int(active[b])
            for name, parts in given.items():
                x = getattr(sequence, name)
                parts.append(x[stop - new : stop] if stop else torch.full_like(x[:new], NAN))
        given = {name: torch.cat(parts) for name, parts in given.items()}
        self.write(given["k"], given["v"], self.pages, active)
        return nsa_decode(
            given["q"],
            given["gate_logits"],
            self.pages,
            active,
            **p.windows,
            **p.selection,
            backend=self.backend,
        )

    def whole(self, b):
        """o and block indices of a sequence so far, in float64, by operators of training."""
        p, length = self.problem, int(self.lengths[b])
        s = self.sequences[b]
        q, k, v, gates = (x[:length].double() for x in (s.q, s.k, s.v, s.gate_logits))
        ends = torch.tensor([0, length], dtype=torch.int32, device=p.device)
        cos, sin = angles(p, length)
        k_src = apply_rotary(k, cos, -sin) if p.rotary_dim else k
        where = dict(cu_seqlens=ends, max_seqlen=length)
        options = dict(**where, **p.windows, backend="reference")

        def compress(x, pooling):
            weight = None if pooling.logits is None else pooling.logits.double().softmax(-1)
            pooled = pool_windows(x, weight, **options)
            if pooling.embedding is not None:
                shares = torch.full_like(pooling.embedding[..., 0].double(), 1 / p.kernel_size)
                shares = shares if weight is None else weight
                pooled = pooled + torch.einsum("hl,hld->hd", shares, pooling.embedding.double())
            return pooled

        k_cmp, v_cmp = compress(k_src, self.pool_k), compress(v, self.pool_v)
        if p.rotary_dim:
            first = torch.arange(k_cmp.shape[0], device=p.device) * p.kernel_stride
            k_cmp = apply_rotary(k_cmp, cos[first], sin[first])
        o, branches = nsa_attention(
            q, k, v, k_cmp, v_cmp, gates, **options, **p.selection, return_branches=True
        )
        return o, branches.block_indices


def small_shares(monkeypatch):
    """Kernels that cut even short sequences, and take few programs in the interpreter."""
    original = launch.default_config
    monkeypatch.setattr(
        launch, "default_config", lambda *x: dataclasses.replace(original(*x), **SHARES)
    )
    monkeypatch.setattr(launch, "LISTED_BY_WARP", 16)
