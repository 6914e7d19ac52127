"""The ways to run selected attention by Triton: either loop order."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AddTo, AttentionGradients, AttentionResult, Softmax
from nsa_fsa.ops.common.sizes import rows_contiguous
from nsa_fsa.ops.common.softmax_statistics import statistics
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.kv_major_backward import selected_attention_bwd
from nsa_fsa.ops.selected_attention.kv_major_forward import selected_attention_fwd
from nsa_fsa.ops.selected_attention.query_major import query_major_bwd_dq, query_major_fwd


@dataclass(frozen=True)
class KVMajor:
    """The loop order of FSA: KV blocks outside, the queries that chose each block inside."""

    config: tuning.Config

    def forward(self, call: SelectedCall) -> AttentionResult:
        return selected_attention_fwd(call, self.config)

    def backward(
        self, call: SelectedCall, do: Tensor, softmax: Softmax, add_to: AddTo
    ) -> AttentionGradients:
        do = rows_contiguous(do)
        found = statistics(do, softmax, call.scale)
        return selected_attention_bwd(call, self.config, do, found, add_to)


@dataclass(frozen=True)
class QueryMajor:
    """The loop order of NSA: queries outside, the blocks that each chose inside.

    Queries may be only the last positions of their sequences. The backward does dq in this order;
    dk and dv come by the blocks' programs, as in every NSA implementation.
    """

    def forward(self, call: SelectedCall) -> AttentionResult:
        return query_major_fwd(call)

    def backward(
        self, call: SelectedCall, do: Tensor, softmax: Softmax, add_to: AddTo
    ) -> AttentionGradients:
        do = rows_contiguous(do)
        found = statistics(do, softmax, call.scale)
        config = tuning.plain_config(call.q, call.v, call.blocks.block_size)
        grads = selected_attention_bwd(call, config, do, found, add_to, store_dq=False)
        if call.q.numel():
            query_major_bwd_dq(call, do, found, grads.q, add=add_to.q is not None)
        return grads


Way: TypeAlias = KVMajor | QueryMajor
