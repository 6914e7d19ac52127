"""The attention layer: a dense layer of vLLM keeps its projections, norms and rotation, and attends
over two paged caches that share one block table.

One has the rotated keys and values, a row for every token. The other has the compressed ones, a row
for every `kernel_stride` tokens, in the order of `nsa_fsa.decode.Pages`: compressed token i lies in
state `i + l / s - 1`, that of the hop which completes it. So nothing in a page depends on tokens
behind the page, and sequences that begin alike share pages. Nothing else is kept: preempted and
rejected tokens, and those found in the prefix cache, need no care.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from nsa_fsa.cache import KeyValues
from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.config import NSAConfig
from nsa_fsa.decode import Pages, append_tokens
from nsa_fsa.decode.operator import BACKENDS

# How a step is split, and all that is used of vLLM.
from nsa_fsa.integrations.vllm.batch import (
    Batch,
    BatchBuilder,
    Chunk,
    Group,
    NSABackend,
    StatesBuilder,
    backend_of,
)
from nsa_fsa.integrations.vllm.names import (
    OPERATOR,
    AttentionLayerBase,
    KVCacheSpec,
    VllmConfig,
    cache_spec,
    direct_register_custom_op,
    eager_break_during_capture,
    get_forward_context,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from nsa_fsa.integrations.vllm.warm_up import small_steps

# What is computed, and over which sequences.
from nsa_fsa.modules.branches import SparseBranches
from nsa_fsa.ops.common.profiler import untimed
from nsa_fsa.ops.compression.reference import num_windows_of
from nsa_fsa.sequences import Sequences, uniform_layout

# What this process has compiled kernels for: settings, dtypes, devices and sizes of engines.
_WARM: set[tuple[Any, ...]] = set()


class States(AttentionLayerBase):
    """The cache of one layer's compressed tokens, `[pages, HKV, page_size / s, D + DV]`."""

    def __init__(self, config: NSAConfig, rows: int, dtype: torch.dtype) -> None:
        self.config, self.rows, self.dtype = config, rows, dtype
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[NSABackend]:
        return backend_of(self.rows, StatesBuilder)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return spec_of(self.config, self.rows, self.dtype, vllm_config, self.config.kernel_stride)


def spec_of(
    config: NSAConfig, rows: int, dtype: torch.dtype, vllm_config: VllmConfig, tokens_per_state: int
) -> KVCacheSpec:
    """Raises ValueError for pages in which blocks do not lie whole."""
    page_size = vllm_config.cache_config.block_size
    if page_size % rows:
        raise ValueError(
            f"--block-size={page_size} is not allowed with NSA layers of "
            f"block_size={config.block_size}: it must be a multiple of {rows}. "
            f"Fix: leave it out, or --block-size {rows}."
        )
    sizes = (config.num_kv_heads, config.head_dim, config.v_head_dim)
    return cache_spec(page_size, *sizes, dtype, tokens_per_state)


