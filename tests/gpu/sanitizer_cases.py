"""Ten small cases of selected attention, forward and backward: what test_sanitizer.py lets compute-sanitizer watch.

compute-sanitizer --tool memcheck python -m tests.gpu.sanitizer_cases
"""

import torch

from tests.cases import BF16, F16, Case, by_name, call, gradients, make_inputs, select, suited

# name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init, local, window, seed
WIDE = Case("wide", (200, 0, 65), 2, 3, 128, 128, BF16, 32, 16, 64, 4, 1, 2, 64, 60)
NARROW = Case("narrow", (300,), 1, 4, 64, 64, F16, 32, 16, 128, 3, 1, 1, 64, 61)
LITTLE, MUCH = 1, 2**30  # workspace

RUNS = [
    ("triton_kv_major", WIDE, MUCH),
    ("triton_kv_major", WIDE, LITTLE),
    ("triton_kv_major", NARROW, MUCH),
    ("triton_kv_major", by_name("t127_d192"), MUCH),
    ("triton_kv_major", by_name("empty_ends"), LITTLE),
    ("triton_kv_major", by_name("t65_no_forced"), MUCH),
    ("triton_kv_major", by_name("one_token_g3"), MUCH),
    ("triton_query_major", WIDE, MUCH),
    ("triton_query_major", by_name("nine"), LITTLE),
    ("triton_query_major", by_name("t31"), MUCH),
]


def main():
    for backend, case, workspace_bytes in RUNS:
        case = suited(case, backend)
        x = make_inputs(case, device="cuda", requires_grad=True)
        lse = call("compressed_attention", case, x)[1].detach()
        x = x.replace(block_indices=select(case, x, lse))
        promise = dict(init_blocks=case.init_blocks, local_blocks=case.local_blocks)
        o, _ = call("selected_attention", case, x, backend, workspace_bytes=workspace_bytes, **promise)
        for result in (o, *gradients("selected_attention", o, x, torch.ones_like(o))):
            assert torch.isfinite(result).all(), (backend, case)
    torch.cuda.synchronize()
    print(f"{len(RUNS)} cases ran")


if __name__ == "__main__":
    main()
