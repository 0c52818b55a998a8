"""Hugging Face's `config.json` as a `SwitchConfig`, and back.

`switch_transformers` is understood; for models without sparse layers the T5 family: `t5` (1.0 and 1.1, FLAN, ByT5), `mt5`, and
`umt5`, in which every layer has its own table of relative positions; and `nllb-moe` (`config/huggingface_nllb`). A config read from
Hugging Face carries Hugging Face's semantics. Those of the first two: a fixed expert capacity per sequence, padding that takes
slots, probabilities in the activations' dtype, losses concatenated on the length axis, no z-loss on the logits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from flax_switch.config import ConfigError, StackConfig, SwitchConfig, check, sparse_layers
from flax_switch.config import huggingface_nllb as nllb
from flax_switch.config.base import check_value
from flax_switch.config.huggingface_heads import head_fields, head_values
from flax_switch.config.ranges import Count, shown

NEVER_DROPS = 2**31 - 1  # an expert_capacity no sequence reaches: how Hugging Face's config says "dropless"

# Fields both sides have: ours, Hugging Face's, and the default transformers gives an absent key.
_COMMON = (
    ("vocab_size", "vocab_size", 32128),
    ("d_kv", "d_kv", 64),
    ("d_ff", "d_ff", 2048),
    ("relative_attention_num_buckets", "relative_attention_num_buckets", 32),
    ("relative_attention_max_distance", "relative_attention_max_distance", 128),
    ("dropout_rate", "dropout_rate", 0.1),
    ("layer_norm_epsilon", "layer_norm_epsilon", 1e-6),
)
_SWITCH = (
    *_COMMON,
    ("d_model", "d_model", 768),
    ("num_heads", "num_heads", 12),
    ("num_encoder_layers", "num_layers", 12),
    ("num_sparse_encoder_layers", "num_sparse_encoder_layers", 3),
    ("num_sparse_decoder_layers", "num_sparse_decoder_layers", 3),
    ("num_experts", "num_experts", 8),
    ("router_bias", "router_bias", False),
    ("router_jitter_noise", "router_jitter_noise", 0.01),
    ("router_dtype", "router_dtype", "float32"),
    ("router_z_loss_coef", "router_z_loss_coef", 0.001),
    ("load_balancing_loss_coef", "router_aux_loss_coef", 0.001),
)
_T5 = (
    *_COMMON,
    ("d_model", "d_model", 512),
    ("num_heads", "num_heads", 8),
    ("num_encoder_layers", "num_layers", 6),
)
_MT5_DEFAULTS = {"vocab_size": 250112, "d_ff": 1024, "num_heads": 6, "num_layers": 8}
_MT5 = tuple((ours, theirs, _MT5_DEFAULTS.get(theirs, default)) for ours, theirs, default in _T5)
_TABLES = {"switch_transformers": _SWITCH, "t5": _T5, "mt5": _MT5, "umt5": _MT5, nllb.MODEL_TYPE: nllb.TABLE}
T5_FAMILY = ("t5", "mt5", "umt5")  # dense models, whose files have T5's names

# What gives a model its shape, and stands in every file that transformers writes. Where one is absent and there is a key that is
# not known here, that key may be its new name.
_SHAPE = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_experts")
# Keys that transformers writes, now or once, and that change nothing here, or are read apart from the tables.
_OTHER = {
    "model_type", "num_decoder_layers", "expert_capacity", "tie_word_embeddings", "dtype", "torch_dtype", "architectures",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_encoder_decoder", "is_decoder", "use_cache",
    "dense_act_fn", "is_gated_act", "feed_forward_proj", "initializer_factor", "add_router_probs", "add_cross_attention",
    "decoder_sparse_step", "encoder_sparse_step", "is_full_sparse", "router_type", "num_selected_experts",
    "router_ignore_padding_tokens", "transformers_version", "n_positions", "output_past", "task_specific_params",
    "classifier_dropout", "id2label", "label2id", "num_labels", "problem_type", "scale_decoder_outputs",
    "batch_prioritized_routing", "dropout", "gradient_checkpointing",
}  # fmt: skip

# Our settings that reproduce what Hugging Face does for every model.
SEMANTICS: dict[str, Any] = dict(
    capacity_mode="fixed",
    routing_group="sequence",
    ignore_padding_tokens=False,
    zero_padding_activations=False,
    cast_router_probs=True,
    router_loss_reduction="huggingface",
    z_loss_coef=0.0,
    label_smoothing=0.0,
    attention_dropout_rate=None,
    activation_dropout_rate=None,
    expert_dropout_rate=None,
    expert_dtype=None,
)
# Those that matter there alone.
_TRAINING = (
    "router_loss_reduction", "z_loss_coef", "label_smoothing", "attention_dropout_rate", "activation_dropout_rate",
    "expert_dropout_rate",
)  # fmt: skip
# Those of them that change the forward pass of a given model: `to_huggingface` will not drop them in silence.
_FORWARD = ("capacity_mode", "routing_group", "ignore_padding_tokens", "zero_padding_activations")

# What Hugging Face's classes cannot compute, and so a model must not have.
_UNREPRESENTABLE = {
    "num_selected_experts": 1,
    "router_type": "tokens_choose",
    "batch_prioritized_routing": False,
    "normalize_router_weights": False,
    "extra_mlp": False,
    "shared_expert": False,
    "expert_d_ff": None,
    "expert_masking_rate": 0.0,
}
_T5_FORM = {"norm": "rms", "use_bias": False, "embedding_scale": "head", "scale_attention_logits": False}
_ACTIVATION_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}


def from_huggingface(values: Any) -> SwitchConfig:
    """Returns the config that a transformers `config.json` describes, with Hugging Face's semantics.

    Args:
      values: the parsed file, or transformers' config object. `model_type` must be one of those above; unknown keys are ignored, as
        transformers does, and absent ones take transformers' defaults, but not both where the model's shape is concerned. Stale
        keys of released files (`encoder_sparse_step`, `is_full_sparse`, `router_type`, `num_selected_experts`,
        `router_ignore_padding_tokens`) have no effect there and none here.

    Raises:
      ConfigError: for another `model_type`, an activation we lack, `eos_token_id`s that are none, or a size that is absent beside a
        key that is not known.
    """
    values = values.to_dict() if hasattr(values, "to_dict") else values
    check(
        isinstance(values, Mapping),
        f"from_huggingface takes a config of transformers, or its config.json as a dict; this is {type(values).__name__}. A model "
        "or its name is for flax_switch.load_pretrained.",
    )
    check_schema(values)
    model_type = check_model_type(values)
    values = {**nllb.DEFAULTS, **values} if model_type == nllb.MODEL_TYPE else values
    table = _TABLES[model_type]
    _check_keys(values, table)
    fields: dict[str, Any] = {ours: values.get(theirs, default) for ours, theirs, default in table}
    dtype = values.get("dtype", values.get("torch_dtype")) or "float32"
    fields["dtype"] = fields["param_dtype"] = str(dtype).removeprefix("torch.")
    pad = values.get("pad_token_id")
    fields["pad_token_id"] = 0 if pad is None else pad
    fields["eos_token_id"], *more = _ids(values.get("eos_token_id", 1))
    fields["extra_eos_token_ids"] = tuple(more)
    start = values.get("decoder_start_token_id")
    fields["decoder_start_token_id"] = fields["pad_token_id"] if start is None else start
    if model_type == nllb.MODEL_TYPE:
        return SwitchConfig(**{**fields, **nllb.fields_of(values)})
    decoder_layers = values.get("num_decoder_layers")
    # An old file has no num_decoder_layers in T5's case, and an explicit null in Switch's: both mean a symmetric model.
    absent = 12 if model_type == "switch_transformers" and "num_decoder_layers" not in values else fields["num_encoder_layers"]
    fields["num_decoder_layers"] = absent if decoder_layers is None else decoder_layers
    if model_type in T5_FAMILY:
        per_layer = model_type == "umt5"
        fields |= head_fields(values)
        return SwitchConfig(**fields, **_t5_fields(values), relative_attention_per_layer=per_layer, **SEMANTICS)
    tied = is_tied(values)
    capacity = values.get("expert_capacity", 64)
    semantics: dict[str, Any] = dict(SEMANTICS, capacity_mode="dropless" if capacity >= NEVER_DROPS else "fixed")
    return SwitchConfig(
        **fields,
        **semantics,
        expert_capacity=64 if capacity >= NEVER_DROPS else capacity,
        mlp_activations=_switch_activations(values),
        sparse_layout="huggingface",
        tie_word_embeddings=tied,
        separate_embeddings=not tied,
    )


# The types of what is read; those of sizes and rates are `SwitchConfig`'s.
_SCHEMA: dict[str, Any] = {
    "model_type": str, "architectures": list | None, "feed_forward_proj": str, "dense_act_fn": str | None,
    "is_gated_act": bool | None, "expert_capacity": Count, "scale_decoder_outputs": bool, "dtype": str | None,
    "torch_dtype": str | None, "pad_token_id": int | None, "decoder_start_token_id": int | None,
    "num_layers": int, "num_decoder_layers": int | None, "num_experts": int, "classifier_dropout": float,
    "id2label": dict | None, "problem_type": str | None, "num_labels": Count,
}  # fmt: skip


def check_schema(values: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a field of a `config.json` whose value is of another type than it is read as."""
    for name, hint in _SCHEMA.items():
        if name in values:
            check_value(f"config.json: {name}", values[name], hint)


