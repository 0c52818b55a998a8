"""T5X checkpoint folders: reading, and working out the config, which they do not hold.

`checkpoint_<step>/checkpoint` is msgpack. A leaf of its tree is an array, or a tensorstore spec that points to a zarr folder
beside it. Sparse and dense models, scanned and not, in float32 and bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import SwitchConfig, check, sparse_layers
from flax_switch.config.model import PROJECTIONS
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.doors import check_folder
from flax_switch.convert.mapping import SAME_NAMES, to_canonical
from flax_switch.convert.scan import unstack_layers
from flax_switch.convert.tensors import CheckpointError, LazyTensor, from_array, join_axes
from flax_switch.convert.zarr import key_value_store, open_array

_KVSTORES = ("file", "gfile", "gcs")
_WHOLE_BLOCK = re.compile(r"(encoder|decoder)/\1/(?!subblock_)(.+)")


def find_checkpoint(folder: Path) -> Path | None:
    """Returns the msgpack file of a checkpoint folder, or of the latest `checkpoint_<step>` in a folder of several."""
    if (folder / "checkpoint").is_file():
        return folder / "checkpoint"
    steps = {int(path.name.removeprefix("checkpoint_")): path for path in folder.glob("checkpoint_*") if path.name[11:].isdigit()}
    return steps[max(steps)] / "checkpoint" if steps and (steps[max(steps)] / "checkpoint").is_file() else None


def read_t5x(
    folder: Path, *, changes: Mapping[str, Any] | None = None, allow_missing: Sequence[str] = ()
) -> tuple[SwitchConfig, str, dict[str, LazyTensor]]:
    """Returns a folder's config, architecture (T5X saves whole models: "full") and canonical tensors.

    Args:
      changes: fields of the config that shapes cannot tell: activations, the number of choices, capacities...
      allow_missing: patterns of paths that may be missing or left over.

    Raises:
      CheckpointError: if the file is corrupt, a spec points outside the folder, or the tree is no T5 or Switch Transformer.
    """
    file = find_checkpoint(folder)
    if file is None:
        raise CheckpointError(f"{folder} holds no T5X checkpoint: there is no file 'checkpoint' in it or in checkpoint_<step>.")
    check_folder(file.parent, below=True)
    target = read_target(file)
    tensors = {path: _joined_heads(path, tensor) for path, tensor in unscanned(target).items()}
    config = infer_config(tensors).replace(**(changes or {}))
    try:
        return config, "full", to_canonical(tensors, SAME_NAMES, canonical_shapes(config), allow_missing=allow_missing)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_target(file: Path) -> dict[str, LazyTensor]:
    """Returns the parameters of a checkpoint, by their path as it is written there, each read when asked for."""
    import flax.serialization
    import msgpack

    try:
        contents = flax.serialization.msgpack_restore(file.read_bytes())
    except (ValueError, msgpack.UnpackException, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is no T5X checkpoint, or is truncated: {error or type(error).__name__}") from error
    state = contents.get("optimizer", contents) if isinstance(contents, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("target"), dict):
        raise CheckpointError(f"{file} is no T5X checkpoint: it has no tree 'optimizer/target'")
    return {path: _leaf(file, path, value) for path, value in _flatten_leaves(state["target"]).items()}


def _flatten_leaves(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not {"driver", "kvstore"} <= value.keys():
            flat |= _flatten_leaves(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _leaf(file: Path, path: str, value: Any) -> LazyTensor:
    if isinstance(value, Mapping):
        return open_zarr(zarr_folder(file, path, value), path)
    if not hasattr(value, "shape"):
        raise CheckpointError(f"{file}: {path} is neither an array nor a tensorstore spec but {type(value).__name__}")
    return from_array(np.asarray(value))


def zarr_folder(file: Path, path: str, spec: Mapping) -> Path:
    """Returns the folder beside the checkpoint that a spec means, wherever it was when the spec was written.

    Old specs hold `path` beside the kvstore, new ones in it. It is relative to the checkpoint's folder, or the full path at the
    time of writing; of that, the last name counts.
    """
    kvstore = spec["kvstore"]
    if spec["driver"] != "zarr" or not isinstance(kvstore, Mapping) or kvstore.get("driver") not in _KVSTORES:
        raise CheckpointError(
            f"{file}: {path} is stored with driver {spec['driver']!r} on {kvstore!r}; known are zarr on {', '.join(_KVSTORES)}"
        )
    where = kvstore.get("path", spec.get("path"))
    parts = [part for part in where.split("/") if part] if isinstance(where, str) else []
    if not parts or ".." in parts or "\\" in where or "\0" in where:
        raise CheckpointError(f"{file}: {path} points to {where!r}; a tensor's folder lies beside the checkpoint")
    return file.parent / parts[-1]


def open_zarr(folder: Path, path: str) -> LazyTensor:
    """Returns a zarr array as a lazy tensor."""
    if not (folder / ".zarray").is_file():
        raise CheckpointError(f"{path} should be in {folder}, which is no zarr array. Fetch the missing folder.")
    tensor = open_array({"driver": "zarr", "kvstore": key_value_store(folder)}, str(folder))
    if tensor.dtype == np.uint16:
        raise CheckpointError(f"{folder} holds bfloat16 as uint16, as T5X wrote before version 3; save it again with a newer T5X")
    return tensor


def unscanned(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Takes the layers of a tree apart if they are stacked. A scanned block of one layer may lack the name `subblock_0`."""
    return unstack_layers({_WHOLE_BLOCK.sub(r"\1/\1/subblock_0/\2", path): tensor for path, tensor in tensors.items()})


