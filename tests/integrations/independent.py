"""Native Sparse Attention once more, for one sequence, from docs/spec.md, and as an attention
function of transformers. Shares no code with nsa_fsa."""

import torch


def nsa(q, k, v, gate_logits, weights_k, weights_v, c, scale):
    """q `[HQ, S, D]`, k `[HKV, S, D]`, v `[HKV, S, DV]`, gate_logits `[S, HQ, 3]`, the logits of
    compression `[HKV, l]` -> `[HQ, S, DV]`. c: the settings, with the names of NSAConfig."""
    size, stride, block = c.kernel_size, c.kernel_stride, c.block_size
    length, group = q.shape[1], q.shape[0] // k.shape[0]
    t = torch.arange(length, device=q.device)
    number = max(0, (length - size) // stride + 1)

    def compress(x, logits):
        windows = [x[:, i * stride : i * stride + size] for i in range(number)]
        weights = logits.softmax(-1)[:, :, None]
        tokens = [(weights * window).sum(1) for window in windows]
        return torch.stack(tokens, 1) if tokens else x[:, :0]

    def attend(keys, values, visible):
        """visible `[HKV or 1, S, keys]`; returns outputs and weights."""
        keys, values, visible = (
            x.repeat_interleave(group, 0) if x.shape[0] > 1 or k.shape[0] == 1 else x
            for x in (keys, values, visible)
        )
        scores = (scale * q @ keys.transpose(1, 2)).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0)  # a query may see nothing
        return weights @ values, weights

    i = torch.arange(number, device=q.device)
    seen = (i * stride + size - 1 <= t[:, None])[None]
    o_cmp, weights = attend(compress(k, weights_k), compress(v, weights_v), seen)

    own = t // block
    j = torch.arange(int(own[-1]) + 1, device=q.device)
    first, last = (
        torch.maximum(i[:, None] * stride, j * block),
        torch.minimum(i[:, None] * stride + size, (j + 1) * block),
    )
    overlap = ((last - first).clamp(min=0) // stride).to(q.dtype)
    scores = weights.unflatten(0, (-1, group)).sum(1) @ overlap  # [HKV, S, blocks]
    future = j > own[:, None]
    forced = ((j < c.init_blocks) | (j > own[:, None] - c.local_blocks)) & ~future
    scores = scores.masked_fill(forced, torch.inf).masked_fill(future, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : c.num_selected_blocks]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True) & ~future
    causal = t <= t[:, None]
    o_slc, _ = attend(k, v, chosen[..., t // block] & causal)

    o_swa, _ = attend(k, v, (causal & (t > t[:, None] - c.window_size))[None])
    gates = gate_logits.sigmoid().permute(2, 1, 0)[..., None]  # [3, HQ, S, 1]
    mixed = (gates * torch.stack((o_cmp, o_slc, o_swa))).sum(0)
    o_dense, _ = attend(k, v, causal[None])
    return torch.where(t[:, None] < c.dense_below, o_dense, mixed)


def attention(module, query, key, value, attention_mask, scaling=None, nsa_gate_logits=None, **_):
    """For full sequences without padding."""
    c, scale = module.nsa_config, query.shape[-1] ** -0.5 if scaling is None else scaling
    gates = nsa_gate_logits.unflatten(-1, (-1, 3))
    weights = (module.compress_k.phi.logits, module.compress_v.phi.logits)
    rows = zip(query, key, value, gates, strict=True)
    o = torch.stack([nsa(q, k, v, g, *weights, c, scale) for q, k, v, g in rows])
    return o.transpose(1, 2), None
