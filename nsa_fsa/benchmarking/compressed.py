"""The run of `nsa-fsa bench compressed`: attention over compressed keys, and the compression that makes them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from nsa_fsa.benchmarking.calls import Calls, Implementation, by_autograd
from nsa_fsa.benchmarking.check import AttentionInputs
from nsa_fsa.benchmarking.check_windows import CompressedOracle, CompressionOracle
from nsa_fsa.benchmarking.measure import Meter
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.running import Prepared, Subject, run_implementations
from nsa_fsa.benchmarking.settings import WindowSetting, compressed_pairs, necessary, necessary_compression

# Means of 32 normal keys have a standard deviation of 0.18; times 6, scores spread as those of single normal keys do.
MEAN_GAIN = 6
LEFT_OUT = {
    "flash_attn_4_strided": "flash-attn 4 could skip what is hidden only with a mask_mod in CuTe's language and block-sparsity "
    "tensors in its kernels' own tile sizes; neither is a stable public interface"
}


# Inputs


def compressed_keys(setting: WindowSetting, generator: torch.Generator) -> Tensor:
    """`[T // s, HKV, D]`: normal numbers, or means of windows of normal keys, of which neighbours share some."""
    shape = (setting.num_rows, setting.num_kv_heads, setting.head_dim)
    if setting.selection == "independent":
        return torch.randn(shape, generator=generator, device=generator.device, dtype=setting.torch_dtype)
    if setting.selection == "window_means":
        # The mean of a stride's keys is normal too, so that the keys themselves need not exist.
        span = setting.kernel_size // setting.kernel_stride
        strides = torch.randn(shape[0] + span - 1, *shape[1:], generator=generator, device=generator.device)
        windows = sum(strides[shift : shift + shape[0]] for shift in range(span))
        return (windows * (MEAN_GAIN * setting.kernel_stride**0.5 / setting.kernel_size)).to(setting.torch_dtype)
    raise ValueError(f"selection={setting.selection!r}: allowed are 'independent' and 'window_means'.")


def make_inputs(setting: WindowSetting, seed: int, device: torch.device) -> AttentionInputs:
    """Random numbers; rows that no window owns are NaN, since nobody may read them."""
    generator = torch.Generator(device).manual_seed(seed)
    queries = (setting.num_tokens, setting.num_heads, setting.head_dim)
    q, do = (torch.randn(queries, generator=generator, device=device, dtype=setting.torch_dtype) for _ in range(2))
    k = compressed_keys(setting, generator)
    v = torch.randn(k.shape, generator=generator, device=device, dtype=k.dtype)
    for x in (k, v):
        x[setting.num_windows :] = torch.nan
    cu_seqlens = torch.tensor([0, setting.num_tokens], dtype=torch.int32, device=device)
    return AttentionInputs(setting, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, cu_seqlens)


@dataclass(frozen=True)
class CompressionInputs:
    """Keys to compress and the weights of a window's places, both requiring gradients; and gradients of what comes out."""

    setting: WindowSetting
    x: Tensor  # [T, HKV, D]
    weight: Tensor  # [HKV, l], float32 as the layer's softmax gives it
    cu_seqlens: Tensor
    seed: int

    @functools.cached_property
    def dpooled(self) -> Tensor:
        return self._gradient(self.setting.num_rows, self.setting.num_kv_heads, self.setting.head_dim)

    @functools.cached_property
    def dwindows(self) -> Tensor:
        """Twice as large as x where windows overlap by half: made only where windows are gathered."""
        x = self.setting
        return self._gradient(x.num_rows, x.num_kv_heads, x.kernel_size, x.head_dim)

    def _gradient(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.x.device).manual_seed(self.seed + 1)
        gradient = torch.randn(shape, generator=generator, device=self.x.device, dtype=self.x.dtype)
        gradient[self.setting.num_windows :] = torch.nan  # of rows that no window owns: ignored
        return gradient


