"""What the shared table of cases does not reach of the compression kernels: the mean, weights of
other dtypes, small tiles."""

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops, reference
from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.compression import triton as compress
from nsa_fsa.ops.compression.triton import TileSize
from nsa_fsa.sequences import Sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (5, 0, 23, 18, 0, 11)
# float32, and sums of some dozen numbers around 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def starts(lengths):
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=DEVICE)


def make(dim, kernel_size, num_heads=2):
    x = torch.randn(sum(LENGTHS), num_heads, dim, device=DEVICE)
    return x, torch.randn(num_heads, kernel_size, device=DEVICE), starts(LENGTHS)


def where(cu_seqlens, *, kernel_size, kernel_stride):
    """The sequences and the windows, as the launchers take them; they do not look at max_seqlen."""
    return Sequences(cu_seqlens, sum(LENGTHS)), Windows(kernel_size, kernel_stride)


def random_gradient(pooled, x, cu_seqlens, *, kernel_size, kernel_stride):
    """NaN in rows that no window owns."""
    do = torch.randn_like(pooled)
    do[~reference.window_rows(x, cu_seqlens, kernel_size, kernel_stride, None)[1]] = torch.nan
    return do


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **CLOSE)


# A program has two windows, or hops, or eight; one of the weights' gradient two positions of
# several, or all.
@pytest.mark.parametrize("size", [TileSize(32, 1), TileSize(128, 1)], ids=str)
@pytest.mark.parametrize("windows", [(8, 4), (7, 7), (3, 1)], ids=str)
def test_small_tiles(windows, size, monkeypatch):
    """Tiles end inside sequences, between them and where nothing is owned; weights are summed over
    many programs."""
    monkeypatch.setattr(compress, "WEIGHT_MIN_WINDOWS", 1)
    monkeypatch.setattr(compress, "WEIGHT_PROGRAMS", 40)

    sizes = dict(zip(("kernel_size", "kernel_stride"), windows, strict=True))
    x, weight, cu_seqlens = make(13, sizes["kernel_size"])
    wide = x.double()
    pooled = compress.pool_windows(x, weight, *where(cu_seqlens, **sizes), size=size)
    check([pooled], [reference.pool_windows(wide, weight.double(), cu_seqlens, **sizes)])
    do = random_gradient(pooled, x, cu_seqlens, **sizes)
    check(
        compress.pool_windows_backward(
            do, x, weight, *where(cu_seqlens, **sizes), size_dx=size, size_dweight=size
        ),
        reference.pool_windows_backward(do.double(), wide, weight.double(), cu_seqlens, **sizes),
    )

    gathered = compress.gather_windows(x, *where(cu_seqlens, **sizes), size=size)
    assert torch.equal(gathered, reference.gather_windows(x, cu_seqlens, **sizes))
    do = random_gradient(gathered, x, cu_seqlens, **sizes)
    check(
        [compress.gather_windows_backward(do, x, *where(cu_seqlens, **sizes), size=size)],
        [reference.gather_windows_backward(do.double(), wide, cu_seqlens, **sizes)],
    )


@pytest.mark.parametrize("max_windows", [1, 3, 128])
def test_windows_of_a_program(max_windows, monkeypatch):
    """However many windows a program adds up, the gradient of the weights is the same
    to rounding."""
    monkeypatch.setattr(compress, "WEIGHT_MIN_WINDOWS", 1)
    monkeypatch.setattr(compress, "WEIGHT_PROGRAMS", 2)
    monkeypatch.setattr(compress, "WEIGHT_MAX_WINDOWS", max_windows)
    sizes = dict(kernel_size=4, kernel_stride=2)
    x, weight, cu_seqlens = make(16, 4)
    do = random_gradient(
        compress.pool_windows(x, weight, *where(cu_seqlens, **sizes)), x, cu_seqlens, **sizes
    )
    _, found = compress.pool_windows_backward(do, x, weight, *where(cu_seqlens, **sizes))
    _, expected = reference.pool_windows_backward(
        do.double(), x.double(), weight.double(), cu_seqlens, **sizes
    )
    check([found], [expected])


def test_mean():
    sizes = dict(kernel_size=6, kernel_stride=3)
    x, _, cu_seqlens = make(20, 6)
    pooled = compress.pool_windows(x, None, *where(cu_seqlens, **sizes))
    check([pooled], [reference.pool_windows(x.double(), None, cu_seqlens, **sizes)])
    do = random_gradient(pooled, x, cu_seqlens, **sizes)
    dx, dweight = compress.pool_windows_backward(do, x, None, *where(cu_seqlens, **sizes))
    assert dweight is None
    check(
        [dx],
        [reference.pool_windows_backward(do.double(), x.double(), None, cu_seqlens, **sizes)[0]],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights(dtype):
    """Of any dtype and strides, which their gradient's dtype follows;
    all arithmetic is in float32."""
    sizes = dict(kernel_size=8, kernel_stride=4)
    x, weight, cu_seqlens = make(16, 8)
    weight = weight.to(dtype).T.contiguous().T
    pooled = compress.pool_windows(x, weight, *where(cu_seqlens, **sizes))
    check([pooled], [reference.pool_windows(x.double(), weight.double(), cu_seqlens, **sizes)])
    do = random_gradient(pooled, x, cu_seqlens, **sizes)
    dx, dweight = compress.pool_windows_backward(do, x, weight, *where(cu_seqlens, **sizes))
    expected = reference.pool_windows_backward(
        do.double(), x.double(), weight.double(), cu_seqlens, **sizes
    )
    check([dx], expected[:1])
    assert dweight.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(dweight.double(), expected[1], rtol=rounding, atol=rounding)


def test_unowned_rows_are_zero():
    """Unspecified, but then not what happens to stand in the memory: compiled and eager runs give
    the same bits."""
    sizes = dict(kernel_size=8, kernel_stride=4)
    x, weight, cu_seqlens = make(16, 8)
    owned = reference.window_rows(x, cu_seqlens, 8, 4, None)[1]
    assert not owned.all()
    x[:] = torch.inf
    assert (compress.pool_windows(x, weight, *where(cu_seqlens, **sizes))[~owned] == 0).all()
    assert (compress.gather_windows(x, *where(cu_seqlens, **sizes))[~owned] == 0).all()


@pytest.mark.parametrize("operator", ["pool_windows", "gather_windows"])
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((9, 1, 8), torch.float64, "float64"), ((9, 1, 257), torch.float32, "257.*at most 256")],
)
def test_what_it_cannot_run(operator, shape, dtype, reason):
    x = torch.ones(shape, dtype=dtype, device=DEVICE, requires_grad=True)
    arguments = (x, None) if operator == "pool_windows" else (x,)
    rest = dict(cu_seqlens=starts((9,)), max_seqlen=9, kernel_size=4, kernel_stride=2)
    with pytest.raises(
        ValueError, match=f"backend='triton' of {operator} does not support this: .*{reason}.*Fix"
    ):
        getattr(ops, operator)(*arguments, **rest, backend="triton")
    getattr(ops, operator)(*arguments, **rest).sum().backward()  # "auto" takes the reference
    assert (x.grad[-1] == 0).all()


def test_sequences_end_where_cu_seqlens_does():
    """What lies behind cu_seqlens, here one more boundary, does not become a sequence: rows past
    its end are in no window."""
    sizes = dict(kernel_size=8, kernel_stride=4)
    x, weight = torch.randn(24, 1, 16, device=DEVICE), torch.randn(1, 8, device=DEVICE)
    cu_seqlens, dpooled = starts((13, 11))[:2], torch.randn(6, 1, 16, device=DEVICE)
    _, found = compress.pool_windows_backward(dpooled, x, weight, *where(cu_seqlens, **sizes))
    _, expected = compress.pool_windows_backward(
        dpooled[:3], x[:13], weight, *where(cu_seqlens, **sizes)
    )
    assert torch.equal(found, expected)
