"""pool_windows and gather_windows on a GPU: rows 9, 10, 11 and 13 of reliability.md."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from nsa_fsa import ops, reference
from tests import on_gpu

pytestmark = pytest.mark.gpu

LENGTHS = (1000, 37, 0, 3000, 64)
OPERATORS = ("pool_windows", "mean_windows", "gather_windows")
RESULTS = ("output", "dx", "dweight")
SHAPES = [(128, 32, 16), (80, 48, 16), (64, 4, 1)]  # head width, window length and step


@dataclass
class Problem:
    """Windows of packed sequences. The output's gradient is NaN in rows that no window owns."""

    operator: str  # one of OPERATORS
    x: torch.Tensor
    weight: torch.Tensor | None
    do: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    kernel_size: int
    kernel_stride: int

    def forward(self, backend="triton"):
        run = ops.gather_windows if self.operator == "gather_windows" else ops.pool_windows
        tensors = (self.x,) if self.operator == "gather_windows" else (self.x, self.weight)
        sizes = dict(kernel_size=self.kernel_size, kernel_stride=self.kernel_stride)
        return run(*tensors, self.cu_seqlens, max(self.lengths), **sizes, backend=backend)

    def leaves(self):
        return [self.x] if self.weight is None else [self.x, self.weight]

    def run(self, backend="triton"):
        """RESULTS, without dweight where there is no weight."""
        o = self.forward(backend)
        return [o.detach(), *torch.autograd.grad(o, self.leaves(), self.do)]

    def alone(self, b):
        """Sequence b by itself."""
        start, length = sum(self.lengths[:b]), self.lengths[b]
        first, number = start // self.kernel_stride, length // self.kernel_stride
        x, do = self.x.detach()[start : start + length], self.do[first : first + number]
        return dataclasses.replace(
            self,
            x=x.clone().requires_grad_(),
            do=do.clone(),
            lengths=(length,),
            cu_seqlens=on_gpu.starts((length,)),
        )

    def of_heads(self, heads):
        """Some heads, in float64."""
        x, do = self.x.detach()[:, heads].double().requires_grad_(), self.do[:, heads].double()
        weight = (
            None if self.weight is None else self.weight.detach()[heads].double().requires_grad_()
        )
        return dataclasses.replace(self, x=x, do=do, weight=weight)


def owned_windows(p):
    return reference.window_rows(p.x.detach(), p.cu_seqlens, p.kernel_size, p.kernel_stride, None)[
        1
    ]


