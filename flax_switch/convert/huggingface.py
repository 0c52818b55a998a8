"""Hugging Face checkpoint folders: the table of names, and reading them.

Read are safetensors, torch's .bin and flax_model.msgpack, one file or shards with an index, written by transformers 4 or 5, of
`SwitchTransformers...`, `NllbMoe...` and, for models without sparse layers, of `T5...`, `MT5...` and `UMT5...`. Written is what
transformers 5 writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.config import huggingface as config_huggingface
from flax_switch.config.heads import HEADS, LANGUAGE_MODEL, head_of
from flax_switch.config.huggingface import T5_FAMILY
from flax_switch.config.huggingface_nllb import MODEL_TYPE as NLLB
from flax_switch.convert import huggingface_nllb as nllb
from flax_switch.convert.canonical import TASK_HEADS, architecture_of, canonical_shapes
from flax_switch.convert.doors import check_counts, config_of
from flax_switch.convert.flax_msgpack import pytorch_name, read_flax_msgpack
from flax_switch.convert.folder import read_folder
from flax_switch.convert.mapping import TRANSPOSE, Rule, to_canonical, to_foreign
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.tensors import CheckpointError, LazyTensor, same_bits
from flax_switch.host import json_text

_ATTENTIONS = {
    "encoder/layers_{i}/attention": "encoder.block.{i}.layer.0.SelfAttention",
    "decoder/layers_{i}/self_attention": "decoder.block.{i}.layer.0.SelfAttention",
    "decoder/layers_{i}/encoder_decoder_attention": "decoder.block.{i}.layer.1.EncDecAttention",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MLPS = {"encoder/layers_{i}": "encoder.block.{i}.layer.1", "decoder/layers_{i}": "decoder.block.{i}.layer.2"}

# What T5 and SwitchTransformers name alike.
_COMMON_RULES = (
    Rule("token_embedder/embedding", "shared.weight"),
    Rule("{stack}/token_embedder/embedding", "{stack}.embed_tokens.weight"),
    Rule("decoder/logits_dense/kernel", "lm_head.weight", TRANSPOSE),
    Rule("encoder/encoder_norm/scale", "encoder.final_layer_norm.weight"),
    Rule("decoder/decoder_norm/scale", "decoder.final_layer_norm.weight"),
    Rule(
        "{stack}/relpos_bias/rel_embedding",
        "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        TRANSPOSE,
    ),
    *(
        Rule(f"{ours}/{name}/kernel", f"{theirs}.{letter}.weight", TRANSPOSE)
        for ours, theirs in _ATTENTIONS.items()
        for name, letter in _PROJECTIONS.items()
    ),
    Rule("encoder/layers_{i}/pre_attention_layer_norm/scale", "encoder.block.{i}.layer.0.layer_norm.weight"),
    Rule("decoder/layers_{i}/pre_self_attention_layer_norm/scale", "decoder.block.{i}.layer.0.layer_norm.weight"),
    Rule("decoder/layers_{i}/pre_cross_attention_layer_norm/scale", "decoder.block.{i}.layer.1.layer_norm.weight"),
    *(Rule(f"{ours}/pre_mlp_layer_norm/scale", f"{theirs}.layer_norm.weight") for ours, theirs in _MLPS.items()),
)

# The heads of tasks, which only the T5 family has there.
_HEAD_RULES = tuple(
    rule
    for name in ("classification_head/dense", "classification_head/out_proj", "classifier", "qa_outputs")
    for rule in (
        Rule(f"{name}/kernel", f"{name.replace('/', '.')}.weight", TRANSPOSE),
        Rule(f"{name}/bias", f"{name.replace('/', '.')}.bias"),
    )
)
_PREFIX = "transformer."  # before the names of the rest, where the head is for sequences or tokens

SWITCH_RULES = (
    *_COMMON_RULES,
    *(
        rule
        for ours, theirs in _MLPS.items()
        for rule in (
            Rule(f"{ours}/mlp/{{w}}/kernel", f"{theirs}.mlp.{{w}}.weight", TRANSPOSE),
            Rule(f"{ours}/mlp/expert/{{w}}/kernel", f"{theirs}.mlp.experts.expert_{{e}}.{{w}}.weight", TRANSPOSE),
            Rule(f"{ours}/mlp/router/router_weights/w/kernel", f"{theirs}.mlp.router.classifier.weight", TRANSPOSE),
            Rule(f"{ours}/mlp/router/router_weights/w/bias", f"{theirs}.mlp.router.classifier.bias"),
        )
    ),
)

T5_RULES = (
    *_COMMON_RULES,
    *_HEAD_RULES,
    *(Rule(f"{ours}/mlp/{{w}}/kernel", f"{theirs}.DenseReluDense.{{w}}.weight", TRANSPOSE) for ours, theirs in _MLPS.items()),
    Rule(
        "{stack}/layers_{i}/relpos_bias/rel_embedding",
        "{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
        TRANSPOSE,
    ),
)

_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The first is in T5 1.0's files; transformers has ignored it since there were two implementations.
_NEVER_USED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", *nllb.NEVER_USED)

_CLASSES = {
    "switch_transformers": {
        "full": "SwitchTransformersForConditionalGeneration",
        "headless": "SwitchTransformersModel",
        "encoder": "SwitchTransformersEncoderModel",
        "embedding": "SwitchTransformersEncoderModel",
    },
    NLLB: nllb.CLASSES,
    **{
        kind: {
            **dict(full=f"{name}ForConditionalGeneration", headless=f"{name}Model", encoder=f"{name}EncoderModel"),
            **{head: f"{name}{about.huggingface}" for head, about in HEADS.items() if head != LANGUAGE_MODEL},
        }
        for kind, name in zip(T5_FAMILY, ("T5", "MT5", "UMT5"), strict=True)
    },
}


def rules_for(model_type: str) -> tuple[Rule, ...]:
    """Returns the table of `switch_transformers`, of `nllb-moe` or of the T5 family."""
    if model_type == NLLB:
        return nllb.RULES
    return T5_RULES if model_type in T5_FAMILY else SWITCH_RULES


def prefix_of(model_type: str, architecture: str) -> str:
    """Returns what `nllb-moe` has before all names of a whole model but that of its head, which is tied; nothing for others."""
    return nllb.PREFIX if model_type == NLLB and architecture == "full" else ""


def class_name(model_type: str, architecture: str) -> str:
    """Returns the transformers class that holds an architecture. Raises `ConfigError` where there is none."""
    check(
        architecture in _CLASSES[model_type],
        f"transformers has no {'NllbMoe' if model_type == NLLB else 'SwitchTransformers'} with a head for {architecture}; keep the "
        "model in the format 'flax_switch', which holds any.",
    )
    return _CLASSES[model_type][architecture]


def read_huggingface(folder: Path, *, allow_missing: Sequence[str] = ()) -> tuple[SwitchConfig, str, dict[str, LazyTensor], dict]:
    """Reads a folder's config, architecture ("full", "headless" or "encoder"), canonical tensors and raw config.json."""
    values = read_json(folder / "config.json")
    with config_of(folder / "config.json"):
        config_huggingface.check_schema(values)
        config_huggingface.check_model_type(values)
    tensors = read_tensors(folder, derived=derived_names(values))
    check_counts(values, tensors, folder / "config.json")
    with config_of(folder / "config.json"):
        config = SwitchConfig.from_huggingface(values)
    try:
        return *assemble(config, values, tensors, allow_missing=allow_missing), values
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def assemble(
    config: SwitchConfig, values: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, allow_missing: Sequence[str] = ()
) -> tuple[SwitchConfig, str, dict[str, LazyTensor]]:
    """Returns the config, architecture and canonical tensors that a config.json, read as `config`, and its tensors are."""
    prefix = nllb.PREFIX if values.get("model_type") == NLLB else _PREFIX
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    architecture = find_architecture(config, values, tensors)
    config, tensors = settle_embeddings(config, values, architecture, tensors)
    rules = rules_for(values.get("model_type", "switch_transformers"))
    return config, architecture, to_canonical(tensors, rules, canonical_shapes(config, architecture), allow_missing=allow_missing)