def check_model_type(values: Mapping[str, Any]) -> str:
    """Returns the `model_type` of a `config.json`. Raises `ConfigError` for one that is not read here."""
    model_type = values.get("model_type", "switch_transformers")
    near = difflib.get_close_matches(shown(model_type)[:40].strip("'"), _TABLES, n=1, cutoff=0.4)
    check(
        isinstance(model_type, str) and model_type in _TABLES,
        f"config.json has model_type {shown(model_type)}, another architecture; flax_switch reads 'switch_transformers', "
        f"'nllb-moe' and, without sparse layers, 't5', 'mt5' and 'umt5'.{f' The nearest is {near[0]!r}.' if near else ''}",
    )
    return model_type


def _check_keys(values: Mapping[str, Any], table: tuple[tuple[str, str, Any], ...]) -> None:
    """Refuses a file in which a size may have a new name, rather than take the default for it."""
    read = {theirs for _, theirs, _ in table}
    shape, other = (nllb.SHAPE, _OTHER | nllb.OTHER) if table is nllb.TABLE else (_SHAPE, _OTHER)
    absent = [name for name in shape if name in read and name not in values]
    unknown = sorted(key for key in values if key not in read | other and not key.startswith("_"))
    check(
        not absent or not unknown,
        f"config.json has no {', '.join(absent)}, but keys that are not known here: {', '.join(map(repr, unknown))}. If one is the "
        "new name of the other, take a newer flax_switch (docs/versions.md); else write the size into the file, or remove the key.",
    )


