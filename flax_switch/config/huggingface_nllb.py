"""transformers' `nllb-moe` (NLLB's mixture of experts, 2207.04672) as fields of a `SwitchConfig`, and back.

What is computed is what fairseq computes: evaluation drops no token, and nothing depends on a sequence's batch mates. Training
is in parts another than in transformers: there is no capacity, balance is judged by sequence and layer, masked outputs of experts
are not made up for (nor are they in fairseq), an MLP's output has the dropout of other sublayers, and no layer is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_switch.config.base import check, check_value
from flax_switch.config.model import SwitchConfig
from flax_switch.config.ranges import Count, Natural, Rate, shown

MODEL_TYPE = "nllb-moe"
CLASS = "NllbMoeForConditionalGeneration"

# Fields both sides have: ours, Hugging Face's, and the default transformers gives an absent key.
TABLE = (
    ("vocab_size", "vocab_size", 128112),
    ("d_model", "d_model", 1024),
    ("d_ff", "encoder_ffn_dim", 4096),
    ("num_heads", "encoder_attention_heads", 16),
    ("num_encoder_layers", "encoder_layers", 12),
    ("num_decoder_layers", "decoder_layers", 12),
    ("num_experts", "num_experts", 128),
    ("dropout_rate", "dropout", 0.1),
    ("attention_dropout_rate", "attention_dropout", 0.1),
    ("activation_dropout_rate", "activation_dropout", 0.0),
    ("router_bias", "router_bias", False),
    ("router_dtype", "router_dtype", "float32"),
    ("batch_prioritized_routing", "batch_prioritized_routing", False),
    ("expert_masking_rate", "moe_token_dropout", 0.2),
    ("load_balancing_loss_coef", "router_aux_loss_coef", 0.001),
)
DEFAULTS = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SHAPE = ("vocab_size", "d_model", "encoder_ffn_dim", "encoder_attention_heads", "encoder_layers", "decoder_layers", "num_experts")
# Keys that are read apart from the table, or that change nothing here.
OTHER = {
    "decoder_ffn_dim", "decoder_attention_heads", "decoder_sparse_step", "encoder_sparse_step", "activation_function",
    "scale_embedding", "second_expert_policy", "normalize_router_prob_before_dropping", "moe_eval_capacity_token_fraction",
    "encoder_layerdrop", "decoder_layerdrop", "init_std", "max_position_embeddings", "output_router_logits", "router_z_loss_coef",
    "num_hidden_layers", "num_attention_heads", "hidden_size", "max_length", "num_beams", "tokenizer_class",
}  # fmt: skip
_SCHEMA: dict[str, Any] = {
    "encoder_layers": int, "decoder_layers": int, "encoder_sparse_step": Natural, "decoder_sparse_step": Natural,
    "encoder_attention_heads": Count, "decoder_attention_heads": Count, "encoder_ffn_dim": Count, "decoder_ffn_dim": Count,
    "d_model": Count, "activation_function": str, "scale_embedding": bool, "router_ignore_padding_tokens": bool,
    "moe_token_dropout": Rate, "moe_eval_capacity_token_fraction": float, "expert_capacity": int | None,
}  # fmt: skip

# What the class computes whatever its config says.
_FIXED: dict[str, Any] = dict(
    num_selected_experts=2,
    normalize_router_weights=True,
    norm="layer",
    use_bias=True,
    positions="sinusoidal",
    scale_attention_logits=True,
    layer_norm_epsilon=1e-5,
)
# Our settings of behaviour that go with it.
SEMANTICS: dict[str, Any] = dict(
    capacity_mode="dropless",
    zero_padding_activations=False,
    z_loss_coef=0.0,
    label_smoothing=0.0,
    expert_dropout_rate=None,
    expert_dtype=None,
)
FORWARD = ("capacity_mode", "zero_padding_activations")
_NONE_OF_ITS = {
    "router_type": "tokens_choose",
    "extra_mlp": False,
    "shared_expert": False,
    "tie_word_embeddings": True,
    "head": "language_model",
}


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json that are not in the table. Raises `ConfigError` that names what is not computed here."""
    for name, hint in _SCHEMA.items():
        if name in values:
            check_value(f"config.json: {name}", values[name], hint)
    heads, d_model = values.get("encoder_attention_heads", 16), values.get("d_model", 1024)
    for ours, theirs, default in (("d_ff", "ffn_dim", 4096), ("num_heads", "attention_heads", 16)):
        both = [values.get(f"{stack}_{theirs}", default) for stack in ("encoder", "decoder")]
        check(
            both[0] == both[1],
            f"config.json has encoder_{theirs}={shown(both[0])} and decoder_{theirs}={shown(both[1])}; flax_switch has one {ours} "
            "for both stacks. Such a model cannot be read.",
        )
    check(d_model % heads == 0, f"config.json has d_model={d_model}, which its {heads} attention heads do not divide.")
    _refuse(values)
    sparse = {
        f"{stack}_sparse_layers": every(values.get(f"{stack}_sparse_step", 4), values.get(f"{stack}_layers", 12))
        for stack in ("encoder", "decoder")
    }
    capacity = values.get("expert_capacity", 64)
    return dict(
        **_FIXED,
        **SEMANTICS,
        **sparse,
        **{f"num_sparse_{name}": len(layers) for name, layers in _counted(sparse)},
        d_kv=d_model // heads,
        mlp_activations=(values.get("activation_function", "relu"),),
        embedding_scale="inputs" if values.get("scale_embedding", True) else "none",
        expert_capacity=64 if capacity is None else capacity,
        # transformers' name means the opposite of what it does: false leaves padding out of routing
        ignore_padding_tokens=not values.get("router_ignore_padding_tokens", False),
    )


