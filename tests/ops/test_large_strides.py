"""Heads that lie more than 2^31 elements apart, as those of a tensor laid out head by head do,
give what neighbours give.

The tensors are views of a sparse file, in whose middle they lie:
an offset that wraps around in 32 bits reads zeros there instead of ending the process.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip(
        "the test_gpu.py of each operator does this with real memory", allow_module_level=True
    )

from nsa_fsa import ops

APART = 1_100_000_000  # elements between two heads: the third is out of reach of an int32
# And where it seems to be instead, 2^32 elements before, is still part of the memory.
MIDDLE = 2 * APART
LENGTHS = (19, 0, 5)
T, D = sum(LENGTHS), 16
CU_SEQLENS = torch.tensor([0, 19, 19, 24], dtype=torch.int32)
LAYOUT = (CU_SEQLENS, max(LENGTHS))
WINDOWS = dict(kernel_size=8, kernel_stride=4)
BLOCKS = dict(block_size=16, init_blocks=0, local_blocks=0)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """A function that copies a tensor, its heads, or what `axis` counts, APART."""
    path = tmp_path_factory.mktemp("large_strides") / "sparse"
    memory = torch.from_file(
        str(path), shared=True, size=4 * (MIDDLE + 3 * APART), dtype=torch.uint8
    )
    used = 0

    def copy(x, axis=1):
        nonlocal used
        strides = list(torch.empty(x.movedim(axis, 0).shape[1:]).stride())
        strides.insert(axis, APART)
        # .data: what is written for one tensor does not count as a change of another.
        y = memory.view(x.dtype).as_strided(x.shape, strides, MIDDLE + used).data
        used += x.numel()
        return y.copy_(x)

    yield copy
    path.unlink()


def rows(num_rows, num_heads):
    return torch.randn(num_rows, num_heads, D)


def assert_same(operator, inputs, spread):
    """Results and gradients of operator(*inputs), a tuple of float tensors,
    wherever the inputs' heads lie.
    """
    results = []
    for place in (lambda x: x.clone(), spread):
        leaves = [place(x).requires_grad_() for x in inputs]
        outputs = [y for y in operator(*leaves) if y is not None]
        differentiable = [y for y in outputs if y.requires_grad]
        grads = [
            place(torch.sin(torch.arange(y.numel()).reshape(y.shape).float()))
            for y in differentiable
        ]
        results.append((*outputs, *torch.autograd.grad(differentiable, leaves, grads)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(3, 1), (1, 3)])
def test_compressed_attention(num_kv_heads, group_size, spread):
    def operator(q, k, v):
        return ops.compressed_attention(
            q, k, v, *LAYOUT, **WINDOWS, return_lse=True, backend="triton"
        )

    q, (k, v) = rows(T, num_kv_heads * group_size), (rows(T // 4, num_kv_heads) for _ in range(2))
    assert_same(operator, (q, k, v), spread)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("backend", ["triton_kv_major", "triton_query_major"])
def test_selected_attention(backend, num_kv_heads, group_size, spread):
    indices = torch.randint(0, 2, (T, num_kv_heads, 1), dtype=torch.int32)
    counts = torch.randint(0, 2, (T, num_kv_heads), dtype=torch.int32)
    chosen = (indices, counts)

    def operator(q, k, v):
        nonlocal chosen
        found = ops.selected_attention(
            q,
            k,
            v,
            chosen[0],
            *LAYOUT,
            block_counts=chosen[1],
            **BLOCKS,
            return_lse=True,
            backend=backend,
        )
        chosen = (spread(indices), spread(counts))  # the next time
        return found

    q, (k, v) = rows(T, num_kv_heads * group_size), (rows(T, num_kv_heads) for _ in range(2))
    assert_same(operator, (q, k, v), spread)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(3, 1), (1, 3)])
def test_select_blocks(num_kv_heads, group_size, spread):
    sizes = dict(BLOCKS, block_size=8, num_selected_blocks=1, **WINDOWS, backend="triton")
    q, k = rows(T, num_kv_heads * group_size), rows(T // 4, num_kv_heads)
    _, lse = ops.compressed_attention(
        q, k, k, *LAYOUT, **WINDOWS, return_lse=True, backend="reference"
    )
    expected = ops.select_blocks(q, k, lse, *LAYOUT, **sizes)
    assert torch.equal(
        ops.select_blocks(spread(q), spread(k), spread(lse), *LAYOUT, **sizes), expected
    )


def test_windows(spread):
    weight = torch.rand(3, 8)
    assert_same(
        lambda x: (ops.pool_windows(x, weight, *LAYOUT, **WINDOWS, backend="triton"),),
        (rows(T, 3),),
        spread,
    )
    assert_same(
        lambda x: (ops.pool_windows(x, None, *LAYOUT, **WINDOWS, backend="triton"),),
        (rows(T, 3),),
        spread,
    )
    assert_same(
        lambda x: (ops.gather_windows(x, *LAYOUT, **WINDOWS, backend="triton"),),
        (rows(T, 3),),
        spread,
    )


def test_gated_combine(spread):
    branches = [rows(T, 3) for _ in range(3)]
    assert_same(
        lambda *x: (ops.gated_combine(*x, backend="triton"),),
        (torch.randn(T, 3, 3), *branches),
        spread,
    )
    shared = torch.randn(T, 1, 3)
    logits = [shared, spread(shared, axis=2)]
    found = [ops.gated_combine(x, *branches, backend="triton") for x in logits]
    assert torch.equal(*found)
