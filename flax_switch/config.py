"""Every setting of a model, its data, its training and its mesh, as frozen dataclasses that validate themselves.

The dataclasses are the truth: ml_collections and gin files are read into them by `flax_switch.recipes`, and Hugging Face's
`config.json` is mapped onto `SwitchConfig` by `flax_switch.config_huggingface`. This module imports nothing but the standard
library, so that data preparation and tools can read a config without starting JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish", "linear", "tanh")
LAYOUTS = ("bottom", "middle", "mixed", "top", "huggingface")
LOSS_NORMALIZERS = ("real_target_tokens", "total_target_tokens", "average_per_sequence")
DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A setting that cannot be used: the message says what was expected, what came and what to change."""


def check(condition: Any, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`, and suggests the nearest."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}; it is {value!r}.{hint}")


@dataclasses.dataclass(frozen=True)
class _Section:
    """What all config dataclasses share: type checks, replace, to and from plain dicts, errors that name the nearest key."""

    if not TYPE_CHECKING:  # type checkers know the fields from each class

        def __new__(cls, *values: Any, **named: Any) -> Self:
            """Refuses a keyword that is no field before the constructor does, and names the nearest one."""
            reject_unknown_keys(cls, named)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _type_hints(type(self)).items():
            value = getattr(self, name)
            check(
                _fits(value, hint),
                f"{type(self).__name__}.{name} must be {_describe(hint)}; it is {value!r} ({type(value).__name__}).",
            )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; validated again."""
        reject_unknown_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-able dict of every field (tuples become lists, sections become dicts)."""

        def plain(value: Any) -> Any:
            if isinstance(value, _Section):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown keys are errors that name the nearest field; absent keys take their defaults."""
        reject_unknown_keys(cls, values)
        sections = {f.name: f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)}
        built = {}
        for key, value in values.items():
            section = sections.get(key)
            if isinstance(section, type) and issubclass(section, _Section):
                built[key] = value if isinstance(value, section) else section.from_dict(value)
            else:
                built[key] = _tuples(value)
        return cls(**built)


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; an int is a fine float, and a bool is no number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(v, item) for v in value)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("NoneType", "None")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def reject_unknown_keys(cls: type, keys: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first key that is no field of `cls`, naming the nearest one."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Its fields are: {', '.join(names)}."
            raise ConfigError(f"{cls.__name__} has no field {key!r}.{hint}")


def sparse_layers(layout: str, num_layers: int, num_sparse: int) -> tuple[int, ...]:
    """Indices of the sparse layers of a stack of `num_layers` with `num_sparse` of them sparse.

    `bottom`, `middle`, `mixed` and `top` are flaxformer's layouts. `huggingface` is transformers' rule
    (step = num_layers // num_sparse, sparse if i % step == 1 or step == 1), odd cases included: it may build another number
    of sparse layers than was asked for.
    """
    n, m = num_layers, num_sparse
    if layout == "huggingface":
        step = n // m if m > 0 else n
        return tuple(i for i in range(n) if step > 0 and (i % step == 1 or step == 1))
    check(0 <= m <= n, f"{m} sparse layers do not fit a stack of {n} layers; lower the number of sparse layers.")
    if m == 0:
        return ()
    if layout == "bottom":
        return tuple(range(m))
    if layout == "top":
        return tuple(range(n - m, n))
    if layout == "middle":
        return tuple(i for i in range(n) if n - m <= 2 * i < n + m)
    check(
        n % m == 0,
        f"sparse_layout='mixed' spreads sparse layers evenly, so their number must divide the number of layers; {m} does not "
        f"divide {n}. Change either number, or take another sparse_layout.",
    )
    return tuple(i for i in range(n) if i % (n // m) == n // m - 1)


@dataclasses.dataclass(frozen=True)
class SwitchConfig(_Section):
    """A Switch Transformer: sizes, routing, losses, numerics. The defaults are Switch-Base with 8 experts (2101.03961).

    Letters in comments are the axes used throughout (see `flax_switch.ops`): V vocabulary, D model, H heads, K head, F MLP,
    E experts, N experts per token, S tokens per group, C capacity.
    """

    # --- sizes
    vocab_size: int = 32128  # V, sentinels and padding to a multiple of 128 included
    d_model: int = 768  # D
    num_heads: int = 12  # H
    d_kv: int = 64  # K, per head; H * K need not equal D
    d_ff: int = 3072  # F of the dense MLPs
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_sparse_encoder_layers: int = 6
    num_sparse_decoder_layers: int = 6
    sparse_layout: str = "mixed"  # one of LAYOUTS
    encoder_sparse_layers: tuple[int, ...] | None = None  # explicit indices; override the layout and the number
    decoder_sparse_layers: tuple[int, ...] | None = None
    mlp_activations: tuple[str, ...] = ("relu",)  # two names make a gated MLP: ("gelu_new", "linear") is T5 1.1's
    extra_mlp: bool = False  # ST-MoE: a dense MLP with its own norm and residual after each sparse block

    # --- experts and routing
    num_experts: int = 8  # E
    num_selected_experts: int = 1  # N, for tokens-choose
    expert_d_ff: int | None = None  # F of the experts; None: d_ff
    shared_expert: bool = False  # a dense MLP of the experts' width beside the routed ones, added to their output
    router_type: str = "tokens_choose"  # or "experts_choose": then the encoder only, decoders always let tokens choose
    batch_prioritized_routing: bool = False  # the encoder only: it breaks causality in a decoder (2106.05974)
    normalize_router_weights: bool = False  # renormalise the N combine weights to sum to 1
    capacity_mode: str = "factor"  # "factor", "fixed" (expert_capacity per group) or "dropless"
    capacity_factor: float = 1.25  # in training: C = max(round(factor * S / E), min_expert_capacity)
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    expert_capacity: int = 64  # C where capacity_mode is "fixed"
    routing_group: str = "sequence"  # "sequence", "tokens" (group_size of them), or "flaxformer" (compatibility)
    group_size: int = 4096  # S where routing_group is "tokens"; the largest S where it is "flaxformer"
    ignore_padding_tokens: bool = False  # False: padding takes slots and counts in losses, as it does upstream
    padding_semantics: str = "masked"  # how ignored padding behaves: flaxformer's "masked" or "scatter" router
    router_bias: bool = False
    router_init_std: float = 0.02  # of the router's kernel; at D**-0.5 tokens begin with preferences, at 0.02 with hardly any
    router_jitter_noise: float = 0.0  # training only: router inputs times U(1-eps, 1+eps)
    router_dtype: str = "float32"
    cast_router_probs: bool = False  # Hugging Face: probabilities in the activations' dtype before argmax
    moe_executor: str = "auto"  # "auto", "einsum", "gather" or "ragged"
    # Dropless with experts on several devices: rows a device can receive, relative to its even share of them. What does not fit
    # is dropped and counted (the metric choices_overflowed).
    expert_parallel_buffer_factor: float = 2.0

    # --- losses
    load_balancing_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    router_loss_reduction: str = "layers"  # mean over sparse layers; or "huggingface": concatenated on length, by stack
    z_loss_coef: float = 1e-4  # on the logits' normaliser
    label_smoothing: float = 0.0
    loss_normalizer: str | float = "real_target_tokens"  # or "total_target_tokens", "average_per_sequence", or a constant

    # --- layers and numerics
    tie_word_embeddings: bool = True
    separate_embeddings: bool = False  # encoder and decoder embed with tables of their own, as Hugging Face's untied models do
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False  # a table in every layer, as T5X's scanned checkpoints have
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    expert_dropout_rate: float | None = None  # None: dropout_rate
    zero_padding_activations: bool = True  # flaxformer multiplies the padding mask in before each sublayer; HF does not
    init_scale: float = 0.1  # of variance-scaling initialisers (Switch, table 3)
    dtype: str = "float32"  # of activations and matrix products; routers, norms, softmax and losses stay float32
    param_dtype: str = "float32"
    expert_dtype: str | None = None  # of activations inside the experts; None: dtype
    scan_layers: bool = False  # one compiled block repeated, where the layout repeats
    remat_policy: str = "none"  # "none", "minimal" (save matrix products) or "full"

    # --- special tokens
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "min_expert_capacity", "group_size"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1; it is {getattr(self, name)}.")
        for name in ("num_encoder_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"):
            check(getattr(self, name) >= 0, f"{name} must not be negative; it is {getattr(self, name)}.")
        one_of("sparse_layout", self.sparse_layout, LAYOUTS)
        one_of("router_type", self.router_type, ("tokens_choose", "experts_choose"))
        one_of("capacity_mode", self.capacity_mode, ("factor", "fixed", "dropless"))
        one_of("routing_group", self.routing_group, ("sequence", "tokens", "flaxformer"))
        one_of("padding_semantics", self.padding_semantics, ("masked", "scatter"))
        one_of("moe_executor", self.moe_executor, ("auto", "einsum", "gather", "ragged"))
        one_of("router_loss_reduction", self.router_loss_reduction, ("layers", "huggingface"))
        if isinstance(self.loss_normalizer, str):
            one_of("loss_normalizer", self.loss_normalizer, LOSS_NORMALIZERS)
        one_of("remat_policy", self.remat_policy, ("none", "minimal", "full"))
        for name in ("dtype", "param_dtype", "router_dtype", "expert_dtype"):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), DTYPES)
        check(
            isinstance(self.mlp_activations, tuple) and 1 <= len(self.mlp_activations) <= 2,
            f"mlp_activations must be one name, or two for a gated MLP; it is {self.mlp_activations!r}.",
        )
        for name in self.mlp_activations:
            one_of("mlp_activations", name, ACTIVATIONS)
        check(
            not (self.separate_embeddings and self.tie_word_embeddings),
            "separate_embeddings gives encoder and decoder tables of their own, so none is left to tie the head to; set "
            "tie_word_embeddings=False.",
        )
        self._check_stack("encoder")
        self._check_stack("decoder")
        if self.is_sparse:
            self._check_routing()
        check(self.router_init_std >= 0, f"router_init_std must not be negative; it is {self.router_init_std}.")
        for name in ("dropout_rate", "expert_dropout_rate", "label_smoothing", "router_jitter_noise"):
            rate = getattr(self, name)
            check(rate is None or 0.0 <= rate < 1.0, f"{name} must lie in [0, 1); it is {rate}.")
        check(
            self.relative_attention_num_buckets >= 4 and self.relative_attention_num_buckets % 2 == 0,
            f"relative_attention_num_buckets must be even and at least 4; it is {self.relative_attention_num_buckets}.",
        )
        check(
            self.relative_attention_max_distance > self.relative_attention_num_buckets // 2,
            f"relative_attention_max_distance ({self.relative_attention_max_distance}) must be larger than half the number of "
            f"buckets ({self.relative_attention_num_buckets}).",
        )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            check(
                0 <= getattr(self, name) < self.vocab_size,
                f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size}.",
            )
        if self.scan_layers:
            for stack in ("encoder", "decoder"):
                check(
                    self.scan_blocks(stack) is not None,
                    f"scan_layers repeats one block, but the {stack}'s sparse layers {self.sparse_indices(stack)} of "
                    f"{self.num_layers(stack)} do not repeat; use sparse_layout='mixed' or scan_layers=False.",
                )

    def _check_stack(self, stack: str) -> None:
        explicit = getattr(self, f"{stack}_sparse_layers")
        n = self.num_layers(stack)
        if explicit is None:
            sparse_layers(self.sparse_layout, n, getattr(self, f"num_sparse_{stack}_layers"))
            return
        check(
            list(explicit) == sorted(set(explicit)) and all(0 <= i < n for i in explicit),
            f"{stack}_sparse_layers must be ascending layer indices below {n}; it is {explicit!r}.",
        )

    def _check_routing(self) -> None:
        check(self.num_experts >= 1, f"num_experts must be at least 1; it is {self.num_experts}.")
        check(
            1 <= self.num_selected_experts <= self.num_experts,
            f"num_selected_experts must lie between 1 and num_experts ({self.num_experts}); it is {self.num_selected_experts}.",
        )
        for name in ("capacity_factor", "eval_capacity_factor", "expert_parallel_buffer_factor"):
            check(getattr(self, name) > 0, f"{name} must be positive; it is {getattr(self, name)}.")
        check(self.expert_capacity >= 1, f"expert_capacity must be at least 1; it is {self.expert_capacity}.")
        check(self.expert_d_ff is None or self.expert_d_ff >= 1, f"expert_d_ff must be at least 1; it is {self.expert_d_ff}.")
        if self.router_type == "experts_choose":
            check(
                self.capacity_mode != "dropless",
                "router_type='experts_choose' has every expert take a fixed number of tokens, so it cannot be dropless; set "
                "capacity_mode='factor' or 'fixed'.",
            )
            check(
                not self.batch_prioritized_routing,
                "batch_prioritized_routing orders tokens that choose; with router_type='experts_choose' set it to False.",
            )

    # --- derived
    def num_layers(self, stack: str) -> int:
        """Number of layers of the `encoder` or `decoder`."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    def sparse_indices(self, stack: str) -> tuple[int, ...]:
        """Indices of the sparse layers of the `encoder` or `decoder`."""
        explicit = getattr(self, f"{stack}_sparse_layers")
        if explicit is not None:
            return explicit
        return sparse_layers(self.sparse_layout, self.num_layers(stack), getattr(self, f"num_sparse_{stack}_layers"))

    def scan_blocks(self, stack: str) -> int | None:
        """How many times one block of layers repeats in a stack, or None where the layout does not repeat."""
        n, sparse = self.num_layers(stack), self.sparse_indices(stack)
        if not sparse:
            return n
        block = n // len(sparse)
        repeats = n % len(sparse) == 0 and sparse == tuple(range(block - 1, n, block))
        return len(sparse) if repeats else None

    @property
    def is_sparse(self) -> bool:
        """Whether any layer is sparse."""
        return bool(self.sparse_indices("encoder") or self.sparse_indices("decoder"))

    @property
    def expert_width(self) -> int:
        """F of the experts."""
        return self.d_ff if self.expert_d_ff is None else self.expert_d_ff

    @property
    def is_gated(self) -> bool:
        """Whether MLPs multiply two projections."""
        return len(self.mlp_activations) == 2

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any]) -> SwitchConfig:
        """The config that a transformers `config.json` describes, with Hugging Face's semantics."""
        from flax_switch import config_huggingface

        return config_huggingface.from_huggingface(values)

    def to_huggingface(self) -> dict[str, Any]:
        """The inverse of `from_huggingface`; raises `ConfigError` naming the field Hugging Face cannot represent."""
        from flax_switch import config_huggingface

        return config_huggingface.to_huggingface(self)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """What text is read and how examples are made of it."""

    source: str | tuple[str, ...] = "default"  # "default": the embedded corpus; else files, folders or globs
    text_field: str = "text"  # the field or column of JSON, tables, parquet and ArrayRecord
    document_separator: str = "line"  # of .txt: "line" (one document a line) or "blank_line"
    heldout_fraction: float = 0.02  # of documents, chosen by a hash of their text
    vocabulary: str | None = None  # a SentencePiece .model; None: train one of vocabulary_size pieces on the corpus
    vocabulary_size: int = 32000  # pieces, before sentinels
    num_sentinels: int = 100
    span_corruption_rate: float = 1.0  # rates of the objectives in the mixture; they need not sum to 1
    prefix_lm_rate: float = 0.0
    infilling_rate: float = 0.0  # inputs of span corruption, but the whole text as targets (BART's text infilling)
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    inputs_length: int = 512  # tokens, sentinels and EOS included
    targets_length: int = 114
    batch_size: int = 128  # examples per step over all processes
    packing: bool = False  # put several short examples in a row, with segment ids
    shuffle: bool = True
    seed: int = 0
    num_workers: int = 0  # processes that prepare batches; the order never depends on it
    prefetch: int = 8  # batches held ready
    cache_dir: str | None = None  # of tokenised text; None: a folder in the user's cache directory

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocabulary_size", "inputs_length", "targets_length", "batch_size", "prefetch"):
            check(getattr(self, name) >= 1, f"data.{name} must be at least 1; it is {getattr(self, name)}.")
        check(self.num_sentinels >= 0 and self.num_workers >= 0, "data.num_sentinels and data.num_workers must not be negative.")
        one_of("data.document_separator", self.document_separator, ("line", "blank_line"))
        check(0.0 < self.noise_density < 1.0, f"data.noise_density must lie in (0, 1); it is {self.noise_density}.")
        check(
            self.mean_noise_span_length >= 1.0,
            f"data.mean_noise_span_length must be at least 1; it is {self.mean_noise_span_length}.",
        )
        rates = (self.span_corruption_rate, self.prefix_lm_rate, self.infilling_rate)
        check(
            min(rates) >= 0 and sum(rates) > 0,
            "data.span_corruption_rate, data.prefix_lm_rate and data.infilling_rate must not be negative, and one of them must be "
            f"positive; they are {', '.join(map(str, rates))}.",
        )
        check(0.0 < self.heldout_fraction < 1.0, f"data.heldout_fraction must lie in (0, 1); it is {self.heldout_fraction}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """The optimiser and its schedule. The defaults are T5X's for pre-training."""

    name: str = "adafactor"  # or "adamw", "adamw_rms" (rates relative to a parameter's RMS), "muon" (the same, matrices by Muon)
    schedule: str = "rsqrt"  # learning_rate * rsqrt(max(step, warmup_steps)); or "constant", "linear", "cosine"
    learning_rate: float = 1.0  # the factor in rsqrt; else the peak
    warmup_steps: int = 10_000  # rsqrt: constant until then; others: linear from 0
    final_learning_rate: float = 0.0  # of linear and cosine, at the last step
    decay_rate: float = 0.8  # Adafactor's second moments: 1 - step**-decay_rate
    multiply_by_parameter_scale: bool = True  # Adafactor's; adamw_rms and muon always do, adamw never does
    min_dim_size_to_factor: int = 128
    clipping_threshold: float | None = 1.0  # Adafactor's, on the update's RMS, per expert
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_global_norm: float | None = None
    trainable: str = ".*"  # a regular expression over parameter paths, or a name in training/freezing; others stay as they are

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optimizer.name", self.name, ("adafactor", "adamw", "adamw_rms", "muon"))
        one_of("optimizer.schedule", self.schedule, ("rsqrt", "constant", "linear", "cosine"))
        check(self.learning_rate > 0, f"optimizer.learning_rate must be positive; it is {self.learning_rate}.")
        check(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative; it is {self.warmup_steps}.")


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Section):
    """How devices are laid out: axes ('data', 'expert', 'model'); one of them may be -1, which takes what is left."""

    data: int = -1
    expert: int = 1
    model: int = 1
    fsdp: bool = False  # parameters and optimiser state also sharded over data
    mode: str = "jit"  # or "pmap": the same train step under jax.pmap, for data and expert parallelism

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mesh.mode", self.mode, ("jit", "pmap"))
        check(
            self.mode == "jit" or (self.model == 1 and not self.fsdp),
            "mesh.mode='pmap' holds all parameters but the experts' whole on each device, so it needs model=1 and fsdp=False; they "
            f"are model={self.model} and fsdp={self.fsdp}. Set mesh.mode='jit' to split parameters over these axes.",
        )
        axes = (self.data, self.expert, self.model)
        check(
            all(a == -1 or a >= 1 for a in axes) and axes.count(-1) <= 1,
            f"mesh axes must be positive, at most one of them -1; they are data={self.data}, expert={self.expert}, "
            f"model={self.model}.",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop."""

    steps: int = 524_288
    seed: int = 0
    microbatches: int = 1  # a batch is split into this many; the update equals the unsplit batch's
    log_every: int = 100
    eval_every: int = 1000
    eval_batches: int = 20
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None  # keep checkpoints whose step is a multiple of it for good
    sample_spans: int = 4  # held-out examples shown at the end: with masked spans filled in, or beside predictions

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "microbatches", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last"):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1; it is {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(_Section):
    """A whole run: what a recipe in configs/ returns and what a checkpoint carries."""

    model: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.data.batch_size % self.train.microbatches == 0,
            f"train.microbatches ({self.train.microbatches}) must divide data.batch_size ({self.data.batch_size}).",
        )