def derived_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names the tensors that a config.json makes copies of shared.weight: no file need hold them."""
    tied = config_huggingface.is_tied(values)
    prefix = nllb.PREFIX if values.get("model_type") == NLLB else _PREFIX
    copies = _EMBEDDING_COPIES if tied or values.get("model_type") in T5_FAMILY else ()
    copies = (*copies, "lm_head.weight") if tied else copies
    return (*copies, *(f"{prefix}{name}" for name in copies))


def read_tensors(folder: Path, derived: Collection[str] = ()) -> dict[str, LazyTensor]:
    """All tensors of the folder's weights, whichever form they are in; safetensors come first. For `derived`, see
    `read_folder`.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin"), ("flax_model", "msgpack")):
        if any((folder / f"{stem}.{suffix}{index}").exists() for index in ("", ".index.json")):
            if suffix == "safetensors":
                return read_folder(folder, stem, read_safetensors, suffix, derived)
            if suffix == "msgpack":
                return read_folder(folder, stem, read_flax_msgpack, suffix, derived, lambda name: pytorch_name(name)[0])
            from flax_switch.convert.torch_bin import read_torch_bin  # torch is needed for .bin files alone

            return read_folder(folder, stem, read_torch_bin, suffix, derived)
    raise CheckpointError(
        f"{folder} has a config.json but no weights: expected model.safetensors, pytorch_model.bin or flax_model.msgpack, or "
        "an index of shards."
    )


