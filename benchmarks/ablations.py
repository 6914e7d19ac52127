"""The KV-major kernels of selected attention without each part of their design, as figure 9 of the
FSA paper has it for its own.

This is the one file of the benchmarks that reaches inside the package: it changes what
`nsa_fsa.ops.common.tuning.default_config` returns, and knows three fields of its `Config`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.operators import SELECTED, selected_attention
from nsa_fsa.benchmarking.cases import Case, Named, Pass
from nsa_fsa.benchmarking.implementations import Function, Implementation
from nsa_fsa.ops.common import tuning

UNLIMITED = 1 << 50
Change = Callable[[Any], Any]  # of a tuning.Config


class Ablation(Implementation):
    """`changed` is the configuration that the kernels run instead of their default."""

    @staticmethod
    def changed(config: tuning.Config) -> tuning.Config:
        return config

    def passes(self, case: Case, function: Function | None = None) -> dict[str, Pass]:
        passes = super().passes(case, function)
        return passes if function else {name: self.within(run) for name, run in passes.items()}

    def within(self, run: Pass) -> Pass:
        default = tuning.default_config

        def changed_run() -> Named:
            with mock.patch.object(tuning, "default_config", lambda *x: self.changed(default(*x))):
                return run()

        return changed_run


class OneTile(Ablation):
    @staticmethod
    def changed(config: tuning.Config) -> tuning.Config:
        forward, backward = config.fwd_m, config.bwd_m
        return dataclasses.replace(config, fwd_item_rows=forward, bwd_item_rows=backward)


class Late(Ablation):
    @staticmethod
    def changed(config: tuning.Config) -> tuning.Config:
        return dataclasses.replace(config, stop_early=False)


def ablation(name: str, label: str, make: type[Ablation] = Ablation, **options: Any) -> Ablation:
    fields = {x.name: getattr(SELECTED, x.name) for x in dataclasses.fields(SELECTED)}
    function = partial(selected_attention, backend="triton_kv_major", **options)
    return make(**fields | dict(name=f"ablation_{name}", label=label, function=function))


ABLATIONS = [
    ablation("none", "the whole design"),
    ablation("items", "without the inner loop: a program per tile", OneTile),
    ablation("early", "without early return: every item as long as the longest may be", Late),
    ablation("forced", "without dense forced blocks", init_blocks=0, local_blocks=0),
    ablation("workspace", "without a bound on the workspace", workspace_bytes=UNLIMITED),
]
