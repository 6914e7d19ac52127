"""What several ranks measure, on two CPU processes with small sizes."""

import io
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import distributed, generation
from nsa_fsa.benchmarking.results import Results
from tests.distributed.processes import on_ranks, printed_by
from tests.model_sizes import model_sizes

TINY = model_sizes(256, 64, 1, 4, 2, vocab_size=128, head_dim=64)


def test_every_part_is_measured_by_two_ranks(tmp_path):
    printed_by("tests.benchmarks.test_distributed", tmp_path)
    rows = json.loads(next(tmp_path.glob("distributed_*.json")).read_text())["rows"]
    found = [(x["variant"], x["pass"], x["num_tokens"], x.get("groups")) for x in rows]
    assert [x["groups"] for x in rows if x.get("default")] == [1, 1]
    assert found == [
        ("context", "deterministic", 70, 1),
        ("context", "deterministic", 70, 2),
        ("context", "alone", 100, None),
        ("context", "exchange", 100, 1),
        ("context", "shared", 100, 1),
        ("context", "exchange", 100, 2),
        ("context", "shared", 100, 2),
        ("module", "forward", 40, None),
        ("module", "forward", 40, None),
        ("prefill", "first_token", 40, None),
        ("prefill", "first_token", 40, None),
    ]
    assert [x["block_size"] for x in rows[-2:]] == [64, 128]
    for row in rows[:2]:
        assert set(row["errors"]) == {"o", "dq", "dk", "dv", "dgate_logits"}
        assert row["errors"]["o"] == 0
        assert max(row["errors"].values()) < 1e-2  # sums of bfloat16 in another order
    assert all(x["ms"] > 0 and x["num_gpus"] == 2 for x in rows)


# --- In each of the processes ---------------------------------------------------------------------


def measure(folder: Path) -> None:
    distributed.RUNS, distributed.WARM_UP = 1, 0
    distributed.SHARED, distributed.CHECKED = ((4, 4, 100, 1), (4, 4, 100, 4)), (4, 4, 70)
    distributed.LENGTHS = (40,)
    generation.LLAMA_3_8B |= TINY
    results = None
    if torch.distributed.get_rank() == 0:
        results = Results(folder, "distributed", distributed.METHOD)
    distributed.measure(results, Console(file=io.StringIO()), list(distributed.PARTS), "cpu")


if __name__ == "__main__":
    on_ranks(measure, 2, Path(sys.argv[1]), Path(sys.argv[1]))
