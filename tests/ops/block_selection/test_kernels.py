"""Tiles so small that short sequences are cut as only long ones otherwise are: many steps, columns,
products and chunks."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa import ops, reference
from nsa_fsa.ops.block_selection import triton as block_selection
from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.block_selection.sorting import NARROW_STEPS
from nsa_fsa.ops.block_selection.triton import TileSizes
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.sequences import Sequences
from tests.cases import device_of
from tests.oracle import windows

DEVICE = device_of("triton")
SMALL = dict(warps=4, stages=2)
TILES = [
    TileSizes(pairs=16, columns=2, keys=8, products=1, **SMALL),
    TileSizes(pairs=16, columns=4, keys=16, products=2, **SMALL),
    TileSizes(pairs=32, columns=2, keys=16, products=4, **SMALL),
]
if DEVICE == "cuda":  # the matrix unit multiplies at least 16 by 8
    TILES = [
        TileSizes(pairs=64, columns=8, keys=8, products=2),
        TileSizes(pairs=64, columns=8, keys=32, products=4),
    ]
CUTS = [
    pytest.param(tile, wide, id=f"tile{i}-{'wide' if wide else 'narrow'}")
    for i, (tile, wide) in enumerate(zip(TILES, itertools.cycle([False, True]), strict=False))
]

# kernel_size, kernel_stride, block_size, num_selected_blocks, init_blocks, local_blocks, G, lengths
SETTINGS = [
    (4, 4, 4, 5, 1, 2, 1, (90,)),  # a window a block
    (4, 4, 4, 7, 0, 0, 2, (70,)),  # the query's own block, half visible, has to win its place
    (8, 4, 8, 4, 0, 1, 3, (0, 61, 50)),  # windows overlap two blocks; three heads take four rows
    (8, 4, 12, 3, 1, 1, 1, (130,)),  # three windows a block
    (8, 4, 16, 5, 1, 2, 12, (120,)),
    (12, 4, 16, 3, 0, 2, 5, (17, 110)),  # windows of three strides
    (16, 4, 16, 1, 0, 0, 1, (100,)),  # windows as long as a block
    (6, 2, 16, 3, 1, 1, 20, (80,)),  # eight windows a block; more heads than a tile has
    (3, 1, 4, 6, 1, 0, 1, (60,)),
    (3, 1, 12, 3, 1, 1, 4, (85,)),  # twelve windows a block, more than a product has
    (4, 2, 4, 24, 2, 3, 1, (0, 0, 120)),  # more places than are unrolled
]


def make(setting, dtype, seed=0):
    """Arguments of select_blocks, and lse. Rows of k_cmp that no token owns are NaN."""
    kernel_size, kernel_stride, block_size, num_selected_blocks = setting[:4]
    init_blocks, local_blocks, group_size, lengths = setting[4:]

    generator = torch.Generator().manual_seed(seed)
    total, num_kv_heads, width = sum(lengths), 2 if group_size <= 4 else 1, 16
    cu_seqlens = [*itertools.accumulate(lengths, initial=0)]
    q = torch.randn(total, num_kv_heads * group_size, width, generator=generator).to(dtype)
    k_cmp = torch.randn(total // kernel_stride, num_kv_heads, width, generator=generator).to(dtype)
    unowned = set(range(len(k_cmp))) - set(
        windows(cu_seqlens, kernel_size=kernel_size, kernel_stride=kernel_stride)
    )
    k_cmp[sorted(unowned)] = torch.nan
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    sizes = dict(kernel_size=kernel_size, kernel_stride=kernel_stride, scale=0.5)
    packed = (cu_seqlens, max(lengths))
    _, lse = ops.compressed_attention(
        q.double(), k_cmp.double(), k_cmp.double(), *packed, return_lse=True, **sizes
    )
    blocks = dict(
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    return q, k_cmp, lse, packed, sizes, blocks


def call_of(q, k_cmp, lse, packed, sizes, blocks):
    """What the launcher takes, on the device that runs the kernels."""
    q, k_cmp, lse, cu_seqlens = (x.to(DEVICE) for x in (q, k_cmp, lse, packed[0]))
    windows = Windows(sizes["kernel_size"], sizes["kernel_stride"])
    forced = Blocks(blocks["block_size"], blocks["init_blocks"], blocks["local_blocks"])
    sequences = Sequences(cu_seqlens, packed[1])
    num_selected = blocks["num_selected_blocks"]
    return SelectionCall(
        q, k_cmp, lse, sequences, sizes["scale"], windows, forced, num_selected, "triton"
    )


def select(*problem, **options):
    return block_selection.select_blocks(call_of(*problem), **options).cpu()


def positions(cu_seqlens):
    return torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])


def assert_best(indices, q, k_cmp, lse, packed, sizes, blocks, tolerance):
    """No block that was left out scores more than a chosen one; as many are chosen as can be."""
    scores = reference.block_scores(
        q.double(), k_cmp.double(), lse, *packed, block_size=blocks["block_size"], **sizes
    )  # [T, HKV, num_blocks]
    own = (positions(packed[0]) // blocks["block_size"])[:, None, None]
    block = torch.arange(scores.shape[2])
    eligible = (block <= own).expand_as(scores)
    forced = eligible & ((block < blocks["init_blocks"]) | (block > own - blocks["local_blocks"]))
    places = blocks["num_selected_blocks"]
    assert torch.equal((indices >= 0).sum(-1), eligible.sum(-1).clamp(max=places))
    assert ((indices >= 0).int().diff(dim=-1) <= 0).all(), "padding comes last"
    ascending = indices.masked_fill(indices < 0, 2**31 - 1).diff(dim=-1) > 0
    assert (ascending | (indices[..., 1:] < 0)).all()
    chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
    chosen = chosen.scatter(2, indices.masked_fill(indices < 0, scores.shape[2]).long(), True)[
        ..., :-1
    ]
    assert not (chosen & ~eligible).any(), "a future block"
    assert (chosen | ~forced).all(), "a forced block is missing"
    worst = scores.masked_fill(~chosen | forced, torch.inf).amin(-1)
    left_out = scores.masked_fill(chosen | ~eligible, 0).amax(-1)
    assert (worst >= left_out * (1 - tolerance) - 1e-30).all()
    contested = ((left_out > 0) & (worst < torch.inf)).float().mean()
    assert contested > 0.1, "nearly nothing was there to be chosen from"


@pytest.mark.parametrize(("tile", "wide"), CUTS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_how_work_is_cut_does_not_show(setting, tile, wide):
    """float32 products round to about 1e-6 of a weight, and at most 6 of a narrow key's 23 bits
    number a column's steps."""
    problem = make(setting, torch.float32)
    assert_best(
        select(*problem, tile=tile, wide=wide), *problem, tolerance=1e-5 if wide else 2.0**-16
    )


