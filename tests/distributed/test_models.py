"""Patched models whose sequences two and four processes share: losses, gradients and trained
weights are those of one process."""

import copy
import sys

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from nsa_fsa.distributed import ContextParallel
from nsa_fsa.integrations.transformers import patch_model
from tests.distributed.processes import on_ranks, printed_by, say, summed
from tests.distributed.test_groups import Log
from tests.integrations.models import dense_model, sparse_model, tokens

LENGTHS = torch.tensor([71, 3, 40, 16, 11])  # 141 tokens, of which two or four ranks need more
CASES = {
    "llama": dict(compress_rope="before"),
    "turned": dict(compress_k="weighted", compress_v="gated", compress_position_embedding=True),
    "shared gate": dict(compress_k="mlp", compress_v="linear", gate="per_token"),
    "qwen3": dict(compress_k="gated", compress_v="weighted"),
}
ON_FOUR = ("turned",)


@pytest.mark.slow
def test_gradients_equal_one_process(tmp_path):
    printed = printed_by("tests.distributed.test_models", "compare", tmp_path)
    sizes = [(2, name) for name in CASES] + [(4, name) for name in ON_FOUR]
    assert printed == [f"{size} {name} {kind}" for size, name in sizes for kind in KINDS]


@pytest.mark.slow
def test_fsdp_trains_as_one_process(tmp_path):
    printed = printed_by("tests.distributed.test_models", "train", tmp_path)
    assert printed == ["False", "True"]


def test_what_cannot_be_shared_is_refused(tmp_path):
    printed = printed_by("tests.distributed.test_models", "refuse", tmp_path)
    expected = (
        "the layers [1] of LlamaModel have no NSA",
        "a compressor of your own, Own, cannot be split",
        "rope_type='dynamic' is not available with context_parallel",
        "context_parallel needs position_ids",
        "attention_mask is not available with context_parallel",
        "a cache is not available with context_parallel",
        "context_parallel=2 must be a ContextParallel",
        "attention_mask hides tokens before real ones in the rows [1]",
        "attention_mask hides tokens before real ones in the rows [0]",
        "the batch has 2 rows",
        "position_ids has shape (3, 141)",
        "141 tokens cannot be shared equally by 2 ranks",
    )
    assert len(printed) == len(expected)
    for line, part in zip(printed, expected, strict=True):
        assert part in line


# --- Batches --------------------------------------------------------------------------------------


def rows():
    return dict(input_ids=tokens(2, 128))


def uneven_rows():
    return dict(input_ids=tokens(2, 141), position_ids=torch.arange(141)[None])


def padded():
    """On the right, with positions as some collators have them."""
    real = torch.arange(141) < torch.tensor([[141], [100]])
    position_ids = (real.cumsum(1) - 1).masked_fill(~real, 1)
    return dict(input_ids=tokens(2, 141), attention_mask=real.long(), position_ids=position_ids)


def packed():
    return dict(
        input_ids=tokens(1, 141),
        cu_seq_lens_q=F.pad(LENGTHS.cumsum(0), (1, 0)).int(),
        cu_seq_lens_k=F.pad(LENGTHS.cumsum(0), (1, 0)).int(),
        max_length_q=71,
        max_length_k=71,
        position_ids=torch.cat([torch.arange(int(n)) for n in LENGTHS])[None],
    )


def packed_rows():
    """In two rows, which only positions say."""
    first = packed()["position_ids"]
    second = torch.cat([torch.arange(100), torch.arange(41)])[None]
    return dict(input_ids=tokens(2, 141), position_ids=torch.cat((first, second)))


KINDS = {x.__name__: x for x in (rows, uneven_rows, padded, packed, packed_rows)}


def labelled(kind):
    """A batch with the labels of its tokens, of which padding has none."""
    batch = KINDS[kind]()
    labels = batch["input_ids"].clone()
    labels[:, 5] = -100
    if "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    return dict(batch, labels=labels)


# --- In each of the processes ---------------------------------------------------------------------


def exact_model(name, checkpoint=False, num_kv_heads=4):
    """A patched model that computes in float64, its norms included."""
    family = name if name == "qwen3" else "llama"
    model = sparse_model(family, num_key_value_heads=num_kv_heads, nsa=CASES[name]).double()
    for parent in list(model.modules()):
        for part, module in list(parent.named_children()):
            if type(module).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(module.weight), eps=1e-6, dtype=torch.float64)
                norm.weight.data.copy_(module.weight)
                setattr(parent, part, norm)
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return model


