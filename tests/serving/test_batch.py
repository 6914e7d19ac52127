"""How a step is split, what a graph is captured of, what vLLM measures, and what a rank loads."""

from types import SimpleNamespace

import pytest
import torch

from nsa_fsa import NSAConfig
from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.vllm.attention import PagedNSA, load_rows, share_of
from nsa_fsa.integrations.vllm.batch import BatchBuilder, split
from nsa_fsa.modules.branches import SparseBranches

PAGE = 16


def make_step(new, past):
    """What vLLM says of a step whose sequences have so many tokens."""
    ends = [0]
    for x in new:
        ends.append(ends[-1] + x)
    totals = torch.tensor([x + y for x, y in zip(new, past, strict=True)], dtype=torch.int32)
    starts = torch.tensor(ends, dtype=torch.int32)
    table = torch.arange(1, 1 + 8 * len(new), dtype=torch.int32).view(-1, 8)
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=totals,
        seq_lens_cpu_upper_bound=totals,
        block_table_tensor=table,
        slot_mapping=torch.arange(ends[-1]),
        max_seq_len=int(totals.max()),
    )


def rows_of(found, num_tokens):
    """Which rows of the step a part has."""
    return torch.arange(num_tokens)[found.rows].tolist()


def new_of(batch):
    """The new tokens of every sequence, by chunks."""
    return [[x.num_new for x in chunk.sequences] for chunk in batch.chunks]


def test_every_token_is_in_one_part():
    new = [1, 3, 1, MOST_NEW, 0, MOST_NEW + 1, 40, 1, 20]
    step = make_step(new, [5, 6, 7, 0, 0, 30, 0, 9, 11])
    batch = split(step, PAGE, most_pages=8)
    parts = [*batch.groups, *batch.chunks]
    found = sorted(row for part in parts for row in rows_of(part, sum(new)))
    assert found == list(range(sum(new)))
    assert [x.num_new for x in batch.groups] == [1, 3, MOST_NEW]
    assert batch.groups[0].lengths.tolist() == [6, 8, 10]
    assert batch.groups[0].table.tolist() == step.block_table_tensor[[0, 2, 7]].tolist()
    assert new_of(batch) == [[MOST_NEW + 1, 40], [20]]
    alone = [x for chunk in batch.chunks for x in chunk.sequences]
    assert all(x.lengths.data_ptr() % 16 == 0 for x in [*parts, *alone])


def test_pages_of_chunks_in_order():
    step = make_step([17, 30], [3, 10])
    (chunk,) = split(step, PAGE, most_pages=8).chunks
    assert chunk.pages.tolist() == [1, 2, 9, 10, 11, 0]
    assert chunk.page_starts.tolist() == [0, 2, 6]
    assert chunk.starts.tolist() == [0, 17, 47]
    assert chunk.longest == 40
    sequence, nth = chunk.sequences[1].windows(8)
    assert sequence.tolist() == [0] * 4
    assert nth.tolist() == [0, 1, 2, 3]
    assert chunk.sequences[1].windows(8).nth is nth  # found once for all layers
    assert [rows_of(x, 47) for x in chunk.sequences] == [[*range(17)], [*range(17, 47)]]
    assert [x.lengths.tolist() for x in chunk.sequences] == [[20], [40]]
    assert [x.table[0, 0].item() for x in chunk.sequences] == [1, 9]


LAYOUTS = {
    "rows of a head side by side": (2 * PAGE * 6, PAGE * 6, 6),
    "heads of a row side by side": (2 * PAGE * 6, 6, 2 * 6),
    "pages apart": (2 * PAGE * 6 + 24, PAGE * 6, 6),
    "pages apart by no row": (2 * PAGE * 6 + 4, PAGE * 6, 6),
}