def _joined_heads(path: str, tensor: LazyTensor) -> LazyTensor:
    """Returns attention kernels whose heads have an axis of their own, as the two-axis kernels of the canonical tree."""
    if re.search(r"attention/(query|key|value)/kernel$", path) and len(tensor.shape) == 3:
        return join_axes(tensor, 1)
    if path.endswith("attention/out/kernel") and len(tensor.shape) == 3:
        return join_axes(tensor, 0)
    return tensor


def infer_config(tensors: Mapping[str, LazyTensor]) -> SwitchConfig:
    """Returns the config that an unscanned canonical tree's shapes tell; what they cannot takes T5X's and the presets' values.

    Gated MLPs are taken for (gelu_new, linear), others for relu. Routing is top-1 with the default capacities.
    """
    shapes = {path: tensor.shape for path, tensor in tensors.items()}

    def shape(pattern: str) -> tuple[int, ...] | None:
        return next((shapes[path] for path in shapes if re.fullmatch(pattern, path)), None)

    alone = "decoder/token_embedder/embedding" in shapes and "token_embedder/embedding" not in shapes
    if alone and any("_fused/" in path for path in shapes):
        return SwitchConfig(**infer_fused(tensors), **_layers(shapes, "decoder"))
    first = "decoder/layers_0/self_attention" if alone else "encoder/layers_0/attention"
    path = "decoder/token_embedder/embedding" if alone else "token_embedder/embedding"
    embedding, query = shape(path), shape(f"{first}/query/kernel")
    table = shape(r"(en|de)coder/(layers_0/)?relpos_bias/rel_embedding")
    experts = shape(r"\w+/layers_\d+/mlp/expert/wi(_0)?/kernel")
    width = shape(r"\w+/layers_\d+/(extra_)?mlp/wi(_0)?/kernel") or (experts or ())[1:]
    if embedding is None or query is None or table is None or not width:
        known = ", ".join(sorted(shapes)[:8])
        raise CheckpointError(
            "the checkpoint is no T5 or Switch Transformer encoder-decoder, nor a decoder of such layers with relative positions; "
            f"its tensors begin with {known}"
        )
    gated = any(path.endswith("/wi_0/kernel") for path in shapes)
    fields: dict[str, Any] = dict(
        param_dtype=tensors[path].dtype.name,
        vocab_size=embedding[0],
        d_model=embedding[1],
        num_heads=table[0],
        d_kv=query[1] // table[0],
        d_ff=width[1],
        mlp_activations=("gelu_new", "linear") if gated else ("relu",),
        relative_attention_num_buckets=table[1],
        relative_attention_per_layer=any(re.fullmatch(r"\w+/layers_0/relpos_bias/rel_embedding", path) for path in shapes),
        tie_word_embeddings="decoder/logits_dense/kernel" not in shapes,
        extra_mlp=any("/extra_mlp/" in path for path in shapes),
        shared_expert=any("/mlp/shared_expert/" in path for path in shapes),
        router_bias=any(path.endswith("/router_weights/w/bias") for path in shapes),
        separate_embeddings="encoder/token_embedder/embedding" in shapes,
    )
    if experts is not None:
        fields |= dict(num_experts=experts[0], expert_d_ff=None if experts[2] == fields["d_ff"] else experts[2])
    if alone:
        parallel = "decoder/layers_0/layer_norm/scale" in shapes
        fields |= dict(architecture="decoder_only", layer_form="parallel" if parallel else "sequential")
    for stack in ("decoder",) if alone else ("encoder", "decoder"):
        fields |= _layers(shapes, stack)
    return SwitchConfig(**fields)


