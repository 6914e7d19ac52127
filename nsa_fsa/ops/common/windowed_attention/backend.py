"""The Triton backend of the operators that are attention over windows."""

from torch import Tensor

from nsa_fsa.ops.common.attention_operator import AttentionBackend
from nsa_fsa.ops.common.calls import NOTHING, AddTo, AttentionGradients, AttentionResult, Softmax
from nsa_fsa.ops.common.triton_backends import TritonBackend, unsupported_tensors
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall

MAX_GROUP_SIZE = 64


class TritonWindows(TritonBackend[WindowedCall], AttentionBackend[WindowedCall]):
    def __init__(self, name: str):
        self.name = name

    def refuses(self, call: WindowedCall, *, backward: bool = False) -> str | None:
        if call.group_size > MAX_GROUP_SIZE:
            return (
                f"{call.group_size} query heads a KV head; supported are at most {MAX_GROUP_SIZE}"
            )
        if not call.scale > 0:
            return f"scale={call.scale}; it must be positive"
        return unsupported_tensors(call.q, call.v)

    def forward(self, call: WindowedCall) -> AttentionResult:
        from nsa_fsa.ops.common.windowed_attention.forward import windowed_attention_fwd

        return windowed_attention_fwd(call)

    def backward(
        self, call: WindowedCall, do: Tensor, softmax: Softmax, add_to: AddTo = NOTHING
    ) -> AttentionGradients:
        from nsa_fsa.ops.common.windowed_attention.backward import windowed_attention_bwd

        return windowed_attention_bwd(call, do, softmax, add_to)
