"""Context parallelism: n ranks share sequences that are too long for one of them.

Each of them has `S / n` of a sequence's S tokens, the first rank the first ones. What a layer does
token by token, it does with those. For attention the ranks exchange tokens for heads, so that each
has all tokens of `HKV / n` KV heads and of the query heads that read them: what is computed then is
what one rank computes for these heads. Where n does not divide HKV, several ranks have the same
heads, with all keys and values, and the queries of a span of the tokens each.

On request that is done in groups of KV heads: while a rank computes one, the next is exchanged, and
the outputs of the one before go back.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_fsa.checks import check_device, check_positive, check_tensor
from nsa_fsa.distributed import collectives
from nsa_fsa.distributed.collectives import Split
from nsa_fsa.sequences import Sequences, pack_batch, positions

if TYPE_CHECKING:  # a PyTorch without torch.distributed imports this file, too
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Runs: TypeAlias = tuple[tuple[int, int], ...]  # of packed rows: the first, and the one behind
IGNORED = -100  # the label of a token that has no part in the loss


class ContextParallel:
    """The ranks that share sequences. Layers and patched models take it as the keyword
    `context_parallel`, beside what `shard` or `part` has cut:

        >>> cp = ContextParallel(mesh["cp"])
        >>> loss = model(**cp.shard(input_ids=input_ids, labels=labels)).loss

    All ranks of the group are given the same batch. A rank's gradients are of its own tokens and
    heads: their sum over the ranks is that of one rank with the whole batch. DDP and FSDP take the
    mean, so the loss to call backward on is the size of the group times the rank's part of the sum
    over the batch's tokens, divided by the number of these, which is what `shard` asks a model for.

    Args:
        group: a process group, or a DeviceMesh of one dimension.
        groups: in how many groups a rank computes its KV heads, which these must divide. One, the
            default, exchanges everything before it computes; several exchange one group while they
            compute another. Results are the same. Two H200s joined by NVLink gained nothing by
            several (docs/distributed.md); slower links may.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, group: "ProcessGroup | DeviceMesh", *, groups: int = 1) -> None:
        from torch.distributed import ProcessGroup, get_rank
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh) and group.ndim == 1:
            group = group.get_group()
        if not isinstance(group, ProcessGroup):
            raise ValueError(
                f"group={group!r:.100} must be a process group that this process is in, or a "
                'DeviceMesh of one dimension. Fix: mesh["cp"], or torch.distributed.group.WORLD.'
            )
        check_positive(groups=groups)
        self.group = group
        self.groups = groups
        self.rank = get_rank(group)
        self.size = group.size()

    def __repr__(self) -> str:
        return f"ContextParallel(rank {self.rank} of {self.size})"

    # -- tokens ------------------------------------------------------------------------------------

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of what all tokens have along `dim`.

        Raises:
            ValueError: where the ranks cannot have equal parts.
        """
        if x.shape[dim] % self.size:
            raise ValueError(
                f"{x.shape[dim]} tokens cannot be shared equally by {self.size} ranks. "
                "Fix: add some at the end, which no other token sees."
            )
        length = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * length, length)

    def gather(self, x: Tensor) -> Tensor:
        """`[B, S / n, ...]` of every rank -> `[B, S, ...]`, the inverse of `part`.

        A gradient is given back to the rank whose part it is of, summed over the ranks.
        """
        return collectives.gather_tokens(x, self.size, self.group.group_name)

    def shard(
        self,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """What to call a model of transformers with on this rank, for a batch that all ranks have.

        If n does not divide the sequences' length S, they are lengthened at the end by tokens of
        their own, which have no label. May read back from the device, as `pack_batch` does.

        Args:
            labels, shift_labels: `[B, S]`, of the tokens themselves, or of those after them.
            attention_mask: `[B, S]`, with padding on the right only. It is left out of the result:
                causal attention does not see what comes later.
            position_ids: `[B or 1, S]`; where they do not go on, another sequence begins.
                Default: counted from each sequence's first token.
            cu_seq_lens_q, max_length_q: the boundaries of sequences that are packed into one row,
                if known, and an upper bound on their lengths.
            inputs: `input_ids` `[B, S]` or `inputs_embeds` `[B, S, E]`, and whatever the model
                takes besides. Tensors `[B, S, ...]` are cut, all others handed on as they are;
                `cu_seq_lens_k` and `max_length_k` are left out, as they are those of the queries.

        Returns:
            This rank's tokens with their positions and labels, `cu_seq_lens_q` and `max_length_q`
            of the whole batch if it is packed, and `context_parallel`. With labels also
            `num_items_in_batch`, by which a rank's loss is such that the mean over the ranks is the
            loss of the batch.

        Raises:
            ValueError: for padding on the left or between tokens, or arguments that do not fit.
        """
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        check_tensor("input_ids", tokens, "[B, S], or inputs_embeds [B, S, E]")
        assert tokens is not None
        batch_size, length = tokens.shape[:2]
        num_more = -length % self.size
        if position_ids is not None:
            position_ids = _along_rows("position_ids", position_ids, tokens)
        if attention_mask is not None:
            real = _right_padded(attention_mask, tokens)
            if position_ids is not None:
                position_ids = _counted_on(position_ids, real)

        packed = _find_sequences(tokens, position_ids, cu_seq_lens_q, max_length_q)
        if packed is not None and num_more:
            packed = _with_more(packed, batch_size, length, num_more)
        if position_ids is not None:
            more = torch.arange(num_more, device=tokens.device).expand(batch_size, -1)
            position_ids = torch.cat((position_ids, more), dim=1)
        elif packed is not None:
            position_ids = positions(packed.cu_seqlens, length + num_more)[None]
        else:
            whole = torch.arange(length + num_more, device=tokens.device)
            position_ids = whole.expand(batch_size, -1)

        result = {k: v for k, v in inputs.items() if k not in ("cu_seq_lens_k", "max_length_k")}
        for name, x in result.items():
            if isinstance(x, Tensor) and x.shape[:2] == tokens.shape[:2]:
                result[name] = self._part_of_longer(x, num_more, 0)
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        if shift_labels is not None:
            shift_labels = _along_rows("labels", shift_labels, tokens)
            number = shift_labels.ne(IGNORED).sum()
            result.setdefault("num_items_in_batch", number / self.size)
            # A model looks whether there are labels, and makes its loss of the shifted ones.
            mine = self._part_of_longer(shift_labels, num_more, IGNORED)
            result.update(labels=mine, shift_labels=mine)
        if packed is not None:
            result["cu_seq_lens_q"], result["max_length_q"] = packed[:2]
        result["position_ids"] = self.part(position_ids)
        return {**result, "context_parallel": self}

    def _part_of_longer(self, x: Tensor, num_more: int, value: int) -> Tensor:
        """This rank's part of x `[B, S, ...]` with so many tokens more."""
        if num_more:
            x = torch.cat((x, x.new_full((x.shape[0], num_more, *x.shape[2:]), value)), dim=1)
        return self.part(x).contiguous()

    # -- heads -------------------------------------------------------------------------------------

    def attend(
        self,
        attention: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *others: Tensor,
        groups: int | None = None,
    ) -> Tensor:
        """Attention to whole sequences, of this rank's tokens: `[B, S / n, HQ, DV]`.

        Args:
            attention: called for every group of KV heads with the slice of the KV heads that it
                has, with the runs of packed tokens whose queries it has (None: all), and with
                tokens of these heads: q `[Tq, HQ', D]`, k and v `[T, HKV', ...]`, where T is B * S,
                and others like q. Returns `[Tq, HQ', DV]`.
            q, k, v: of this rank's tokens, `[B, S / n, HQ, D]` and `[B, S / n, HKV, ...]`.
            others: what else queries have, `[B, S / n, H, ...]`, where H is a multiple of HKV.
            groups: as of ContextParallel, for this call; default: those of ContextParallel.

        Raises:
            ValueError: for groups that do not divide the rank's KV heads.
        """
        (batch_size, length), num_kv_heads = q.shape[:2], k.shape[2]
        tensors = (q, k, v, *others)
        if self.size == 1:  # there is nobody to exchange anything with
            packed = (x.flatten(0, 1) for x in tensors)
            o = attention(slice(0, num_kv_heads), None, *packed)
            return o.unflatten(0, (batch_size, length))
        groups = self._checked(self.groups if groups is None else groups, num_kv_heads)
        split = self._split(num_kv_heads, groups)
        runs = self._runs(split, batch_size, length)
        number = num_kv_heads // (split.shares * groups)  # of a group
        first = self.rank // split.spans * number * groups
        are_keys = (False, True, True, *(False for _ in others))
        coming, going = collectives.depart(split, are_keys, *tensors), []
        for start in range(first, first + number * groups, number):
            heads = slice(start, start + number)
            o = attention(heads, runs, *collectives.arrive(split, are_keys, *coming.pop(0)))
            going.append(collectives.leave(split, o, batch_size))
        return collectives.collect(split, going)

    def _checked(self, groups: int, num_kv_heads: int) -> int:
        possible = self.possible_groups(num_kv_heads)
        if groups not in possible:
            raise ValueError(
                f"groups={groups} of ContextParallel does not divide the {possible[-1]} KV heads "
                f"that each of {self.size} ranks has. Fix: one of {possible}."
            )
        return groups

    def possible_groups(self, num_kv_heads: int) -> list[int]:
        """What divides the KV heads of a rank, which are the last of these."""
        number = num_kv_heads // math.gcd(num_kv_heads, self.size)
        return [x for x in range(1, number + 1) if number % x == 0]

    def _split(self, num_kv_heads: int, groups: int) -> Split:
        """As many shares of the heads as there can be, and as many spans as that leaves."""
        shares = math.gcd(num_kv_heads, self.size)
        who = (spans_of(shares, self.size), self.rank, self.group.group_name)
        return Split(shares, self.size // shares, groups, *who)

    def _runs(self, split: Split, batch_size: int, length: int) -> Runs | None:
        """Of which packed tokens this rank computes the queries, in the order in which these
        arrive; None: of all."""
        if split.spans == 1:
            return None
        runs: list[tuple[int, int]] = []
        for row in range(batch_size):
            for rank, span in enumerate(split.span_of):
                start = (row * self.size + rank) * length
                if span != self.rank % split.spans:
                    continue
                if runs and runs[-1][1] == start:
                    start = runs.pop()[0]
                runs.append((start, (row * self.size + rank + 1) * length))
        return tuple(runs)


def spans_of(shares: int, size: int) -> tuple[int, ...]:
    """The span of the queries that the tokens of each of so many ranks belong to, where as many
    ranks as there are shares of the heads are one.

    A span is those of a run of the first ranks and of their mirror images among the last, as later
    queries have more to do. An odd number of shares cannot be mirrored, and later spans have more
    to do.
    """
    if shares % 2:
        return tuple(rank // shares for rank in range(size))
    pairs = (min(rank, size - 1 - rank) for rank in range(size))
    return tuple(pair // (shares // 2) for pair in pairs)


def check_context_parallel(context_parallel: Any, attention_mask: Any, cache: Any) -> None:
    """Raises ValueError for anything but a ContextParallel, and for what does not go with it."""
    if not isinstance(context_parallel, ContextParallel):
        raise ValueError(
            f"context_parallel={context_parallel!r:.100} must be a ContextParallel or None. "
            "Fix: nsa_fsa.distributed.ContextParallel(group)."
        )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is not available with context_parallel: it must be None. "
            "Fix: ContextParallel.shard, which leaves out a mask of padding on the right, where "
            "causal attention does not look; or sequences packed without padding."
        )
    if cache is not None:
        raise ValueError(
            "a cache is not available with context_parallel, which is for whole sequences. "
            "Fix: use_cache=False to train; leave context_parallel out to generate."
        )


# --- What a batch is like -------------------------------------------------------------------------


def _along_rows(name: str, x: Tensor, tokens: Tensor) -> Tensor:
    """x as `[B, S]`; raises ValueError for another shape."""
    check_tensor(name, x, "[B, S]")
    check_device(name, x, tokens.device)
    batch_size, length = tokens.shape[:2]
    if x.shape not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be [B, S] = {(batch_size, length)}. "
            "Fix: one number for every token."
        )
    return x.expand(batch_size, -1)


def _right_padded(mask: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens are real, bool `[B, S]`; raises ValueError for any before which some are not."""
    real = _along_rows("attention_mask", mask, tokens) != 0
    wrong = (real[:, 1:] & ~real[:, :-1]).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"attention_mask hides tokens before real ones in the rows {wrong}: with "
            "context_parallel padding must be on the right, where causal attention does not look. "
            'Fix: tokenizer.padding_side = "right", or pack the sequences without padding.'
        )
    return real


def _counted_on(position_ids: Tensor, real: Tensor) -> Tensor:
    """Positions that go on in the padding, where they begin no sequences."""
    column = torch.arange(real.shape[1], device=real.device)
    last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
    return torch.where(real, position_ids, position_ids.gather(1, last) + column - last)


def _find_sequences(
    tokens: Tensor,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    max_length_q: int | Tensor | None,
) -> Sequences | None:
    """Where sequences lie in a packed batch; None: each row is one."""
    batch_size, length = tokens.shape[:2]
    if cu_seq_lens_q is not None:
        if batch_size != 1:
            raise ValueError(
                "cu_seq_lens_q describes sequences packed into one row [1, T], but the batch has "
                f"{batch_size} rows. Fix: pack them into one row, or pass position_ids."
            )
        longest = length if max_length_q is None else int(max_length_q)
        found = Sequences(cu_seq_lens_q, longest).check(tokens.device)
        found.check_values(length, length)
        return found
    if position_ids is None:
        return None
    packing = pack_batch(batch_size, length, tokens.device, position_ids=position_ids)
    return packing.layout if packing.packed else None


def _with_more(packed: Sequences, batch_size: int, length: int, num_more: int) -> Sequences:
    """Sequences of a batch `[B, S]` whose rows are followed by so many tokens: one sequence each.

    Without a look at the device: a boundary moves by those of the rows before it.
    """
    ends = packed.cu_seqlens
    moved = ends + num_more * ((ends - 1).clamp(min=0) // length)
    row = torch.arange(1, batch_size + 1, dtype=torch.int32, device=ends.device)
    cu_seqlens = torch.cat((moved, row * (length + num_more))).sort().values
    return Sequences(cu_seqlens, max(packed.max_seqlen, num_more))