def _counted(sparse: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name.replace("_sparse_layers", "_layers"), layers) for name, layers in sparse.items()]


def every(step: int, layers: int) -> tuple[int, ...]:
    """Returns the indices of every `step`-th of so many layers; none for step 0."""
    return tuple(range(step - 1, layers, step)) if step > 0 else ()


def _refuse(values: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for settings with which transformers' outputs are random, or depend on the batch."""
    fraction = values.get("moe_eval_capacity_token_fraction", 1.0)
    check(
        fraction >= 1.0,
        f"config.json has moe_eval_capacity_token_fraction={shown(fraction)}, with which tokens are dropped by what else is in the "
        "batch; flax_switch drops none. Write 1.0, as facebook/nllb-moe-54b has it.",
    )
    policy = values.get("second_expert_policy", "all")
    check(
        policy == "all",
        f"config.json has second_expert_policy={shown(policy)}, which draws the second expert at random, in evaluation too; "
        "flax_switch takes the second best. Write 'all', as facebook/nllb-moe-54b has it.",
    )
    tied = values.get("tie_word_embeddings", True)
    check(
        tied is True, f"config.json has tie_word_embeddings={shown(tied)}; the head of {MODEL_TYPE} is read where it is tied: true."
    )


def is_nllb(config: SwitchConfig) -> bool:
    """Returns whether a config is nearer to this class than to T5's."""
    return config.norm == "layer" or config.positions == "sinusoidal"


def problems(config: SwitchConfig) -> list[str]:
    """Returns one phrase for each field that makes a model which the class cannot compute."""
    wanted = {**_FIXED, **_NONE_OF_ITS}
    if not config.is_sparse:
        wanted = {name: value for name, value in wanted.items() if name not in ("num_selected_experts", "normalize_router_weights")}
    found = [
        f"{name}={getattr(config, name)!r} (there it is {value!r})"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if config.embedding_scale == "head":
        found.append("embedding_scale='head' (there it is 'inputs' or 'none')")
    if config.is_gated:
        found.append(f"mlp_activations={config.mlp_activations!r} (its MLPs are not gated)")
    if config.num_heads * config.d_kv != config.d_model:
        found.append(f"d_kv={config.d_kv} (there it is d_model / num_heads)")
    if config.expert_width != config.d_ff:
        found.append(f"expert_d_ff={config.expert_d_ff} (there it is d_ff)")
    for stack in config.stacks:
        if _step(stack.sparse_layers, stack.num_layers) is None:
            found.append(f"the {stack.name}'s sparse layers {stack.sparse_layers}, which are not every n-th")
    return found


def _step(sparse: tuple[int, ...], layers: int) -> int | None:
    return next((step for step in range(layers + 1) if every(step, layers) == sparse), None)


def to_values(config: SwitchConfig) -> dict[str, Any]:
    """Returns what a `config.json` says beside the table and the special tokens."""
    return {
        "decoder_ffn_dim": config.d_ff,
        "decoder_attention_heads": config.num_heads,
        "encoder_sparse_step": _step(config.encoder.sparse_layers, config.num_encoder_layers),
        "decoder_sparse_step": _step(config.decoder.sparse_layers, config.num_decoder_layers),
        "activation_function": config.mlp_activations[0],
        "activation_dropout": config.activation_dropout,
        "attention_dropout": config.attention_dropout,
        "scale_embedding": config.embedding_scale == "inputs",
        "expert_capacity": config.expert_capacity,
        "router_ignore_padding_tokens": not config.ignore_padding_tokens,
        "moe_eval_capacity_token_fraction": 1.0,
        "second_expert_policy": "all",
        "router_z_loss_coef": config.router_z_loss_coef,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }
