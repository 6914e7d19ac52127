"""What every NSA layer has beside its projections, whoever makes those: gates, compressors, and the
three branches that they lead to."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_fsa.cache import KeyValues
from nsa_fsa.checks import check_whole_sequences
from nsa_fsa.config import NSAConfig
from nsa_fsa.decode import Pages, append_tokens, nsa_decode
from nsa_fsa.decode.operator import BACKENDS
from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import Runs
from nsa_fsa.modules.compression import Compressor
from nsa_fsa.modules.gating import BranchGate
from nsa_fsa.modules.rotary import apply_rotary
from nsa_fsa.ops import Branches, nsa_attention, window_starts
from nsa_fsa.ops.common.backends import check_known
from nsa_fsa.ops.nsa_attention import OPERATORS
from nsa_fsa.sequences import Sequences

# What a layer has that the dense one has not, by name.
PARTS = ("gate", "compress_k", "compress_v")


class Inside(NamedTuple):
    """The tensors of one forward of a layer, gradients included where they have any."""

    q: Tensor  # [T, HQ, D], rotated
    k: Tensor  # of the selected branch, rotated, where `layout` says
    v: Tensor
    k_cmp: Tensor  # compressed keys, rotated
    o: Tensor  # [T, HQ, DV], the branches' outputs, mixed
    branches: Branches  # without gradients
    scale: float
    real: Tensor | None  # bool [T], which of the tokens are no padding; None: all


class Details(NamedTuple):
    """What some of the queries of one forward saw; branch order compressed, selected, sliding."""

    rows: Tensor  # int64 [N], which of the forward's T packed queries these are
    outputs: Tensor  # [N, 3, HQ, DV], of each branch, before the gates
    lse: Tensor  # [N, 3, HQ], natural log; -inf where a query sees nothing
    scores: Tensor  # [N, HKV, blocks], of every block; 0 for future ones


class Record(NamedTuple):
    """What one forward of a layer decided; see `SparseBranches.recorder`."""

    layer_idx: int | None
    block_indices: Tensor  # int32 [T, HKV, T_sel]; of dense queries, what they would have chosen
    gates: Tensor  # [T, HQ or 1, 3], after the sigmoid; 0, 1, 0 of dense queries
    layout: Sequences
    config: NSAConfig  # of the layer, in that forward
    # For the recorder to look at; `nsa_fsa.visualization.record` does not keep it.
    inside: Inside | None = None
    details: Details | None = None  # kept on request by `nsa_fsa.visualization.record`


class SparseBranches:
    """Mixed in before an attention module that has queries, keys and values to hand over.

    Of its modules `add_branches` makes `PARTS`.
    """

    layer_idx: int | None
    gate: nn.Module
    compress_k: Compressor
    compress_v: Compressor
    # Called with a Record after every forward while set; `nsa_fsa.visualization.record` and
    # `nsa_fsa.training.teach` set and clear it.
    recorder: Callable[[Record], None] | None = None

    @property
    def nsa_config(self) -> NSAConfig:
        """The settings of this layer."""
        raise NotImplementedError

    def add_branches(
        self,
        config: NSAConfig,
        compressor_k: nn.Module | None = None,
        compressor_v: nn.Module | None = None,
        **factory: Any,
    ) -> None:
        """Makes the modules; the arguments are those of `NativeSparseAttention`.

        Raises:
            ValueError: for a backend that no operator knows, or compressors that are no modules.
            RuntimeError: for a backend that cannot run on this machine.
        """
        for name, module in dict(compressor_k=compressor_k, compressor_v=compressor_v).items():
            if module is not None and not isinstance(module, nn.Module):
                raise ValueError(
                    f"{name}={module!r} must be an nn.Module or None. "
                    "Fix: pass a module that is built already, not its class; for a kind by name, "
                    f'NSAConfig({name.replace("compressor", "compress")}="mlp", ...).'
                )
        check_known(config.backend, "NativeSparseAttention", *OPERATORS)
        for operator in OPERATORS:
            if config.backend in operator.by_name:
                operator.named(config.backend)  # it can run here
        num_gates = config.num_heads if config.gate == "per_head" else 1
        self.gate = BranchGate(config.hidden_size, num_gates, config.gate_init, **factory)
        kind_k = config.compress_k if compressor_k is None else compressor_k
        kind_v = config.compress_v if compressor_v is None else compressor_v
        self.compress_k = Compressor(config, kind_k, config.head_dim, **factory)
        self.compress_v = Compressor(config, kind_v, config.v_head_dim, **factory)

    def compress(
        self,
        k_src: Tensor,
        v_src: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        layout: Sequences,
        heads: slice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys and values of a packed batch; with cos and sin `[T, rotary_dim]`, keys
        are rotated as their window's first position. heads: which of the KV heads they are of;
        None: all.
        """
        k_cmp = self.compress_k(k_src, layout, heads=heads).to(k_src.dtype)
        v_cmp = self.compress_v(v_src, layout, heads=heads).to(v_src.dtype)
        if cos is not None and sin is not None:
            sizes = windows_of(self.nsa_config)
            first = window_starts(k_src, layout.cu_seqlens, seqused_k=layout.seqused_k, **sizes)
            k_cmp = rotate(k_cmp, cos[first], sin[first])
        return k_cmp, v_cmp

    def share(
        self,
        cp: ContextParallel,
        attention: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_logits: Tensor,
    ) -> Tensor:
        """Attention to whole sequences, of this rank's tokens: q `[B, S / n, HQ, D]`, k and v
        `[B, S / n, HKV, ...]` and gate_logits `[B, S / n, 3 * HQ or 3]` -> `[B, S / n, HQ, DV]`.

        attention: as of `ContextParallel.attend`, with gate_logits `[Tq, 3 * HQ' or more]` after v.

        Raises:
            ValueError: for a layer that is recorded where ranks share a KV head.
        """
        num_kv_heads = k.shape[2]
        if self.recorder is not None and num_kv_heads % cp.size:
            raise ValueError(
                f"layer {self.layer_idx} cannot be recorded while {cp.size} ranks of "
                f"context_parallel share {num_kv_heads} KV heads: none has all queries of a head. "
                f"Fix: a number of ranks that divides {num_kv_heads}, or record without "
                "context_parallel."
            )
        if gate_logits.shape[2] == 3:  # those of all heads go with each of them
            gate_logits = gate_logits[:, :, None].expand(-1, -1, num_kv_heads, -1).flatten(2)
        groups = None if self.recorder is None else 1  # who records is told of a forward once
        return cp.attend(attention, q, k, v, gate_logits, groups=groups)

    def mix(
        self,
        q: Tensor,
        keys: KeyValues,
        k_cmp: Tensor,
        v_cmp: Tensor,
        gate_logits: Tensor,
        layout: Sequences,
        scale: float | None = None,
        real: Tensor | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        """The branches' outputs, mixed: q `[T, HQ, D]` -> `[T, HQ, DV]`.

        gate_logits: `[T, 3 * HQ]`, head by head; of gates that all heads share `[T, 3]`, or copies
        of these. scale: default the config's. real: bool `[T]`, for who records: which tokens are
        no padding; default: all. runs: which of the keys' rows q and gate_logits are of; default:
        all, or those that `layout` says.
        """
        c = self.nsa_config
        check_whole_sequences()

        if runs is not None:
            whole = (q, keys, k_cmp, v_cmp, gate_logits, layout)
            return torch.cat([self.mix(*x, scale) for x in _runs_of(runs, whole, c.kernel_stride)])

        gate_logits = gate_logits.unflatten(-1, (-1, 3))  # [T, HQ or 1, 3]
        if c.gate == "per_token":
            gate_logits = gate_logits[:, :1]
        q = q.to(keys.k.dtype)  # a cache filled under another autocast holds wider keys
        scale = c.scale if scale is None else scale

        o = nsa_attention(
            q,
            keys.k,
            keys.v,
            k_cmp,
            v_cmp,
            gate_logits,
            layout.cu_seqlens,
            layout.max_seqlen,
            **_rule_of(c),
            k_swa=keys.k_swa,
            v_swa=keys.v_swa,
            scale=scale,
            cu_seqlens_q=layout.cu_seqlens_q,
            seqused_k=layout.seqused_k,
            return_branches=self.recorder is not None,
            recompute=c.recompute,
            backend=c.backend,
        )

        if self.recorder is not None:
            o, branches = o
            gates = gate_logits.detach().sigmoid()
            if c.dense_below:  # they read all keys of the selected branch, and nothing else
                is_dense = layout.positions(q.shape[0]) < c.dense_below
                selected_alone = torch.arange(3, device=q.device) == 1
                gates = torch.where(is_dense[:, None, None], selected_alone.to(gates), gates)

            inside = Inside(q, keys.k, keys.v, k_cmp, o, branches, scale, real)
            self.recorder(Record(self.layer_idx, branches.block_indices, gates, layout, c, inside))

        return o

    def append_step(
        self, k: Tensor, v: Tensor, pages: Pages, lengths: Tensor, **options: Any
    ) -> None:
        """Appends a few new tokens of every sequence to the pages of a cache, as `append_tokens`
        does, compressed as this layer compresses. Both compressors must pool.

        k, v: `[T, HKV, D]` and `[T, HKV, DV]`, rotated. options: `turn`, `rotation` and `write`.
        """
        c, pool_k, pool_v = self.nsa_config, self.compress_k.pooling(), self.compress_v.pooling()
        assert pool_k is not None
        assert pool_v is not None
        append_tokens(
            *(k, v, pages, lengths),
            pool_k=pool_k,
            pool_v=pool_v,
            backend=BACKENDS.or_auto(c.backend),
            **(windows_of(c) | options),
        )

    def mix_step(
        self,
        q: Tensor,
        gate_logits: Tensor,
        pages: Pages,
        lengths: Tensor,
        scale: float | None = None,
    ) -> Tensor:
        """As `mix`, for a few new tokens of every sequence that the pages of a cache hold already:
        q `[T, HQ, D]` -> `[T, HQ, DV]`.

        gate_logits: `[T, 3 * HQ or 3]`. lengths: int32 `[B]`. scale: as of `mix`.
        """
        c = self.nsa_config
        return nsa_decode(
            *(q.to(pages.k.dtype), gate_logits.unflatten(-1, (-1, 3)), pages, lengths),
            **_rule_of(c),
            scale=c.scale if scale is None else scale,
            backend=BACKENDS.or_auto(c.backend),
        ).o


# What `SparseBranches.mix` takes first.
_Mixed = tuple[Tensor, KeyValues, Tensor, Tensor, Tensor, Sequences]


def _runs_of(runs: Runs, whole: _Mixed, kernel_stride: int) -> Iterator[_Mixed]:
    """Of each run its queries, and the keys up to its end."""
    q, keys, k_cmp, v_cmp, gate_logits, layout = whole
    sizes = [end - start for start, end in runs]
    of_queries = zip(runs, q.split(sizes), gate_logits.split(sizes), strict=True)
    for (start, end), q_run, gates_run in of_queries:
        k, v = keys.k[:end], keys.v[:end]
        shared = keys.k_swa is keys.k
        own = (k, v) if shared else (keys.k_swa[:end], keys.v_swa[:end])
        seen = KeyValues(k, v, *own, keys.k_src, keys.v_src)
        windows = (x[: end // kernel_stride] for x in (k_cmp, v_cmp))
        yield q_run, seen, *windows, gates_run, layout.up_to(start, end)


def windows_of(c: NSAConfig) -> dict[str, Any]:
    """The sizes of a layer's windows, as operators take them."""
    return dict(kernel_size=c.kernel_size, kernel_stride=c.kernel_stride)


def blocks_of(c: NSAConfig) -> dict[str, Any]:
    """The size of a layer's blocks, and which of them are forced, as operators take them."""
    return dict(block_size=c.block_size, init_blocks=c.init_blocks, local_blocks=c.local_blocks)


def _rule_of(c: NSAConfig) -> dict[str, Any]:
    """Who sees what, as the core takes it and decoding does."""
    return dict(
        **windows_of(c),
        **blocks_of(c),
        num_selected_blocks=c.num_selected_blocks,
        window_size=c.window_size,
        dense_below=c.dense_below,
    )


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x `[T, H, D]` by cos and sin `[T, rotary_dim]`, if there are any."""
    return x if cos is None or sin is None else apply_rotary(x, cos, sin).to(x.dtype)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """`[B, S, ...]` -> the packed rows `[T, ...]`."""
    return x.flatten(0, 1) if rows is None else x.flatten(0, 1).index_select(0, rows)


def put_back(x: Tensor, rows: Tensor | None, batch_size: int, length: int) -> Tensor:
    """The packed rows `[T, ...]` -> `[B, S, ...]`, 0 where there was padding."""
    if rows is not None:
        x = x.new_zeros(batch_size * length, *x.shape[1:]).index_copy(0, rows, x)
    return x.unflatten(0, (batch_size, length))
