"""The default configurations of the Triton kernels fit every GPU generation:
no spills, no more shared memory than there is.

In processes of their own: Triton compiles or interprets, decided when it is imported,
and these tests interpret.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_resources.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.system() != "Linux",
    reason="needs Triton, which is made for Linux",
)


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(SCRIPT.parent), str(ROOT)])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "COLUMNS": "220",
        "PYTHONPATH": path,
    }
    command = [sys.executable, str(SCRIPT)] if code is None else [sys.executable, "-c", code]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=900
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_default_configurations_fit(arch, tmp_path):
    path = tmp_path / "rows.json"
    checked = run(f"--arch={arch}", "--failures-only", f"--json={path}")
    rows = json.loads(path.read_text())
    kernels = {row["kernel"] for row in rows}
    # What the host functions launched: nothing slipped past the capture.
    assert {
        "mark_kernel",
        "collect_kernel",
        "plan_kernel",
        "merge_fwd_kernel",
        "locate_runs_kernel",
        "query_fwd_kernel",
        "append_kernel",
        "score_kernel",
        "choose_kernel",
        "attend_kernel",
        "merge_kernel",
        "weigh_blocks_kernel",
        "join_heads_kernel",
        "compare_kernel",
        "grade_kernel",
        "subtract_kernel",
        "divergence_dq_kernel",
        "divergence_dk_kernel",
    } <= kernels
    twin = "hopper_" if arch == "sm_90" else ""
    names = ("fwd", "bwd_dq", "bwd_dkdv")
    assert {"sum_parts_kernel", *(f"compressed_{name}_{twin}kernel" for name in names)} <= kernels
    assert {row["case"]["group_size"] for row in rows} == ({1, 4, 16} if arch == "sm_90" else {4})
    assert all(row["registers"] > 0 for row in rows if not row["error"])
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_wide_heads_fit_gpus_with_less_shared_memory():
    """The GPUs most people have: GeForce RTX 3090, 4090 and 5090, A10, L4, L40S.
    `make resources` compiles for the others.
    """
    checked = run("--arch=sm_86", "--head-dim=256", "--failures-only")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_kernel_that_does_not_compile_in_time_fails_the_check():
    small = ("--arch=sm_90", "--head-dim=32", "--variant=decoding")
    checked = run(*small, "--compile-limit=0.001")
    assert checked.returncode == 1
    # Each kernel that is given up on is named, and the others are still compiled.
    for kernel in ("append_kernel", "score_kernel", "merge_kernel"):
        assert re.search(rf"{kernel} .*not compiled after 0.001 s", checked.stdout), (
            checked.stdout + checked.stderr
        )


def test_what_counts_as_a_failure():
    """Limits by hand: 163 KiB on sm_80, 99 KiB on sm_89, 227 KiB on sm_90 and sm_100."""
    checked = run(
        code="""
from check_resources import Case, Row
def failure(arch="sm_90", **values):
    return Row("kernel", Case(arch, 128, 128, "bf16", 64, 4), **values).failure
assert failure(registers=255, shared=227 * 1024, stack=16, tensor_memory=512) == ""
assert failure(stack=24) == "spills 24 B"
assert failure(shared=227 * 1024 + 1) == "shared memory 227 > 227 KiB"
assert failure("sm_80", shared=163 * 1024) == ""
assert failure("sm_80", shared=200 * 1024) == "shared memory 200 > 163 KiB"
assert failure("sm_89", shared=100 * 1024) == "shared memory 100 > 99 KiB"
assert failure("sm_100", tensor_memory=1024) == "tensor memory 1024 > 512 columns"
assert failure(error="does not compile", stack=100) == "does not compile; spills 100 B"
"""
    )
    assert checked.returncode == 0, checked.stderr


def test_products_of_strides_in_32_bits_are_seen(tmp_path):
    """A kernel that multiplies three strides, one of them by an index of 64 bits."""
    (tmp_path / "strided.py").write_text("""
from typing import Any, NamedTuple
import triton
import triton.language as tl

@triton.jit
def at_row(ptr, stride_row):
    return ptr + tl.arange(0, 32) * stride_row

@triton.jit
def strided(ptr, stride_head, stride_token, stride_batch):
    ptr += tl.program_id(0).to(tl.int64) * stride_batch + tl.program_id(1) * stride_head
    tl.store(at_row(ptr, stride_token), 0.0)

class Heads(NamedTuple):
    ptr: Any
    stride_t: Any
    stride_h: Any

@triton.jit
def bundled(x, factor):
    ptr = x.ptr + tl.program_id(0).to(tl.int64) * x.stride_h + factor * tl.program_id(0)
    tl.store(ptr + tl.program_id(1) * x.stride_t, 0.0)
""")
    checked = run(
        str(tmp_path),
        code="""