def infer_fused(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Returns what the shapes of fused layers tell; gated MLPs are taken for (swish, linear), others for relu.

    Attention's logits are taken for scaled where positions are rotary, which shapes cannot tell either.
    """
    found = {path.removeprefix("decoder/"): tensor.shape for path, tensor in tensors.items()}
    sparse = tuple(p for p in PROJECTIONS if any(f"/{p}_fused/expert/" in path for path in found))
    kernels = {}
    for name in PROJECTIONS:
        pattern = rf"layers_\d+/{name}_fused/(expert/)?kernel"
        path = next((path for path in found if re.fullmatch(pattern, path)), None)
        if path is None or len(found[path]) != 3 + ("/expert/" in path):
            raise CheckpointError(f"the checkpoint has fused layers, but no kernel decoder/layers_0/{name}_fused/kernel [., ., .]")
        kernels[name] = found[path][-3:]
    (V, D), (_, H, inputs), K = found["token_embedder/embedding"], kernels["q_wi"], kernels["kv"][2] // 2
    part = kernels["o_wo"][1] - K
    table = next((shape for path, shape in found.items() if path.endswith("relpos_bias/rel_embedding")), None)
    experts = next((shape[0] for path, shape in found.items() if "/expert/" in path), None)
    fields: dict[str, Any] = dict(
        architecture="decoder_only", layer_form="fused", param_dtype=tensors["decoder/token_embedder/embedding"].dtype.name,
        vocab_size=V, d_model=D, num_heads=H, d_kv=K, d_ff=H * part, positions="rotary" if table is None else "relative",
        scale_attention_logits=table is None,
        mlp_activations=("swish", "linear") if part and (inputs - K) // part == 2 else ("relu",),
        tie_word_embeddings="logits_dense/kernel" not in found,
        router_bias=any(path.endswith("/router_weights/w/bias") for path in found),
    )  # fmt: skip
    if table is not None:
        fields["relative_attention_num_buckets"] = table[1]
        fields["relative_attention_per_layer"] = "layers_0/relpos_bias/rel_embedding" in found
    return fields if experts is None else {**fields, "num_experts": experts, "fused_sparse": sparse}


def _layers(shapes: Mapping[str, tuple[int, ...]], stack: str) -> dict[str, Any]:
    found = [re.match(rf"{stack}/layers_(\d+)/((?:mlp|\w+_fused)/expert/)?", path) for path in shapes]
    layers = {int(match[1]) for match in found if match}
    sparse = tuple(sorted({int(match[1]) for match in found if match and match[2]}))
    n = len(layers)
    check(layers == set(range(n)), f"the {stack}'s layers are numbered {sorted(layers)}; expected 0 to {n - 1}")
    mixed = not sparse or (n % len(sparse) == 0 and sparse == sparse_layers("mixed", n, len(sparse)))
    return {
        f"num_{stack}_layers": n,
        f"num_sparse_{stack}_layers": len(sparse),
        f"{stack}_sparse_layers": None if mixed else sparse,
    }
