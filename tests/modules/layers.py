"""Small layers with every parameter random, and the layer's forward once more,
as plainly as spec.md can be read.
"""

import math

import torch

from nsa_fsa import NSAConfig
from nsa_fsa.modules import NativeSparseAttention
from tests import oracle

COMPRESSED, SELECTED, SLIDING = range(3)  # spec.md, section 7: the branch order everywhere

SPARSE = dict(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    num_selected_blocks=3,
    init_blocks=1,
    local_blocks=1,
    window_size=6,
)
SMALL = dict(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, **SPARSE)

# Between them: every compression kind for keys and for values, both RoPE orders, shared and
# separate keys and values, both kinds of gate, and every switch on and off. `phi`: an nn.Module of
# the user's own instead.
VARIANTS = {
    "default": dict(),
    "mean-linear": dict(compress_k="mean", compress_v="linear", gate="per_token"),
    "before-mlp": dict(
        compress_k="mlp",
        compress_v="mean",
        compress_rope="before",
        qk_norm=True,
        qkv_bias=True,
        o_bias=True,
    ),
    "branches-gated": dict(
        compress_k="gated",
        compress_v="weighted",
        kv_per_branch=True,
        compress_position_embedding=True,
    ),
    "before-branches": dict(
        compress_k="linear",
        compress_v="mlp",
        compress_rope="before",
        kv_per_branch=True,
        v_head_dim=12,
        gate="per_token",
    ),
    "wide-values": dict(
        compress_k="weighted",
        compress_v="gated",
        v_head_dim=4,
        qk_norm=True,
        compress_position_embedding=True,
        rope_parameters={
            "rope_type": "linear",
            "factor": 3.0,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "no-rope": dict(
        rope_parameters=None,
        scale=0.2,
        compress_position_embedding=True,
        # Without RoPE, the embeddings of a linear phi would shift all keys alike and
        # change nothing.
        compress_k="gated",
        compress_v="mlp",
        compress_hidden_size=5,
    ),
    "own-modules": dict(compress_k="mean", compress_v="mean", kv_per_branch=True),
    # 30 keys are more than a query chooses, and 45 tokens go on behind them.
    "dense-below": dict(dense_below=30, compress_rope="before", v_head_dim=4),
}


class FirstPlusTanhOfLast(torch.nn.Module):
    """A phi of the user's own, which no built-in kind can imitate:
    windows `[N, H, l, D]` to `[N, H, D]`.
    """

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, windows):
        return windows[:, :, 0] + self.strength * torch.tanh(windows[:, :, -1])


def small_config(**changes):
    """60 tokens are 8 blocks, of which every query reads 3, and 14 compressed tokens."""
    return NSAConfig(**{**SMALL, **changes})


def make_layer(config, dtype=torch.float64, seed=0, gain=2.0, **arguments):
    """A layer whose parameters all matter: as initialised, gates ignore their input and
    compressors are means.

    gain: 1 keeps the variance. 2 gives peaked softmax weights and block scores far apart,
    which no rounding reorders.
    """
    layer = NativeSparseAttention(config, **arguments).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name in ("q_norm.weight", "k_norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias") or "logits" in name or "embedding" in name:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim:
                fan_in = parameter.shape[-1] if parameter.ndim == 2 else parameter.shape[-2]
                parameter.copy_(gain * noise / fan_in**0.5)
    return layer


def make_variant(name, dtype=torch.float64, seed=0, gain=2.0, **changes):
    own = (
        dict(compressor_k=FirstPlusTanhOfLast(), compressor_v=FirstPlusTanhOfLast())
        if name == "own-modules"
        else {}
    )
    return make_layer(small_config(**{**VARIANTS[name], **changes}), dtype, seed, gain, **own)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


def rms_ratio(actual, expected):
    """Root mean square of the error over that of the expected values."""
    return rms(actual.double() - expected.double()) / rms(expected)


def operations(y):
    """The names of what y was computed by, as its gradient goes back through it."""
    found, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [x for x, _ in node.next_functions]
    return {x.name() for x in found}


# --- The layer's forward from spec.md, one sequence at a time -------------------------------------


def rotate(vector, position, rope):
    """RoPE in the half-split convention: channels c and c + d/2 are a point in the plane,
    turned by position * frequency.
    """
    if rope is None:
        return vector
    d = int(len(vector) * rope.get("partial_rotary_factor", 1.0))
    turned = vector.clone()
    for c in range(d // 2):
        angle = position / rope.get("factor", 1.0) * rope["rope_theta"] ** (-2 * c / d)
        turned[c] = vector[c] * math.cos(angle) - vector[c + d // 2] * math.sin(angle)
        turned[c + d // 2] = vector[c + d // 2] * math.cos(angle) + vector[c] * math.sin(angle)
    return turned


def compress_window(compressor, kind, window, head):
    """Section 1: the l vectors of one head's window to one vector."""
    phi, embedding = compressor.phi, compressor.position_embedding
    if embedding is not None:
        window = [x + embedding[head, m] for m, x in enumerate(window)]
    if isinstance(phi, FirstPlusTanhOfLast):
        return window[0] + phi.strength * torch.tanh(window[-1])
    if kind == "mean":
        return sum(window) / len(window)
    if kind == "weighted":
        weights = torch.exp(phi.logits[head]) / torch.exp(phi.logits[head]).sum()
        return sum(w * x for w, x in zip(weights, window, strict=True))
    flat = torch.cat(window)
    if kind == "linear":
        return flat @ phi.weight[head]
    if kind == "mlp":
        hidden = flat @ phi.up[head]
        return (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ phi.down[head]
    gate = flat @ phi.gate_map.weight[head]
    return (flat @ phi.value_map.weight[head]) / (1 + torch.exp(-gate))


def expected_output(layer, x):
    """What the layer should return for one sequence x `[S, E]`, and the blocks it should select
    `[S, HKV, T_sel]`.
    """
    c = layer.config
    num_branches = 3 if c.kv_per_branch else 1

    def project(linear):
        bias = 0 if linear.bias is None else linear.bias
        return [linear.weight @ x[t] + bias for t in range(len(x))]

    def normalise(vector, norm):
        return (
            vector / torch.sqrt((vector**2).mean() + c.qk_norm_eps) * norm.weight
            if c.qk_norm
            else vector
        )

    def head(rows, t, index, width):
        return rows[t][index * width : (index + 1) * width]

    queries, keys, values = project(layer.q_proj), project(layer.k_proj), project(layer.v_proj)
    q = torch.stack(
        [
            torch.stack(
                [
                    rotate(
                        normalise(head(queries, t, h, c.head_dim), layer.q_norm),
                        t,
                        c.rope_parameters,
                    )
                    for h in range(c.num_heads)
                ]
            )
            for t in range(len(x))
        ]
    )

    def branch_keys(branch, rotated=True):
        """Section 8: projections are ordered by KV head, then by branch."""
        rows = []
        for t in range(len(x)):
            heads = []
            for kv in range(c.num_kv_heads):
                key = head(keys, t, kv * num_branches + branch % num_branches, c.head_dim)
                key = normalise(key, layer.k_norm)
                heads.append(rotate(key, t, c.rope_parameters) if rotated else key)
            rows.append(torch.stack(heads))
        return torch.stack(rows)

    def branch_values(branch):
        return torch.stack(
            [
                torch.stack(
                    [
                        head(values, t, kv * num_branches + branch % num_branches, c.v_head_dim)
                        for kv in range(c.num_kv_heads)
                    ]
                )
                for t in range(len(x))
            ]
        )

    after = c.compress_rope == "after"
    k_src, v_src = branch_keys(COMPRESSED, rotated=not after), branch_values(COMPRESSED)
    k_cmp = x.new_zeros(len(x) // c.kernel_stride, c.num_kv_heads, c.head_dim)
    v_cmp = x.new_zeros(len(x) // c.kernel_stride, c.num_kv_heads, c.v_head_dim)
    i = 0
    while i * c.kernel_stride + c.kernel_size <= len(x):
        covered = range(i * c.kernel_stride, i * c.kernel_stride + c.kernel_size)
        for kv in range(c.num_kv_heads):
            key = compress_window(
                layer.compress_k, c.compress_k, [k_src[p, kv] for p in covered], kv
            )
            k_cmp[i, kv] = rotate(key, i * c.kernel_stride, c.rope_parameters) if after else key
            v_cmp[i, kv] = compress_window(
                layer.compress_v, c.compress_v, [v_src[p, kv] for p in covered], kv
            )
        i += 1

    cu_seqlens = [0, len(x)]
    packed = dict(scale=c.scale, cu_seqlens=cu_seqlens)
    windows = dict(kernel_size=c.kernel_size, kernel_stride=c.kernel_stride)
    o_cmp, _ = oracle.oracle_compressed(q, k_cmp, v_cmp, **packed, **windows)
    scores = oracle.oracle_block_scores(
        q, k_cmp, len(x), block_size=c.block_size, **packed, **windows
    )
    chosen = oracle.oracle_select(
        scores,
        block_size=c.block_size,
        num_selected_blocks=c.num_selected_blocks,
        init_blocks=c.init_blocks,
        local_blocks=c.local_blocks,
        cu_seqlens=cu_seqlens,
    )
    selected, sliding = ((branch_keys(x), branch_values(x)) for x in (SELECTED, SLIDING))
    o_slc, _ = oracle.oracle_selected(q, *selected, chosen, block_size=c.block_size, **packed)
    o_swa, _ = oracle.oracle_sliding(q, *sliding, window_size=c.window_size, **packed)
    o_dense, _ = oracle.oracle_dense(q, *selected, **packed)

    rows = []
    for t in range(len(x)):
        logits = layer.gate.weight @ x[t] + layer.gate.bias
        heads = []
        for h in range(c.num_heads):
            first = 3 * h if c.gate == "per_head" else 0
            g = [
                1 / (1 + torch.exp(-logits[first + branch]))
                for branch in (COMPRESSED, SELECTED, SLIDING)
            ]
            mixed = (
                g[COMPRESSED] * o_cmp[t, h] + g[SELECTED] * o_slc[t, h] + g[SLIDING] * o_swa[t, h]
            )
            heads.append(o_dense[t, h] if t < c.dense_below else mixed)
        out = layer.o_proj.weight @ torch.cat(heads)
        rows.append(out if layer.o_proj.bias is None else out + layer.o_proj.bias)
    return torch.stack(rows), chosen
