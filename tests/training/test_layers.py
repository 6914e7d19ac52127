"""What a layer learns from dense attention, against whole matrices of weights."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa_fsa import NSACache
from nsa_fsa.training import Lesson, freeze_all_but_new, teach
from tests.modules.layers import VARIANTS, make_layer, make_variant, randn, small_config
from tests.ops.block_divergence.direct import direct

NUMBERS = Lesson._fields[1:]
LEARNED = NUMBERS[:2]


def seen_by_hand(layer, x, free_only=True):
    """The numbers of a lesson of one sequence x `[1, S, E]`, each of every token that counts."""
    records = []
    layer.recorder = records.append
    layer(x)
    layer.recorder = None
    (entry,) = records
    inside, c = entry.inside, layer.config
    with torch.no_grad():
        q, k, v = (x.transpose(0, 1)[None] for x in (inside.q, inside.k, inside.v))
        dense = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=c.scale, enable_gqa=True
        )
        dense = dense[0].transpose(0, 1).flatten(1)
    num_windows = max(0, (x.shape[1] - c.kernel_size) // c.kernel_stride + 1)
    k_cmp = inside.k_cmp[:num_windows]
    compared = direct(inside.q, inside.k, k_cmp, entry.block_indices, c, c.scale, free_only)
    error = (inside.o.flatten(1) - dense).norm(dim=1) / dense.norm(dim=1)
    divergence, mass, recall = compared
    gates = layer.gate(x[0]).unflatten(-1, (-1, 3)).sigmoid()
    found = dict(error=error, divergence=divergence, mass=mass, recall=recall, gates=gates)
    return {name: x[c.dense_below :] for name, x in found.items()}


def mean_by_hand(*tokens):
    """Of what `seen_by_hand` says of some sequences, the lesson."""
    together = {name: torch.cat([x[name] for x in tokens]) for name in NUMBERS}
    recall = together.pop("recall")
    gates = together.pop("gates").mean((0, 1))
    known = recall[~recall.isnan()]
    return {name: x.mean() for name, x in together.items()} | dict(
        recall=known.sum() / len(known), gates=gates
    )


def assert_lesson(lesson, expected):
    for name in NUMBERS:
        found = getattr(lesson, name)
        assert found.requires_grad == (name in LEARNED)
        torch.testing.assert_close(
            found.detach(), expected[name].detach(), rtol=0, atol=1e-10, equal_nan=True
        )


def gradients(layer, loss):
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        zero = torch.zeros(())
        ours, theirs = (zero if x is None else x for x in (found[name], grad))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name, check_dtype=False)


def test_where_all_queries_are_dense_there_is_nothing_to_learn():
    layer = make_variant("dense-below")
    with teach(layer) as teacher:
        layer(randn(2, 30, 24))
        teacher.loss().backward()
    (lesson,) = teacher.lessons
    assert lesson.error == lesson.divergence == lesson.mass == 0
    assert lesson.recall.isnan()
    assert torch.equal(lesson.gates, torch.zeros(3, dtype=torch.float64))
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("compress_rope", ["before", "after"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lesson_is_what_whole_matrices_say(variant, compress_rope):
    layer, x = make_variant(variant, compress_rope=compress_rope), randn(1, 45, 24)
    plain = layer(x)
    with teach(layer) as teacher:
        output = layer(x)
    assert torch.equal(plain, output)
    expected = mean_by_hand(seen_by_hand(layer, x))
    (lesson,) = teacher.lessons
    assert_lesson(lesson, expected)
    loss = 3 * expected["error"] + 0.5 * expected["divergence"]
    found = gradients(layer, teacher.loss(error=3, divergence=0.5))
    assert_same_gradients(found, gradients(layer, loss))
    if variant == "default":
        assert all(found[f"compress_{x}.phi.logits"].abs().sum() > 0 for x in "kv")
        assert lesson.recall < 1


@pytest.mark.parametrize("num_kv_heads", [4, 1], ids=["G1", "G4"])
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "mlp", "gated"])
def test_every_compressor_learns_from_block_scores(kind, num_kv_heads):
    layer = make_layer(small_config(compress_k=kind, num_kv_heads=num_kv_heads))
    x = randn(1, 40, 24)
    with teach(layer, free_only=False) as teacher:
        layer(x)
    expected = mean_by_hand(seen_by_hand(layer, x, free_only=False))
    assert_lesson(teacher.lessons[0], expected)
    found = gradients(layer, teacher.lessons[0].divergence)
    assert_same_gradients(found, gradients(layer, expected["divergence"]))
    learned = {name for name, grad in found.items() if grad is not None and grad.abs().sum() > 0}
    of_keys = {name for name, _ in layer.named_parameters() if name.startswith("compress_k")}
    assert learned == {"q_proj.weight", "k_proj.weight", *of_keys}


def test_packed_sequences_and_padded_ones_are_separate():
    layer, lengths = make_variant("default"), (37, 12, 3, 26)
    rows = [randn(1, n, 24, seed=n) for n in lengths]
    expected = mean_by_hand(*(seen_by_hand(layer, x) for x in rows))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    padded, mask = torch.zeros(4, 37, 24, dtype=torch.float64), torch.zeros(4, 37)
    for row, x in enumerate(rows):
        place = slice(37 - x.shape[1], 37) if row % 2 else slice(x.shape[1])
        padded[row, place], mask[row, place] = x[0], 1
    with teach(layer) as teacher:
        layer(torch.cat(rows, dim=1), cu_seqlens=starts)
        layer(padded, attention_mask=mask)
    packed, of_padded = teacher.lessons
    assert_lesson(packed, expected)
    assert_lesson(of_padded, expected)
    torch.testing.assert_close(teacher.loss(), expected["error"] + expected["divergence"])


def test_chunks_that_fill_a_cache_are_one_sequence():
    layer, x = make_variant("default"), randn(1, 45, 24)
    cache = NSACache(layer.config)
    with torch.no_grad(), teach(layer) as teacher:
        for chunk in x.split((30, 1, 14), dim=1):
            layer(chunk, cache=cache)
        assert teacher.loss().item() > 0
    expected = mean_by_hand(seen_by_hand(layer, x))
    for name in ("error", "divergence", "mass", "gates"):
        parts = zip(teacher.lessons, (30, 1, 14), strict=True)
        mean = sum(getattr(lesson, name) * n for lesson, n in parts) / 45
        torch.testing.assert_close(mean, expected[name].detach(), rtol=0, atol=1e-10)


def test_a_layer_that_is_the_dense_one_has_no_error():
    """Where all blocks are chosen and gates are exactly 0, 1, 0; and the error's gradient is 0
    there, not NaN."""
    layer = make_layer(small_config(num_selected_blocks=8))
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([-1e3, 1e3, -1e3]).repeat(4))
    x = torch.zeros(1, 10, 24, dtype=torch.float64)
    x[:, 1:] = randn(1, 9, 24)  # the first token's values are 0
    with teach(layer) as teacher:
        layer(x)
    (lesson,) = teacher.lessons
    assert lesson.error < 1e-12
    assert lesson.mass == pytest.approx(1)
    assert lesson.recall.isnan()
    assert lesson.gates.tolist() == [0, 1, 0]
    assert all(x is None or x.isfinite().all() for x in gradients(layer, lesson.error).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close_to_float64(dtype):
    x = randn(1, 45, 24)
    exact = mean_by_hand(seen_by_hand(make_variant("default", gain=1.0), x))
    layer = make_variant("default", dtype, gain=1.0)
    with teach(layer) as teacher:
        layer(x.to(dtype))
    (lesson,) = teacher.lessons
    near = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # some roundings of 2**-24 or 2**-8
    for name in ("error", "divergence", "mass", "gates"):
        assert getattr(lesson, name).dtype == torch.float32
        torch.testing.assert_close(
            getattr(lesson, name).double(), exact[name], rtol=near, atol=near
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_has_its_lesson_in_one_graph(backend):
    torch._dynamo.reset()  # it would count another test's graphs of this forward
    layer, x = make_variant("default"), randn(1, 45, 24)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with teach(layer) as teacher:
        plain = layer(x)
    expected = gradients(layer, teacher.loss() + plain.sum())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            with teach(layer) as again:
                output = compiled(x)
            assert torch.equal(output, plain)
            assert_lesson(again.lessons[0], teacher.lessons[0]._asdict())
            found = gradients(layer, again.loss() + output.sum())
            assert_same_gradients(found, expected)


def test_a_local_lesson_stays_in_its_layer():
    layers = torch.nn.Sequential(make_variant("default"), make_variant("default", seed=1))
    x = randn(1, 45, 24).requires_grad_()  # as where embeddings learn
    with teach(layers) as teacher:
        expected = layers(x)
    local = freeze_all_but_new(layers)
    with teach(layers, local=True) as alone:
        output = layers(x)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    for ours, theirs in zip(alone.lessons, teacher.lessons, strict=True):
        assert_lesson(ours, theirs._asdict())
    for number, layer in enumerate(layers):
        own, lesson = [*layer.parameters()], alone.lessons[number]
        loss = lesson.error + lesson.divergence
        *grads, dx = torch.autograd.grad(loss, [*local, x], allow_unused=True)
        assert dx is None
        for parameter, grad in zip(local, grads, strict=True):
            assert (grad is not None) == any(parameter is p for p in own)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in layers)


def test_what_cannot_be_learned_is_refused():
    layer, x = make_variant("default"), randn(1, 20, 24)
    with (
        pytest.raises(ValueError, match=r"Linear has no NSA layer\. Fix"),
        teach(torch.nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="workspace_bytes"), teach(layer, workspace_bytes=0):
        pass
    with teach(layer) as teacher, pytest.raises(RuntimeError, match=r"has run inside .* Fix: call"):
        teacher.loss()
    with teach(layer) as teacher, torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="gradients are on, but were off while an NSA layer ran"):
        teacher.loss()
    assert layer.recorder is None


def test_freezing_leaves_what_is_new():
    layers = torch.nn.Sequential(make_variant("default"), torch.nn.Linear(24, 24))
    new = freeze_all_but_new(layers)
    names = {name for name, p in layers.named_parameters() if p.requires_grad}
    assert names == {
        *("0.gate.weight", "0.gate.bias"),
        *("0.compress_k.phi.logits", "0.compress_v.phi.logits"),
    }
    assert {id(p) for p in new} == {id(p) for p in layers.parameters() if p.requires_grad}
    assert len(new) == 4
    with pytest.raises(ValueError, match=r"Linear has no NSA layer\. Fix"):
        freeze_all_but_new(layers[1])
