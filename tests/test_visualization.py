"""Looking inside a layer: what is recorded, counted and drawn is what the layer did."""

import dataclasses
import sys

import matplotlib
import matplotlib.colors
import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSACache, NSAConfig, patch_model
from nsa_fsa.visualization import (
    BRANCH_COLORS,
    KEY_KINDS,
    by_layer,
    keys_attended,
    plot_block_selection,
    plot_gates,
    queries_of,
    record,
    selected_blocks,
)
from tests.model_sizes import NO_TOKENS, model_sizes

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def layer():
    config = NSAConfig.from_dict(
        dict(preset="tiny", hidden_size=32, num_heads=4, num_kv_heads=2, gate_init="dense")
    )
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
    with (
        pytest.raises(ValueError, match=r"Linear has no NSA layer\. Fix"),
        record(torch.nn.Linear(2, 2)),
    ):
        pass


def test_keys_attended_counts_each_key_once(layer):
    """Against sets of positions, built one query at a time."""
    length, c = 300, layer.config
    with record(layer) as records:
        layer(torch.randn(1, length, 32))
    keys, compressed = keys_attended(records[0])
    for t in range(0, length, 7):
        per_head = []
        for indices in records[0].block_indices[t].tolist():
            read = {
                p
                for i in indices
                if i >= 0
                for p in range(i * c.block_size, (i + 1) * c.block_size)
            }
            read |= set(range(max(0, t - c.window_size + 1), t + 1))
            per_head.append(len([p for p in read if p <= t]))
        assert keys[t].item() == pytest.approx(sum(per_head) / len(per_head))
        assert compressed[t].item() == sum(
            i * c.kernel_stride + c.kernel_size - 1 <= t for i in range(length)
        )


def test_dense_queries_read_all_keys_by_the_selected_branch(layer):
    """In numbers, gates and pictures, also in a second sequence and behind a past."""
    layer.config = dataclasses.replace(layer.config, dense_below=120)
    x, cache = torch.randn(2, 150, 32), NSACache(layer.config)
    with torch.no_grad(), record(layer) as records:
        layer(x[:, :70], cache=cache)
        layer(x[:, 70:], cache=cache)
        layer(x)
    for entries in (records[:2], records[2:]):
        keys, compressed = keys_attended(entries, sequence=1)
        assert torch.equal(keys[:120], torch.arange(1.0, 121))
        assert (keys[120:] < 121).all()
        assert (compressed[:120] == 0).all()
        assert (compressed[120:] > 0).all()
        gates = torch.cat([entry.gates.unflatten(0, (2, -1)) for entry in entries], 1)
        assert torch.equal(gates[:, :120], torch.tensor([0.0, 1.0, 0.0]).expand(2, 120, 4, 3))
        assert (gates[:, 120:] < 1).all()
        _, axes = plt.subplots()
        plot_block_selection(axes, entries, sequence=1)
        image = torch.as_tensor(axes.images[0].get_array())
        always = list(KEY_KINDS).index("selected, always")
        assert torch.equal(image[:120] > 0, image[:120] == always)
        assert torch.equal(image[:120] > 0, torch.ones(120, 150).tril() > 0)
        assert (image[120:] == list(KEY_KINDS).index("sliding window")).any()


def test_padding_among_the_indices_selects_nothing():
    indices = torch.tensor([[[0, -1]], [[0, 1]], [[-1, -1]]], dtype=torch.int32)
    assert selected_blocks(indices, block_size=2).tolist() == [
        [[True, False]],
        [[True, True]],
        [[False, False]],
    ]


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**model_sizes(32, 32, 3, 4, 2, vocab_size=64, **NO_TOKENS))
    model = LlamaForCausalLM(config).eval()
    patch_model(model, preset="tiny", verbose=False)
    return model


@torch.no_grad()
def test_a_prefill_into_an_empty_cache_is_a_forward_of_whole_sequences(model):
    """transformers' models cache by default when they are not trained."""
    tokens = torch.randint(1, 64, (2, 150))
    with record(model) as cached:
        model(tokens)
    with record(model) as plain:
        model(tokens, use_cache=False)
    assert len(cached) == len(plain) == 3
    for ours, expected in zip(cached, plain, strict=True):
        for sequence in (0, 1):
            for found, same in zip(
                queries_of(ours, sequence), queries_of(expected, sequence), strict=True
            ):
                assert torch.equal(found, same)
            for found, same in zip(
                keys_attended(ours, sequence), keys_attended(expected, sequence), strict=True
            ):
                assert torch.equal(found, same)


