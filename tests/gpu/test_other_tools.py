"""The layer on a GPU with its parameters elsewhere until a module runs:
offloaded by accelerate, sharded by FSDP2.
"""

import copy

import pytest
import torch
import torch.distributed as dist

from tests.gpu.test_layer import VARIANTS, make, make_input
from tests.modules.layers import rms_ratio
from tests.modules.test_other_tools import Block, offloaded, shard_every_module

pytestmark = pytest.mark.gpu


def assert_same(found, expected, variant):
    """The same bits; but one kernel normalises only where it may read the weight,
    and rounds elsewhere than nn.RMSNorm.
    """
    assert rms_ratio(found, expected) <= 0.01
    if variant != "qwen3":
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded(variant, how, tmp_path):
    model, (x, _, packed) = Block(make(variant)), make_input()
    expected = model.attn(x, **packed)
    model = offloaded(model.cpu(), how, tmp_path, device=0)
    assert_same(model.attn(x, **packed), expected, variant)


@pytest.fixture
def mesh():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_sharded_by_itself(variant, mesh):
    layer, (x, dy, packed) = make(variant), make_input()
    plain = copy.deepcopy(layer)
    layer = shard_every_module(layer, mesh)
    found, expected = layer(x, **packed), plain(x, **packed)
    assert_same(found, expected, variant)
    found.backward(dy)
    expected.backward(dy)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        assert rms_ratio(p.grad.full_tensor(), q.grad) <= 0.02