import sys
sys.path.insert(0, sys.argv[1])
import check_resources as check, strided, triton, triton_ir
from triton.compiler import ASTSource
signature = {"ptr": "*fp32", "stride_head": "i32", "stride_token": "i32", "stride_batch": "i32"}
target = check.GPUTarget("cuda", 90, 32)
kernel = triton.compile(ASTSource(strided.strided, signature), target=target)
found = triton_ir.narrow_products(kernel.asm["source"])
assert found == ["stride_head", "stride_row"], found
signature = {"x": strided.Heads("*fp32", "i32", "i32"), "factor": "i32"}
kernel = triton.compile(ASTSource(strided.bundled, signature), target=target)
found = triton_ir.narrow_products(kernel.asm["source"])
assert found == ["x.stride"], found
""",
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_sums_over_copies_between_elements_are_seen(tmp_path):
    """Kernels that add up a reshaped tensor, of which lanes hold copies; where they lie is up to
    Triton."""
    (tmp_path / "added.py").write_text("""
import triton
import triton.language as tl

@triton.jit
def added(ptr, to_ptr, stride, AXIS: tl.constexpr, RESHAPED: tl.constexpr):
    pair, block, place = tl.arange(0, 2), tl.arange(0, 8), tl.arange(0, 16)
    head, tile = pair[:, None, None], pair[None, :, None]
    if AXIS == 1:
        head, tile = tile, head
    at = head.to(tl.int64) * stride + tile * 8 + block[None, None, :]
    x = tl.sum(tl.load(ptr + at), AXIS)
    if RESHAPED:
        x = tl.reshape(x, [16])
        tl.store(to_ptr + place, tl.cumsum(x, 0))
        tl.store(to_ptr, tl.sum(x, 0))
    else:
        tl.store(to_ptr, tl.sum(tl.sum(x, 0), 0))
""")
    checked = run(
        str(tmp_path),
        code=r'''
import sys
sys.path.insert(0, sys.argv[1])
import check_resources as check, added, triton, triton_ir
from triton.compiler import ASTSource
def faults(axis, reshaped):
    signature = {"ptr": "*i32", "to_ptr": "*i32", "stride": "i32"}
    signature |= {"AXIS": "constexpr", "RESHAPED": "constexpr"}
    source = ASTSource(added.added, signature, {"AXIS": axis, "RESHAPED": reshaped})
    target = check.GPUTarget("cuda", 90, 32)
    kernel = triton.compile(source, target=target, options=dict(num_warps=1))
    return triton_ir.faults(kernel.asm["source"], kernel.asm["ttgir"])
assert any("adds up lanes" in faults(axis, True) for axis in (0, 1))
assert not any(faults(axis, False) for axis in (0, 1))
def code(lanes, axis, layout="#linear"):
    return f"""#linear = #ttg.linear<{{register = [], lane = {lanes}, warp = [], block = []}}>
    %1 = "tt.reduce"(%0) <{{axis = {axis} : i32}}> ({{
    ^bb0(%a: i32, %b: i32):
      tt.reduce.return %2 : i32
    }}) : (tensor<2x8xi32, {layout}>) -> i32"""
misadded = triton_ir.misadded
assert misadded(code("[[1], [2], [4], [0], [8]]", 0)) == ["[[1], [2], [4], [0], [8]], along axis 0"]
assert not misadded(code("[[0], [0], [4], [8], [16]]", 0))
rows = "[[0, 2], [0, 4], [0, 0], [1, 0], [0, 1]]"
assert misadded(code(rows, 1)) and not misadded(code(rows, 0))
sliced = "#ttg.slice<{dim = 0, parent = #linear}>"
assert misadded(code(rows, 0, sliced))
''',
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_spills_are_seen(tmp_path):
    """A kernel that keeps 64 values a thread, with enough registers and with too few."""
    (tmp_path / "hoard.py").write_text("""
import triton
import triton.language as tl

@triton.jit
def hoard(ptr, N: tl.constexpr):
    at = ptr + tl.arange(0, N)
    x = tl.load(at)
    tl.store(at, x * tl.sum(x))
""")
    checked = run(
        str(tmp_path),
        code="""
import sys
sys.path.insert(0, sys.argv[1])
import check_resources as check, hoard, triton
from triton.compiler import ASTSource
def stack(**options):
    signature, aligned = {"ptr": "*fp32", "N": "constexpr"}, {(0,): [["tt.divisibility", 16]]}
    source = ASTSource(hoard.hoard, signature, {"N": 2048}, aligned)
    options = dict(num_warps=1, **options)
    kernel = triton.compile(source, target=check.GPUTarget("cuda", 90, 32), options=options)
    return check.resources(kernel.asm["cubin"])[1]
print(stack(), stack(maxnreg=32))
assert stack() == 0
assert stack(maxnreg=32) > check.STACK_ALLOWED
""",
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
