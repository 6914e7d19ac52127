"""What the scripts that take long share: one thread on the CPU, and the package's progress.

Import it before torch, whose OpenMP library reads the environment once, while it is loaded.
"""

import os

# The tensors of a run on a CPU are small, so that threads wait for each other more than they
# compute: 40 steps of the quickstart take 32 s with one thread on 2 cores and 25 s with two.
# Beside 4 busy processes, two did not finish one step in 40 s, as a thread that waits spins
# first, and so takes the time slice of the one it waits for; threads that sleep at once
# (OMP_WAIT_POLICY=PASSIVE) took 58 s for the 40 steps on idle cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nsa_fsa.progress import Steps

__all__ = ["Steps"]