def exact_loss(model, batch):
    """In float64, which the model's own is not."""
    labels, number = batch.get("shift_labels"), batch.get("num_items_in_batch")
    if labels is None:
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        number = (labels != -100).sum()
    output = model(**batch)
    loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / number
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=0)
    return loss


def compare():
    """Two ranks have two groups of KV heads each, and of four ranks two share one KV head."""
    num_kv_heads, groups = {2: (4, 2), 4: (2, 1)}[distributed.get_world_size()]
    cp = ContextParallel(distributed.group.WORLD, groups=groups)
    for name in CASES if cp.size == 2 else ON_FOUR:
        model = exact_model(name, num_kv_heads=num_kv_heads)
        for kind in KINDS:
            batch = labelled(kind)
            expected = exact_loss(model, batch)
            expected_gradients = torch.autograd.grad(expected, [*model.parameters()])
            loss = exact_loss(model, cp.shard(**batch))
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            largest = max(x.abs().max() for x in expected_gradients)
            torch.testing.assert_close(summed(loss) / cp.size, expected, rtol=1e-12, atol=0)
            for (part, _), x, y in zip(
                model.named_parameters(), gradients, expected_gradients, strict=True
            ):
                error = (summed(x) / cp.size - y).abs().max() / largest
                assert error < 1e-12, f"{name}, {kind}, {part}: {error}"
            say(cp.size, name, kind)
    if cp.size == 2:
        check_what_is_exchanged()


def check_what_is_exchanged():
    """Under autocast 16 bits, although a rotation in float32 makes float32 of queries and keys."""
    model, cp = sparse_model().train(), ContextParallel(distributed.group.WORLD)
    with Log() as log, torch.autocast("cpu", torch.bfloat16):
        model(**cp.shard(**labelled("rows"))).loss.backward()
    assert log.dtypes["all_to_all_single"] == {torch.bfloat16}


def train():
    """Three steps of FSDP2, which takes means over the ranks."""
    size, rate = distributed.get_world_size(), 3e-3
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    cp = ContextParallel(mesh["cp"], groups=2)
    for checkpoint in (False, True):
        model = exact_model("turned", checkpoint)
        expected = steps(copy.deepcopy(model), rate, labelled)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = steps(model, rate, lambda kind: cp.shard(**labelled(kind)))
        for part, x in found.items():
            error = (x.full_tensor() - expected[part]).abs().max() / rate
            assert error < 1e-8, f"{part}: {error}"
        say(checkpoint)


def steps(model, rate, batch_of):
    """The weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for kind in ("rows", "packed", "padded"):
        exact_loss(model, batch_of(kind)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


class Own(nn.Module):
    def forward(self, windows):
        return windows.mean(2)


def refuse():
    cp = ContextParallel(distributed.group.WORLD)
    model, ids = sparse_model(), tokens(2, 64)
    own = dense_model()
    patch_model(own, "tiny", compressor_k=lambda config: Own(), verbose=False)
    rope_parameters = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    before = dict(compress_rope="before")
    dynamic = sparse_model(rope_parameters=rope_parameters, nsa=before)
    left = (torch.arange(64) >= torch.tensor([[0], [9]])).long()
    hole = torch.ones(2, 64)
    hole[0, 7] = 0

    def call(model, **changes):
        return lambda: model(**{**cp.shard(input_ids=ids), **changes})

    attempts = (
        call(sparse_model(layers=[0])),
        call(own),
        call(dynamic),
        call(model, position_ids=None),
        call(model, attention_mask=torch.ones(2, 32)),
        call(model, use_cache=True),
        call(model, context_parallel=2),
        lambda: cp.shard(input_ids=ids, attention_mask=left),
        lambda: cp.shard(input_ids=ids, attention_mask=hole),
        lambda: cp.shard(**{**packed(), "input_ids": tokens(2, 141)}),
        lambda: cp.shard(input_ids=tokens(2, 141), position_ids=torch.ones(3, 141)),
        lambda: cp.part(tokens(2, 141)),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"Fix: ") as error:
            attempt()
        say(error.value)


if __name__ == "__main__":
    function = {x.__name__: x for x in (compare, train, refuse)}[sys.argv[1]]
    for size in (2, 4) if function is compare else (2,):
        on_ranks(function, size, sys.argv[2])
