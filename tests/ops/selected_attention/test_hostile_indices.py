"""Row 7 of reliability.md: block indices that no selection would produce must be harmless,
and mean what spec.md says.
"""

import pytest
import torch

from nsa_fsa import ops
from tests import oracle
from tests.cases import (
    Case,
    backends_of,
    call,
    case_for,
    device_of,
    gradients,
    is_float,
    is_refused,
    make_inputs,
    on_a_gpu_only,
    widest_dtype,
)
from tests.guards import GUARD, assert_untouched, guarded, guarded_allocations

INT_MIN, INT_MAX = -(2**31), 2**31 - 1

CASE = Case(
    "hostile", (0, 33, 16), 2, 2, 32, 16, torch.float32, 8, 4, 8, 4, 1, 1, 8, seed=7, small=True
)
# No sequence has a block 5. 2^28 blocks of 8 are 2^31 keys, where int32 arithmetic would wrap
# around to a valid position.
OUT_OF_RANGE = (INT_MIN, INT_MIN + 1, -2, -1, 5, 6, 1000, 2**27, 2**28, INT_MAX - 1, INT_MAX)


def case_of(backend):
    return case_for(
        "selected_attention", backend, CASE, calls=0
    )  # small enough, whatever the indices


def check(backend, block_indices, block_counts=None):
    """Output, lse and gradients with these indices equal the oracle's,
    and nothing was read or written out of bounds.
    """
    case, (dtype, rounding) = case_of(backend), widest_dtype(backend)
    x = make_inputs(case, dtype, device=device_of(backend)).replace(
        block_indices=block_indices.to(device_of(backend))
    )
    given = {name: getattr(x, name) for name in ("q", "k", "v", "block_indices")}
    if isinstance(block_counts, torch.Tensor):
        given["block_counts"] = block_counts
    buffers = {}
    for name, value in given.items():
        given[name], buffers[name] = guarded(value)
    originals = {name: value.clone() for name, value in given.items()}
    counts = given.pop("block_counts", block_counts)
    x = x.replace(**{name: view.requires_grad_(is_float(view)) for name, view in given.items()})
    y = make_inputs(case, torch.float64, requires_grad=True).replace(
        block_indices=block_indices.cpu()
    )
    expected, lse_expected = oracle.oracle_selected(
        y.q,
        y.k,
        y.v,
        y.block_indices,
        block_size=case.block_size,
        scale=case.scale,
        cu_seqlens=y.cu_seqlens,
        block_counts=block_counts,
    )
    do = torch.randn_like(expected)
    with guarded_allocations():
        o, lse = call("selected_attention", case, x, backend, block_counts=counts)
        found = gradients("selected_attention", o, x, do.to(o))

    close = dict(rtol=10 * rounding, atol=10 * rounding)
    torch.testing.assert_close(o.double().cpu(), expected, **close)
    torch.testing.assert_close(lse.double().cpu(), lse_expected.detach(), **close)
    for name, a, b in zip(
        "qkv", found, gradients("selected_attention", expected, y, do), strict=True
    ):
        torch.testing.assert_close(
            a.double().cpu(), b, msg=lambda m, name=name: f"d{name}: {m}", **close
        )
    for name, buffer in buffers.items():
        assert_untouched(buffer, name)
        assert torch.equal(buffer[GUARD:-GUARD].view(originals[name].shape), originals[name]), (
            f"{name} was written to"
        )
    return o, lse, found


def indices_of(*entries):
    """The same entries for every query and KV head."""
    return (
        torch.tensor(entries, dtype=torch.int32)
        .expand(sum(CASE.lengths), CASE.num_kv_heads, -1)
        .clone()
    )