@pytest.mark.parametrize("strides", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_gathered_of_a_cache(strides):
    (chunk,) = split(make_step([17, 30], [3, 10]), PAGE, most_pages=8).chunks
    cache = torch.arange(20.0 * strides[0]).as_strided((20, 2, PAGE, 6), (*strides, 1))
    found = chunk.gather(cache)
    assert chunk.rows_in(cache) is chunk.rows_in(cache)  # found once for all layers
    assert found.is_contiguous()
    assert found.equal(cache[chunk.pages].transpose(1, 2).flatten(0, 1))


def test_no_more_pages_are_gathered_at_once_than_a_sequence_can_have():
    step = make_step([17] * 5, [63, 63, 100, 1, 1])
    batch = split(step, PAGE, most_pages=8)
    assert new_of(batch) == [[17], [17], [17], [17, 17]]
    batch = split(step, PAGE, most_pages=16)
    assert new_of(batch) == [[17, 17], [17, 17, 17]]


@pytest.mark.parametrize("num_new", [1, 4])
def test_a_graph_reads_tensors_that_stay(num_new):
    """Those of vLLM, in which places that nobody has follow."""
    step = make_step([num_new] * 3, [0, 5, 9])
    (group,) = split(step, PAGE, most_pages=8).groups
    assert group.rows == slice(0, 3 * num_new)
    assert group.table.data_ptr() == step.block_table_tensor.data_ptr()
    assert group.lengths.data_ptr() == step.seq_lens.data_ptr()


def make_builder(speculative=None):
    """As vLLM makes it."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=8 * PAGE),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=speculative,
        use_v2_model_runner=False,
    )
    return BatchBuilder(SimpleNamespace(block_size=PAGE), ["layer"], config, torch.device("cpu"))


def test_a_step_has_the_tables_that_a_graph_has():
    """Kernels are compiled for the width of a table: no other ones than those of graphs."""
    step, builder = make_step([1, 1], [40, 5]), make_builder()
    (group,) = builder.build(0, step).groups
    assert group.table.shape == (2, 8)
    (group,) = builder.build_for_cudagraph_capture(step).groups
    assert group.table.shape == (2, 8)


def test_guessed_tokens_are_decoded():
    assert make_builder().reorder_batch_threshold == 1
    speculative = SimpleNamespace(num_speculative_tokens=5, parallel_drafting=False)
    assert make_builder(speculative).reorder_batch_threshold == 6


class Layer(SparseBranches, torch.nn.Module):
    """One without vLLM around it."""

    attend_to_the_longest = PagedNSA.attend_to_the_longest

    def __init__(self, config):
        super().__init__()
        self._nsa_config = config
        self.add_branches(config)

    nsa_config = property(lambda self: self._nsa_config)


CONFIG = NSAConfig.from_dict(
    dict(preset="tiny", hidden_size=64, num_heads=8, num_kv_heads=2, compress_k="gated")
)


@pytest.mark.parametrize("num_tokens", [7, 200])
def test_what_is_rehearsed_is_the_longest_sequence(num_tokens):
    layer = Layer(CONFIG)
    q, gates = torch.randn(num_tokens, 64), torch.randn(num_tokens, 24)
    o = layer.attend_to_the_longest(q, gates, 96)
    assert o.shape == (min(num_tokens, 96), 8, 8)
    assert not o.any()


@pytest.mark.parametrize(("world", "heads", "kv_heads"), [(2, 4, 1), (4, 2, 1)])
def test_ranks_have_the_heads_that_their_queries_read(world, heads, kv_heads):
    whole, found = Layer(CONFIG), []
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for rank in range(world):
        config = share_of(CONFIG, world)
        assert (config.num_heads, config.num_kv_heads) == (heads, kv_heads)
        assert (config.hidden_size, config.head_dim, config.scale) == (64, 8, CONFIG.scale)
        layer = Layer(config)
        PagedNSA._load_shares(layer, CONFIG, world, rank)
        for name, parameter in layer.named_parameters():
            parameter.weight_loader(parameter, whole.get_parameter(name))
        found.append(layer)
    per_rank = 3 * heads
    for rank, layer in enumerate(found):
        rows = slice(rank * per_rank, (rank + 1) * per_rank)
        assert layer.gate.weight.equal(whole.gate.weight[rows])
        head = rank * heads // 4  # of 8 query heads, 4 read a KV head
        theirs = whole.compress_k.phi.gate_map.weight[head : head + 1]
        assert layer.compress_k.phi.gate_map.weight.equal(theirs)


def test_a_checkpoint_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"has \(2, 5\) where its config asks for \(2, 6\)"):
        load_rows(torch.nn.Parameter(torch.zeros(2, 6)), torch.zeros(4, 5), rows=slice(2, 4))