@torch.no_grad()
def test_steps_are_rows_below_the_prefill(model):
    """Left-padded rows of different lengths, and the same text in one forward."""
    lengths, new, width = (90, 121), 30, 121
    text = [torch.randint(1, 64, (1, n + new)) for n in lengths]
    tokens, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens[row, width - n :], mask[row, width - n :] = text[row][0, :n], 1
    with record(model) as records:
        cache = model(tokens, attention_mask=mask).past_key_values
        for step in range(new):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = torch.stack(
                [x[0, n + step : n + step + 1] for x, n in zip(text, lengths, strict=True)]
            )
            cache = model(token, attention_mask=mask, past_key_values=cache).past_key_values
    for row, n in enumerate(lengths):
        with record(model) as whole:
            model(text[row], use_cache=False)
        for layer, entries in by_layer(records).items():
            positions, block_indices = queries_of(entries, row)
            assert positions.tolist() == list(range(n + new))
            assert torch.equal(block_indices, whole[layer].block_indices)
            # The last steps alone are pictured, too.
            keys, compressed = keys_attended(entries[-3:], row)
            expected, seen = keys_attended(whole[layer])
            assert torch.equal(keys, expected[-3:])
            assert torch.equal(compressed, seen[-3:])


@torch.no_grad()
def test_of_several_texts_the_last_counts_and_gaps_are_refused(model):
    with record(model) as records:
        model(torch.randint(1, 64, (1, 40)))
        cache = model(torch.randint(1, 64, (1, 20))).past_key_values
        for _ in range(2):
            cache = model(torch.randint(1, 64, (1, 1)), past_key_values=cache).past_key_values
    first, *steps = by_layer(records)[1][1:]
    assert queries_of(by_layer(records)[1]).positions.tolist() == list(range(22))
    with pytest.raises(
        ValueError,
        match=r"without gaps: found \[0\] to \[21\]\. Fix: pass the records of every forward",
    ):
        queries_of([first, steps[-1]])
    with pytest.raises(
        ValueError, match=r"records of the layers \[0, 1, 2\]; they must be of one\. Fix: by_layer"
    ):
        queries_of(records)
    with pytest.raises(ValueError, match=r"there are no records. Fix: call the model within"):
        queries_of([])
    with pytest.raises(
        ValueError,
        match=r"sequence=1 must be among the 1 of this forward, counted from 0. Fix: sequence=0",
    ):
        queries_of(first, 1)


def test_a_record_inside_another(layer):
    x = torch.randn(1, 20, 32)
    with record(layer) as outer:
        layer(x)
        with record(layer) as inner:
            layer(x)
        layer(x)
    assert (len(outer), len(inner)) == (2, 1)
    assert layer.recorder is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_records_a_layer_once(model, use_reentrant):
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    tokens = torch.randint(1, 64, (1, 40))
    with record(model, details=True) as records:
        model(tokens, labels=tokens).loss.backward()
    assert [entry.layer_idx for entry in records] == [0, 1, 2]
    assert model.model.layers[0].self_attn.gate.weight.grad is not None


@torch.no_grad()
def test_a_compiled_layer_is_recorded_in_one_graph(layer):
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(1, 40, 32)
    with record(layer) as records:
        compiled(x)
        layer(x)
    assert torch.equal(*(entry.block_indices for entry in records))


