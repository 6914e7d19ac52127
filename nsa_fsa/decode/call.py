"""The calls of decoding's two operators."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsa_fsa.decode.pages import Pages
from nsa_fsa.ops.common.calls import Blocks, Call, Windows


class Pooling(NamedTuple):
    """How a window's tokens make one: their mean, or a sum weighted per head, after an embedding
    of their places has been added."""

    logits: Tensor | None = None  # [HKV, l], whose softmax weighs the tokens; None: the mean
    embedding: Tensor | None = None  # [HKV, l, width]


class NewTokensCall(Call):
    """A call about T = B * num_new new tokens, which are the rows of its first tensor."""

    lengths: Tensor  # int32 [B], new tokens included

    @property
    def num_new(self) -> int:
        """New tokens of a sequence."""
        return self.first.shape[0] // self.lengths.shape[0]


@dataclass(frozen=True)
class AppendCall(NewTokensCall):
    """One call of `append_tokens`."""

    new_k: Tensor  # [T, HKV, D]
    new_v: Tensor  # [T, HKV, DV]
    pages: Pages
    lengths: Tensor  # int32 [B], new tokens included
    k_logits: Tensor | None
    k_embedding: Tensor | None
    v_logits: Tensor | None
    v_embedding: Tensor | None
    turn: Tensor | None  # [2, l, rotary_dim / 2]
    cos: Tensor | None  # [T, rotary_dim], of the new tokens
    sin: Tensor | None
    windows: Windows
    write: int  # 1: write the tokens; 0: the pages have them
    compress: int  # 1: pool the windows that the new tokens complete; 0: the caller does
    backend: str

    @property
    def pool_k(self) -> Pooling:
        return Pooling(self.k_logits, self.k_embedding)

    @property
    def pool_v(self) -> Pooling:
        return Pooling(self.v_logits, self.v_embedding)


@dataclass(frozen=True)
class DecodeCall(NewTokensCall):
    """One call of `nsa_decode`: the queries of new tokens, which the pages hold."""

    q: Tensor  # [T, HQ, D]
    gate_logits: Tensor  # [T, HQ or 1, 3]
    pages: Pages
    lengths: Tensor  # int32 [B], new tokens included
    scale: float
    windows: Windows
    blocks: Blocks
    num_selected_blocks: int
    window_size: int
    dense_below: int
    backend: str

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.pages.k.shape[1]


class Decoded(NamedTuple):
    o: Tensor  # [T, HQ, DV]
    block_indices: Tensor  # int32 [T, HKV, T_sel], ascending, -1 where there is none
