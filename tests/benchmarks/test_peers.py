"""The peers' adapters, with stand-ins that compute the right thing from what they are given."""

import sys
import types

import pytest
import torch

from benchmarks.inputs import SuiteCase
from benchmarks.peers import FLEX
from benchmarks.suites import IMPLEMENTATIONS
from nsa_fsa import ops
from nsa_fsa.benchmarking.cases import PASSES
from nsa_fsa.benchmarking.check import WrongResult
from tests.benchmarking.tools import case


def suite_case(selection="random", **options):
    return case(kind=SuiteCase, selection=selection, **options)


def stand_in(monkeypatch, module, **members):
    parts = module.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(parts[depth - 1]))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**members))


def selected(q, k, v, indices, block_size):
    where = (torch.tensor([0, q.shape[0]], dtype=torch.int32), q.shape[0])
    options = dict(block_size=block_size, backend="reference")
    return ops.selected_attention(q, k, v, indices, *where, **options)


def causal(q, k, v, causal, softmax_scale=None):
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def causal_and_lse(*tensors, **options):
    return causal(*tensors, **options), None


def fla(q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, **sizes):
    assert block_indices.dtype == block_counts.dtype == torch.int64
    assert g_cmp is g_slc is g_swa is None
    counted = torch.arange(block_indices.shape[-1]) < block_counts[..., None]
    return selected(q[0], k[0], v[0], block_indices.where(counted, -1).int()[0], **sizes)[None]


def old_fla(q, k, v, g_slc, g_swa, block_indices, block_counts, block_size):
    o = fla(q, k, v, None, None, None, block_indices, block_counts, block_size=block_size)
    return o * g_slc[..., None]


def topk(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):
    assert topk_idx.dtype == torch.int32
    assert topk_idx.is_contiguous()
    assert cu_seqlens.tolist() == [0, q.shape[0]]
    return selected(q, k, v, topk_idx.transpose(0, 1), block_size)


def cudnn(
    q_tensor, k_tensor, v_tensor, block_indices_tensor, block_counts_tensor, cum_seqlen_q_tensor,
    cum_seqlen_k_tensor, block_size, scale_softmax, max_s_q, max_s_k, is_causal=False,
):  # fmt: skip
    assert is_causal
    assert max_s_q == max_s_k == q_tensor.shape[0]
    assert scale_softmax == q_tensor.shape[2] ** -0.5
    counts = [[sum(j >= 0 for j in x) for x in heads] for heads in block_indices_tensor.tolist()]
    assert block_counts_tensor.dtype == torch.int32
    assert block_counts_tensor.tolist() == counts
    return selected(q_tensor, k_tensor, v_tensor, block_indices_tensor, block_size), None, None


NSA = types.SimpleNamespace(selection_attention_wrapper=cudnn)
GROUP_16 = dict(num_heads=16, num_kv_heads=1)


@pytest.mark.parametrize(
    ("name", "module", "members"),
    [
        ("flash_attn_4", "flash_attn.cute", dict(flash_attn_func=causal_and_lse)),
        ("flash_attn_2", "flash_attn", dict(flash_attn_func=causal)),
        ("fla_nsa", "fla.ops.nsa", dict(parallel_nsa=fla)),
        ("fla_nsa", "native_sparse_attention.ops.parallel", dict(parallel_nsa=old_fla)),
        ("nsa_triton", "native_sparse_attention.ops", dict(topk_sparse_attention=topk)),
        ("fsa", "fsa.ops.FSA_topk_sparse_attention", dict(FSA_topk_sparse_attention=topk)),
        ("cudnn_nsa", "cudnn", dict(NSA=NSA)),
    ],
)
def test_peers_get_what_they_take(monkeypatch, name, module, members, seed):
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", None)  # not importable, unless it stands in
    stand_in(monkeypatch, module, **members)
    by, x = IMPLEMENTATIONS[name], suite_case(seed=seed, **GROUP_16)
    passes = by.passes(x)
    for pass_name in PASSES:
        if name == "cudnn_nsa" and pass_name != "forward":
            with pytest.raises(RuntimeError, match="does not require grad"):
                passes[pass_name]()
        else:
            assert max(by.check(x, pass_name, passes[pass_name]()).values()) < 1e-5


def test_a_wrong_peer_is_refused(monkeypatch, seed):
    wrong = lambda *x, **o: 1.02 * topk(*x, **o)  # noqa: E731
    stand_in(monkeypatch, "fsa.ops.FSA_topk_sparse_attention", FSA_topk_sparse_attention=wrong)
    by, x = IMPLEMENTATIONS["fsa"], suite_case(seed=seed)
    for name, run in by.passes(x).items():
        with pytest.raises(WrongResult, match="differs from the reference"):
            by.check(x, name, run())


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("fla_nsa", dict(), "wants groups of 16, 32, ... query heads, not 2"),
        ("fla_nsa", dict(num_heads=24, num_kv_heads=1), "not 24"),
        ("cudnn_nsa", dict(block_size=128), "takes blocks of 16, 32 or 64 keys, not 128"),
    ],
)
def test_what_a_peer_does_not_take_is_said(name, sizes, reason):
    with pytest.raises(ValueError, match=reason):
        IMPLEMENTATIONS[name].passes(suite_case(**sizes))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(seed):
    """Its forward; it has no backward on the CPU, and refuses tensors that ask for one."""
    x = suite_case("independent", seed=seed)
    o = FLEX.function(x)(x["q"], x["k_cmp"], x["v_cmp"])
    assert FLEX.check(x, "forward", dict(o=o))["o"] < 1e-5
