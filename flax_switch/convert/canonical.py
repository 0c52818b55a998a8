"""The canonical parameter tree of a config: T5X's paths and their shapes, computed without building the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from flax_switch.config import StackConfig, SwitchConfig
from flax_switch.config.heads import HEADS, LANGUAGE_MODEL, head_shapes
from flax_switch.config.weights import SCALE, stored

HEAD = "decoder/logits_dense/kernel"
# With the head of a language model; without; the encoder alone; and with the head of each task.
ARCHITECTURES = ("full", "headless", "encoder", *(name for name in HEADS if name != LANGUAGE_MODEL))
TASK_HEADS = ("classification_head/", "classifier/", "qa_outputs/")  # where their parameters are


def canonical_shapes(config: SwitchConfig, architecture: str = "full") -> dict[str, tuple[int, ...]]:
    """Returns every parameter of the unscanned model by its path, with its shape.

    Axes: V vocabulary, D model, H heads, K head, F MLP, E experts. A quantised model's kernels have the shapes of their values, and
    scales beside them (`config/weights.py`). `architecture` is one of `ARCHITECTURES`; a model with tied
    embeddings has no head of its own, so "full" and "headless" hold the same tensors then. With the head of a task (`config.head`)
    it says nothing: the config does.
    """
    V, D = config.vocab_size, config.d_model
    shapes: dict[str, tuple[int, ...]] = {config.embedding_path: (V, D)}
    for view in config.stacks[:1] if architecture == "encoder" else config.stacks:
        stack = view.name
        if config.separate_embeddings:
            shapes[f"{stack}/token_embedder/embedding"] = (V, D)
        table = (config.num_heads, config.relative_attention_num_buckets)
        if config.has_bias_tables and not config.relative_attention_per_layer:
            shapes[f"{stack}/relpos_bias/rel_embedding"] = table
        for i in range(view.num_layers):
            layer = f"{stack}/layers_{i}"
            if config.has_bias_tables and config.relative_attention_per_layer:
                shapes[f"{layer}/relpos_bias/rel_embedding"] = table
            for name, shape in layer_shapes(config, view, sparse=i in view.sparse_layers).items():
                shapes[f"{layer}/{name}"] = shape
        shapes |= _norm(config, f"{stack}/{stack}_norm")
    if config.head != LANGUAGE_MODEL:
        shapes |= head_shapes(config)
    elif architecture == "full" and not config.tie_word_embeddings:
        shapes[HEAD] = (D, V)
    return _as_stored(shapes, config)


def architecture_of(config: SwitchConfig) -> str:
    """Returns which of `ARCHITECTURES` a whole model of this config is."""
    return "full" if config.head == LANGUAGE_MODEL else config.head


def _as_stored(shapes: dict[str, tuple[int, ...]], config: SwitchConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what stands in for the kernels of a quantised model."""
    result: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        weights = weights_of(path, config)
        if weights == "float":
            result[path] = shape
        else:
            result[path], result[path + SCALE] = stored(shape, weights)[:2]
    return result


def weights_of(path: str, config: SwitchConfig) -> str:
    """Returns the form that a parameter has in a model: one of `config.weights.WEIGHTS`."""
    if not is_kernel(path):
        return "float"
    if path == HEAD:
        return config.head_weights
    return config.attention_weights(*path.split("/")[-3:-1])


def is_kernel(path: str) -> bool:
    """Returns whether a path is a kernel that may be quantised: any but those of tasks' heads, which are small, and of
    routers, which are sensitive (2101.03961).
    """
    return path.endswith("/kernel") and not is_router(path) and not path.startswith(TASK_HEADS)


def parameters_of(path: str, shape: Sequence[int], dtype: object) -> int:
    """Returns how many parameters of the model an array holds: two in each byte of int4, none in scales."""
    return 0 if path.endswith(SCALE) else math.prod(shape) * (2 if str(dtype) == "uint8" else 1)