@pytest.mark.parametrize(("tile", "wide"), CUTS)
def test_ties_go_to_the_lowest_block(tile, wide):
    """Equal keys, and a query whose windows all lie in its past: steps tie with steps and columns
    with columns."""
    setting = (4, 4, 4, 6, 0, 1, 1, (100,))
    q, k_cmp, _, packed, sizes, blocks = make(setting, torch.float32)
    k_cmp = torch.zeros_like(k_cmp)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, *packed, return_lse=True, **sizes)
    indices = select(q, k_cmp, lse, packed, sizes, blocks, tile=tile, wide=wide)
    own = positions(packed[0]) // 4
    for t in range(24, 100):
        assert indices[t].tolist() == [[0, 1, 2, 3, 4, int(own[t])]] * 2, f"t={t}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_keys_choose_as_narrow_ones(dtype):
    """A sequence gets the same blocks beside a longer one that needs 64-bit keys; only in float32
    those tell more apart."""
    q, k_cmp, lse, *rest = make((8, 4, 8, 5, 1, 1, 2, (170,)), dtype)
    # Scores that differ by a millionth: keys that keep all of their bits choose others.
    k_cmp[:] = k_cmp[:1]
    q[..., 0], k_cmp[..., 0] = 1.0, torch.arange(len(k_cmp))[:, None] % 5 * 2.0**-20
    narrow, wide = (
        select(q, k_cmp, lse, *rest, tile=TILES[-1], wide=wide) for wide in (False, True)
    )
    assert torch.equal(narrow, wide) == (dtype == torch.float16)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="looks into Triton's interpreter; on a GPU compute-sanitizer sees it"
)
@pytest.mark.parametrize("local_blocks", [0, 2])
@pytest.mark.parametrize("tile", TILES, ids=range(len(TILES)))
def test_only_tokens_of_the_sequence_are_read(tile, local_blocks, monkeypatch):
    """Columns begin a block early and end where the longest of them does,
    which in memory may be anywhere."""
    read, load_rows = [], block_selection.load_rows

    def watched(ptr, offsets, inside, DIM, PADDED_DIM, MASKED):
        if not MASKED:  # keys
            read.append(torch.from_numpy(offsets.handle.data // DIM))
        return load_rows(ptr, offsets, inside, DIM, PADDED_DIM, MASKED)

    problem = make((6, 2, 8, 4, 0, local_blocks, 5, (87,)), torch.float32)
    monkeypatch.setattr(block_selection, "load_rows", watched)
    select(*problem, tile=tile)
    num_windows = (87 - 6) // 2 + 1
    assert int(torch.cat(read).min()) == 0
    # The last window ends in the last query's own block, which is no candidate where it is local,
    # and nor is the one before.
    assert num_windows - 1 - 4 * local_blocks <= int(torch.cat(read).max()) < num_windows


def test_lengths_that_need_wide_keys(monkeypatch):
    """The host decides by max_seqlen, an upper bound."""
    seen = []

    def launch(*arguments, **_):
        seen.append(arguments[-1].WIDE)

    class Kernel:
        def __getitem__(self, grid):
            return launch

    monkeypatch.setattr(block_selection, "select_blocks_kernel", Kernel())
    problem = make((8, 4, 16, 5, 1, 1, 2, (40,)), torch.float16)
    q, k_cmp, lse, packed, sizes, blocks = problem
    steps = NARROW_STEPS.value * TileSizes().columns
    for max_seqlen in (40, steps * 16, steps * 16 + 1):
        select(q, k_cmp, lse, (packed[0], max_seqlen), sizes, blocks)
    select(q.float(), k_cmp.float(), lse, packed, sizes, blocks)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("num_selected_blocks", [1, 3, 64])
def test_nothing_to_choose(num_selected_blocks):
    """All places are forced, or there are as many as blocks: no score is looked at."""
    q, k_cmp, lse, packed, sizes, _ = make((8, 4, 8, 1, 0, 0, 2, (100, 7)), torch.float32)
    local = min(num_selected_blocks, 3)
    blocks = dict(
        block_size=8, num_selected_blocks=num_selected_blocks, init_blocks=0, local_blocks=local
    )
    nothing = torch.full_like(k_cmp, torch.nan)
    indices = select(q, nothing, lse, packed, sizes, blocks)
    expected = reference.select_blocks(q, torch.zeros_like(k_cmp), lse, *packed, **sizes, **blocks)
    assert torch.equal(indices, expected)
