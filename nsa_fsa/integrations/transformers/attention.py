"""How transformers reaches a patched attention layer, and the layers left dense beside it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import flash_attention_mask

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.cache import check_in_step, layer_state
from nsa_fsa.modules import NativeSparseAttention
from nsa_fsa.ops.varlen import cu_seqlens_from_position_ids, sequence_ids

ATTENTION_NAME = "nsa_fsa"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class NSAAttention(NativeSparseAttention):
    """`NativeSparseAttention` with the forward of transformers' attention modules, sharing a dense module's projections.

    Args:
        config: must fit the dense module; `patch_model` checks that.
        dense: the Llama, Qwen2 or Qwen3 attention whose projections (and norms) this layer keeps using.
        new: compressors, device and dtype of what is added, as `NativeSparseAttention` takes them.
    """

    def __init__(self, config: NSAConfig, dense: nn.Module, **new: Any) -> None:
        projections = {name: getattr(dense, name, nn.Identity()) for name in PROJECTIONS}
        super().__init__(config, dense.layer_idx, projections=projections, **new)  # type: ignore[arg-type]
        self.train(dense.training)
        self._dense = (dense,)  # in a tuple, so that it is not a submodule

    def to_dense(self) -> nn.Module:
        """The dense module this one replaced, with the projections as they are now."""
        (dense,) = self._dense
        for name in PROJECTIONS:
            if hasattr(dense, name):
                setattr(dense, name, getattr(self, name))
        return dense.train(self.training)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention signature. Returns (output `[B, S, E]`, None): there are no attention weights to return.

        What is `cache` since transformers 5.24 was `past_key_values` before. Packed batches are recognised by `cu_seq_lens_q`
        among the kwargs or, at the cost of a device sync, by `position_ids` that start anew.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is not available: sparse attention never has the weights as a matrix.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; NSA layers take the 2D padding mask and are causal "
                f'by themselves. Fix: leave config._attn_implementation at "{ATTENTION_NAME}", and pass no 4D mask.'
            )
        model_cache = past_key_values if cache is None else cache
        state = None if model_cache is None else layer_state(model_cache, self.layer_idx or 0, self.config)
        if model_cache is not None:
            check_in_step(model_cache, self.layer_idx or 0, hidden_states.shape[1])
        batch_size, length, _ = hidden_states.shape

        cu_seqlens, max_seqlen = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
        position_ids = kwargs.get("position_ids")
        if cu_seqlens is None and position_ids is not None and attention_mask is None and (state is None or state.is_empty):
            found = cu_seqlens_from_position_ids(position_ids.expand(batch_size, -1))
            if found.shape[0] - 1 > batch_size:  # more sequences than rows: the batch is packed
                cu_seqlens, max_seqlen = found, length
        if cu_seqlens is None:
            output = super().forward(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, cache=state
            )
            return output, None
        if state is not None:
            raise ValueError("a packed batch cannot fill a cache. Fix: pass use_cache=False when training on packed sequences.")
        if position_embeddings is not None:
            cos, sin = (x.expand(batch_size, length, -1).reshape(1, batch_size * length, -1) for x in position_embeddings)
            position_embeddings = cos, sin
        output = super().forward(
            hidden_states.reshape(1, batch_size * length, -1),
            position_embeddings=position_embeddings,
            cu_seqlens=cu_seqlens,
            max_seqlen=None if max_seqlen is None else int(max_seqlen),
        )
        return output.reshape(hidden_states.shape), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The 2D padding mask `[B, tokens so far]`, or None when there is no padding: never anything of size S x S."""
    mask = flash_attention_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs)
    if mask is None and kv_length != q_offset + q_length:
        # A static cache is longer than what it holds; only a mask can tell a dense layer how long that is.
        mask = torch.ones(batch_size, int(q_offset) + q_length, dtype=torch.bool, device=kwargs.get("device"))
    return mask


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention for the layers that a partial patch left dense, from the same 2D mask and packing arguments.

    query `[B, HQ, Sq, D]`, key and value `[B, HKV, Sk, D]` -> (`[B, Sq, HQ, D]`, None).

    Raises:
        RuntimeError: for a layer that its config wants sparse.
    """
    sparse = (getattr(module.config, "nsa", {"layers": ()}) or {}).get("layers")
    if sparse is None or module.layer_idx in sparse:
        raise RuntimeError(
            f"layer {module.layer_idx} is dense, but its config, a {type(module.config).__name__}, has NSA there. Fix: build "
            "or load the model with AutoModelForCausalLM or AutoModel."
        )
    if attention_mask is not None:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]  # a static cache's unused end
    num_queries, num_keys, device = query.shape[2], key.shape[2], query.device
    q_position = torch.arange(num_keys - num_queries, num_keys, device=device)
    visible = (torch.arange(num_keys, device=device) <= q_position[:, None])[None]  # [1, Sq, Sk]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, :].bool()
    elif num_queries == num_keys:
        cu_seqlens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        if cu_seqlens is None and position_ids is not None:
            cu_seqlens = cu_seqlens_from_position_ids(position_ids.expand(query.shape[0], -1))
        if cu_seqlens is not None:
            sequence = sequence_ids(cu_seqlens, query.shape[0] * num_queries).view(query.shape[0], num_queries)
            visible = visible & (sequence[:, :, None] == sequence[:, None, :])
    # A padded query sees nothing, which softmax would turn into NaN; its own position is as good as anything.
    visible = visible | (torch.arange(num_keys, device=device) == q_position[:, None])
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None], dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, dense_attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