@torch.no_grad()
@pytest.mark.parametrize("max_queries", [1000, 7])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_details_are_what_was_scored_and_what_each_branch_gave(layer, device, max_queries):
    """Of two sequences, a prefill into a cache and a step: against the operators on
    whole sequences.
    """
    x, c, layer = torch.randn(2, 100, 32, device=device), layer.config, layer.to(device)
    near = 1e-5 if device == "cpu" else 2e-2  # products of float32 in TF32
    layer.gate.weight.normal_()
    with record(layer, details=True, max_queries=max_queries) as records:
        layer(x)
        cache = NSACache(c)
        layer(x[:, :99], cache=cache)
        layer(x[:, 99:], cache=cache)
    whole, prefill, step = (entry.details for entry in records)
    assert len(whole.rows) == min(200, max_queries)
    assert whole.rows[[0, -1]].tolist() == [0, 199]
    for details, entry in zip((whole, prefill, step), records, strict=True):
        assert entry.inside is None
        assert details.outputs.shape == (len(details.rows), 3, 4, 8)
        assert details.lse.shape == (len(details.rows), 3, 4)
        for n, row in enumerate(details.rows.tolist()):
            # The blocks that are chosen by score are the best of those that the scores say.
            own = (
                row % 100 if entry is records[0] else row % 99 if entry is records[1] else 99
            ) // c.block_size
            for head in range(2):
                chosen = [i for i in entry.block_indices[row, head].tolist() if i >= 0]
                free = [
                    i for i in range(own + 1) if i >= c.init_blocks and i <= own - c.local_blocks
                ]
                scores = details.scores[n, head]
                best = sorted(free, key=lambda i: -scores[i].item())[
                    : c.num_selected_blocks - c.init_blocks - c.local_blocks
                ]
                taken = sorted(scores[i].item() for i in chosen if i in free)
                assert taken == pytest.approx(sorted(scores[i].item() for i in best), abs=near)
                assert (scores[own + 1 :] == 0).all()
    # The layer's output is the gated sum of the branches' outputs.
    gates = records[0].gates[whole.rows].transpose(1, 2)[..., None]  # [N, 3, HQ, 1]
    o = layer.o_proj((gates * whole.outputs).sum(1).flatten(1))
    assert torch.allclose(o, layer(x).flatten(0, 1)[whole.rows], atol=near)
    # The steps say what the whole says.
    keys, _ = keys_attended(records[1:], sequence=1)
    assert torch.equal(keys, keys_attended(records[0], sequence=1)[0])
    last = whole.rows.tolist().index(199)
    for name in ("outputs", "lse", "scores"):
        assert torch.allclose(getattr(step, name)[1], getattr(whole, name)[last], atol=near), name


def test_without_details_nothing_is_kept_of_what_they_need(layer):
    with record(layer) as records:
        layer(torch.randn(1, 40, 32))
    assert records[0].inside is None
    assert records[0].details is None
    with (
        pytest.raises(ValueError, match="max_queries=0 must be an int >= 1"),
        record(layer, max_queries=0),
    ):
        pass


@torch.no_grad()
def test_pictures_show_what_was_read(layer):
    """Any head of any sequence; against sets of positions, built one query at a time."""
    c, length = layer.config, 200
    with record(layer) as records:
        layer(torch.randn(2, length, 32))
    figure, (left, right) = plt.subplots(1, 2)
    plot_block_selection(left, records[0], kv_head=1, sequence=1)
    plot_gates(right, records)
    image = torch.as_tensor(left.images[0].get_array())
    kinds, block_indices = list(KEY_KINDS), records[0].block_indices[length:, 1].tolist()
    for t in range(0, length, 13):
        own, selected = t // c.block_size, {i for i in block_indices[t] if i >= 0}
        for p in range(length):
            block, in_window = p // c.block_size, t - c.window_size < p
            by = "always" if block < c.init_blocks or block > own - c.local_blocks else "by score"
            expected = "in the future"
            if p <= t and block in selected:
                expected = "selected and in the window" if in_window else f"selected, {by}"
            elif p <= t:
                expected = "sliding window" if in_window else "only as compressed tokens"
            assert kinds[int(image[t, p])] == expected, (t, p)
    assert left.get_title() == "Keys read: layer 3, KV head 1 of 2, sequence 1"
    assert left.images[0].get_extent() == [0, length, length, 0]
    # Every colour of the picture is in the legend, and those of the branches are the same in
    # both panels.
    texts, patches = left.get_legend().get_texts(), left.get_legend().get_patches()
    legend = {
        text.get_text(): patch.get_facecolor() for text, patch in zip(texts, patches, strict=True)
    }
    assert list(legend) == kinds
    for kind, color in legend.items():
        assert left.images[0].cmap(kinds.index(kind)) == pytest.approx(color, abs=2 / 255)
    bars = {
        bar.get_label(): container.patches[0].get_facecolor()
        for bar, container in zip(right.containers, right.containers, strict=True)
    }
    assert (
        bars["selected"]
        == legend["selected, by score"]
        == matplotlib.colors.to_rgba(BRANCH_COLORS[1])
    )
    assert bars["sliding"] == legend["sliding window"]
    with pytest.raises(
        ValueError, match=r"kv_head=2 must be among the layer's 2, counted from 0. Fix: kv_head=0"
    ):
        plot_block_selection(left, records[0], kv_head=2)
    # The dense start: the selected branch open, the others nearly closed.
    assert [bar.get_height() for bar in right.patches] == pytest.approx(
        [0.0025, 0.9975, 0.0025], abs=1e-4
    )
    plt.close(figure)


