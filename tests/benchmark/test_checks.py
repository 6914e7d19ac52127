"""The benchmark refuses wrong results, and gives peers what they take."""

import dataclasses
import sys
import types

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.benchmarking import selected
from nsa_fsa.benchmarking.check import Oracle, WrongResult
from nsa_fsa.benchmarking.implementations import IMPLEMENTATIONS, ours, sdpa
from nsa_fsa.benchmarking.running import checked
from nsa_fsa.benchmarking.selections import block_counts
from nsa_fsa.benchmarking.settings import Setting
from tests.benchmark.tools import CPU, SETTINGS, TINY, reference_calls


@pytest.mark.parametrize("setting", [TINY, *SETTINGS], ids=str)
def test_the_check_accepts_what_is_right(setting, seed):
    inputs = selected.make_inputs(setting, seed, CPU)
    calls, oracle = reference_calls(inputs), Oracle(inputs)
    errors = oracle.check(o=calls.forward())
    for backward in (calls.backward, calls.forward_backward):
        errors |= oracle.check(**dict(zip(("dq", "dk", "dv"), backward(), strict=True)))
    assert max(errors.values()) < 1e-5
    assert set(errors) == {"o", "dq", "dk", "dv"}


def test_the_check_accepts_full_attention(seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    errors = checked(sdpa(inputs, "MATH"), Oracle(inputs, full=True))
    assert set(errors) == {"forward", "backward", "forward_backward"}
    assert max(error for each in errors.values() for error in each.values()) < 1e-5
    with pytest.raises(WrongResult, match="o differs"):
        Oracle(inputs).check(o=sdpa(inputs, "MATH").forward())


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong", ["scaled", "nan", "one block less", "one head swapped"])
def test_the_check_refuses_what_is_wrong(name, wrong, seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    faulty = inputs
    if wrong == "one block less":
        indices = inputs.block_indices.clone()
        indices[..., 1] = -1
        faulty = dataclasses.replace(inputs, block_indices=indices)
    calls = reference_calls(faulty)
    if wrong == "one block less":  # without the promise that makes kernels take forced blocks for granted
        calls = ours(dataclasses.replace(faulty, setting=dataclasses.replace(TINY, init_blocks=0, local_blocks=0)), "reference")
    result = (
        dict(zip(("o", "dq", "dk", "dv"), (calls.forward(), *calls.forward_backward()), strict=True))[name].detach().clone()
    )
    if wrong == "scaled":
        result *= 1.02
    elif wrong == "nan":
        result[-1] = torch.nan
    elif wrong == "one head swapped":
        result[:, 0] = result[:, -1]
    with pytest.raises(WrongResult, match=name):
        Oracle(inputs).check(**{name: result})


# The peers' adapters, with stand-ins that compute the right thing from what they are given


def stand_in(monkeypatch, module, **members):
    parts = module.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**members))


def selected_reference(q, k, v, indices, block_size):
    cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    return ops.selected_attention(q, k, v, indices, cu_seqlens, q.shape[0], block_size=block_size, backend="reference")


def causal_reference(q, k, v, causal):
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def fla_stand_in(q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64):
    assert block_indices.dtype == block_counts.dtype == torch.int64
    assert g_cmp is g_slc is g_swa is None
    counted = torch.arange(block_indices.shape[-1]) < block_counts[..., None]
    indices = block_indices.where(counted, -1).int()
    return selected_reference(q[0], k[0], v[0], indices[0], block_size)[None]


def old_fla_stand_in(q, k, v, g_slc, g_swa, block_indices, block_counts, block_size):
    return fla_stand_in(q, k, v, None, None, None, block_indices, block_counts, block_size) * g_slc[..., None]


def topk_stand_in(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):
    assert topk_idx.dtype == torch.int32
    assert topk_idx.is_contiguous()
    assert cu_seqlens.tolist() == [0, q.shape[0]]
    return selected_reference(q, k, v, topk_idx.transpose(0, 1), block_size)


def cudnn_stand_in(
    q_tensor, k_tensor, v_tensor, block_indices_tensor, block_counts_tensor, cum_seqlen_q_tensor, cum_seqlen_k_tensor,
    block_size, scale_softmax, max_s_q, max_s_k, is_causal=False,
):  # fmt: skip
    assert is_causal
    assert max_s_q == max_s_k == q_tensor.shape[0]
    assert torch.equal(block_counts_tensor, block_counts(block_indices_tensor))
    return selected_reference(q_tensor, k_tensor, v_tensor, block_indices_tensor, block_size), None, None


@pytest.mark.parametrize(
    ("name", "module", "members"),
    [
        ("flash_attn_4", "flash_attn.cute", dict(flash_attn_func=lambda *qkv, **o: (causal_reference(*qkv, **o), None))),
        ("flash_attn_2", "flash_attn", dict(flash_attn_func=causal_reference)),
        ("fla_nsa", "fla.ops.nsa", dict(parallel_nsa=fla_stand_in)),
        ("fla_nsa", "native_sparse_attention.ops.parallel", dict(parallel_nsa=old_fla_stand_in)),
        ("nsa_triton", "native_sparse_attention.ops", dict(topk_sparse_attention=topk_stand_in)),
        ("fsa", "fsa.ops.FSA_topk_sparse_attention", dict(FSA_topk_sparse_attention=topk_stand_in)),
        ("cudnn_nsa", "cudnn", dict(NSA=types.SimpleNamespace(selection_attention_wrapper=cudnn_stand_in))),
    ],
)
def test_peers_get_what_they_take(monkeypatch, name, module, members, seed):
    implementation = IMPLEMENTATIONS[name]
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", None)  # not importable, unless it is what stands in
    stand_in(monkeypatch, module, **members)
    assert implementation.missing() is None
    inputs = selected.make_inputs(TINY, seed, CPU)
    calls = implementation.prepare(inputs)
    errors = checked(calls, Oracle(inputs, full=implementation.kind == "full"))
    passes = {"forward"} if name == "cudnn_nsa" else {"forward", "backward", "forward_backward"}
    assert set(errors) == passes, calls.not_timed
    assert set(calls.not_timed) == {"forward", "backward", "forward_backward"} - passes


def test_what_peers_do_not_support():
    assert "16, 32" in IMPLEMENTATIONS["fla_nsa"].unsupported(Setting(8192, 4))
    assert IMPLEMENTATIONS["fla_nsa"].unsupported(Setting(8192, 16)) is None
    assert "128" in IMPLEMENTATIONS["cudnn_nsa"].unsupported(Setting(8192, 16, block_size=128))
    assert IMPLEMENTATIONS["cudnn_nsa"].unsupported(Setting(8192, 1)) is None