def to_huggingface(config: SwitchConfig) -> dict[str, Any]:
    """Returns the `config.json` of a config: the inverse of `from_huggingface`.

    A model without sparse layers becomes a T5 config, unless it was read from a `switch_transformers` one.

    Raises:
      ConfigError: naming every field that Hugging Face cannot represent. `with_huggingface_semantics` changes those that are a
        matter of behaviour (capacity, groups, padding) and not of the weights.
    """
    problems = _architecture_problems(config)
    if config.is_sparse:
        of_nllb = nllb.is_nllb(config)
        wanted = nllb.SEMANTICS if of_nllb else dict(SEMANTICS, capacity_mode=("fixed", "dropless"))
        for name in nllb.FORWARD if of_nllb else _FORWARD:
            value, allowed = getattr(config, name), wanted[name]
            if value != allowed and value not in (allowed if isinstance(allowed, tuple) else ()):
                problems.append(f"{name}={value!r} (there it is {allowed!r}; see flax_switch.config.huggingface.SEMANTICS)")
    _refuse(problems)
    if nllb.is_nllb(config):
        return _nllb_config(config)
    return _t5_config(config) if _is_dense(config) else _switch_config(config)


def with_huggingface_semantics(config: SwitchConfig) -> tuple[SwitchConfig, dict[str, tuple[Any, Any]]]:
    """Returns the config of the same weights as Hugging Face would run them, and what changed: {field: (before, after)}.

    A dropless config stays dropless. A capacity factor becomes the fixed `expert_capacity` per sequence. A sparse layout is
    written the way Hugging Face counts it.

    Raises:
      ConfigError: naming the fields that no setting can bring over, gated experts or a second choice for instance.
    """
    _refuse(_architecture_problems(config))
    changes = dict(nllb.SEMANTICS if nllb.is_nllb(config) else SEMANTICS)
    if config.capacity_mode == "dropless":
        changes["capacity_mode"] = "dropless"
    changed = {name: (getattr(config, name), new) for name, new in changes.items() if getattr(config, name) != new}
    return config.replace(**changes), changed


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns in lines what `with_huggingface_semantics` changed, what changes outputs apart from what training alone sees."""
    told = {name: f"  {name}: {before!r} here, {after!r} there" for name, (before, after) in changed.items()}
    computed, trained = ([told[name] for name in told if (name in _TRAINING) == training] for training in (False, True))
    lines = ["transformers has no settings for these, so its outputs can differ a little:", *computed] if computed else []
    lines += ["Only training sees these:", *trained] if trained else []
    return "\n".join(lines)


def _architecture_problems(config: SwitchConfig) -> list[str]:
    """Returns one phrase for each field that makes a model Hugging Face's classes cannot compute."""
    problems = []
    if config.decoder_only:
        return ["architecture='decoder_only' (they have an encoder): keep it in the format 'flax_switch', which holds any model"]
    if nllb.is_nllb(config):
        return nllb.problems(config)
    for name, allowed in _T5_FORM.items():
        if getattr(config, name) != allowed:
            problems.append(f"{name}={getattr(config, name)!r} (there it is {allowed!r}, or the model an NLLB-MoE in all)")
    if config.is_sparse:
        if config.is_gated:
            problems.append(f"mlp_activations={config.mlp_activations!r} (its experts are not gated)")
        for name, allowed in _UNREPRESENTABLE.items():
            value = getattr(config, name)
            if value != allowed and not (name == "expert_d_ff" and value == config.d_ff):
                problems.append(f"{name}={value!r} (there it is {allowed!r})")
        for stack in config.stacks:
            if _num_sparse(config, stack) is None:
                explicit = f"{stack.name}_sparse_layers"
                field = explicit if getattr(config, explicit) is not None else "sparse_layout"
                problems.append(f"{field}={getattr(config, field)!r}: the {stack.name}'s sparse layers {stack.sparse_layers}")
    elif _is_dense(config) and _feed_forward_proj(config) is None:
        problems.append(f"mlp_activations={config.mlp_activations!r} (T5 supports one activation, or one with a linear gate)")
    if config.relative_attention_per_layer and not _is_umt5(config):
        problems.append(
            "relative_attention_per_layer=True (there the first layer's table serves all layers, but in UMT5, which has no "
            "sparse layers)"
        )
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("Hugging Face's classes cannot represent " + "; ".join(problems) + ".")