def layer_shapes(config: SwitchConfig, stack: StackConfig, *, sparse: bool) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of one layer, its relative position table apart."""
    D, HK, E = config.d_model, config.num_heads * config.d_kv, config.num_experts
    shapes: dict[str, tuple[int, ...]] = {}
    if config.layer_form == "fused":
        return _fused(config, sparse)
    attentions = {"attention": "pre_attention_layer_norm"}
    if stack.causal:
        attentions = {"self_attention": "pre_self_attention_layer_norm" if config.layer_form == "sequential" else "layer_norm"}
    if stack.attends_to_source:
        attentions["encoder_decoder_attention"] = "pre_cross_attention_layer_norm"
    for attention, norm in attentions.items():
        shapes |= _norm(config, norm)
        for name in ("query", "key", "value"):
            shapes |= _projection(config, f"{attention}/{name}", D, HK)
        shapes |= _projection(config, f"{attention}/out", HK, D)
    if config.layer_form == "sequential":
        shapes |= _norm(config, "pre_mlp_layer_norm")
    if not sparse:
        shapes |= _mlp(config, "mlp", config.d_ff)
        return shapes
    shapes |= _router(config, "mlp", (D,))
    shapes |= {name: (E, *shape) for name, shape in _mlp(config, "mlp/expert", config.expert_width).items()}
    if config.shared_expert:
        shapes |= _mlp(config, "mlp/shared_expert", config.expert_width)
    if config.extra_mlp:
        shapes |= _norm(config, "pre_extra_mlp_layer_norm")
        shapes |= _mlp(config, "extra_mlp", config.d_ff)
    return shapes


def _fused(config: SwitchConfig, sparse: bool) -> dict[str, tuple[int, ...]]:
    """Returns the parameters of a fused layer; in each kernel a head's features of attention come before those of the MLP."""
    D, H, K, part = config.d_model, config.num_heads, config.d_kv, config.d_ff // config.num_heads
    kernels = {
        "q_wi": (D, H, K + len(config.mlp_activations) * part),
        "kv": (D, 1, 2 * K),
        "o_wo": (H, K + part, D),
    }
    shapes: dict[str, tuple[int, ...]] = {"layer_norm/scale": (D,)}
    for name, shape in kernels.items():
        if sparse and name in config.fused_sparse:
            shapes |= _router(config, f"{name}_fused", shape[: 2 if name == "o_wo" else 1])
            shapes[f"{name}_fused/expert/kernel"] = (config.num_experts, *shape)
        else:
            shapes[f"{name}_fused/kernel"] = shape
    return shapes


def _router(config: SwitchConfig, prefix: str, features: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.learned_router:
        shapes[f"{prefix}/router/router_weights/w/kernel"] = (*features, config.num_experts)
    if config.router_bias:
        shapes[f"{prefix}/router/router_weights/w/bias"] = (config.num_experts,)
    return shapes


def _mlp(config: SwitchConfig, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    D = config.d_model
    inputs = ("wi_0", "wi_1") if config.is_gated else ("wi",)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in inputs:
        shapes |= _projection(config, f"{prefix}/{name}", D, width)
    return {**shapes, **_projection(config, f"{prefix}/wo", width, D)}


def _projection(config: SwitchConfig, path: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}/kernel": (inputs, outputs), **({f"{path}/bias": (outputs,)} if config.use_bias else {})}


def _norm(config: SwitchConfig, path: str) -> dict[str, tuple[int, ...]]:
    parts = ("scale", "bias") if config.norm == "layer" else ("scale",)
    return {f"{path}/{part}": (config.d_model,) for part in parts}


KINDS = (  # what a parameter is of -> the paths; the first that matches
    ("embeddings and head", r"(.*/)?token_embedder/.*|decoder/logits_dense/.*"),
    ("attention", r".*attention/.*"),
    ("relative positions", r".*relpos_bias/.*"),
    ("norms", r".*norm/.*"),
    ("routers", r".*/router/.*"),
    ("experts", r".*/expert/.*"),
    ("fused projections", r".*_fused/.*"),
    ("dense MLPs", r".*"),
)


def kind_of(path: str) -> str:
    """Returns which of the `KINDS` a parameter is."""
    return next(kind for kind, pattern in KINDS if re.fullmatch(pattern, path))


def is_router(path: str) -> bool:
    """Returns whether a path belongs to a router."""
    return "/router/" in path


def is_expert(path: str) -> bool:
    """Returns whether a path is a stack of experts."""
    return "/expert/" in path


def flatten(tree: dict, prefix: str = "") -> dict:
    """Returns a nested dict as a flat one with '/' in its keys; a flat one stays as it is."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: dict) -> dict:
    """Returns the inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
