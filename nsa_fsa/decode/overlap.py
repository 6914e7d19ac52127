"""Starting a kernel while the one before it still runs.

Decoding is a chain of small kernels, some of which take less time than it takes to start one. GPUs
of compute capability 9.0 and newer can start a kernel early, which then waits inside for the one
before it: programmatic dependent launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_fsa.ops.common.triton_backends import capability

OLDEST = (9, 0)


@triton.jit
def take_turn(OVERLAP: tl.constexpr):
    """Waits until the kernel before is done. Every program calls it before all else, so that who
    waits for a kernel waits for all before it, too."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pass_turn(OVERLAP: tl.constexpr):
    """Lets the next kernel start once all programs have called this or are done. What is started
    takes room: nothing is gained where a program has much left to do."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


def overlap(device: torch.device) -> dict[str, Any]:
    """The constant and the option of a launch on this device."""
    if device.type != "cuda" or (capability(device) or (0, 0)) < OLDEST:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
