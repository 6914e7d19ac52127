"""Row 7 of reliability.md: block indices that no selection would produce must be harmless, and mean what spec.md says."""

import pytest
import torch

from nsa_fsa import ops
from tests import oracle
from tests.cases import Case, backends_of, call, device_of, gradients, make_inputs, widest_dtype

INT_MIN, INT_MAX = -(2**31), 2**31 - 1

CASE = Case("hostile", (0, 37, 5, 16), 2, 2, 32, 16, torch.float32, 8, 4, 8, 4, 1, 1, 8, seed=7, small=True)
NUM_BLOCKS = 5  # of the longest sequence

GUARD = 4096


def guarded(x):
    """A view in the middle of a larger buffer full of NaN: what is read out of bounds shows. Returns (view, buffer)."""
    buffer = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype, device=x.device)
    buffer[GUARD : GUARD + x.numel()] = x.flatten()
    return buffer[GUARD : GUARD + x.numel()].view(x.shape), buffer


def check(backend, block_indices, block_counts=None):
    """Output, lse and gradients with these indices equal the oracle's, and no buffer was written to."""
    dtype, rounding = widest_dtype(backend)
    x = make_inputs(CASE, dtype, device=device_of(backend))
    views = {name: guarded(getattr(x, name)) for name in ("q", "k", "v")}
    originals = {name: buffer.clone() for name, (_, buffer) in views.items()}
    x = x.replace(
        **{name: view.requires_grad_() for name, (view, _) in views.items()}, block_indices=block_indices.to(x.q.device)
    )
    o, lse = call("selected_attention", CASE, x, backend, block_counts=block_counts)

    y = make_inputs(CASE, torch.float64, requires_grad=True).replace(block_indices=block_indices.cpu())
    expected, lse_expected = oracle.oracle_selected(
        y.q, y.k, y.v, y.block_indices, block_size=CASE.block_size, scale=CASE.scale, cu_seqlens=y.cu_seqlens,
        block_counts=block_counts,
    )  # fmt: skip
    close = dict(rtol=10 * rounding, atol=10 * rounding)
    torch.testing.assert_close(o.double().cpu(), expected, **close)
    torch.testing.assert_close(lse.double().cpu(), lse_expected.detach(), **close)

    do = torch.randn_like(expected)
    found = gradients("selected_attention", o, x, do.to(o))
    for name, a, b in zip("qkv", found, gradients("selected_attention", expected, y, do), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, msg=lambda m, name=name: f"d{name}: {m}", **close)
    for name, (_, buffer) in views.items():
        # Compared as integers: NaN differs from itself.
        as_integers = torch.int64 if dtype == torch.float64 else torch.int32
        assert torch.equal(buffer.detach().view(as_integers), originals[name].view(as_integers)), f"{name} was written to"
    return o, lse, found


def indices_of(*entries):
    """The same entries for every query and KV head."""
    return torch.tensor(entries, dtype=torch.int32).expand(sum(CASE.lengths), CASE.num_kv_heads, -1).clone()


@pytest.mark.parametrize("value", [INT_MIN, INT_MIN + 1, -2, -1, NUM_BLOCKS, NUM_BLOCKS + 1, 1000, 2**28, INT_MAX - 1, INT_MAX])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_out_of_range_entry_selects_nothing(backend, value):
    """In every slot in turn. 2^28 * block_size is 2^31, where int32 arithmetic would wrap around to a valid position."""
    for slot in range(3):
        entries = [0, 1]
        entries.insert(slot, value)
        check(backend, indices_of(*entries))


@pytest.mark.parametrize("value", [-1, INT_MIN, INT_MAX, NUM_BLOCKS])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_nothing_valid(backend, value):
    """Output 0, lse -inf, gradients 0, not NaN."""
    o, lse, grads = check(backend, indices_of(value, value, value))
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_first_block_past_each_sequence(backend):
    """Also where the next sequence's rows begin right there, and where it is the query's own block plus one."""
    own = torch.cat([torch.arange(n) for n in CASE.lengths]) // CASE.block_size
    past = torch.cat([torch.full((n,), -(-n // CASE.block_size)) for n in CASE.lengths])
    for beyond in (past, own + 1):
        indices = indices_of(0, -1, -1)
        indices[:, :, 1] = beyond[:, None]
        check(backend, indices)


@pytest.mark.parametrize("entries", [(0, 0), (1, 1, 1, 1), (2, 0, 2, 0), (0, -1, 0), (4, 3, 2, 1, 0), (3, 0, 4, 1)], ids=str)
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_repeated_and_unsorted(backend, entries):
    """A repeated index counts once, in whatever order; padding may stand anywhere."""
    check(backend, indices_of(*entries))


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_random_garbage(backend):
    """Everything at once, other garbage for every query."""
    generator = torch.Generator().manual_seed(11)
    pool = torch.tensor([INT_MIN, -7, -1, 0, 1, 2, 3, 4, 5, 6, 2**28, INT_MAX], dtype=torch.int32)
    indices = pool[torch.randint(len(pool), (sum(CASE.lengths), CASE.num_kv_heads, 6), generator=generator)]
    check(backend, indices)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1000])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_block_counts_as_int(backend, count):
    check(backend, indices_of(1, 0, 3, 2), count)


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_block_counts_as_tensor(backend):
    """0, 1, 3, all, more than there are, and negative, mixed over queries and KV heads."""
    generator = torch.Generator().manual_seed(12)
    values = torch.tensor([0, 1, 3, 4, 5, INT_MAX, -1, INT_MIN], dtype=torch.int32)
    counts = values[torch.randint(len(values), (sum(CASE.lengths), CASE.num_kv_heads), generator=generator)]
    check(backend, indices_of(1, 0, 3, 2), counts.to(device_of(backend)))
    check(backend, indices_of(1, INT_MIN, 1, 0), counts.to(device_of(backend)))


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_no_slots_at_all(backend):
    o, lse, _ = check(backend, indices_of(0)[..., :0])
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_with_queries_at_the_end_of_a_gapped_buffer(backend):
    """Block numbers count from the sequence's first key; a block past the used rows reads nothing of the gap."""
    device = device_of(backend)
    k, v = torch.full((32, 1, 8), torch.nan, device=device), torch.full((32, 1, 8), torch.nan, device=device)
    k[3:13], v[3:13] = torch.randn(10, 1, 8, device=device), torch.randn(10, 1, 8, device=device)
    q = torch.randn(2, 1, 8, device=device)
    layout = dict(
        cu_seqlens=torch.tensor([0, 3, 32], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, 0, 2], dtype=torch.int32, device=device),
        seqused_k=torch.tensor([0, 10], dtype=torch.int32, device=device),
    )
    indices = torch.tensor([[[2, 0, 3, 7]], [[INT_MAX, 3, 2, -1]]], dtype=torch.int32, device=device)
    o, lse = ops.selected_attention(
        q, k, v, indices, max_seqlen=29, block_size=4, scale=0.5, return_lse=True, backend=backend, **layout
    )
    cpu = {name: x.cpu() for name, x in layout.items()}
    expected = oracle.oracle_selected(q.cpu(), k.cpu(), v.cpu(), indices.cpu(), block_size=4, scale=0.5, **cpu)
    torch.testing.assert_close((o.cpu(), lse.cpu()), expected)