def make_compression_inputs(setting: WindowSetting, seed: int, device: torch.device) -> CompressionInputs:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (setting.num_tokens, setting.num_kv_heads, setting.head_dim)
    x = torch.randn(shape, generator=generator, device=device, dtype=setting.torch_dtype)
    weight = torch.randn(setting.num_kv_heads, setting.kernel_size, generator=generator, device=device).softmax(-1)
    cu_seqlens = torch.tensor([0, setting.num_tokens], dtype=torch.int32, device=device)
    return CompressionInputs(setting, x.requires_grad_(), weight.requires_grad_(), cu_seqlens, seed)


# Implementations


def windows_of(setting: WindowSetting) -> dict[str, Any]:
    return dict(kernel_size=setting.kernel_size, kernel_stride=setting.kernel_stride)


def no_such_backend(setting: WindowSetting, operator: str, backend: str) -> str | None:
    from nsa_fsa.ops.common import backends

    return backends.available(operator).get(backend, f"{operator} has no backend {backend!r}")


def attention(inputs: AttentionInputs, backend: str) -> Calls:
    """Forward with lse, as block selection wants it; backward by the registered operator."""
    from nsa_fsa.ops import compressed_attention
    from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES

    setting = inputs.setting
    assert isinstance(setting, WindowSetting)
    arguments: dict[str, Any] = dict(**windows_of(setting), backend=backend)

    def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return compressed_attention(q, k, v, inputs.cu_seqlens, setting.num_tokens, **arguments, **more)

    calls = by_autograd(inputs, attend)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    saved: dict[str, Any] = {}

    def forward() -> tuple[Tensor, Tensor]:
        return attend(q, k, v, return_lse=True)

    def backward() -> tuple[Tensor, ...]:
        if not saved:
            saved.update(zip(("o", "lse"), forward(), strict=True))
        return torch.ops.nsa_fsa.compressed_attention_backward(
            do=inputs.do, q=q, k=k, v=v, **saved, cu_seqlens=inputs.cu_seqlens, max_seqlen=setting.num_tokens,
            cu_seqlens_q=None, seqused_k=None, scale=setting.head_dim**-0.5, workspace_bytes=WORKSPACE_BYTES, **arguments,
        )  # fmt: skip

    calls.forward, calls.backward, calls.outputs = forward, backward, ("o", "lse")
    return calls


def flex_attention(inputs: AttentionInputs) -> Calls:
    """PyTorch's flex_attention, compiled where there is a GPU; the block mask is made before the clock starts."""
    from torch.nn.attention import flex_attention as flex

    setting = inputs.setting
    assert isinstance(setting, WindowSetting)
    stride, size, device = setting.kernel_stride, setting.kernel_size, inputs.q.device

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key * stride + size - 1 <= query

    function: Any = flex.flex_attention
    make_mask: Any = flex.create_block_mask
    if inputs.q.is_cuda:
        torch.compiler.reset()  # shapes known to the compiler: the next setting is compiled for itself, not for any length
        function, make_mask = torch.compile(function, dynamic=False), torch.compile(make_mask, dynamic=False)
    mask = make_mask(sees, None, None, setting.num_tokens, setting.num_windows, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[: setting.num_windows], v[: setting.num_windows]
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))  # views [1, heads, T or N, D]
        return function(q, k, v, block_mask=mask, enable_gqa=setting.group_size > 1).transpose(1, 2)[0]

    return by_autograd(inputs, attend)


def compression(inputs: CompressionInputs, backend: str, *, gathered: bool = False, weighted: bool = False) -> Calls:
    """Forward as a user calls it; backward by the registered operator."""
    from nsa_fsa import ops

    setting, x = inputs.setting, inputs.x
    weight, do = inputs.weight if weighted else None, inputs.dwindows if gathered else inputs.dpooled
    leaves = [x, inputs.weight] if weighted else [x]
    arguments: dict[str, Any] = dict(**windows_of(setting), seqused_k=None, backend=backend)
    where = (inputs.cu_seqlens, setting.num_tokens)

    def compress() -> Tensor:
        if gathered:
            return ops.gather_windows(x, *where, **arguments)
        return ops.pool_windows(x, weight, *where, **arguments)

    def forward() -> Tensor:
        with torch.no_grad():
            return compress()

    def backward() -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(x=x.detach(), cu_seqlens=inputs.cu_seqlens, **arguments)
        if gathered:
            return (torch.ops.nsa_fsa.gather_windows_backward(dwindows=do, **given),)
        detached = None if weight is None else weight.detach()
        return torch.ops.nsa_fsa.pool_windows_backward(dpooled=do, weight=detached, **given)[: len(leaves)]

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compress(), leaves, do)

    return Calls(
        forward, backward, forward_backward, outputs=("windows" if gathered else "pooled",),
        gradients=("dx", "dweight")[: len(leaves)],
    )  # fmt: skip