def make(
    operator, lengths, num_heads, dim, kernel_size, kernel_stride, dtype=torch.bfloat16, seed=0
):
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device="cuda", generator=generator)

    total = sum(lengths)
    x = randn(total, num_heads, dim).requires_grad_()
    weight = (
        randn(num_heads, kernel_size, dtype=torch.float32).requires_grad_()
        if operator == "pool_windows"
        else None
    )
    inner = (kernel_size, dim) if operator == "gather_windows" else (dim,)
    do = randn(total // kernel_stride, num_heads, *inner)
    p = Problem(
        operator, x, weight, do, tuple(lengths), on_gpu.starts(lengths), kernel_size, kernel_stride
    )
    do[~owned_windows(p)] = torch.nan
    return p


def assert_same_bits(found, expected, what):
    for name, a, b in zip(RESULTS, found, expected, strict=False):
        assert torch.equal(a, b), f"{name}, {what}: {(a != b).sum()} of {a.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_windows(operator, shape, dtype):
    """So many that every program of the weights' gradient adds up several; against float64."""
    p = make(operator, (30_000, 0, 17_000, 3), 8, *shape, dtype=dtype)
    owned, heads = owned_windows(p), [0, 7]
    found, expected = p.run(), p.of_heads(heads).run("reference")
    on_gpu.assert_rms_close("output", found[0][owned][:, heads], expected[0][owned], dtype)
    on_gpu.assert_rms_close("dx", found[1][:, heads], expected[1], dtype)
    if operator == "pool_windows":  # float32 like the weights, from exact products, whatever x is
        on_gpu.assert_rms_close("dweight", found[2][heads], expected[2], torch.float32)


# Row 9: the same bits in every run, in company and alone.


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_repeatable(operator, shape):
    p = make(operator, LENGTHS, 3, *shape)
    first = p.run()
    for run in range(1, 50):
        assert_same_bits(p.run(), first, f"run {run}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_sequence_alone_and_among_others(operator, shape):
    p = make(operator, LENGTHS, 3, *shape)
    output, dx, *_ = p.run()
    for b, length in enumerate(LENGTHS):
        start, first = sum(LENGTHS[:b]), sum(LENGTHS[:b]) // p.kernel_stride
        number = max(0, (length - p.kernel_size) // p.kernel_stride + 1)
        found = p.alone(b).run()
        expected = [output[first : first + number], dx[start : start + length]]
        assert_same_bits(
            [found[0][:number], found[1]], expected, f"sequence {b} of {length} tokens"
        )


# Row 10: more than 2^31 elements, of x, of the windows, and, where the step is 1,
# of pooled windows too.


@on_gpu.needs(60)
@pytest.mark.parametrize("windows", [(32, 16), (2, 1)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_offsets_past_2_31(operator, windows):
    p = make(operator, (41_000, 0, 29_000), 256, 128, *windows)
    assert p.x.numel() > 2**31
    owned, heads = owned_windows(p), [0, 131, 255]
    found = p.run()
    found = [found[0][:, heads], found[1][:, heads], *(x[heads] for x in found[2:])]
    expected = p.of_heads(heads).run("reference")
    on_gpu.assert_rms_close("output", found[0][owned], expected[0][owned])
    for rows in (slice(0, 500), slice(-500, None), slice(None)):
        on_gpu.assert_rms_close(f"dx {rows}", found[1][rows], expected[1][rows])
    if operator == "pool_windows":
        on_gpu.assert_rms_close("dweight", found[2], expected[2], torch.float32)


@on_gpu.needs(60)
def test_strides_past_2_31():
    """One head of many, of rows far apart: the offset of a single row inside a window is more than
    an int32 counts."""
    rows, width = 9, 2**29
    memory = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device="cuda")
    memory[:, :128] = torch.randn(rows, 128, device="cuda")
    x = memory[:, :128].unsqueeze(1)  # [9, 1, 128]
    assert x.stride(0) * (rows - 1) > 2**31
    sizes = dict(kernel_size=8, kernel_stride=1, backend="triton")
    for run, tensors in ((ops.pool_windows, (None,)), (ops.gather_windows, ())):
        found = run(x, *tensors, on_gpu.starts((rows,)), rows, **sizes)
        expected = run(x.contiguous(), *tensors, on_gpu.starts((rows,)), rows, **sizes)
        assert torch.equal(found, expected)
        assert not found[:2].isnan().any()


# Row 11: nothing waits for the GPU, so a CUDA graph can record everything.


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_host_syncs(operator):
    warm, other = (make(operator, lengths, 2, *SHAPES[0]) for lengths in (LENGTHS, (50, 1400)))
    warm.run()
    with on_gpu.syncs_forbidden():
        warm.run()
        other.run()  # other lengths, another number of sequences


@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_graph(operator):
    """Recorded once; replayed with other values and lengths it gives the same bits as
    running anew."""
    lengths = (1000, 0, 77, 2000)
    p = make(operator, lengths, 2, *SHAPES[0])
    p.lengths = (sum(lengths),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = on_gpu.record(p.run)

    for seed, others in ((1, lengths), (2, (3000, 77, 0, 0)), (3, (0, 1, 64, 3012))):
        other = make(operator, others, 2, *SHAPES[0], seed=seed)
        with torch.no_grad():
            for name in ("x", "weight", "do", "cu_seqlens"):
                if getattr(p, name) is not None:
                    getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        replayed = [x.clone() for x in recorded]
        assert_same_bits(replayed, p.run(), f"{others}")
        assert_same_bits(replayed, other.run(), f"{others}, anew")


# Row 13: nothing piles up, and beside the results there is next to no workspace.


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_growth_over_50_steps(operator):
    p = make(operator, (1000, 3000), 4, *SHAPES[0])
    on_gpu.assert_no_growth(p.run)


@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_peak(operator, expanded):
    """x takes 64 MiB and its windows 128; the gradient of a sum, one number expanded,
    is not copied either."""
    p = make(operator, (20_000, 0, 12_768), 8, *SHAPES[0])
    if expanded:
        p.do = torch.ones((), dtype=p.do.dtype, device="cuda").expand(p.do.shape)
    p.run()  # loads the kernels
    o, peak = on_gpu.extra(p.forward)
    allowed = on_gpu.num_bytes(o) + on_gpu.MIB
    assert peak <= allowed, (
        f"forward: {peak / on_gpu.MIB:.1f} MiB, allowed are {allowed / on_gpu.MIB:.1f}"
    )
    grads, peak = on_gpu.extra(lambda: torch.autograd.grad(o, p.leaves(), p.do))
    # The parts of the weights' gradient: 512 x 8 heads x 32 positions x 4 bytes.
    allowed = on_gpu.num_bytes(*grads) + 4 * on_gpu.MIB
    assert peak <= allowed, (
        f"backward: {peak / on_gpu.MIB:.1f} MiB, allowed are {allowed / on_gpu.MIB:.1f}"
    )
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_somebody_wants_to_know_what_is_compiled(monkeypatch):
    """As vLLM does while it serves: what it would be told has no words for bundles of constants."""
    import triton

    def told(**compilation):
        pytest.fail("nobody is told")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", told)
    p = make("pool_windows", (500,), 1, 48, 28, 7)  # a shape that no other test compiles
    assert p.forward().isfinite()[owned_windows(p)].all()
