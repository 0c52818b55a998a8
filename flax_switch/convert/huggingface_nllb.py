"""Names of transformers' `nllb-moe`, apart from the prefix `model.` that all but the head have in a whole model."""

from __future__ import annotations

from flax_switch.convert.mapping import SAME, TRANSPOSE, Rule, Transform

PREFIX = "model."
CLASSES = {"full": "NllbMoeForConditionalGeneration", "headless": "NllbMoeModel"}
# Made of the config; older transformers saved them.
NEVER_USED = ("encoder.embed_positions.weights", "decoder.embed_positions.weights")

_LAYERS = {
    "attention": "self_attn", "self_attention": "self_attn", "encoder_decoder_attention": "cross_attention",
    "pre_attention_layer_norm": "self_attn_layer_norm", "pre_self_attention_layer_norm": "self_attn_layer_norm",
    "pre_cross_attention_layer_norm": "cross_attention_layer_norm", "pre_mlp_layer_norm": "ff_layer_norm",
}  # fmt: skip
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_MLP = {"wi": "fc1", "wo": "fc2"}
_KERNEL, _BIAS, _SCALE = ("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME), ("scale", "weight", SAME)


def _both(ours: str, theirs: str, weight: tuple[str, str, Transform]) -> tuple[Rule, Rule]:
    return tuple(Rule(f"{ours}/{name}", f"{theirs}.{other}", transform) for name, other, transform in (weight, _BIAS))  # pyright: ignore[reportReturnType]


def _rules() -> tuple[Rule, ...]:
    rules = [Rule("token_embedder/embedding", "shared.weight")]
    for stack in ("encoder", "decoder"):
        rules += _both(f"{stack}/{stack}_norm", f"{stack}.layer_norm", _SCALE)
        ours, theirs = f"{stack}/layers_{{i}}", f"{stack}.layers.{{i}}"
        for part, other in _LAYERS.items():
            if part.endswith("norm"):
                rules += _both(f"{ours}/{part}", f"{theirs}.{other}", _SCALE)
                continue
            for name, projection in _PROJECTIONS.items():
                rules += _both(f"{ours}/{part}/{name}", f"{theirs}.{other}.{projection}", _KERNEL)
        for name, layer in _MLP.items():
            rules += _both(f"{ours}/mlp/{name}", f"{theirs}.ffn.{layer}", _KERNEL)
            rules += _both(f"{ours}/mlp/expert/{name}", f"{theirs}.ffn.experts.expert_{{e}}.{layer}", _KERNEL)
        rules += _both(f"{ours}/mlp/router/router_weights/w", f"{theirs}.ffn.router.classifier", _KERNEL)
    return tuple(rules)


RULES = _rules()