class PagedNSA(SparseBranches, AttentionLayerBase):
    """Mixed in before an attention class of vLLM; `make_sparse` makes a module one.

    Of the dense class it has `qkv_proj`, `rotary_emb`, `o_proj`, the sizes, and `q_norm` and
    `k_norm` where there are any.
    """

    qkv_proj: Any
    rotary_emb: Any
    o_proj: Any
    q_size: int
    kv_size: int
    _nsa_config: NSAConfig

    @property
    def nsa_config(self) -> NSAConfig:
        """The settings of this rank's heads."""
        return self._nsa_config

    def become_sparse(
        self, layer_idx: int, config: NSAConfig, rows: int, vllm_config: VllmConfig
    ) -> None:
        """Puts two caches of vLLM in the place of one, and adds the gate and the compressors.

        config: of all ranks' heads. rows: what a page's tokens are a multiple of.
        """
        module: Any = self
        layers = vllm_config.compilation_config.static_forward_context
        self.layer_name: str = module.attn.layer_name
        del layers[self.layer_name], module.attn
        self.layer_idx, self.rows = layer_idx, rows
        world, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self._nsa_config = own = share_of(config, world)
        self.add_branches(own)
        self._load_shares(config, world, rank)
        self.max_length: int = vllm_config.model_config.max_model_len
        self.cache_dtype: torch.dtype = vllm_config.model_config.dtype
        self.turn = turn_of(self.rotary_emb, own) if own.compress_rope == "after" else None
        self.kv_cache = torch.empty(0)  # vLLM binds both caches later
        self.states = States(own, rows, self.cache_dtype)
        layers[self.layer_name], layers[f"{self.layer_name}.states"] = self, self.states

    def _load_shares(self, config: NSAConfig, world: int, rank: int) -> None:
        """Has every part load what belongs to this rank's heads, which are its first axis."""
        kv_heads, own = config.num_kv_heads, self._nsa_config.num_kv_heads
        first = rank * kv_heads // world  # ranks share a head where there are fewer
        of_gate = slice(None)
        if config.gate == "per_head":
            share = 3 * config.num_heads // world
            of_gate = slice(rank * share, (rank + 1) * share)
        for part, rows in (
            (self.gate, of_gate),
            (self.compress_k, slice(first, first + own)),
            (self.compress_v, slice(first, first + own)),
        ):
            for parameter in part.parameters():
                parameter.requires_grad_(False)
                parameter.weight_loader = functools.partial(  # type: ignore[attr-defined]
                    load_rows, rows=rows
                )

    def get_attn_backend(self) -> type[NSABackend]:
        return backend_of(self.rows, BatchBuilder)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        self.page_size = vllm_config.cache_config.block_size  # asked before anything is rehearsed
        return spec_of(self._nsa_config, self.rows, self.cache_dtype, vllm_config, 1)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        c, module = self._nsa_config, self
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        if hasattr(module, "q_norm"):
            q = module.q_norm(q.unflatten(-1, (-1, c.head_dim))).flatten(-2)
            k = module.k_norm(k.unflatten(-1, (-1, c.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        o = q.new_empty(q.shape[0], c.num_heads * c.v_head_dim)
        gate_logits = self.gate(hidden_states)
        torch.ops.nsa_fsa.vllm_attention(q, k, v, gate_logits, o, self.layer_name)
        return self.o_proj(o)[0]

    # --- Inside the operator ----------------------------------------------------------------------

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, o: Tensor, batch: Batch
    ) -> None:
        """Caches the new tokens, and writes what they read into o `[T, HQ * DV]`."""
        q, k, v = self._by_heads(q, k, v)
        for group in batch.groups:
            rows = group.rows
            found = self._decode(q[rows], k[rows], v[rows], gate_logits[rows], group)
            o[rows] = found.flatten(1)
        for chunk in batch.chunks:
            rows = chunk.rows
            found = self._prefill(q[rows], k[rows], v[rows], gate_logits[rows], chunk)
            o[rows] = found.flatten(1)

    def _by_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self._nsa_config
        widths = (c.head_dim, c.head_dim, c.v_head_dim)
        q, k, v = (x.unflatten(-1, (-1, y)) for x, y in zip((q, k, v), widths, strict=True))
        return q, k, v  # [T, heads, width]

    def _pages(self, table: Tensor) -> Pages:
        width = self._nsa_config.head_dim
        kv, states = self.kv_cache, self.states.kv_cache
        return Pages(
            *(kv[..., :width], kv[..., width:], states[..., :width], states[..., width:], table)
        )

    def _append(self, k: Tensor, v: Tensor, pages: Pages, group: Group) -> None:
        """Writes new tokens into their pages, and compresses the windows that they complete."""
        c, lengths = self._nsa_config, group.lengths
        pools = (self.compress_k.pooling(), self.compress_v.pooling())
        if None not in pools:
            rotation = None
            if self.turn is not None and self.compress_k.position_embedding is not None:
                new = torch.arange(-group.num_new, 0, device=lengths.device)
                rotation = self._rotation((lengths[:, None] + new).flatten())
            self.append_step(k, v, pages, lengths, turn=self.turn, rotation=rotation)
        else:
            append_tokens(
                *(k, v, pages, lengths),
                kernel_size=c.kernel_size,
                kernel_stride=c.kernel_stride,
                compress=False,
                backend=BACKENDS.or_auto(c.backend),
            )
            self._compress_new(pages, group)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, group: Group) -> Tensor:
        """A few new tokens of every sequence: `[T, HQ, D]` -> `[T, HQ, DV]`."""
        pages = self._pages(group.table)
        self._append(k, v, pages, group)
        return self.mix_step(q, gate_logits, pages, group.lengths)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, chunk: Chunk
    ) -> Tensor:
        """Chunks of prompts, over all of their sequences' keys: `[T, HQ, D]` -> `[T, HQ, DV]`."""
        c = self._nsa_config
        sizes = [x.num_new for x in chunk.sequences]
        for group, new_k, new_v in zip(
            chunk.sequences, k.split(sizes), v.split(sizes), strict=True
        ):
            self._append(new_k, new_v, self._pages(group.table), group)

        kv, states = (chunk.gather(x) for x in (self.kv_cache, self.states.kv_cache))
        hops = c.kernel_size // c.kernel_stride
        # The first compressed token lies so many states behind the first token.
        states = states[hops - 1 :]
        kv = kv[: kv.shape[0] - (hops - 1) * c.kernel_stride]
        width = c.head_dim
        keys, values = kv[..., :width], kv[..., width:]
        starts = (chunk.page_starts * self.kv_cache.shape[2]).clamp(max=kv.shape[0])
        layout = Sequences(starts, chunk.longest, chunk.starts, chunk.lengths)
        packed = KeyValues(keys, values, keys, values, keys, values)
        return self.mix(q, packed, states[..., :width], states[..., width:], gate_logits, layout)

    def _compress_new(self, pages: Pages, group: Group) -> None:
        """Compresses the windows that new tokens, which the pages have, complete."""
        c = self._nsa_config
        size, stride, hops = c.kernel_size, c.kernel_stride, c.kernel_size // c.kernel_stride
        sequence, nth = group.windows(stride)
        total = group.lengths.long()
        old, complete = (num_windows_of(x, size, stride) for x in (total - group.num_new, total))
        window = old[sequence] + nth  # [N]
        exists = window < complete[sequence]
        position = window[:, None] * stride + torch.arange(size, device=window.device)  # [N, l]
        page = _page_of(pages.table, sequence[:, None], position // pages.page_size)
        page = torch.where(exists[:, None], page, 0)
        k, v = (x[page, :, position % pages.page_size].flatten(0, 1) for x in (pages.k, pages.v))
        cos = sin = None
        if self.turn is not None:
            cos, sin = self._rotation(position.flatten())
            k = turn_back(k, cos, sin)
        layout = uniform_layout(window.shape[0], size, window.device)  # a sequence of every window
        k_cmp, v_cmp = self.compress(k, v, cos, sin, layout)
        # Compression has a row for every hop, of which a window's first one counts.
        state, per_page = window + hops - 1, pages.k_cmp.shape[2]
        page = _page_of(pages.table, sequence, state // per_page)
        page = torch.where(exists, page, 0)  # vLLM's page 0 is nobody's
        pages.k_cmp[page, :, state % per_page] = k_cmp[::hops]
        pages.v_cmp[page, :, state % per_page] = v_cmp[::hops]

    def _rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[N, rotary_dim]` by which vLLM rotates; of any position that there is."""
        table: Tensor = self.rotary_emb.cos_sin_cache
        cos, sin = table[position.clamp(0, table.shape[0] - 1)].chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def rehearse(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, o: Tensor) -> None:
        """Takes as much memory as any step can, while vLLM measures what it may fill with pages:
        the last tokens of the longest sequence attend, over keys that are gathered."""
        o.zero_()
        if not q.is_cuda:  # elsewhere pages get what they are given, and nothing is compiled
            return
        c = self._nsa_config
        kernels = (c, q.dtype, q.device, self.page_size, self.max_length, q.shape[0])
        if kernels not in _WARM:
            self.warm_up(q, k, v, gate_logits)
            _WARM.add(kernels)
        self.attend_to_the_longest(
            q, gate_logits, self.max_length + 2 * max(self.rows, c.kernel_size)
        )

    def warm_up(self, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor) -> None:
        """Attends in small steps, over pages of its own."""
        c, kept = self._nsa_config, (self.kv_cache, self.states.kv_cache)
        rows, width = self.page_size, c.head_dim + c.v_head_dim
        try:
            for step in small_steps(rows, self.max_length, q.shape[0], q.device):
                self.kv_cache, self.states.kv_cache = (
                    k.new_zeros(step.num_pages, c.num_kv_heads, x, width, dtype=self.cache_dtype)
                    for x in (rows, rows // c.kernel_stride)
                )
                n = step.num_tokens
                o = q.new_empty(n, c.num_heads * c.v_head_dim)
                self.attend(q[:n], k[:n], v[:n], gate_logits[:n], o, step.batch)
        finally:
            self.kv_cache, self.states.kv_cache = kept

    def attend_to_the_longest(self, q: Tensor, gate_logits: Tensor, num_keys: int) -> Tensor:
        """What the last of so many tokens read where all of their keys are 0."""
        c = self._nsa_config
        number, device = min(q.shape[0], num_keys), q.device
        q = q[:number].unflatten(-1, (-1, c.head_dim))
        width, states = c.head_dim + c.v_head_dim, num_keys // c.kernel_stride
        kv, cmp = (q.new_zeros(x, c.num_kv_heads, width) for x in (num_keys, states))
        keys, values = kv[..., : c.head_dim], kv[..., c.head_dim :]
        starts, of_queries = (
            torch.tensor([0, x], dtype=torch.int32, device=device) for x in (num_keys, number)
        )
        layout = Sequences(starts, num_keys, of_queries, starts[1:])
        packed = KeyValues(keys, values, keys, values, keys, values)
        compressed = cmp[..., : c.head_dim], cmp[..., c.head_dim :]
        return self.mix(q, packed, *compressed, gate_logits[:number], layout)


@functools.cache
def sparse_attention_class(dense_class: Any) -> Any:
    """The subclass of an attention class that is sparse."""
    names = {"__module__": __name__}
    return type(f"NSA{dense_class.__name__}", (PagedNSA, dense_class), names)


def share_of(config: NSAConfig, world: int) -> NSAConfig:
    """The settings of one of so many ranks, each of which has its part of the heads."""
    kv_heads = max(config.num_kv_heads // world, 1)
    return dataclasses.replace(config, num_heads=config.num_heads // world, num_kv_heads=kv_heads)


def load_rows(parameter: nn.Parameter, loaded: Tensor, *, rows: slice) -> None:
    """Loads some rows of what a checkpoint has."""
    loaded = loaded[rows]
    if parameter.shape != loaded.shape:
        raise ValueError(
            f"the checkpoint has {tuple(loaded.shape)} where its config asks for "
            f"{tuple(parameter.shape)}. Fix: save the model again with save_pretrained."
        )
    parameter.data.copy_(loaded)


def turn_of(rotary: Any, config: NSAConfig) -> Tensor:
    """`turn` of `append_tokens`, by the angles of vLLM's own rotation."""
    table: Tensor = rotary._compute_cos_sin_cache()[: config.kernel_size].float()
    turn = torch.stack(table.chunk(2, dim=-1))  # [2, l, rotary_dim / 2]
    return turn / turn[0, 0, 0]  # where RoPE scales, as YaRN does, that is its factor


def _page_of(table: Tensor, sequence: Tensor, column: Tensor) -> Tensor:
    """Page numbers, int64; of a column that is not there, any."""
    return table[sequence, column.clamp(max=table.shape[1] - 1)].long()


@eager_break_during_capture
def vllm_attention(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, output: Tensor, layer_name: str
) -> None:
    """What the layer of this name does in the current step, behind the compiler's back."""
    context: Any = get_forward_context()
    layer: PagedNSA = context.no_compile_layers[layer_name]
    with untimed():
        if isinstance(context.attn_metadata, dict):
            batch = context.attn_metadata[layer_name]
            layer.attend(q, k, v, gate_logits, output, batch)
        elif layer.kv_cache.numel() == 0:
            layer.rehearse(q, k, v, gate_logits, output)
        else:
            output.zero_()


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, output: Tensor, layer_name: str
) -> None:
    return


_LIBRARY = torch.library.Library("nsa_fsa", "FRAGMENT")
direct_register_custom_op(
    op_name=OPERATOR.partition("::")[2],
    op_func=vllm_attention,
    mutates_args=["output"],
    fake_impl=_nothing,
    target_lib=_LIBRARY,
)
