"""The quickstart, from beginning to end, on a run too short to learn anything."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "quickstart.py"


def test_quickstart(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps=2", "--length=256", "--batch-size=1", f"--output={tmp_path}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for expected in ("NSALlamaForCausalLM", "418,432", "424,752", "identical logits"):
        assert expected in " ".join(run.stdout.split())  # the console wraps lines
    for file in ("loss.png", "selection_and_gates.png", "nsa_llama/config.json", "nsa_llama/model.safetensors"):
        assert (tmp_path / file).stat().st_size > 500, file
