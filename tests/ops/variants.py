"""How many times the kernels of 40 steps are compiled: run by test_variants.py, with Triton that
compiles, not interprets.

    python variants.py packed 40 32 8

prints, as JSON, how many variants every kernel has after each of 40 steps with 32 and 8 heads, of
packed batches. Or of a `single` sequence, or of queries of a growing cache, `decode`."""

import json
import random
import sys
from collections import defaultdict
from dataclasses import replace

import check_resources
import torch
from triton.runtime.jit import JITFunction

from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.block_selection.triton import select_blocks
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AddTo, Blocks, Softmax, Windows
from nsa_fsa.ops.common.windowed_attention.backward import windowed_attention_bwd
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.forward import windowed_attention_fwd
from nsa_fsa.ops.compression import triton as compress
from nsa_fsa.ops.gated_combine import triton as gated_combine
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall, SelectedCall
from nsa_fsa.ops.selected_attention.launch import KVMajor, QueryMajor
from nsa_fsa.sequences import Sequences

WINDOWS, BLOCKS = Windows(32, 16), Blocks(64, 1, 2)
SCALE, WORKSPACE_BYTES = 0.1, 2 << 30
SHARED = (SCALE, WORKSPACE_BYTES, "triton")  # by all calls of attention
BF16, F32 = torch.bfloat16, torch.float32
found = defaultdict(set)


def record(self, *args, grid, warmup=False, **keywords):
    """What Triton would compile a kernel anew for."""
    _, _, _, _, binder = self.device_caches[0]
    _, specialization, options = binder(*args, **keywords)
    # Memory is imagined: where a tensor begins inside of what was allocated says how it
    # would be aligned.
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
    tokens, cu_seqlens = sum(lengths), new(len(lengths) + 1, dtype=torch.int32)
    sequences = Sequences(cu_seqlens, max(lengths))
    q, do = new(tokens, num_heads, head_dim), new(tokens, num_heads, head_dim)
    k, v = new(tokens, num_kv_heads, head_dim), new(tokens, num_kv_heads, head_dim)
    k_cmp, lse = new(tokens // 16, num_kv_heads, head_dim), new(tokens, num_heads, dtype=F32)
    weight, logits = new(num_kv_heads, 32, dtype=F32), new(tokens, num_heads, 3)

    compress.pool_windows(k, weight, sequences, WINDOWS)
    compressed = WindowedCall(q, k_cmp, k_cmp, sequences, *SHARED, WINDOWS, None)
    windowed_attention_fwd(compressed)
    indices = select_blocks(
        SelectionCall(q, k_cmp, lse, sequences, SCALE, WINDOWS, BLOCKS, 16, "triton")
    )
    selected = SelectedCall(q, k, v, sequences, *SHARED, BLOCKS, indices, None, None)
    selected = replace(selected, index=build_block_index(IndexCall.of(selected)))
    way = KVMajor(tuning.default_config(q, v, BLOCKS.block_size))
    way.forward(selected)
    gated_combine.gated_combine(logits, do, do, do)

    _, gated_lse, delta = gated_combine.branch_gradients(do, [do] * 3, [lse] * 3, logits)
    add_to = AddTo(*(new(*x.shape) for x in (q, k, v)))
    way.backward(selected, do, Softmax(None, gated_lse[1], delta[1]), add_to)
    softmax = Softmax(None, gated_lse[0], delta[0])
    windowed_attention_bwd(compressed, do, softmax, AddTo(new(*q.shape)))
    compress.pool_windows_backward(k_cmp, k, weight, sequences, WINDOWS)


def decode(tokens, num_heads, num_kv_heads, head_dim=128, batch=4):
    """One query of each sequence, and caches of `tokens` rows in all; selected attention in both
    loop orders."""
    q, lse = new(batch, num_heads, head_dim), new(batch, num_heads, dtype=F32)
    k, k_cmp = new(tokens, num_kv_heads, head_dim), new(tokens // 16, num_kv_heads, head_dim)
    cu_seqlens, cu_seqlens_q = (new(batch + 1, dtype=torch.int32) for _ in range(2))
    sequences = Sequences(cu_seqlens, tokens, cu_seqlens_q, new(batch, dtype=torch.int32))

    windowed_attention_fwd(WindowedCall(q, k_cmp, k_cmp, sequences, *SHARED, WINDOWS, None))
    indices = select_blocks(
        SelectionCall(q, k_cmp, lse, sequences, SCALE, WINDOWS, BLOCKS, 16, "triton")
    )
    selected = SelectedCall(q, k, k, sequences, *SHARED, BLOCKS, indices, None, None)
    QueryMajor().forward(selected)
    selected = replace(selected, index=build_block_index(IndexCall.of(selected)))
    KVMajor(tuning.default_config(q, k, BLOCKS.block_size)).forward(selected)


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