def _is_umt5(config: SwitchConfig) -> bool:
    return config.relative_attention_per_layer and _is_dense(config)


def _is_dense(config: SwitchConfig) -> bool:
    return not config.is_sparse and config.sparse_layout != "huggingface"


def is_tied(values: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` ties the head to the embedding, read as transformers reads it.

    Its T5 takes all but `false` for tied, `null` too; its SwitchTransformers refuses what is neither true nor false. transformers 5
    writes tie_word_embeddings=true into every T5 config and keeps what it meant in scale_decoder_outputs. Its mT5 never scales
    the decoder's output, so that the head is one of its own, whether a file holds it or not. Its UMT5 ties as the file says;
    transformers 5 scales the output where the file says false, too, which T5X and transformers 4 do not, nor is it done here.
    """
    tied = values.get("tie_word_embeddings", True)
    if values.get("model_type") in ("mt5", "umt5"):
        return values["model_type"] == "umt5" and tied is not False
    if values.get("model_type") == nllb.MODEL_TYPE:
        return True
    if values.get("model_type") == "t5":
        return bool(values["scale_decoder_outputs"]) if "scale_decoder_outputs" in values else tied is not False
    check(
        isinstance(tied, bool),
        f"config.json has tie_word_embeddings={shown(tied)}, which transformers refuses for SwitchTransformers; write true or "
        "false.",
    )
    return tied


def _ids(eos: Any) -> list[int]:
    """Returns the ids that end a sequence, of one, a list or none; the first is the one that texts are closed with."""
    if eos is None:
        return [1]
    ids = list(eos) if isinstance(eos, (list, tuple)) else [eos]
    check(
        len(ids) > 0 and all(isinstance(token, int) and not isinstance(token, bool) for token in ids),
        f"config.json has eos_token_id={shown(eos)}; expected an id or a list of ids. Write the id of the end of a sequence, T5's "
        "is 1.",
    )
    return list(dict.fromkeys(ids))


def _activation(name: str) -> str:
    return _ACTIVATION_ALIASES.get(name, name)


def _switch_activations(values: Mapping[str, Any]) -> tuple[str, ...]:
    # Released files carry feed_forward_proj beside dense_act_fn; the oldest have nothing else.
    name = values.get("dense_act_fn") or values.get("feed_forward_proj", "relu").removeprefix("gated-")
    check(
        not name.startswith("gated-"),
        f"dense_act_fn={name!r}: transformers' SwitchTransformers has no gated MLP and refuses this name.",
    )
    return (_activation(name), "linear") if values.get("is_gated_act") else (_activation(name),)


def _t5_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    projection = values.get("feed_forward_proj", "relu" if values.get("model_type") == "t5" else "gated-gelu")
    if projection == "gated-gelu":  # transformers: the tanh approximation, in this one case
        activations = ("gelu_new", "linear")
    elif projection.startswith("gated-"):
        activations = (_activation(projection.removeprefix("gated-")), "linear")
    else:
        activations = (_activation(projection),)
    return dict(
        mlp_activations=activations,
        tie_word_embeddings=is_tied(values),
        num_sparse_encoder_layers=0,
        num_sparse_decoder_layers=0,
    )


def _feed_forward_proj(config: SwitchConfig) -> str | None:
    """T5's name of the activations, or None where it has none."""
    first, *gate = config.mlp_activations
    if not gate:
        return first
    if gate != ["linear"] or first == "gelu":  # "gated-gelu" means gelu_new there
        return None
    return "gated-gelu" if first == "gelu_new" else f"gated-{first}"


def _num_sparse(config: SwitchConfig, stack: StackConfig) -> int | None:
    """Returns the number of sparse layers from which Hugging Face builds this stack's, or None where no number does."""
    n, asked = stack.num_layers, getattr(config, f"num_sparse_{stack.name}_layers")
    for m in (asked, *range(n + 2)):
        if sparse_layers("huggingface", n, m) == stack.sparse_layers:
            return m
    return None


def _shared_fields(config: SwitchConfig, table) -> dict[str, Any]:
    return {
        **{theirs: getattr(config, ours) for ours, theirs, _ in table},
        "num_decoder_layers": config.num_decoder_layers,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": [config.eos_token_id, *config.extra_eos_token_ids] if config.extra_eos_token_ids else config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.param_dtype,
        "is_encoder_decoder": True,
        "use_cache": True,
    }


def _nllb_config(config: SwitchConfig) -> dict[str, Any]:
    return {
        **{name: value for name, value in _shared_fields(config, nllb.TABLE).items() if name != "num_decoder_layers"},
        **nllb.to_values(config),
        "model_type": nllb.MODEL_TYPE,
        "architectures": [nllb.CLASS],
    }


def _switch_config(config: SwitchConfig) -> dict[str, Any]:
    return {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        **_shared_fields(config, _SWITCH),
        "num_sparse_encoder_layers": _num_sparse(config, config.encoder),
        "num_sparse_decoder_layers": _num_sparse(config, config.decoder),
        "expert_capacity": NEVER_DROPS if config.capacity_mode == "dropless" else config.expert_capacity,
        "dense_act_fn": config.mlp_activations[0],
        "router_ignore_padding_tokens": False,
    }


def _t5_config(config: SwitchConfig) -> dict[str, Any]:
    return {
        "model_type": "umt5" if _is_umt5(config) else "t5",
        "architectures": ["UMT5ForConditionalGeneration" if _is_umt5(config) else "T5ForConditionalGeneration"],
        **_shared_fields(config, _T5),
        "feed_forward_proj": _feed_forward_proj(config),
        "is_gated_act": config.is_gated,
        "dense_act_fn": config.mlp_activations[0],
        **head_values(config),
    }
