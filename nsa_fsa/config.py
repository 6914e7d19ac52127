"""NSAConfig: every choice of a Native Sparse Attention layer, checked once, here."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPRESSION_KINDS = ("mean", "weighted", "linear", "mlp", "gated")
GATE_KINDS = ("per_head", "per_token")
GATE_INITS = ("balanced", "dense")
COMPRESS_ROPE = ("after", "before")
BRANCHES = ("compressed", "selected", "sliding")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
_ROPE_KEYS = (
    "rope_type", "rope_theta", "factor", "partial_rotary_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor",
    "long_factor",
)  # fmt: skip

# The paper's two kernel settings (block size x selected blocks), and one small enough to watch on a
# CPU: at 1,024 tokens `tiny` attends at most 96 selected + 32 recent keys and 127 compressed
# tokens, a quarter of what dense attention reads.
_PAPER = dict(kernel_size=32, kernel_stride=16, init_blocks=1, local_blocks=2, window_size=512)
_TINY = dict(kernel_size=16, kernel_stride=8, init_blocks=1, local_blocks=1, window_size=32)
PRESETS: dict[str, dict[str, Any]] = {
    "fsa-64x16": dict(**_PAPER, block_size=64, num_selected_blocks=16),
    "fsa-128x8": dict(**_PAPER, block_size=128, num_selected_blocks=8),
    "tiny": dict(**_TINY, block_size=16, num_selected_blocks=6),
}


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Configuration of one `NativeSparseAttention` layer.

    Symbols in parentheses are the NSA paper's. Lengths are in tokens.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads (HQ).
        num_kv_heads: key/value heads (HKV); `num_heads` must be a multiple, and the quotient is the
            GQA group size G. Default `num_heads`: plain multi-head attention.
        head_dim: width of a query and key head (D); default `hidden_size // num_heads`.
        v_head_dim: width of a value head (DV); default `head_dim`.
        scale: softmax scale; default `head_dim ** -0.5`.
        kernel_size: length of a compression window (l); a multiple of `kernel_stride`,
            at most `block_size`.
        kernel_stride: step between compression windows (s).
        block_size: length of a selection block (B_K); a multiple of `kernel_stride`.
        num_selected_blocks: blocks each query reads per KV head (T_sel), forced ones included.
        init_blocks: blocks at the start of the sequence that every query reads.
        local_blocks: most recent blocks, the query's own included, that every query reads.
        window_size: keys of the sliding branch (w), the query's own position included.
        dense_below: queries at a smaller position of their sequence than this attend to all keys up
            to their own, as in a dense layer, in training and decoding alike; 0: none do.
        compress_k, compress_v: how a window becomes one token: "mean", "weighted", "linear",
            "mlp" or "gated".
        compress_hidden_size: hidden width of the "mlp" kind; default the head width.
        compress_position_embedding: add a learned embedding of the position inside the window
            before compressing.
        compress_rope: "after" compresses un-rotated keys and rotates the result as the window's
            first position; "before" compresses keys that are already rotated.
        gate: "per_head" gives every query head its own three gates,
            "per_token" shares them among the heads.
        gate_init: "balanced" starts all gates at 0.5 (training from scratch); "dense" opens the
            selected branch and nearly closes the others, so that a swapped-in layer starts out as
            the dense one (see `NativeSparseAttention`).
        kv_per_branch: project separate keys and values for each branch, as the NSA paper does.
        qk_norm: RMS-normalise every query and key head before RoPE, as Qwen3 does.
        qk_norm_eps: epsilon of that norm.
        qkv_bias, o_bias: biases of the input and output projections.
        rope_parameters: transformers' form, such as
            `{"rope_type": "default", "rope_theta": 10000.0}`; the types are "default", "linear",
            "dynamic", "yarn", "llama3", "longrope" and "proportional". `None`: the layer rotates
            nothing unless its caller passes `position_embeddings`. "dynamic" and "longrope" turn by
            angles that depend on the length so far: tokens in a cache keep the angles that they
            came with, as in transformers, so that a sequence that outgrows the model's own length
            in parts is not the same as one fed at once.
        max_position_embeddings: length the model was made for; "dynamic",
            "yarn" and "longrope" scale relative to it.
        recompute: of "compressed", "selected" and "sliding", the branches whose output is computed
            again in backward instead of kept for it: `num_heads * v_head_dim` numbers less per
            token and branch, for the time of the branch's forward.
        backend: which implementation of the operators runs; "auto" takes the fastest that can.

    Fields that default to another field's value are filled in at construction;
    `dataclasses.replace(config, head_dim=64)` therefore has to name `v_head_dim`, `scale` and
    `compress_hidden_size` as well.

    Raises:
        ValueError: names the field, its value, what is allowed and how to fix it.
    """

    hidden_size: int
    num_heads: int
    # Filled in by __post_init__, and an int ever after.
    num_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    v_head_dim: int = None  # type: ignore[assignment]
    scale: float = None  # type: ignore[assignment]

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    dense_below: int = 0

    compress_k: str = "weighted"
    compress_v: str = "weighted"
    compress_hidden_size: int = None  # type: ignore[assignment]
    compress_position_embedding: bool = False
    compress_rope: str = "after"

    gate: str = "per_head"
    gate_init: str = "balanced"
    kv_per_branch: bool = False
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False

    rope_parameters: dict[str, Any] | None = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}, hash=False
    )
    max_position_embeddings: int = 131072
    recompute: tuple[str, ...] = ()
    backend: str = "auto"

    @property
    def group_size(self) -> int:
        """G: query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads"):
            self._check_int(name, minimum=1)

        self._fill_if_none("num_kv_heads", self.num_heads)
        self._check_int("num_kv_heads", minimum=1)
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_heads={self.num_heads}",
            "choose num_kv_heads so that each KV head serves a whole group of query heads",
        )

        if self.head_dim is None:
            why = f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            divides = self.hidden_size % self.num_heads == 0
            self._require(divides, "head_dim", f"an int, because {why}", "pass head_dim explicitly")
            self._fill("head_dim", self.hidden_size // self.num_heads)
        self._check_int("head_dim", minimum=1)

        self._fill_if_none("v_head_dim", self.head_dim)
        self._fill_if_none("compress_hidden_size", self.head_dim)
        self._fill_if_none("scale", self.head_dim**-0.5)
        self._require(
            _is_positive_number(self.scale),
            "scale",
            "a positive finite number",
            "leave it out for head_dim ** -0.5",
        )

        for name in (
            "v_head_dim",
            "compress_hidden_size",
            "kernel_size",
            "kernel_stride",
            "block_size",
            "num_selected_blocks",
            "window_size",
            "max_position_embeddings",
        ):
            self._check_int(name, minimum=1)
        for name in ("init_blocks", "local_blocks", "dense_below"):
            self._check_int(name, minimum=0)

        self._require(
            self.kernel_size % self.kernel_stride == 0,
            "kernel_size",
            f"a multiple of kernel_stride={self.kernel_stride}",
            "for example kernel_size = 2 * kernel_stride",
        )
        self._require(
            self.block_size % self.kernel_stride == 0,
            "block_size",
            f"a multiple of kernel_stride={self.kernel_stride}",
            "for example block_size = 4 * kernel_stride",
        )
        self._require(
            self.kernel_size <= self.block_size,
            "kernel_size",
            f"at most block_size={self.block_size}",
            "shorten the compression window or enlarge the block",
        )
        self._require(
            self.init_blocks + self.local_blocks <= self.num_selected_blocks,
            "num_selected_blocks",
            f"at least init_blocks + local_blocks = {self.init_blocks + self.local_blocks}",
            "the forced blocks count among the selected ones: select more, or force fewer",
        )

        for name, allowed in (
            ("compress_k", COMPRESSION_KINDS),
            ("compress_v", COMPRESSION_KINDS),
            ("compress_rope", COMPRESS_ROPE),
            ("gate", GATE_KINDS),
            ("gate_init", GATE_INITS),
        ):
            known = _is_one_of(getattr(self, name), allowed)
            self._require(known, name, f"one of {allowed}", "check the spelling")

        switches = ("kv_per_branch", "qk_norm", "qkv_bias", "o_bias")
        for name in ("compress_position_embedding", *switches):
            is_switch = isinstance(getattr(self, name), bool)
            self._require(is_switch, name, "True or False", "pass a bool")

        self._require(
            _is_positive_number(self.qk_norm_eps),
            "qk_norm_eps",
            "a positive finite number",
            "1.0e-6 is usual (YAML reads 1e-6, without the point, as text)",
        )
        self._require(
            isinstance(self.recompute, (tuple, list))
            and all(_is_one_of(name, BRANCHES) for name in self.recompute),
            "recompute",
            f"a tuple of branches among {BRANCHES}",
            'for example ("compressed", "sliding")',
        )
        self._fill("recompute", tuple(self.recompute))  # YAML and JSON have lists

        is_name = isinstance(self.backend, str) and self.backend != ""
        self._require(is_name, "backend", "a backend's name", 'use "auto"')
        self._check_rope()

    def _check_rope(self) -> None:
        if self.rope_parameters is None:
            return
        is_dict = isinstance(self.rope_parameters, Mapping)
        self._require(is_dict, "rope_parameters", "a dict or None", "see the docstring")

        rope = dict(self.rope_parameters)
        # That was the key's name before transformers 5.
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", 10000.0)
        self._require(
            _is_one_of(rope["rope_type"], ROPE_TYPES),
            "rope_parameters",
            f"a rope_type among {ROPE_TYPES}",
            "or pass position_embeddings=(cos, sin) to the layer and set rope_parameters=None",
        )

        bands = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        needed = {
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor",),
            "llama3": ("factor", *bands),
            "longrope": ("short_factor", "long_factor"),
        }.get(rope["rope_type"], ())
        missing = [key for key in needed if key not in rope]
        wanted = f"the keys {needed} for {rope['rope_type']!r}"
        self._require(not missing, "rope_parameters", wanted, f"add {missing}")

        unknown = [key for key in rope if key not in _ROPE_KEYS]
        wanted, fix = f"made of the keys {_ROPE_KEYS}", f"check the spelling of {unknown}"
        self._require(not unknown, "rope_parameters", wanted, fix)

        given = self.rope_parameters
        scaling = [key for key in given if key not in ("rope_theta", "partial_rotary_factor")]
        self._require(  # the default type would ignore them
            "rope_type" in given or "type" in given or not scaling,
            "rope_parameters",
            f"a dict with a rope_type where it has {scaling}",
            'for example {"rope_type": "linear", "factor": 2.0}',
        )

        lists = ("short_factor", "long_factor")
        numbers = [key for key in rope if key not in ("rope_type", "truncate", *lists)]
        always = ("rope_theta", "factor", "partial_rotary_factor", *needed)
        # The others may be None.
        numbers = [key for key in numbers if key in always or rope[key] is not None]
        wrong = [key for key in numbers if not _is_positive_number(rope[key])]
        self._require(
            not wrong and rope.get("partial_rotary_factor", 1) <= 1,
            "rope_parameters",
            "positive finite numbers, with partial_rotary_factor at most 1",
            f"check {wrong or 'partial_rotary_factor'} (YAML reads 1e6, without a point, as text)",
        )

        has_switch = rope.get("truncate") is None or isinstance(rope["truncate"], bool)
        wanted = "a dict whose truncate is True or False"
        self._require(has_switch, "rope_parameters", wanted, "pass a bool")

        rotary_dim = int(self.head_dim * rope.get("partial_rotary_factor", 1.0))
        self._require(
            rotary_dim % 2 == 0 and rotary_dim > 0,
            "head_dim",
            "even (in its rotated part), because RoPE rotates pairs",
            "use an even head_dim or rope_parameters=None",
        )

        for key in [key for key in lists if key in rope]:
            factors = rope[key]
            self._require(
                isinstance(factors, (list, tuple))
                and len(factors) == rotary_dim // 2
                and all(_is_positive_number(factor) for factor in factors),
                "rope_parameters",
                f"a dict whose {key} holds rotary_dim // 2 = {rotary_dim // 2} positive numbers",
                "take it as the model's config has it, for one head",
            )

        self._fill("rope_parameters", rope)  # last, so that errors show what was passed

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one way to complete a frozen dataclass

    def _fill_if_none(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            self._fill(name, value)

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        allowed = f"an int >= {minimum}, and one that 64 bits hold"
        self._require(is_int and minimum <= value < 2**63, name, allowed, "pass a whole number")

    def _require(self, ok: bool, name: str, allowed: str, fix: str) -> None:
        if not ok:
            raise ValueError(
                f"NSAConfig.{name}={getattr(self, name)!r} is not allowed: it must be {allowed}. "
                f"Fix: {fix}."
            )

    # -- other forms -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults filled in, as plain JSON-compatible values."""
        return {**dataclasses.asdict(self), "recompute": list(self.recompute)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NSAConfig:
        """The inverse of `to_dict`. A key `preset` fills in the fields of that preset;
        explicit keys win over it.

        Raises:
            ValueError: for an unknown key (with the nearest known one), a missing one,
                or an inconsistent value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"NSAConfig.from_dict got {type(values).__name__}; "
                "it must be a mapping of NSAConfig fields to values. Fix: for a preset, "
                'from_dict({"preset": ..., "hidden_size": ..., "num_heads": ...}).'
            )
        values = dict(values)
        if (name := values.pop("preset", None)) is not None:
            values = {**preset(name), **values}
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                fix = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}."
                raise ValueError(f"NSAConfig has no field {key!r}; {fix}")
        missing = [key for key in ("hidden_size", "num_heads") if key not in values]
        if missing:
            raise ValueError(
                f"NSAConfig needs {missing}. "
                "Fix: add them, or NSAConfig.from_pretrained_config(model.config)."
            )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> NSAConfig:
        """`from_dict` of a YAML file, as in `configs/`; raises ValueError as it does."""
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(
                f"{path} is no valid YAML: {error}. Fix: see configs/ for what one looks like."
            ) from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} holds {type(values).__name__}; "
                "it must be a mapping of NSAConfig fields to values. Fix: see configs/."
            )
        return cls.from_dict(values)

    @classmethod
    def from_pretrained_config(
        cls,
        hf_config: Any,
        preset: str | None = None,
        *,
        layer: int | None = None,
        **overrides: Any,
    ) -> NSAConfig:
        """The NSA layer of a patched model's config, or the one that fits a dense Llama,
        Qwen2 or Qwen3 config.

        Of the config of a patched model, or of an `NSALlamaConfig` (and so on, of any family), it
        is what the layers of that model have, whose biases, norms and RoPE are those of the dense
        modules. Of a dense one it has head counts, biases, norms and RoPE, in the form of
        transformers 5 or 4 (`rope_theta` and `rope_scaling`), `gate_init="dense"`, so that the
        pretrained projections keep working, and `compress_rope="before"`, which starts closer to
        the dense model than "after".

        Args:
            hf_config: a transformers config, such as `model.config`;
                of a larger model, its `text_config`.
            preset: "fsa-64x16" (default for a dense config), "fsa-128x8" or "tiny";
                its fields win over `hf_config`.
            layer: index of the layer, where a patched model's have different settings;
                negative ones count from the end.
            overrides: fields of NSAConfig, which win over all others.

        Raises:
            ValueError: for a model type whose attention this layer cannot stand in for,
                for layers with different settings where none is named, or for a layer without NSA.
        """
        if hasattr(hf_config, "nsa_of_layer"):
            values = hf_config.nsa_of_layer(layer)
        else:
            values = attention_fields(hf_config)
        if layer is not None and not hasattr(hf_config, "nsa_of_layer"):
            raise ValueError(
                f"layer={layer!r} is not allowed with a {type(hf_config).__name__}, "
                "which is dense: it must be None. "
                "Fix: leave layer out, or pass the config of a patched model."
            )
        changes = overrides if preset is None else {"preset": preset, **overrides}
        return cls.from_dict(with_changes({"preset": "fsa-64x16", **values}, changes))


def attention_fields(hf_config: Any) -> dict[str, Any]:
    """The fields of NSAConfig that a Llama, Qwen2 or Qwen3 config decides, and a dense start.

    Raises:
        ValueError: for another model type.
    """
    model_type = getattr(hf_config, "model_type", None)
    family = str(model_type).removeprefix("nsa_")
    if family not in ("llama", "qwen2", "qwen3"):
        fix = "patch_model(model), or build NSAConfig yourself"
        if hasattr(hf_config, "text_config"):
            fix = "pass its text_config, that of the language model inside"
        raise ValueError(
            f"model_type={model_type!r} is not supported: "
            f"allowed are 'llama', 'qwen2' and 'qwen3'. Fix: {fix}."
        )

    attention_bias = bool(getattr(hf_config, "attention_bias", False))
    num_heads = hf_config.num_attention_heads
    return dict(
        hidden_size=hf_config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=getattr(hf_config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        qkv_bias=True if family == "qwen2" else attention_bias,
        o_bias=False if family == "qwen2" else attention_bias,
        qk_norm=family == "qwen3",
        qk_norm_eps=float(hf_config.rms_norm_eps),
        rope_parameters=_rope_of(hf_config),
        max_position_embeddings=hf_config.max_position_embeddings,
        gate_init="dense",
        compress_rope="before",
    )


def _rope_of(hf_config: Any) -> dict[str, Any]:
    """What transformers' Llama, Qwen2 and Qwen3 rotate by, which ignore keys unknown to them."""
    rope = {"rope_theta": getattr(hf_config, "rope_theta", None)}
    found = getattr(hf_config, "rope_parameters", None)
    rope.update(found or getattr(hf_config, "rope_scaling", None) or {})
    # That is the key's name in transformers 4.
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if (original := getattr(hf_config, "original_max_position_embeddings", None)) is not None:
        rope["original_max_position_embeddings"] = original
    if rope["rope_type"] == "default":
        rope.pop("partial_rotary_factor", None)  # without scaling these models rotate whole heads
    elif rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", hf_config.max_position_embeddings)
    # Numbers that are 0 or None count as not given there, too.
    return {key: rope[key] for key in _ROPE_KEYS if rope.get(key) or rope.get(key) is False}


def _is_positive_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def _is_one_of(value: Any, allowed: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in allowed


def with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place; a `preset` among these stands for its fields.

    Raises:
        ValueError: for an unknown preset.
    """
    name = changes.get("preset")
    return {**settings, **({} if name is None else preset(name)), **changes}


def preset(name: str) -> dict[str, Any]:
    """The sparsity fields of a preset: "fsa-64x16", "fsa-128x8" (the FSA paper's settings)
    or "tiny" (for a CPU).

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"preset={name!r} is not known: allowed are {tuple(PRESETS)}. "
            "Fix: pick one, or set the fields."
        )
    return dict(PRESETS[name])
