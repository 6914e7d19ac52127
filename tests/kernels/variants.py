"""How many times the kernels of 40 steps are compiled: run by test_variants.py, with Triton that compiles, not interprets.

    python variants.py packed 40 32 8

prints, as JSON, how many variants every kernel has after each of 40 steps with 32 and 8 heads, of packed batches. Or of a
`single` sequence, or of queries of a growing cache, `decode`.
"""

import json
import random
import sys
from collections import defaultdict
from dataclasses import replace

import check_resources
import torch
from triton.runtime.jit import JITFunction

from nsa_fsa.ops.block_selection import triton as block_selection
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AddTo, Blocks, Softmax
from nsa_fsa.ops.compressed_attention import triton_backward as compressed_attention_backward
from nsa_fsa.ops.compressed_attention import triton_forward as compressed_attention
from nsa_fsa.ops.compression import triton as compress
from nsa_fsa.ops.gated_combine import triton as gated_combine
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall, SelectedCall
from nsa_fsa.ops.selected_attention.launch import KVMajor, QueryMajor
from nsa_fsa.sequences import Sequences

WINDOWS = dict(kernel_size=32, kernel_stride=16)
FORCED = dict(block_size=64, init_blocks=1, local_blocks=2)
BF16, F32 = torch.bfloat16, torch.float32
found = defaultdict(set)


def record(self, *args, grid, warmup=False, **keywords):
    """What Triton would compile a kernel anew for."""
    _, _, _, _, binder = self.device_caches[0]
    _, specialization, options = binder(*args, **keywords)
    # Memory is imagined: where a tensor begins inside of what was allocated says how it would be aligned.
    tensors = [x for x in members(args) if isinstance(x, torch.Tensor)]
    aligned = [x.storage_offset() * x.element_size() % 16 == 0 for x in tensors]
    found[self.fn.__name__].add(str((specialization, options, aligned)))


def members(arguments):
    """The arguments, bundles taken apart."""
    for x in arguments:
        yield from members(x) if isinstance(x, tuple) else (x,)


def new(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def step(lengths, num_heads, num_kv_heads, head_dim=128):
    """Forward and backward of the whole core."""
    tokens, longest, cu_seqlens = sum(lengths), max(lengths), new(len(lengths) + 1, dtype=torch.int32)
    q, do = new(tokens, num_heads, head_dim), new(tokens, num_heads, head_dim)
    k, v = new(tokens, num_kv_heads, head_dim), new(tokens, num_kv_heads, head_dim)
    k_cmp, lse = new(tokens // 16, num_kv_heads, head_dim), new(tokens, num_heads, dtype=F32)
    weight, logits = new(num_kv_heads, 32, dtype=F32), new(tokens, num_heads, 3)
    compress.pool_windows(k, weight, cu_seqlens, **WINDOWS)
    compressed_attention.compressed_attention_fwd(q, k_cmp, k_cmp, cu_seqlens, scale=0.1, **WINDOWS)
    indices = block_selection.select_blocks(
        q, k_cmp, lse, cu_seqlens, longest, num_selected_blocks=16, scale=0.1, **FORCED, **WINDOWS
    )
    sequences = Sequences(cu_seqlens, longest)
    call = SelectedCall(q, k, v, sequences, 0.1, 2 << 30, "triton", Blocks(**FORCED), indices, None, None)
    call = replace(call, index=build_block_index(IndexCall.of(call)))
    way = KVMajor(tuning.default_config(q, v, FORCED["block_size"]))
    way.forward(call)
    gated_combine.gated_combine(logits, do, do, do)
    _, gated_lse, delta = gated_combine.branch_gradients(do, [do] * 3, [lse] * 3, logits)
    add_to = AddTo(*(new(*x.shape) for x in (q, k, v)))
    way.backward(call, do, Softmax(None, gated_lse[1], delta[1]), add_to)
    compressed_attention_backward.compressed_attention_bwd(
        do, q, k_cmp, k_cmp, None, gated_lse[0], cu_seqlens, longest, delta=delta[0], add_to=(new(*q.shape), None, None),
        scale=0.1, workspace_bytes=2 << 30, **WINDOWS,
    )  # fmt: skip
    compress.pool_windows_backward(k_cmp, k, weight, cu_seqlens, **WINDOWS)


def decode(tokens, num_heads, num_kv_heads, head_dim=128, batch=4):
    """One query of each sequence, and caches of `tokens` rows in all."""
    q, lse = new(batch, num_heads, head_dim), new(batch, num_heads, dtype=F32)
    k, k_cmp = new(tokens, num_kv_heads, head_dim), new(tokens // 16, num_kv_heads, head_dim)
    cu_seqlens, cu_seqlens_q = new(batch + 1, dtype=torch.int32), new(batch + 1, dtype=torch.int32)
    where = dict(cu_seqlens_q=cu_seqlens_q, seqused_k=new(batch, dtype=torch.int32))
    compressed_attention.compressed_attention_fwd(q, k_cmp, k_cmp, cu_seqlens, scale=0.1, **WINDOWS, **where)
    indices = block_selection.select_blocks(
        q, k_cmp, lse, cu_seqlens, tokens, num_selected_blocks=16, scale=0.1, **FORCED, **WINDOWS, **where
    )
    sequences = Sequences(cu_seqlens, tokens, **where)
    QueryMajor().forward(SelectedCall(q, k, k, sequences, 0.1, 2 << 30, "triton", Blocks(**FORCED), indices, None, None))


def main(kind, steps, *heads):
    check_resources.pretend_gpu("sm_90")
    JITFunction.run = record
    random.seed(1)
    history, tokens = [], 4000
    with torch.no_grad():
        for _ in range(steps):
            if kind == "decode":
                tokens += random.randint(1, 5)
                decode(tokens, *heads)
            elif kind == "packed":
                step([random.randint(200, 2000) for _ in range(random.randint(2, 16))], *heads)
            else:
                step([random.randint(1000, 9000)], *heads)
            history.append({name: len(variants) for name, variants in found.items()})
    print(json.dumps(history))


main(sys.argv[1], *map(int, sys.argv[2:]))
