"""Selected attention on indices as `select_blocks` gives them, with the forced blocks they promise,
beside the reference.
"""

import dataclasses

import torch

from tests.cases import (
    RESULTS,
    call,
    case_for,
    device_of,
    gradients,
    make_inputs,
    select,
    widest_dtype,
)
from tests.guards import guarded, guarded_allocations


def selection(case, backend):
    """The case as the backend can run it, its inputs in float64 on the CPU,
    and what the reference selects.
    """
    case = case_for("selected_attention", backend, case)
    x = make_inputs(case, torch.float64)
    return case, x, select(case, x, call("compressed_attention", case, x)[1])


def forced(case, init_blocks, local_blocks, free):
    """The case with these forced blocks, and `free` more for the scores to choose."""
    chosen = dict(
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        num_selected_blocks=init_blocks + local_blocks + free,
    )
    return dataclasses.replace(case, **chosen)


def output_gradient(case):
    return torch.randn(sum(case.lengths), case.num_heads, case.v_head_dim, dtype=torch.float64)


def run(backend, case, x, block_indices, do, **extra):
    """RESULTS in the backend's widest dtype, as float64 on the CPU;
    what is read or written out of bounds shows.
    """
    device, dtype = device_of(backend), widest_dtype(backend)[0]
    tensors = {
        name: guarded(getattr(x, name).to(device, dtype))[0].requires_grad_()
        for name in ("q", "k", "v")
    }
    x = x.replace(
        block_indices=guarded(block_indices.to(device))[0],
        cu_seqlens=x.cu_seqlens.to(device),
        **tensors,
    )
    extra = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in extra.items()
    }
    with guarded_allocations():
        promise = dict(init_blocks=case.init_blocks, local_blocks=case.local_blocks)
        o, lse = call("selected_attention", case, x, backend, **promise, **extra)
        results = [o, lse, *gradients("selected_attention", o, x, do.to(o))]
    return [result.detach().cpu().double() for result in results]


def assert_results_close(backend, found, expected, names=RESULTS, rows=slice(None)):
    """To rounding in the backend's widest dtype; ten times it for sums over a query's keys and a
    key's queries.
    """
    rounding = 10 * widest_dtype(backend)[1]
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        if name in names:
            close = dict(rtol=rounding, atol=rounding)
            torch.testing.assert_close(
                a[rows], b[rows], msg=lambda m, name=name: f"{name}: {m}", **close
            )