def out_of_range():
    """One value for every query and KV head, each of them many times."""
    values = torch.tensor(OUT_OF_RANGE, dtype=torch.int32)
    shape = (sum(CASE.lengths), CASE.num_kv_heads)
    return values[torch.arange(shape[0] * shape[1]) % len(values)].view(shape)


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_out_of_range_entry_selects_nothing(backend, slot):
    if slot != 1:
        on_a_gpu_only(backend)
    indices = indices_of(0, 1, 2)
    indices[..., slot] = out_of_range()
    check(backend, indices)


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_nothing_valid(backend):
    """Output 0, lse -inf, gradients 0, not NaN."""
    o, lse, grads = check(
        backend,
        torch.stack([out_of_range(), indices_of(-1)[..., 0], out_of_range().flip(0)], dim=-1),
    )
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_first_block_past_each_sequence(backend):
    """Also where the next sequence's rows begin right there, and where it is the query's own
    block plus one.
    """
    on_a_gpu_only(backend)
    block_size = case_of(backend).block_size
    own = torch.cat([torch.arange(n) for n in CASE.lengths]) // block_size
    past = torch.cat([torch.full((n,), -(-n // block_size)) for n in CASE.lengths])
    for beyond in (past, own + 1):
        indices = indices_of(0, -1, -1)
        indices[:, :, 1] = beyond[:, None]
        check(backend, indices)


@pytest.mark.parametrize(
    "entries",
    [(0, 0), (1, 1, 1, 1), (2, 0, 2, 0), (0, -1, 0), (4, 3, 2, 1, 0), (2, 0, 4, 1)],
    ids=str,
)
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_repeated_and_unsorted(backend, entries):
    """A repeated index counts once, in whatever order; padding may stand anywhere."""
    if entries != (2, 0, 4, 1):
        on_a_gpu_only(backend)
    check(backend, indices_of(*entries))


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_random_garbage(backend):
    """Everything at once, other garbage for every query."""
    generator = torch.Generator().manual_seed(11)
    pool = torch.tensor([INT_MIN, -7, -1, 0, 1, 2, 3, 4, 5, 6, 2**28, INT_MAX], dtype=torch.int32)
    indices = pool[
        torch.randint(len(pool), (sum(CASE.lengths), CASE.num_kv_heads, 6), generator=generator)
    ]
    check(backend, indices)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 1000])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_block_counts_as_int(backend, count):
    if count != 3:
        on_a_gpu_only(backend)
    check(backend, indices_of(1, 0, 3, 2), count)


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_block_counts_as_tensor(backend):
    """0, 1, 3, all, more than there are, and negative, mixed over queries and KV heads."""
    on_a_gpu_only(backend)
    generator = torch.Generator().manual_seed(12)
    values = torch.tensor([0, 1, 3, 4, 5, INT_MAX, -1, INT_MIN], dtype=torch.int32)
    counts = values[
        torch.randint(len(values), (sum(CASE.lengths), CASE.num_kv_heads), generator=generator)
    ]
    check(backend, indices_of(1, 0, 3, 2), counts.to(device_of(backend)))
    check(backend, indices_of(1, INT_MIN, 1, 0), counts.to(device_of(backend)))


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_no_slots_at_all(backend):
    o, lse, _ = check(backend, indices_of(0)[..., :0])
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_with_queries_at_the_end_of_a_gapped_buffer(backend):
    """Block numbers count from the sequence's first key; a block past the used rows reads
    nothing of the gap.
    """
    device, block_size = device_of(backend), 16
    k = torch.full((96, 1, 8), torch.nan, device=device)
    v = torch.full((96, 1, 8), torch.nan, device=device)
    k[3:43], v[3:43] = torch.randn(40, 1, 8, device=device), torch.randn(40, 1, 8, device=device)
    q = torch.randn(2, 1, 8, device=device)
    layout = dict(
        cu_seqlens=torch.tensor([0, 3, 96], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, 0, 2], dtype=torch.int32, device=device),
        seqused_k=torch.tensor([0, 40], dtype=torch.int32, device=device),
    )
    indices = torch.tensor(
        [[[2, 0, 3, 7]], [[INT_MAX, 3, 2, -1]]], dtype=torch.int32, device=device
    )

    def run(backend):
        arguments = dict(
            max_seqlen=93,
            block_size=block_size,
            scale=0.5,
            return_lse=True,
            backend=backend,
            **layout,
        )
        return ops.selected_attention(q, k, v, indices, **arguments)

    if is_refused("selected_attention", backend, run):
        return
    o, lse = run(backend)
    cpu = {name: x.cpu() for name, x in layout.items()}
    expected = oracle.oracle_selected(
        q.cpu(), k.cpu(), v.cpu(), indices.cpu(), block_size=block_size, scale=0.5, **cpu
    )
    torch.testing.assert_close((o.cpu(), lse.cpu()), expected)