def attention_implementation(backend: str) -> Implementation:
    return Implementation(
        "compressed_attention", "compressed attention", "ours", functools.partial(attention, backend=backend),
        unsupported=functools.partial(no_such_backend, operator="compressed_attention", backend=backend),
        distribution="nsa-fsa", notes="forward: with lse; backward: the registered operator",
        facts=lambda inputs, name: dict(backend=backend),
    )  # fmt: skip


@dataclass(frozen=True)
class Compression(Implementation):
    """One of this package's ways to compress: `options` as `compression` takes them."""

    options: tuple[str, ...] = ()

    @property
    def keywords(self) -> dict[str, bool]:
        return dict.fromkeys(self.options, True)


def compression_implementations(backend: str) -> list[Implementation]:
    def one(name: str, label: str, operator: str, *options: str) -> Compression:
        keywords: dict[str, Any] = dict.fromkeys(options, True)
        return Compression(
            name, label, "compression", functools.partial(compression, backend=backend, **keywords),
            unsupported=functools.partial(no_such_backend, operator=operator, backend=backend), distribution="nsa-fsa",
            notes="of the keys alone; backward: the registered operator", facts=lambda inputs, name: dict(backend=backend),
            options=options,
        )  # fmt: skip

    return [
        one("pool_mean", "pooling, mean", "pool_windows"),
        one("pool_weighted", "pooling, weighted", "pool_windows", "weighted"),
        one("gather", "gathering windows", "gather_windows", "gathered"),
    ]


FLEX = Implementation(
    "flex_attention", "flex_attention (PyTorch)", "peer", flex_attention, distribution="torch",
    notes="torch.nn.attention.flex_attention, compiled for each setting; the block mask is given, and no lse is returned",
)  # fmt: skip
COMPRESSED = {x.name: x for x in [attention_implementation("triton"), FLEX, *compression_implementations("triton")]}


# The run


def attention_subject(setting: WindowSetting, inputs: AttentionInputs) -> Subject:
    work = necessary(setting, compressed_pairs(setting), num_indices=0, num_keys=setting.num_windows)
    recorded = setting.without_blocks(setting.selection)
    return Subject(recorded, CompressedOracle(inputs), work)


def compression_subject(inputs: CompressionInputs, implementation: Implementation) -> Subject:
    assert isinstance(implementation, Compression)
    setting, options = inputs.setting, implementation.keywords
    weight = inputs.weight if "weighted" in options else None
    do = inputs.dwindows if "gathered" in options else inputs.dpooled
    return Subject(setting, CompressionOracle(setting, inputs.x, weight, do), necessary_compression(setting, **options))


def run(
    settings: list[WindowSetting], implementations: list[Implementation], passes: list[str], meter: Meter, results: Results,
    seed: int, device: torch.device, console: Console,
) -> None:  # fmt: skip
    """Attention at every setting, then compression: one after the other, for their inputs are large."""

    def prepare_attention(setting: WindowSetting) -> Prepared:
        inputs = make_inputs(setting, seed, device)
        subject = attention_subject(setting, inputs)
        return Prepared(inputs, lambda implementation: subject)

    def prepare_compression(setting: WindowSetting) -> Prepared:
        inputs = make_compression_inputs(setting, seed, device)
        return Prepared(inputs, functools.partial(compression_subject, inputs))

    for name, reason in LEFT_OUT.items():
        results.leave_out(name, reason)
    compressing = [x for x in implementations if isinstance(x, Compression)]
    attending = [x for x in implementations if not isinstance(x, Compression)]
    parts: list[tuple[list[Implementation], Callable[[WindowSetting], Prepared]]] = [
        (attending, prepare_attention), (list(compressing), prepare_compression),
    ]  # fmt: skip
    for chosen, prepare in parts:
        run_implementations(settings, chosen, passes, meter, results, console, prepare)
