"""Patched models on two processes: DDP and FSDP2 compute what one process does."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel

from nsa_fsa.integrations.transformers import NSAAttention, patch_model, unpatch_model
from tests.integrations.families import FAMILIES, family, tokens
from tests.integrations.models import scramble

ROOT = Path(__file__).parents[2]


def test_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "tests.integrations.test_distributed", str(tmp_path / "store")]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    runs = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    for run in runs:
        printed, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors[-3000:]
        assert printed.splitlines() == list(FAMILIES)


@pytest.fixture
def one_rank():
    """A process group of this process alone, as a mesh."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    distributed.destroy_process_group()


@pytest.mark.parametrize("layers", [None, [0]], ids=["whole", "partly patched"])
def test_context_parallelism_is_refused(one_rank, layers):
    """PyTorch's, which accelerate's is."""
    model, ids = family("Llama"), tokens(2, 64)
    patch_model(model, "tiny", layers=layers, verbose=False)
    expected = model(ids).logits
    with (
        context_parallel(one_rank, buffers=[ids], buffer_seq_dims=[1]),
        pytest.raises(ValueError, match=r"context_parallel is on.*Fix: leave"),
    ):
        model(ids)
    assert torch.equal(model(ids).logits, expected)


def test_what_is_sharded_is_neither_patched_nor_unpatched(one_rank):
    model, sparse = family("Llama"), family("Llama")
    patch_model(sparse, "tiny", verbose=False)
    fully_shard(model.model.layers[0], mesh=one_rank)
    fully_shard(sparse, mesh=one_rank)
    with pytest.raises(ValueError, match=r"sharded already.*Fix: .*before fully_shard"):
        patch_model(model, "tiny", verbose=False)
    with pytest.raises(TypeError, match=r"FSDP.* cannot be unpatched.*Fix: .*before wrapping"):
        unpatch_model(sparse)


def gradients(model):
    """Of the gates, whole, after a step on the same tokens."""
    torch.manual_seed(0)  # of the dropout that some have elsewhere
    model(input_ids=tokens(2, 130), use_cache=False)[0].float().square().mean().backward()
    layers = [module for module in model.modules() if isinstance(module, NSAAttention)]
    found = [layer.gate.weight.grad for layer in layers]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]


def main(store, rank):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))  # the default is a GPU where there is one
    for name in FAMILIES:
        model = family(name)
        patch_model(model, "tiny", verbose=False)
        scramble(model).train()
        expected = gradients(copy.deepcopy(model))
        assert expected

        replicated = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
        for module in list(model.modules()):
            if any(isinstance(child, NSAAttention) for child in module.children()):
                fully_shard(module, mesh=mesh)  # a decoder layer
        fully_shard(model, mesh=mesh)
        for wrapped in (replicated, model):
            for found, gradient in zip(gradients(wrapped), expected, strict=True):
                torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
        print(name, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
