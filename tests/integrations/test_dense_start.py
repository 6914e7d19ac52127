"""gate_init="dense": a patched model starts out as the dense one,
on sequences that the selected branch sees whole.
"""

import pytest
import torch

from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from tests.integrations.models import TINY_REACH, attentions, dense_model, greedy

STEPS, LENGTH = 100, 90


def stories():
    """Four sentences, repeated: a model of two layers soon knows them by heart,
    and its logits become peaked.
    """
    rng = torch.Generator().manual_seed(0)
    return torch.randint(1, 97, (4, 15), generator=rng).repeat(1, 8)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = dense_model(initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = stories()
    for step in range(STEPS):
        batch = text[:, step % 15 : step % 15 + LENGTH]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5, loss  # it has learned: guessing is ln(97) = 4.6
    return model.eval()


@torch.no_grad()
def test_dense_start_is_close_to_the_dense_model(trained):
    """Gates of sigmoid(-6), sigmoid(6), sigmoid(-6) change each layer's output by about
    half a percent.
    """
    ids = stories()[:, 3 : 3 + TINY_REACH]
    expected = trained(ids, use_cache=False).logits
    patch_model(trained, preset="tiny", verbose=False)
    try:
        logits = trained(ids, use_cache=False).logits
        assert attentions(trained)[0].nsa_config.gate_init == "dense"
        error = (logits - expected).norm() / expected.norm()
        assert 0 < error < 0.05
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    finally:
        unpatch_model(trained)


def test_dense_start_continues_like_the_dense_model(trained):
    """The same twenty tokens, cached and not, for every sentence."""
    prompt = stories()[:, :70]
    expected = greedy(trained, prompt, 20)
    # And they are what it learned.
    assert (expected[:, 70:] == stories()[:, 70:90]).float().mean() > 0.9
    patch_model(trained, preset="tiny", verbose=False)
    try:
        assert torch.equal(greedy(trained, prompt, 20), expected)
        assert torch.equal(trained.generate(prompt, max_new_tokens=20, do_sample=False), expected)
    finally:
        unpatch_model(trained)


@torch.no_grad()
def test_balanced_start_is_not(trained):
    """That the tests above can fail: with all gates at one half the model is another one."""
    ids = stories()[:, 3 : 3 + TINY_REACH]
    expected = trained(ids, use_cache=False).logits
    patch_model(
        trained,
        NSAConfig.from_pretrained_config(trained.config, "tiny", gate_init="balanced"),
        verbose=False,
    )
    try:
        records = []
        attentions(trained)[1].recorder = records.append
        logits = trained(ids, use_cache=False).logits
        assert (records[0].gates == 0.5).all()
        assert (logits - expected).norm() / expected.norm() > 0.05
    finally:
        unpatch_model(trained)
