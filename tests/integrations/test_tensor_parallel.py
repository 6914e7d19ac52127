"""Saved patched models, split over two processes by transformers' tensor parallelism: logits,
gradients and generated tokens are those of one process, and what is saved is the whole."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import distributed, nn
from transformers.distributed import DistributedConfig

from nsa_fsa.integrations.transformers import NSAAttention, patch_model
from tests.integrations.families import family, tokens
from tests.integrations.models import dense_model, scramble

ROOT = Path(__file__).parents[2]
AFTER = dict(compress_rope="after", compress_position_embedding=True)
# Family, settings and KV heads of a rank. The plans of Phi3 and Olmo2 gather all heads first.
CASES = {
    "Llama": (dict(), 1),
    "Llama, turned": (dict(compress_k="weighted", compress_v="gated", **AFTER), 1),
    "Llama, mean": (dict(compress_k="mean", compress_v="mean"), 1),
    "Llama, shared gate": (dict(compress_k="mlp", compress_v="linear", gate="per_token"), 1),
    "Llama, one layer": (dict(layers=[1]), 1),
    "Qwen3": (dict(), 1),
    "Phi3": (dict(), 2),
    "Olmo2": (dict(), 2),
}
EXPERTS = {"Qwen3Moe": (dict(), 1)}


def in_two_processes(*arguments):
    command = [sys.executable, "-m", "tests.integrations.test_tensor_parallel", *arguments]
    # transformers takes GPUs where there are any.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    runs = [
        subprocess.Popen([*command, str(rank)], env=environment, **options) for rank in range(2)
    ]
    printed = []
    for run in runs:
        found, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors[-3000:]
        printed.append(found)
    return printed


def test_equals_one_process(tmp_path):
    for printed in in_two_processes("compare", str(tmp_path)):
        assert printed.splitlines() == list(CASES)


def test_experts_equal_one_process(tmp_path):
    for printed in in_two_processes("compare_experts", str(tmp_path)):
        if "ValueError" in printed:
            pytest.skip(
                f"PyTorch {torch.__version__} gathers no experts of dense models: {printed}"
            )
        assert printed.splitlines() == list(EXPERTS)


def test_what_cannot_be_split_is_refused(tmp_path):
    for printed in in_two_processes("refuse", str(tmp_path)):
        of_heads, of_own, of_patch = printed.splitlines()
        assert "2 ranks of tensor parallelism do not divide the 1 KV heads" in of_heads
        assert "Own, cannot be split by KV heads. Fix: no tensor parallelism" in of_own
        assert "the model is tensor-parallel" in of_patch


# --- In each of the processes ---------------------------------------------------------------------


def exact(name, **settings):
    """A patched model in float64, whose experts have that, too."""
    model = family(name.partition(",")[0])
    patch_model(model, "tiny", verbose=False, **settings)
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"
    return scramble(model).double()


def split(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64, **options
    )


def results(model):
    """Logits, gradients, and tokens of both kinds of cache."""
    ids = tokens(2, 130)
    found = model(ids, labels=ids, use_cache=False)
    found.loss.backward()
    gradients = {name: whole(x.grad) for name, x in model.named_parameters()}
    options = dict(max_new_tokens=4, do_sample=False, disable_compile=True)
    written = [
        model.generate(ids[:, :60], cache_implementation=kind, **options)
        for kind in (None, "static")
    ]
    return found.logits.detach(), gradients, written


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compare_experts(folder, rank):
    if rank == 0:
        family("Qwen3Moe").save_pretrained(folder / "dense")
    distributed.barrier()
    dense = split(folder / "dense")
    try:
        for x in dense.parameters():
            whole(x)
    except ValueError as error:  # PyTorch 2.11
        print(repr(error))
    else:
        compare(folder, rank, EXPERTS)


def compare(folder, rank, cases=CASES):
    for name, (settings, kv_heads) in cases.items():
        path = folder / name
        expected = exact(name, **settings)
        if rank == 0:
            expected.save_pretrained(path)
        distributed.barrier()
        model = split(path, experts_implementation="eager") if "Moe" in name else split(path)
        seen = []
        sparse = [x for x in model.modules() if isinstance(x, NSAAttention)]
        sparse[0].compress_k.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.shape[1])
        )
        logits, gradients, written = results(model)
        expected_logits, expected_gradients, expected_written = results(copy.deepcopy(expected))
        assert set(seen) == {kv_heads}, (name, seen)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-12)
        largest = max(x.abs().max() for x in expected_gradients.values())
        for part, gradient in gradients.items():
            error = (gradient - expected_gradients[part]).abs().max()
            assert error < 1e-7 * largest, f"{name}: {part}"  # norms compute in float32
        assert all(map(torch.equal, written, expected_written)), name
        model.save_pretrained(folder / "again")
        distributed.barrier()
        again = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "again", dtype=torch.float64
        )
        for part, x in again.named_parameters():
            assert torch.equal(x, expected.get_parameter(part)), f"{name}: {part}"
        distributed.barrier()
        print(name)


class Own(nn.Module):
    def forward(self, windows):
        return windows.mean(2)


def refuse(folder, rank):
    sizes = dict(vocab_size=96)  # transformers 5.17 splits no odd one
    one_head = dense_model(num_key_value_heads=1, **sizes)
    patch_model(one_head, "tiny", verbose=False)
    own = dense_model(**sizes)
    patch_model(own, "tiny", compressor_k=lambda config: Own(), verbose=False)
    for name, model in (("one head", one_head), ("own", own), ("dense", dense_model(**sizes))):
        if rank == 0:
            model.save_pretrained(folder / name)
    distributed.barrier()
    attempts = (
        lambda: split(folder / "one head"),
        lambda: split(folder / "own", compressor_k=lambda config: Own()),
        lambda: patch_model(split(folder / "dense"), "tiny"),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"Fix: ") as error:
            attempt()
        print(error.value)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[2]), int(sys.argv[3])
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    {x.__name__: x for x in (compare, compare_experts, refuse)}[sys.argv[1]](folder, rank)
    distributed.destroy_process_group()
