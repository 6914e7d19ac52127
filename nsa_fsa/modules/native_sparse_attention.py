"""NativeSparseAttention: the layer.

Shapes: B sequences of up to S tokens, T tokens packed end to end, E hidden width, HQ and HKV heads,
D and DV head widths.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa import checks
from nsa_fsa.cache import KeyValues, NSACache
from nsa_fsa.cache.nsa_cache import Rotation
from nsa_fsa.config import NSAConfig
from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import Runs, check_context_parallel
from nsa_fsa.modules.branches import SparseBranches, put_back, rotate, take
from nsa_fsa.modules.norm import normalize
from nsa_fsa.modules.rotary import RotaryEmbedding
from nsa_fsa.sequences import Packing, Sequences, pack_batch, positions, uniform_layout

# What the caller says of positions: position_embeddings and position_ids.
_Given = tuple[tuple[Tensor, Tensor] | None, Tensor | None]
# Cos and sin of packed tokens, `[T, rotary_dim]`; None where nothing is rotated.
_Turn = tuple[Tensor, Tensor] | tuple[None, None]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class NativeSparseAttention(SparseBranches, nn.Module):
    """Causal self-attention that reads compressed tokens, the best-scoring blocks of keys,
    and a sliding window.

    Native Sparse Attention (Yuan et al., 2025), with the selected branch in the Flash Sparse
    Attention loop order (Yan et al., 2025) where a GPU backend runs it. Parameter names of the
    projections are Hugging Face's.

    With `config.gate_init="dense"` a layer that is given a dense layer's projections starts out as
    that layer, up to about half a percent, on sequences of at most
    `num_selected_blocks * block_size` tokens, where the selected branch sees every key.

    Args:
        config: the one dataclass that configures everything.
        layer_idx: position in the model, for records and caches.
        compressor_k, compressor_v: your own phi instead of `config.compress_k` / `compress_v`:
            an nn.Module mapping windows `[N, HKV, kernel_size, D or DV]` to `[N, HKV, D or DV]`.
        projections: existing modules to use as `q_proj`, `k_proj`, `v_proj`, `o_proj`,
            `q_norm` and `k_norm`.
        device, dtype: where and in what precision the new parameters are made.

    Raises:
        ValueError: for a backend that no operator knows, or arguments that are not what is
            asked for above.
        RuntimeError: for a backend that cannot run on this machine.

    Example:
        >>> config = NSAConfig(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)
        >>> attn = NativeSparseAttention(config)
        >>> y = attn(x)  # [B, S, 4096] -> [B, S, 4096]
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self,
        config: NSAConfig,
        layer_idx: int | None = None,
        *,
        compressor_k: nn.Module | None = None,
        compressor_v: nn.Module | None = None,
        projections: Mapping[str, nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(config, projections)
        self.config = config
        self.layer_idx = layer_idx
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        for name, module in (projections or _make_projections(config, factory)).items():
            setattr(self, name, module)
        self.add_branches(config, compressor_k, compressor_v, **factory)
        self.rotary = RotaryEmbedding(config) if config.rope_parameters is not None else None

    @property
    def nsa_config(self) -> NSAConfig:
        return self.config

    def reset_parameters(self) -> None:
        """Every parameter as a new layer has it, the projections' and your own compressors' by
        their `reset_parameters`.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def extra_repr(self) -> str:
        names = ("block_size", "num_selected_blocks", "init_blocks", "local_blocks", "window_size")
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in names)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | Packing | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        cache: NSACache | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`, in the projections' dtype (autocast's under autocast).

        Args:
            hidden_states: `[B, S, E]`; with `cu_seqlens`, all sequences packed into one row,
                `[1, T, E]`.
            position_embeddings: cos and sin, each `[B or 1, S, rotary_dim]`;
                default: computed from positions.
            attention_mask: `[B, S]` or, with a cache, `[B, past + S]`; non-zero where a token is
                real. Padding may be on either side; the output of a padded position is 0. Or what
                `sequences.pack_batch` found in such a mask, which several layers can share: it
                reads the mask back from the device.
            cu_seqlens: int32 `[number of sequences + 1]`, boundaries in a packed batch.
            max_seqlen: an upper bound on the longest packed sequence; default T, because reading it
                from `cu_seqlens` would wait for the device. Pass it on a GPU, where FlashAttention
                starts as many programs for every sequence as the longest may need: 130 of 500
                tokens are 130 times those needed without it.
            position_ids: int64 or int32 `[B or 1, S]`, for the rotary embedding only;
                default: counted from each sequence's first real token.
            cache: decode state; new tokens are appended to it, and everything it holds is
                attended to. Up to 16 new tokens of each row, without gradients and without padding
                among them, take a few launches where compressors pool ("mean", "weighted"), keys
                are shared by the branches, and positions are those that the cache counts, or
                `compress_rope="before"`.
            context_parallel: the ranks that share the sequences. `hidden_states`, and positions
                if given, are of this rank's tokens, S / n of each row, and `cu_seqlens` and
                `max_seqlen` of all ranks' tokens.

        Raises:
            ValueError: for a mask that is not 2D or has negative values, packed input with a
                mask or a cache, arguments of another kind or on another device, or shapes
                that do not fit; with `context_parallel`, for a mask, a cache, or a compressor of
                your own.
        """
        if context_parallel is not None:
            check_context_parallel(context_parallel, attention_mask, cache)
        arguments = (attention_mask, cu_seqlens, max_seqlen, cache, context_parallel)
        rows, packed = self._pack(hidden_states, *arguments)
        given = (position_embeddings, position_ids)
        rotation = None if cache is None else self._rotation_by_position(given)
        if cache is not None and self._decodes(hidden_states, rows, cache, given, rotation):
            return self._decode(hidden_states, cache, rotation, given)
        batch_size, length = hidden_states.shape[:2]
        num_ranks = 1 if context_parallel is None else context_parallel.size
        whole = (batch_size, num_ranks * length)
        layout = packed or uniform_layout(*whole, device=hidden_states.device)
        x = take(hidden_states, rows)  # [T, E]

        q, k, v = self._project(x)  # [T, HQ, D]; k and v: [T, HKV, 1 or 3, D]
        gate_logits = self.gate(x)
        turn = self._rotation(hidden_states, rows, layout, given, cache, context_parallel)
        update = None if cache is None else partial(cache.update, rows=rows, rotation=rotation)
        attention = partial(self._attend, turn=turn, layout=layout, update=update)
        if context_parallel is None:
            q = rotate(q, *turn)
            o = attention(None, None, q, k, v, gate_logits)  # [T, HQ, DV]
        else:  # inside `attention` keys are of all ranks' tokens, and heads are this rank's
            q = rotate(q, *_part_of(turn, batch_size, context_parallel))
            local = (x.unflatten(0, (batch_size, length)) for x in (q, k, v, gate_logits))
            o = self.share(context_parallel, attention, *local).flatten(0, 1)
        output = put_back(self.o_proj(o.flatten(1).to(q.dtype)), rows, batch_size, length)
        if cache is not None:
            cache.commit(needed_by_backward=o.requires_grad)
        return output

    def _attend(
        self,
        heads: slice | None,
        runs: Runs | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_logits: Tensor,
        *,
        turn: _Turn,
        layout: Sequences,
        update: Callable[..., tuple[KeyValues, Tensor, Tensor, Sequences]] | None = None,
    ) -> Tensor:
        """q `[T, HQ, D]`, rotated, k and v `[T, HKV, 1 or 3, D or DV]` -> `[T, HQ, DV]`.

        heads: which of the KV heads these are; None: all. runs: as of `mix`. turn: cos and sin of
        the keys. update: appends to a cache, if there is one.
        """
        keys = self._branch_keys(k, v, *turn)
        if update is None:
            sources = (keys.k_src, keys.v_src, keys.cos, keys.sin)
            k_cmp, v_cmp = self.compress(*sources, layout, heads)
        else:
            keys, k_cmp, v_cmp, layout = update(keys, layout, self.compress)
        return self.mix(q, keys, k_cmp, v_cmp, gate_logits, layout, runs=runs)

    def _rotation_by_position(self, given: _Given) -> Rotation | None:
        """How any position is rotated, where a cache needs it to decode the fast way: where keys
        are rotated after compression, by the positions that a cache counts, and RoPE depends on
        nothing else."""
        if self.rotary is None or _has_any(given) or self.config.compress_rope == "before":
            return None
        return self.rotary.at if self.rotary.is_by_position and self._pools else None

    @property
    def _pools(self) -> bool:
        """Whether decoding's kernels can compress as this layer does."""
        pooling = (self.compress_k.pooling(), self.compress_v.pooling())
        return None not in pooling and not self.config.kv_per_branch

    def _decodes(
        self,
        hidden_states: Tensor,
        rows: Tensor | None,
        cache: NSACache,
        given: _Given,
        rotation: Rotation | None,
    ) -> bool:
        """Whether new tokens go the fast way of decoding: a few of each sequence, after others,
        without padding, gradients, or anyone who records."""
        rotates = self.rotary is not None or _has_any(given)
        turns = self.config.compress_rope == "after" and rotates
        return (
            rows is None
            and not cache.is_empty
            and 0 < hidden_states.shape[1] <= MOST_NEW
            and hidden_states.shape[0] > 0
            and not torch.is_grad_enabled()
            and self.recorder is None
            and self._pools
            and cache.is_by_position
            and turns == (rotation is not None)
        )

    def _decode(
        self, hidden_states: Tensor, cache: NSACache, rotation: Rotation | None, given: _Given
    ) -> Tensor:
        """The forward where it `_decodes`: few operations, of which none copies what the cache
        holds or depends on the host."""
        x = hidden_states.flatten(0, 1)  # [T, E]
        q, k, v = self._project(x)
        k, v = k.squeeze(2), v.squeeze(2)
        step = cache.step(k, v, hidden_states.shape[1], rotation)
        cos, sin = step.rotation or self._rotation(hidden_states, None, None, given, cache)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (x.to(step.pages.k.dtype) for x in (k, v))
        where = step.pages, step.lengths
        self.append_step(k, v, *where, turn=step.turn, rotation=step.rotation)
        o = self.mix_step(q, self.gate(x), *where)  # [T, HQ, DV]
        output = put_back(self.o_proj(o.flatten(1).to(q.dtype)), None, *hidden_states.shape[:2])
        cache.commit(needed_by_backward=False)
        return output

    def _pack(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: NSACache | None,
        context_parallel: ContextParallel | None,
    ) -> tuple[Tensor | None, Sequences | None]:
        """Rows of the flattened batch that hold real tokens (None: all of them),
        and where the sequences lie among those (None: every row of the batch is one).
        """
        width = self.config.hidden_size
        checks.check_tensor("hidden_states", hidden_states, f"[B, S, {width}]")
        if hidden_states.ndim != 3 or hidden_states.shape[2] != width:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; it must "
                f"be [B, S, {width}]. Fix: add the batch axis, or check hidden_size in the config."
            )
        checks.check_rows("hidden_states", hidden_states, 3, f"[B, S, {width}]")

        if cache is not None and not isinstance(cache, NSACache):
            raise ValueError(
                f"cache is {type(cache).__name__}; it must be an NSACache. "
                "Fix: NSACache(attn.config)."
            )
        if cache is not None and cache.config != self.config:
            raise ValueError(
                "the cache was made for a layer with other settings: "
                f"{cache.differences(self.config)}. "
                "Fix: start with a new cache, NSACache(attn.config), and feed all tokens again."
            )

        batch_size, length = hidden_states.shape[:2]
        if context_parallel is not None:
            length *= context_parallel.size
        if cu_seqlens is not None:
            if batch_size != 1 or attention_mask is not None or cache is not None:
                raise ValueError(
                    "cu_seqlens describes sequences packed into one row [1, T, E], "
                    f"without attention_mask or cache, but the batch has {batch_size} rows, "
                    f"attention_mask is {'' if attention_mask is None else 'not '}None "
                    f"and cache is {'' if cache is None else 'not '}None. "
                    "Fix: pass either cu_seqlens or a padded batch."
                )
            max_seqlen = length if max_seqlen is None else max_seqlen
            return None, Sequences(cu_seqlens, max_seqlen).check(hidden_states.device)

        if cache is not None:
            cache.check_room(batch_size, length)
        if attention_mask is None:
            return None, None
        if isinstance(attention_mask, Packing):
            return _beside_cache(attention_mask, attention_mask.mask, length, cache)

        past = 0 if cache is None else cache.num_tokens
        checks.check_tensor("attention_mask", attention_mask, "[B, S]")
        checks.check_device("attention_mask", attention_mask, hidden_states.device)
        if attention_mask.shape not in ((batch_size, length), (batch_size, past + length)):
            or_past = f" or [B, past + S] = {(batch_size, past + length)}" if past else ""
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"it must be [B, S] = {(batch_size, length)}{or_past}. Fix: pass the 2D padding "
                "mask; this layer is causal by itself and takes no other mask."
            )

        packing = pack_batch(batch_size, length, hidden_states.device, attention_mask)
        return _beside_cache(packing, attention_mask, length, cache)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[T, E]` -> q `[T, HQ, D]`, k `[T, HKV, 1, D]` and v `[T, HKV, 1, DV]`, or three of
        each, for every branch one, with `kv_per_branch`."""
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        num_heads, num_kv_heads = self._check_projected(q, k, v)
        q = normalize(self.q_norm, q.unflatten(-1, (num_heads, c.head_dim)))
        k = normalize(self.k_norm, k.unflatten(-1, (num_kv_heads, -1, c.head_dim)))
        v = v.unflatten(-1, (num_kv_heads, -1, c.v_head_dim))
        # Under autocast a norm returns float32 where the projections return 16 bits.
        return q.to(v.dtype), k.to(v.dtype), v

    def _check_projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
        """How many query and KV heads there are: all, or under tensor parallelism a rank's."""
        c = self.config
        sources = 3 if c.kv_per_branch else 1
        width = c.num_kv_heads * sources
        whole = (c.num_heads * c.head_dim, width * c.head_dim, width * c.v_head_dim)
        found = (q.shape[-1], k.shape[-1], v.shape[-1])
        ranks = max(whole[0] // max(found[0], 1), 1)
        if found != tuple(x / ranks for x in whole) or c.num_kv_heads % ranks:
            raise ValueError(
                f"the projections return {', '.join(map(str, found))} features; {c.num_heads} "
                f"query and {c.num_kv_heads} KV heads need {', '.join(map(str, whole))}, or all "
                "three an equal part of these, of whole KV heads. Fix: projections of these widths,"
                " or a number of ranks that divides the KV heads."
            )
        return c.num_heads // ranks, c.num_kv_heads // ranks

    def _rotation(
        self,
        hidden_states: Tensor,
        rows: Tensor | None,
        layout: Sequences | None,
        given: _Given,
        cache: NSACache | None,
        context_parallel: ContextParallel | None = None,
    ) -> _Turn:
        """cos and sin of the packed tokens, `[T, rotary_dim]`; None where nothing is rotated.
        layout: None for a step of decoding."""
        position_embeddings, position_ids = given
        batch = hidden_states.shape[:2]

        def packed(x: Tensor) -> Tensor:
            """`[B or 1, S, ...]`, of this rank's tokens, -> `[T, ...]`, of all."""
            x = x.expand(*batch, -1)
            return take(x if context_parallel is None else context_parallel.gather(x), rows)

        if position_embeddings is not None:
            self._check_rotation(position_embeddings, hidden_states)
            cos, sin = map(packed, position_embeddings)
            return cos, sin

        if self.rotary is None:
            return None, None

        # numel() would be one number for torch.export.
        num_rows = batch[0] * batch[1] if rows is None else rows.shape[0]
        if context_parallel is not None:
            num_rows *= context_parallel.size

        if position_ids is not None:
            checks.check_tensor("position_ids", position_ids, "integers [B or 1, S]")
            checks.check_device("position_ids", position_ids, hidden_states.device)
            is_int = position_ids.dtype in (torch.int64, torch.int32)
            if position_ids.shape not in (batch, (1, batch[1])) or not is_int:
                raise ValueError(
                    f"position_ids has dtype {position_ids.dtype} and shape "
                    f"{tuple(position_ids.shape)}; it must be int64 or int32 [B or 1, S], here "
                    f"{tuple(batch)}. Fix: leave it out to count from each sequence's first token."
                )
            position = packed(position_ids[..., None]).squeeze(-1)
        elif cache is not None:
            position = cache.next_positions(layout, num_rows)
        else:
            assert layout is not None
            position = positions(layout.cu_seqlens, num_rows)

        past = 0 if cache is None else cache.num_tokens
        longest = batch[1] if layout is None else layout.max_seqlen
        return self.rotary(position, past + longest, hidden_states.dtype)

    def _check_rotation(self, position_embeddings: Any, hidden_states: Tensor) -> None:
        pair = position_embeddings
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(
                f"position_embeddings is {type(pair).__name__}; "
                "it must be a pair (cos, sin) of tensors [B or 1, S, rotary_dim]. "
                "Fix: pass (cos, sin), or leave it out to compute them here."
            )

        for name, x in zip(("cos", "sin"), pair, strict=True):
            name = f"{name} of position_embeddings"
            checks.check_rows(name, x, 3, "[B or 1, S, rotary_dim]")
            checks.check_device(name, x, hidden_states.device)
            batch_size, length = hidden_states.shape[:2]
            rotary_dim = x.shape[2]
            if (
                x.shape[0] not in (1, batch_size)
                or x.shape[1] != length
                or x.shape != pair[0].shape
                or rotary_dim % 2
                or rotary_dim > self.config.head_dim
            ):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; "
                    f"it must be [B or 1, S, rotary_dim], here [{batch_size} or 1, "
                    f"{length}, an even number up to head_dim={self.config.head_dim}], "
                    "and cos and sin must be alike. Fix: pass the rotation of these tokens alone."
                )

    def _branch_keys(
        self, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> KeyValues:
        """Rotates the keys of every branch, and puts beside them what compression reads. k and v:
        `[T, HKV, 1 or 3, D or DV]`."""
        if self.config.kv_per_branch:
            of_branches = k.unbind(2)
            k_cmp, k_slc, k_swa = (rotate(x, cos, sin) for x in of_branches)
            k_src, (v_src, v_slc, v_swa) = of_branches[0], v.unbind(2)
        else:  # the gradient of a choice, `k[:, :, 0]`, would be copied into zeros
            k_src, v_src = k.squeeze(2), v.squeeze(2)
            k_cmp = k_slc = k_swa = rotate(k_src, cos, sin)
            v_slc = v_swa = v_src
        if self.config.compress_rope == "before":
            return KeyValues(k_slc, v_slc, k_swa, v_swa, k_cmp, v_src)
        return KeyValues(k_slc, v_slc, k_swa, v_swa, k_src, v_src, cos, sin)


def _has_any(given: _Given) -> bool:
    return any(x is not None for x in given)


def _part_of(turn: _Turn, batch_size: int, cp: ContextParallel) -> _Turn:
    """Of cos and sin of all ranks' tokens, those of this rank's."""
    cos, sin = turn
    if cos is None or sin is None:
        return None, None
    rows = (x.unflatten(0, (batch_size, -1)) for x in (cos, sin))
    cos, sin = (cp.part(x).flatten(0, 1) for x in rows)
    return cos, sin


def _check_arguments(config: Any, projections: Any) -> None:
    """Raises ValueError for wrong arguments of the constructor, before anything is built."""
    if not isinstance(config, NSAConfig):
        raise ValueError(
            f"config is {type(config).__name__}; it must be an NSAConfig. "
            "Fix: NSAConfig.from_dict of a dict, "
            "or NSAConfig.from_pretrained_config(model.config) of a transformers model."
        )
    if projections is None:
        return
    is_mapping = isinstance(projections, Mapping)
    is_whole = is_mapping and {*projections} == {*PROJECTIONS}
    if not is_whole or not all(isinstance(x, nn.Module) for x in projections.values()):
        found = projections
        if is_mapping:
            found = {name: type(x).__name__ for name, x in projections.items()}
        raise ValueError(
            f"projections={found!r} must map exactly {PROJECTIONS} to modules. "
            "Fix: nn.Identity() where there is no norm."
        )


def _make_projections(config: NSAConfig, factory: dict[str, Any]) -> dict[str, nn.Module]:
    c = config
    # Keys and values are ordered head by head, then branch by branch.
    num_kv = c.num_kv_heads * (3 if c.kv_per_branch else 1)

    def norm() -> nn.Module:
        if not c.qk_norm:
            return nn.Identity()
        return nn.RMSNorm(c.head_dim, eps=c.qk_norm_eps, **factory)

    return {
        "q_proj": nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias, **factory),
        "k_proj": nn.Linear(c.hidden_size, num_kv * c.head_dim, bias=c.qkv_bias, **factory),
        "v_proj": nn.Linear(c.hidden_size, num_kv * c.v_head_dim, bias=c.qkv_bias, **factory),
        "o_proj": nn.Linear(c.num_heads * c.v_head_dim, c.hidden_size, bias=c.o_bias, **factory),
        "q_norm": norm(),
        "k_norm": norm(),
    }


def _beside_cache(
    packing: Packing, mask: Tensor | None, length: int, cache: NSACache | None
) -> tuple[Tensor | None, Sequences]:
    """Rows and layout of new tokens, after the cache has hidden what their mask `[B, past + S]`
    hides of it.
    """
    if cache is None:
        return packing.rows, packing.layout
    # One token is not worth a look back, and neither is a mask that hides nothing of a cache
    # without padding.
    if mask is not None and mask.shape[1] > length > 1 and (packing.padded or cache.has_padding):
        cache.hide(mask[:, : mask.shape[1] - length])
    # A cache counts columns: as many as the batch is wide, however few of them hold real tokens.
    # (Written out, because PyTorch 2.11's compiler hands an empty tuple across a graph break for
    # what `_replace` returns.)
    return packing.rows, Sequences(packing.layout.cu_seqlens, length)
