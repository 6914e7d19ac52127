"""Looking inside a layer: what is recorded, counted and drawn is what the layer did."""

import matplotlib
import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSACache, NSAConfig
from nsa_fsa.visualization import keys_attended, plot_block_selection, plot_gates, record, selected_blocks

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def layer():
    config = NSAConfig.from_dict(dict(preset="tiny", hidden_size=32, num_heads=4, num_kv_heads=2, gate_init="dense"))
    return NativeSparseAttention(config, layer_idx=3)


def test_record_collects_forwards_and_lets_go(layer):
    model = torch.nn.Sequential(layer)
    with record(model) as records:
        model(torch.randn(1, 40, 32))
        model(torch.randn(2, 50, 32))
    model(torch.randn(1, 60, 32))
    assert [entry.block_indices.shape for entry in records] == [(40, 2, 6), (100, 2, 6)]
    assert records[0].layer_idx == 3
    with pytest.raises(RuntimeError, match="oops"), record(model):
        raise RuntimeError("oops")
    assert layer.recorder is None
    with pytest.raises(ValueError, match=r"Linear has no NativeSparseAttention layer\. Fix"), record(torch.nn.Linear(2, 2)):
        pass


def test_keys_attended_counts_each_key_once(layer):
    """Against sets of positions, built one query at a time."""
    length, c = 300, layer.config
    with record(layer) as records:
        layer(torch.randn(1, length, 32))
    keys, compressed = keys_attended(records[0], c)
    for t in range(0, length, 7):
        per_head = []
        for indices in records[0].block_indices[t].tolist():
            read = {p for i in indices if i >= 0 for p in range(i * c.block_size, (i + 1) * c.block_size)}
            read |= set(range(max(0, t - c.window_size + 1), t + 1))
            per_head.append(len([p for p in read if p <= t]))
        assert keys[t].item() == pytest.approx(sum(per_head) / len(per_head))
        assert compressed[t].item() == sum(i * c.kernel_stride + c.kernel_size - 1 <= t for i in range(length))


def test_padding_among_the_indices_selects_nothing():
    indices = torch.tensor([[[0, -1]], [[0, 1]], [[-1, -1]]], dtype=torch.int32)
    assert selected_blocks(indices, block_size=2).tolist() == [[[True, False]], [[True, True]], [[False, False]]]


def test_a_record_of_decoding_is_refused(layer):
    cache = NSACache(layer.config)
    with record(layer) as records:
        layer(torch.randn(1, 5, 32), cache=cache)
    with pytest.raises(ValueError, match="forward with a cache"):
        keys_attended(records[0], layer.config)


def test_pictures_show_what_was_selected(layer):
    with record(layer) as records:
        layer(torch.randn(1, 200, 32))
    figure, (left, right) = plt.subplots(1, 2)
    plot_block_selection(left, records[0], layer.config, kv_head=1)
    plot_gates(right, records)
    image = left.images[0].get_array()
    selected = selected_blocks(records[0].block_indices, layer.config.block_size)[:, 1]
    assert (torch.as_tensor(image >= 2) == selected).all()  # 2: chosen by score, 3: always read
    assert (image[:, 0] == 3).all()
    # The dense start: the selected branch open, the others nearly closed.
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.0025, 0.9975, 0.0025], abs=1e-4)
    plt.close(figure)
