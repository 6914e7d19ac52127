"""What the benchmark of generation measures, with a tiny model on a CPU."""

from rich.console import Console

from benchmarks import generation
from nsa_fsa.benchmarking.results import Results

PARTS = ["first_token", "further_tokens", "uncompiled_tokens"]


def test_every_way_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 6)
    monkeypatch.setattr(generation, "RUNS", 1)
    sizes = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        head_dim=16,
    )
    model = generation.make_model("cpu", **sizes)
    results = Results(tmp_path, "generate", generation.METHOD)
    generation.measure(results, Console(quiet=True), [70], [2], ["sdpa"], PARTS, model)
    assert "not_timed" not in results.document or not results.document["not_timed"]
    found = [(x["implementation"], x["pass"], x["batch_size"]) for x in results.document["rows"]]
    passes = [("first_token", 1), ("further_tokens", 2), ("uncompiled_tokens", 2)]
    assert found == [(way, *x) for way in ("dense_sdpa", "nsa_fsa") for x in passes]
    assert model.config._attn_implementation == "sdpa"

    results = Results(tmp_path, "generate", generation.METHOD)
    generation.measure(results, Console(quiet=True), [70], [2], [], PARTS[:1], model)
    assert [x["pass"] for x in results.document["rows"]] == PARTS[:1]
