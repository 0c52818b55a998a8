"""The settings of a model, as a frozen dataclass that validates itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from flax_switch.config.base import _Section, check, differences, may_change, one_of
from flax_switch.config.heads import HEADS, LANGUAGE_MODEL, check_head
from flax_switch.config.ranges import Count, Epsilon, Layers, Natural, NotNegative, Positive, Range, Rate, Seed
from flax_switch.config.stacks import LAYOUTS, StackConfig, sparse_layers
from flax_switch.config.weights import FINE, FINE_ALONE, GROUP, WEIGHTS

ATTENTION_IMPLEMENTATIONS = ("auto", "plain", "fused")  # see `ops.kernels.fused_attention.fuses`
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish", "linear", "tanh")
LOSS_NORMALIZERS = ("real_target_tokens", "total_target_tokens", "average_per_sequence")
ROUTERS = ("tokens_choose", "experts_choose", "hash")  # see `ops.moe.block.ROUTERS`
EXECUTORS = ("einsum", "gather", "ragged", "blocks", "hit")  # see `ops.moe.executors`
DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = ("encoder_decoder", "decoder_only")
LAYER_FORMS = ("sequential", "parallel", "fused")
POSITIONS = ("relative", "rotary", "sinusoidal")
NORMS = ("rms", "layer")
EMBEDDING_SCALES = ("head", "inputs", "none")
PROJECTIONS = ("q_wi", "kv", "o_wo")  # of a fused layer


@dataclasses.dataclass(frozen=True)
class SwitchConfig(_Section):
    """A Switch Transformer: sizes, routing, losses, numerics. The defaults are Switch-Base with 8 experts (2101.03961).

    Letters in comments are the axes used throughout (see `flax_switch.ops`): V vocabulary, D model, H heads, K head, F MLP,
    E experts, N experts per token, S tokens per group, C capacity.
    """

    # --- architecture
    architecture: str = "encoder_decoder"  # or "decoder_only": the encoder's fields mean nothing, and there is no cross-attention
    # Decoder-only models have others. "parallel": attention and MLP from one norm, their sum times 2**-0.5. "fused": the same,
    # unscaled, in one projection to queries and MLP, one to a key and a value that all heads share, and one back
    layer_form: str = "sequential"
    fused_sparse: tuple[str, ...] = ("q_wi", "o_wo")  # which projections of a fused sparse layer have experts
    positions: str = "relative"  # or "rotary" (2104.09864), of a decoder-only model, or "sinusoidal" (1706.03762), of others
    scale_attention_logits: bool = False  # divide them by sqrt(d_kv), which otherwise the queries' initialisation does
    bidirectional_inputs: bool = False  # of a decoder-only model: inputs (a prompt) see each other, only targets are causal
    norm: str = "rms"  # or "layer": LayerNorm, which takes the mean off and has a bias; like the next two of encoder-decoders alone
    use_bias: bool = False  # in the projections of attention, in MLPs and in experts
    # Where sqrt(d_model) lies between a table and the states: "head": a tied head divides by it; "inputs": embeddings are
    # multiplied by it when they are read; "none": nowhere
    embedding_scale: str = "head"

    # --- sizes
    vocab_size: Count = 32128  # V, sentinels and padding to a multiple of 128 included
    d_model: Count = 768  # D
    num_heads: Count = 12  # H
    d_kv: Count = 64  # K, per head; H * K need not equal D
    d_ff: Count = 3072  # F of the dense MLPs
    num_encoder_layers: Layers = 12
    num_decoder_layers: Layers = 12
    num_sparse_encoder_layers: Layers = 6
    num_sparse_decoder_layers: Layers = 6
    sparse_layout: str = "mixed"  # one of LAYOUTS
    encoder_sparse_layers: tuple[Natural, ...] | None = None  # explicit indices; override the layout and the number
    decoder_sparse_layers: tuple[Natural, ...] | None = None
    mlp_activations: tuple[str, ...] = ("relu",)  # two names make a gated MLP: ("gelu_new", "linear") is T5 1.1's
    extra_mlp: bool = False  # ST-MoE: a dense MLP with its own norm and residual after each sparse block

    # --- experts and routing
    num_experts: Annotated[int, Range(1, largest=2**20)] = 8  # E
    num_selected_experts: Count = 1  # N, for tokens-choose
    expert_d_ff: Count | None = None  # F of the experts; None: d_ff
    shared_expert: bool = False  # a dense MLP of the experts' width beside the routed ones, added to their output
    # One of ROUTERS. "experts_choose": in the encoder only, decoders always let tokens choose. "hash": by token id, nothing learned
    router_type: str = "tokens_choose"
    hash_seed: Seed = 0  # which ids go to which expert, where router_type is "hash"
    batch_prioritized_routing: bool = False  # the encoder only: it breaks causality in a decoder (2106.05974)
    normalize_router_weights: bool = False  # renormalise the N combine weights to sum to 1
    capacity_mode: str = "factor"  # "factor", "fixed" (expert_capacity per group) or "dropless"
    capacity_factor: Positive = 1.25  # in training: C = max(round(factor * S / E), min_expert_capacity)
    eval_capacity_factor: Positive = 2.0
    min_expert_capacity: Count = 4
    expert_capacity: Count = 64  # C where capacity_mode is "fixed"
    routing_group: str = "sequence"  # "sequence", "tokens" (group_size of them), or "flaxformer" (compatibility)
    group_size: Count = 4096  # S where routing_group is "tokens"; the largest S where it is "flaxformer"
    ignore_padding_tokens: bool = False  # False: padding takes slots and counts in losses, as it does upstream
    padding_semantics: str = "masked"  # how ignored padding behaves: flaxformer's "masked" or "scatter" router
    router_bias: bool = False
    router_init_std: NotNegative = 0.02  # of the router's kernel; at D**-0.5 routing starts out uneven, at 0.02 nearly uniform
    router_jitter_noise: Rate = 0.0  # training only: router inputs times U(1-eps, 1+eps)
    # NLLB's expert output masking (2207.04672, section 6.2): a choice counts nothing at this rate; in evaluation all count 1 - rate
    expert_masking_rate: Rate = 0.0
    router_dtype: str = "float32"
    cast_router_probs: bool = False  # Hugging Face: probabilities in the activations' dtype before argmax
    moe_executor: str = may_change("auto")  # "auto" or one of EXECUTORS
    # Dropless with experts on several devices: rows a device can receive at a time, relative to its even share of them. What does
    # not fit waits for a further round and is counted (the metric choices_overflowed).
    expert_parallel_buffer_factor: Positive = may_change(2.0)

    # --- losses
    load_balancing_loss_coef: NotNegative = 0.01
    router_z_loss_coef: NotNegative = 0.0
    router_loss_reduction: str = "layers"  # mean over sparse layers; or "huggingface": concatenated on length, by stack
    z_loss_coef: NotNegative = 1e-4  # on the logits' normaliser
    label_smoothing: Rate = 0.0
    contrastive_temperature: Positive = 0.05  # of head="embedding": what scores of pairs of texts are divided by
    loss_normalizer: str | Positive = "real_target_tokens"  # or "total_target_tokens", "average_per_sequence", or a constant

    # --- layers and numerics
    tie_word_embeddings: bool = True
    separate_embeddings: bool = False  # encoder and decoder embed with tables of their own, as Hugging Face's untied models do
    relative_attention_num_buckets: Annotated[int, Range(4, largest=2**20)] = 32
    relative_attention_max_distance: Count = 128
    relative_attention_per_layer: bool = False  # a table in every layer, as T5X's scanned checkpoints have
    layer_norm_epsilon: Epsilon = 1e-6
    dropout_rate: Rate = 0.1
    attention_dropout_rate: Rate | None = None  # of attention probabilities; None: dropout_rate
    activation_dropout_rate: Rate | None = None  # inside MLPs; None: dropout_rate
    expert_dropout_rate: Rate | None = None  # inside experts; None: the same as inside MLPs
    zero_padding_activations: bool = True  # flaxformer multiplies the padding mask in before each sublayer; HF does not
    init_scale: Positive = 0.1  # of variance-scaling initialisers (Switch, table 3)
    copying_heads: Natural = 0  # heads of every cross-attention that begin by attending to the token's like in the inputs
    dtype: str = "float32"  # of activations and matrix products; routers, norms, softmax and losses stay float32
    param_dtype: str = "float32"
    # How kernels are held, but the routers': "float" is param_dtype; "int8" or "int4" (`config/weights`) cannot be trained.
    weights: str = "float"
    expert_dtype: str | None = None  # of activations inside the experts; None: dtype
    scan_layers: bool = False  # one compiled block repeated, where the layout repeats
    remat_policy: str = may_change("none")  # "none", "minimal" (save matrix products) or "full"
    # "plain": probabilities [B, H, Q, T] are kept for the backward pass. "fused": nothing has both axes, and logits are computed
    # again. "auto": fused where lengths are long, by platform. Cached decoding, and attention weights that are asked for, are plain
    attention_implementation: str = may_change("auto")

    # --- special tokens
    pad_token_id: Natural = 0
    eos_token_id: Natural = 1
    # further ids that end a sequence in generation; texts are closed with eos_token_id
    extra_eos_token_ids: tuple[Natural, ...] = ()
    decoder_start_token_id: Natural = 0

    # --- what it ends in: see `config/heads`
    head: str = LANGUAGE_MODEL  # or a head for a task: one of HEADS
    labels: tuple[str, ...] = ()  # of a head that tells classes apart, their names
    classifier_dropout: Rate = 0.0  # of what such a head reads, in training

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("sparse_layout", self.sparse_layout, LAYOUTS)
        one_of("router_type", self.router_type, ROUTERS)
        one_of("capacity_mode", self.capacity_mode, ("factor", "fixed", "dropless"))
        one_of("routing_group", self.routing_group, ("sequence", "tokens", "flaxformer"))
        one_of("padding_semantics", self.padding_semantics, ("masked", "scatter"))
        one_of("moe_executor", self.moe_executor, ("auto", *EXECUTORS))
        one_of("router_loss_reduction", self.router_loss_reduction, ("layers", "huggingface"))
        if isinstance(self.loss_normalizer, str):
            one_of("loss_normalizer", self.loss_normalizer, LOSS_NORMALIZERS)
        one_of("remat_policy", self.remat_policy, ("none", "minimal", "full"))
        one_of("attention_implementation", self.attention_implementation, ATTENTION_IMPLEMENTATIONS)
        one_of("weights", self.weights, WEIGHTS)
        for name in ("dtype", "param_dtype", "router_dtype", "expert_dtype"):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), DTYPES)
        check(
            isinstance(self.mlp_activations, tuple) and 1 <= len(self.mlp_activations) <= 2,
            f"mlp_activations must be one name, or two for a gated MLP; it is {self.mlp_activations!r}.",
        )
        widths = {"d_model": self.d_model, "num_heads * d_kv": self.num_heads * self.d_kv, "d_ff": self.d_ff}
        for name, width in {**widths, "expert_d_ff": self.expert_width}.items():
            check(
                self.weights != "int4" or width % GROUP == 0,
                f"weights='int4' needs a multiple of {GROUP}, which share a scale, as {name}; it is {width}. Take 'int8'.",
            )
        for name in self.mlp_activations:
            one_of("mlp_activations", name, ACTIVATIONS)
        check(
            not (self.separate_embeddings and self.tie_word_embeddings),
            "separate_embeddings gives encoder and decoder tables of their own, so none is left to tie the head to; set "
            "tie_word_embeddings=False.",
        )
        self._check_architecture()
        check_head(self)
        for stack in self.stacks:
            self._check_stack(stack)
        if self.is_sparse:
            self._check_routing()
        check(self.copying_heads <= self.num_heads, f"copying_heads must be at most {self.num_heads}; it is {self.copying_heads}.")
        check(
            self.relative_attention_num_buckets % 2 == 0,
            f"relative_attention_num_buckets must be even; it is {self.relative_attention_num_buckets}.",
        )
        check(
            self.relative_attention_max_distance > self.relative_attention_num_buckets // 2,
            f"relative_attention_max_distance ({self.relative_attention_max_distance}) must be larger than half the number of "
            f"buckets ({self.relative_attention_num_buckets}).",
        )
        outside = f"is outside the vocabulary of {self.vocab_size}."
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            check(getattr(self, name) < self.vocab_size, f"{name}={getattr(self, name)} {outside}")
        for token in self.extra_eos_token_ids:
            check(token < self.vocab_size, f"extra_eos_token_ids holds {token}, which {outside}")

    def _check_architecture(self) -> None:
        """Raises for fields that are another architecture's, or another form of layer's."""
        one_of("architecture", self.architecture, ARCHITECTURES)
        one_of("layer_form", self.layer_form, LAYER_FORMS)
        one_of("positions", self.positions, POSITIONS)
        one_of("norm", self.norm, NORMS)
        one_of("embedding_scale", self.embedding_scale, EMBEDDING_SCALES)

        def only(condition: bool, wanted: str, **neutral: Any) -> None:
            for name, value in neutral.items():
                found = getattr(self, name)
                check(condition or found == value, f"{name}={found!r} is not for {wanted}; set {name}={value!r}.")

        fused = self.layer_form == "fused"
        only(
            self.decoder_only, "architecture='encoder_decoder'",
            layer_form="sequential", bidirectional_inputs=False,
        )  # fmt: skip
        for wanted, other in (("encoder_decoder", "rotary"), ("decoder_only", "sinusoidal")):
            only(self.architecture != wanted or self.positions != other, f"architecture={wanted!r}", positions="relative")
        only(
            not self.decoder_only, "architecture='decoder_only'",
            separate_embeddings=False, copying_heads=0, batch_prioritized_routing=False,
            router_loss_reduction="layers", norm="rms", use_bias=False, embedding_scale="head",
        )  # fmt: skip
        check(
            not self.decoder_only or self.router_type != "experts_choose",
            "router_type='experts_choose' is not for architecture='decoder_only', where a token's experts would depend on later "
            "tokens; set router_type='tokens_choose'.",
        )
        only(
            not fused, "layer_form='fused'",
            extra_mlp=False, shared_expert=False, expert_d_ff=None, expert_dropout_rate=None, weights="float",
        )  # fmt: skip
        for name in self.fused_sparse:
            one_of("fused_sparse", name, PROJECTIONS)
        ordered = tuple(name for name in PROJECTIONS if name in self.fused_sparse)
        check(
            bool(ordered) and self.fused_sparse == ordered,
            f"fused_sparse must name at least one of {', '.join(PROJECTIONS)}, in this order; it is {self.fused_sparse!r}.",
        )
        check(
            not fused or self.d_ff % self.num_heads == 0,
            f"layer_form='fused' gives each head a part of the MLP: num_heads ({self.num_heads}) must divide d_ff ({self.d_ff}).",
        )
        check(
            self.positions != "rotary" or self.d_kv % 2 == 0,
            f"positions='rotary' turns pairs of features, so d_kv must be even; it is {self.d_kv}.",
        )
        check(
            self.positions != "sinusoidal" or (self.d_model % 2 == 0 and self.d_model > 2),
            f"positions='sinusoidal' has a sine and a cosine of several frequencies, so d_model must be even and more than 2; it "
            f"is {self.d_model}.",
        )

    def _check_stack(self, stack: StackConfig) -> None:
        n, sparse = stack.num_layers, stack.sparse_layers
        check(
            list(sparse) == sorted(set(sparse)) and all(0 <= i < n for i in sparse),
            f"{stack.name}_sparse_layers must be ascending layer indices below {n}; it is {sparse!r}.",
        )
        check(
            not self.scan_layers or stack.block_size is not None,
            f"scan_layers repeats one block, but {stack.why_not_blocks}; use sparse_layout='mixed' or scan_layers=False.",
        )

    def _check_routing(self) -> None:
        check(
            self.num_selected_experts <= self.num_experts,
            f"num_selected_experts must lie between 1 and num_experts ({self.num_experts}); it is {self.num_selected_experts}.",
        )
        if self.router_type == "experts_choose":
            check(
                self.capacity_mode != "dropless",
                "router_type='experts_choose' has every expert take a fixed number of tokens, so it cannot be dropless; set "
                "capacity_mode='factor' or 'fixed'.",
            )
            check(
                not self.batch_prioritized_routing,
                "batch_prioritized_routing is for tokens that choose; with router_type='experts_choose' set it to False.",
            )

        learned = dict(num_selected_experts=1, router_bias=False, batch_prioritized_routing=False, router_jitter_noise=0.0)
        for name, value in learned.items():
            check(
                self.learned_router or getattr(self, name) == value,
                f"{name} is about a router that learns; with router_type='hash' set it to {value}.",
            )

    def __repr__(self) -> str:
        """Returns the shortest of the expressions that make it: from the defaults, or from a preset and what differs."""
        from flax_switch.config.presets import PRESETS  # which are made of these configs

        written = [super().__repr__()]
        for name, preset in PRESETS.items():
            changes = ", ".join(f"{field}={value!r}" for field, value in differences(self, preset).items())
            written.append(f"PRESETS[{name!r}]" + (f".replace({changes})" if changes else ""))
        return min(written, key=len)

    def check_trainable(self) -> None:
        """Raises `ConfigError` where the weights are integers, which have no gradients."""
        check(
            self.weights == "float",
            f"A model with {self.weights} weights cannot be trained: integers have no gradients. Train the float model that it was "
            "made of, and quantise what comes out.",
        )

    # --- derived
    @property
    def head_weights(self) -> str:
        """The form of the output head: of a quantised model int8, as logits are the last to be made coarse."""
        return "float" if self.weights == "float" else "int8"

    def attention_weights(self, attention: str, projection: str) -> str:
        """Returns the form of a kernel of an attention, both named as their modules are: some are int8 in an int4 model."""
        kernels = FINE_ALONE if self.decoder_only else FINE
        fine = self.weights == "int4" and projection in kernels.get(attention, ())
        return "int8" if fine else self.weights

    @property
    def copied_head(self) -> bool:
        """Whether the head, though tied, is in memory a parameter of its own: quantised from the embeddings, which stay float."""
        return self.tie_word_embeddings and self.weights != "float" and self.head == LANGUAGE_MODEL

    @property
    def encoder(self) -> StackConfig:
        """The layers of the encoder."""
        return self._stack("encoder")

    @property
    def decoder(self) -> StackConfig:
        """The layers of the decoder."""
        return self._stack("decoder")

    @property
    def decoder_only(self) -> bool:
        """Whether the decoder is all there is."""
        return self.architecture == "decoder_only"

    @property
    def stacks(self) -> tuple[StackConfig, ...]:
        """The encoder and the decoder, or the one of them that the model has."""
        if self.decoder_only:
            return (self.decoder,)
        return (self.encoder, self.decoder) if HEADS[self.head].reads_decoder else (self.encoder,)

    @property
    def routers(self) -> tuple[str, ...]:
        """What the routers of all stacks are called, in order."""
        return tuple(name for stack in self.stacks for name in stack.routers)

    @property
    def embedding_path(self) -> str:
        """Where the token embeddings are among the parameters: in T5X a decoder without an encoder has its own."""
        return "decoder/token_embedder/embedding" if self.decoder_only else "token_embedder/embedding"

    @property
    def has_bias_tables(self) -> bool:
        """Whether attention adds biases by relative position."""
        return self.positions == "relative"

    @property
    def input_scale(self) -> float:
        """What embeddings are multiplied by when they are read."""
        return self.d_model**0.5 if self.embedding_scale == "inputs" else 1.0

    @property
    def head_scale(self) -> float:
        """What states are multiplied by before a tied head."""
        return self.d_model**-0.5 if self.embedding_scale == "head" else 1.0

    @property
    def attention_dropout(self) -> float:
        """The rate of dropout of attention probabilities."""
        return self.dropout_rate if self.attention_dropout_rate is None else self.attention_dropout_rate

    @property
    def activation_dropout(self) -> float:
        """The rate of dropout inside MLPs."""
        return self.dropout_rate if self.activation_dropout_rate is None else self.activation_dropout_rate

    @property
    def expert_dropout(self) -> float:
        """The rate of dropout inside experts."""
        return self.activation_dropout if self.expert_dropout_rate is None else self.expert_dropout_rate

    @property
    def key_heads(self) -> int:
        """Heads of keys and values: in fused layers one, which all queries share (1911.02150)."""
        return 1 if self.layer_form == "fused" else self.num_heads

    def _stack(self, name: str) -> StackConfig:
        n, sparse = getattr(self, f"num_{name}_layers"), getattr(self, f"{name}_sparse_layers")
        if sparse is None:
            sparse = sparse_layers(self.sparse_layout, n, getattr(self, f"num_sparse_{name}_layers"))
        crosses = name == "decoder" and not self.decoder_only
        return StackConfig(name, n, sparse, crosses, self.fused_sparse if self.layer_form == "fused" else ())

    @property
    def learned_router(self) -> bool:
        """Whether routers have parameters."""
        return self.router_type != "hash"

    @property
    def is_sparse(self) -> bool:
        """Whether any layer is sparse."""
        return any(stack.sparse_layers for stack in self.stacks)

    @property
    def expert_width(self) -> int:
        """F of the experts."""
        return self.d_ff if self.expert_d_ff is None else self.expert_d_ff

    @property
    def is_gated(self) -> bool:
        """Whether MLPs multiply two projections."""
        return len(self.mlp_activations) == 2

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any] | Any) -> SwitchConfig:
        """Returns what a config of transformers, or its `config.json` as a dict, describes, with Hugging Face's semantics."""
        from flax_switch.config import huggingface

        return huggingface.from_huggingface(values)

    def to_huggingface(self) -> dict[str, Any]:
        """Returns the inverse of `from_huggingface`; raises `ConfigError` naming the field Hugging Face cannot represent."""
        from flax_switch.config import huggingface

        return huggingface.to_huggingface(self)
