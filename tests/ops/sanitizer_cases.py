"""Small cases of every operator that has kernels, forward and backward:
what test_sanitizer.py lets compute-sanitizer watch.

compute-sanitizer --tool memcheck python -m tests.ops.sanitizer_cases
"""

import dataclasses
import sys

import torch

from nsa_fsa.ops import block_divergence
from nsa_fsa.ops.common import tuning
from tests.cases import BF16, F16, Case, by_name, call, gradients, make_inputs, output, select
from tests.decode.problems import Problem, Run

# name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init, local,
# window, seed
WIDE = Case("wide", (200, 0, 65), 2, 3, 128, 128, BF16, 32, 16, 64, 4, 1, 2, 64, 60)
NARROW = Case("narrow", (300,), 1, 4, 64, 64, F16, 32, 16, 128, 3, 1, 1, 64, 61)
PAIRS = Case("pairs", (200, 0, 65), 2, 2, 128, 128, BF16, 32, 16, 64, 4, 1, 2, 64, 63)
PLAIN = Case("plain", (200, 0, 65), 2, 3, 96, 80, BF16, 32, 16, 64, 4, 1, 2, 64, 62)
LITTLE, MUCH = 1, 2**30  # workspace

# Backend of selected attention, on the blocks that the kernels of compressed attention and of
# selection choose.
SELECTED = [
    ("triton_kv_major", WIDE, MUCH),
    ("triton_kv_major", WIDE, LITTLE),
    ("triton_kv_major", NARROW, MUCH),
    ("triton_kv_major", by_name("t127_d192"), MUCH),
    ("triton_kv_major", by_name("empty_ends"), LITTLE),
    ("triton_kv_major", by_name("t65_no_forced"), MUCH),
    ("triton_kv_major", by_name("one_token_g3"), MUCH),
    ("triton_query_major", WIDE, MUCH),
    ("triton_query_major", dataclasses.replace(by_name("nine"), block_size=16), LITTLE),
    ("triton_query_major", by_name("t31"), MUCH),
]


# Operators with a single Triton backend, and their gradients.
OTHERS = [
    ("compressed_attention", WIDE),  # with the kernels written for Hopper, where these can run
    ("compressed_attention", PLAIN),
    ("pool_windows", WIDE),
    ("gather_windows", WIDE),
    ("gated_combine", WIDE),  # a gate for all heads of a query
    ("gated_combine", NARROW),  # one for each
    ("nsa_attention", WIDE),  # gradients that are added to others
    ("nsa_attention", NARROW),
    ("nsa_attention", PLAIN),
]
# Compressed attention, backward in one pass, which long sequences have;
# where the kernels for Hopper can run.
IN_ONE_PASS = [(PAIRS,), (NARROW,)]
# Steps of decoding: lengths before, and new tokens.
DECODING = [
    (Problem(lengths=(0, 5, 97), device="cuda"),),
    (Problem(lengths=(33, 200), num_new=3, page_size=0, dtype=BF16, device="cuda"),),
]
DIVERGENCE = [(WIDE, MUCH), (NARROW, LITTLE), (PLAIN, MUCH)]
RUNS = [*SELECTED, *OTHERS, *IN_ONE_PASS, *DECODING, *DIVERGENCE]


def run_selected(backend, case, workspace_bytes):
    x = make_inputs(case, device="cuda", requires_grad=True)
    lse = call("compressed_attention", case, x, "triton")[1].detach()
    x = x.replace(block_indices=select(case, x, lse, "triton"))
    promise = dict(init_blocks=case.init_blocks, local_blocks=case.local_blocks)
    o, _ = call("selected_attention", case, x, backend, workspace_bytes=workspace_bytes, **promise)
    return o, *gradients("selected_attention", o, x, torch.ones_like(o))


def run_other(operator, case):
    x = make_inputs(case, device="cuda", requires_grad=True)
    o = output(call(operator, case, x, "triton"))
    grads = gradients(operator, o, x, torch.ones_like(o))
    # Rows that no window owns are unspecified.
    return grads if operator.endswith("_windows") else (o, *grads)


def run_in_one_pass(case):
    choose = tuning.compressed_config

    def always(*arguments):
        return dataclasses.replace(choose(*arguments), one_pass_tokens=0, one_pass_part_rows=128)

    tuning.compressed_config = always
    try:
        return run_other("compressed_attention", case)
    finally:
        tuning.compressed_config = choose


def run_divergence(case, workspace_bytes):
    """The lse of dense attention may be any."""
    x = make_inputs(case, device="cuda")
    k_cmp = x.k_cmp.nan_to_num(0).requires_grad_()
    lse = call("compressed_attention", case, x, "triton")[1]
    found = block_divergence(
        *(x.q.requires_grad_(), x.k, k_cmp, lse, lse, select(case, x, lse, "triton")),
        *(x.cu_seqlens, max(case.lengths)),
        **case.windows,
        block_size=case.block_size,
        workspace_bytes=workspace_bytes,
        backend="triton",
    )
    grads = torch.autograd.grad(found.divergence.sum(), (x.q, k_cmp))
    return found.divergence, found.mass.nan_to_num(posinf=0), *grads


def run_decoding(problem):
    run = Run(problem, "triton")
    return [run.step().o for _ in range(2)]


def main():
    # FlashAttention 4 is others' work, and compiles for minutes under the tool:
    # the window of the whole goes to PyTorch's, whose kernels the tool is told to leave out.
    sys.modules["flash_attn"] = None  # type: ignore[assignment]
    for run, cases in (
        (run_selected, SELECTED),
        (run_other, OTHERS),
        (run_in_one_pass, IN_ONE_PASS),
        (run_decoding, DECODING),
        (run_divergence, DIVERGENCE),
    ):
        for case in cases:
            for result in run(*case):
                assert torch.isfinite(result).all(), case
    torch.cuda.synchronize()
    print(f"{len(RUNS)} cases ran")


if __name__ == "__main__":
    main()