@torch.no_grad()
def test_a_record_has_the_settings_that_its_forward_ran_with(layer):
    """Whatever the layer has by the time that something is counted or drawn."""
    before = layer.config
    with record(layer) as records:
        layer(torch.randn(1, 100, 32))
        layer.config = dataclasses.replace(before, window_size=64, num_selected_blocks=3)
        layer(torch.randn(1, 100, 32))
    assert [entry.config for entry in records] == [before, layer.config]
    # Of several texts the last counts.
    assert torch.equal(keys_attended(records)[0], keys_attended(records[1])[0])
    assert keys_attended(records[1])[0][63] == 64  # all are in the window
    figure, axes = plt.subplots(1, 2)
    for ax, entry in zip(axes, records, strict=True):
        plot_block_selection(ax, entry)
        kinds = [list(KEY_KINDS)[int(kind)] for kind in ax.images[0].get_array()[-1]]
        in_window = [kind in ("sliding window", "selected and in the window") for kind in kinds]
        assert in_window == [p > 99 - entry.config.window_size for p in range(100)]
    plt.close(figure)


def test_a_missing_matplotlib_names_the_extra(layer, monkeypatch):
    with record(layer) as records, torch.no_grad():
        layer(torch.randn(1, 40, 32))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # not importable
    with pytest.raises(
        ImportError, match=r"plots need matplotlib, which is not.*Fix: pip install .nsa-fsa\[plot\]"
    ):
        plot_block_selection(None, records)
    with pytest.raises(
        ImportError, match=r"plots need matplotlib, which is not.*Fix: pip install .nsa-fsa\[plot\]"
    ):
        plot_gates(None, records)


@torch.no_grad()
def test_pictures_of_steps_and_of_long_texts(layer, monkeypatch):
    cache, x = NSACache(layer.config), torch.randn(1, 130, 32)
    with record(layer) as records:
        layer(x[:, :100], cache=cache)
        layer(x[:, 100:], cache=cache)
        layer(x)
    figure, axes = plt.subplots(1, 3)
    plot_block_selection(axes[0], records[:2])
    plot_block_selection(axes[1], records[1])
    both, steps = (torch.as_tensor(ax.images[0].get_array()) for ax in axes[:2])
    assert both.shape == (130, 130)
    assert torch.equal(steps, both[100:])
    assert axes[1].images[0].get_extent() == [0, 130, 130, 100]
    monkeypatch.setattr("nsa_fsa.visualization.MAX_PIXELS", 65)
    plot_block_selection(axes[2], records[2])
    assert torch.equal(torch.as_tensor(axes[2].images[0].get_array()), both[::2, ::2])
    plt.close(figure)


def test_gates_have_a_bar_a_layer_however_many_forwards():
    config = NSAConfig.from_dict(dict(preset="tiny", hidden_size=32, num_heads=4, num_kv_heads=2))
    model = torch.nn.Sequential(NativeSparseAttention(config), NativeSparseAttention(config))
    with record(model) as records, torch.no_grad():
        for length in (30, 1, 1):
            model(torch.randn(1, length, 32))
    # 30 of layer 0's 32 tokens.
    records[0] = records[0]._replace(gates=torch.ones_like(records[0].gates))
    figure, ax = plt.subplots()
    plot_gates(ax, records)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1"]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([31 / 32] * 3 + [0.5] * 3)
    plt.close(figure)