def read_json(path: Path) -> dict:
    """Returns a JSON object from a file; a CheckpointError if it is none."""
    try:
        return json_text.read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def find_architecture(config: SwitchConfig, values: Mapping, tensors: Mapping[str, LazyTensor]) -> str:
    """Returns which of the models a folder holds: by the class it names, or by having no decoder."""
    if config.head != LANGUAGE_MODEL:
        return architecture_of(config)
    named = (values.get("architectures") or [""])[0]
    for classes in _CLASSES.values():
        for architecture, name in classes.items():
            if name == named:
                return architecture
    return "full" if any(name.startswith("decoder.") for name in tensors) else "encoder"


def settle_embeddings(
    config: SwitchConfig, values: Mapping, architecture: str, tensors: Mapping[str, LazyTensor]
) -> tuple[SwitchConfig, dict[str, LazyTensor]]:
    """Decides how many embedding tables there are, which only the file can tell, and drops copies and unused tensors.

    Tied models hold one table; old files repeat it under other names, which is checked. Untied SwitchTransformers hold four
    (shared, the encoder's, the decoder's, the head) when transformers 5 wrote them and two (shared, the head) when 4 did. T5
    never has more than two, and an untied T5 without a head computes with the shared table, unscaled.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _NEVER_USED}
    stacks = ("encoder",) if architecture == "encoder" else tuple(stack.name for stack in config.stacks)
    if config.separate_embeddings and not any(f"{stack}.embed_tokens.weight" in tensors for stack in stacks):
        config = config.replace(separate_embeddings=False)
    copies = () if config.separate_embeddings else _EMBEDDING_COPIES
    if config.tie_word_embeddings:
        copies = (*copies, "lm_head.weight")
    for name in copies:
        if name not in tensors:
            continue
        if "shared.weight" in tensors and not same_bits(tensors[name], tensors["shared.weight"]):
            raise CheckpointError(
                f"config.json ties the embeddings, but {name} differs from shared.weight. If the model has embeddings of its "
                'own, set "tie_word_embeddings": false in config.json.'
            )
        tensors.setdefault("shared.weight", tensors[name])
        del tensors[name]
    untied_t5 = values.get("model_type") in T5_FAMILY and architecture == "full" and not config.tie_word_embeddings
    if untied_t5 and "shared.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    return config, tensors


def huggingface_tensors(
    config: SwitchConfig, architecture: str, model_type: str, canonical: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Returns the tensors of a canonical tree under Hugging Face's names.

    An untied SwitchTransformers is written with four tables even where ours are one and a head: transformers 5 would draw
    the encoder's and decoder's at random if they were absent.
    """
    canonical = dict(canonical)
    if model_type == "switch_transformers" and not config.tie_word_embeddings and "token_embedder/embedding" in canonical:
        for stack in ("encoder",) if architecture == "encoder" else ("encoder", "decoder"):
            canonical.setdefault(f"{stack}/token_embedder/embedding", canonical["token_embedder/embedding"])
    foreign = to_foreign(canonical, rules_for(model_type))
    if before := prefix_of(model_type, architecture):
        return {f"{before}{name}": tensor for name, tensor in foreign.items()}
    if head_of(config).huggingface not in ("ForSequenceClassification", "ForTokenClassification"):
        return foreign
    heads = tuple(name.replace("/", ".") for name in TASK_HEADS)
    return {name if name.startswith(heads) else f"{_PREFIX}{name}": tensor for name, tensor in foreign.items()}
