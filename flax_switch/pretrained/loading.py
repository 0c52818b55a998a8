"""Models from any format, placed on devices as they are read."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from flax_switch.config import SwitchConfig, check, one_of
from flax_switch.config.weights import KERNELS, SCALE
from flax_switch.convert import checkpoint as checkpoints
from flax_switch.convert import live, tokenizer
from flax_switch.convert.adapter import Adapter
from flax_switch.convert.canonical import canonical_shapes, flatten, unflatten
from flax_switch.convert.quantize import as_floats, in_dtype, quantized, with_copied_head, with_weights
from flax_switch.convert.scan import stack_layers
from flax_switch.convert.tensors import DTYPES, LazyTensor, dtype_name, from_array
from flax_switch.generation.defaults import defaults_of, read_defaults, read_prefixes
from flax_switch.nn.heads import build_model
from flax_switch.nn.init import init_params, logical_axes
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.kernels.on_disk import OnDisk
from flax_switch.ops.kernels.quantized import faster_as_floats
from flax_switch.parallel.mesh import tree_shardings
from flax_switch.pretrained.adapter import adapter_of, mesh_of
from flax_switch.pretrained.calibration import Calibration, calibrated
from flax_switch.pretrained.model import Pretrained
from flax_switch.pretrained.on_disk import Files, expert_budget, expert_files, leave_on_disk, narrow
from flax_switch.pretrained.saving import unscanned

if TYPE_CHECKING:
    from flax_switch.data.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Shardings = Callable[[str], Sharding | None] | Mapping[str, Any]


def load_pretrained(
    path: str | Path | Any,
    *,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    seed: int = 0,
    verify: bool = True,
    experts: str = "memory",
    expert_memory: str | int | None = None,
    kernels: str = "auto",
    adapter: str | Path | None = None,
    **changes: Any,
) -> Pretrained:
    """Loads a model from a Hugging Face folder or hub name, a T5X checkpoint, a training run or a folder of our own.

    Tensors are read one at a time, and each process reads only the blocks its devices hold.

    Args:
      path: a folder, a name on the hub such as "google/switch-base-8" (extra `hub`), or a model of transformers itself.
      shardings: where parameters go: a function from their path ("encoder/layers_0/...", or the scanned path) to a sharding or
        None, or a tree of shardings. By default the default device.
      mesh: instead of shardings: lay parameters out over this mesh by the library's rules.
      dtype: of the parameters, such as "bfloat16" or jnp.bfloat16; None keeps each tensor's. Routers keep theirs.
      allow_missing: patterns of tensors that may be missing; they are freshly initialised (with `seed`).
      verify: of a training run take the newest checkpoint whose parameters have their checksums; without, the newest.
      experts: "disk" leaves experts in their safetensors files, and reads those that are hit: see docs/offload.md.
      expert_memory: how much memory experts on disk may take, such as "4GB" (the default) or a number of bytes.
      kernels: how quantised ones are held in memory: "integers"; "floats", as float32 with the numbers that the integers mean; or
        "auto", each as it is multiplied faster here: see docs/quantisation.md.
      adapter: a folder with an adapter for the model, which is put in use: see docs/lora.md. What does not fit is found before
        weights are read.
      changes: fields of the config to change, such as scan_layers=True or dropout_rate=0.0. head="classification" with
        labels=["negative", "positive"] gives a model without such a head a new one: see docs/heads.md. weights="int8" or "int4"
        quantises a
        float checkpoint while it is read, and a float dtype there is that of kernels alone: see docs/quantisation.md.

    Raises:
      CheckpointError: naming what is wrong with the checkpoint.
      ConfigError: if a change does not fit the parameters.
    """
    placed: dict[str, Any] = dict(shardings=shardings, mesh=mesh, dtype=dtype, seed=seed, kernels=kernels)
    budget = expert_budget(experts, expert_memory)
    if live.is_live(path):
        check(budget is None, "experts='disk' reads experts from files; this model is in memory already.")
        config, architecture, tensors = live.read_live(path, allow_missing=allow_missing)
        weights = changes.pop("weights", None)
        of_head = checkpoints.taken_head(changes)
        config, architecture, tensors = checkpoints.with_head(config, architecture, tensors, of_head, type(path).__name__)
        config = checkpoints.changed(config, architecture, tensors, changes, type(path).__name__)
        config, tensors = (config, tensors) if weights is None else with_weights(config, tensors, weights)
        defaults = defaults_of(live.generation_values(path), f"{type(path).__name__}.generation_config")
        built = _built(config, architecture, tensors, None, defaults, **placed)
        return built if adapter is None else built.with_adapter(adapter)
    check(
        isinstance(path, (str, os.PathLike)),
        f"load_pretrained takes a folder, a model's name on the hub, or a model of transformers, not a {type(path).__name__}. "
        "For a config of ours fs.init_params(config, key) makes parameters.",
    )
    if budget is not None:
        changes = {"scan_layers": False, **changes}
    opened = checkpoints.open_checkpoint(path, changes=changes, allow_missing=allow_missing, revision=revision, verify=verify)
    added = None if adapter is None else adapter_of(adapter, opened, verify=verify)
    return from_checkpoint(opened, experts=experts, expert_memory=expert_memory, adapter=added, **placed)


def from_checkpoint(
    opened: checkpoints.Checkpoint,
    *,
    experts: str = "memory",
    expert_memory: str | int | None = None,
    adapter: Adapter | None = None,
    **placed: Any,
) -> Pretrained:
    """Returns the model of a checkpoint that is open; parameters of its config that it lacks are freshly initialised with `seed`.

    Arguments are those of `load_pretrained`: `shardings`, `mesh`, `dtype`, `seed`, `kernels`, `experts` and `expert_memory`.
    adapter: one that is open, to be put in use.
    """
    budget = expert_budget(experts, expert_memory)
    on_disk = None if budget is None else (expert_files(opened), budget)
    vocabulary, defaults = tokenizer.load_vocabulary(opened.path), read_defaults(opened.path)
    built = _built(opened.config, opened.architecture, opened.tensors, vocabulary, defaults, on_disk=on_disk, **placed)
    built = built.replace(prefixes=read_prefixes(opened.path))
    return built if adapter is None else built.with_adapter(adapter)


def _built(
    config: SwitchConfig,
    architecture: str,
    tensors: Mapping[str, LazyTensor],
    vocabulary: Vocabulary | None,
    defaults: Mapping[str, Any],
    *,
    shardings: Shardings | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    seed: int = 0,
    kernels: str = "auto",
    on_disk: tuple[Files, int] | None = None,
) -> Pretrained:
    check(
        on_disk is None or (mesh is None and shardings is None),
        "experts='disk' serves one device; shardings and a mesh lay experts out over several. Leave one of the two out.",
    )
    if dtype is not None:
        dtype = dtype_name(dtype)
        one_of("dtype", dtype, tuple(DTYPES))
        config, tensors = config.replace(param_dtype=dtype), in_dtype(tensors, dtype)
    model = build_model(config, architecture)
    left: dict[str, OnDisk] = {}
    held = functools.partial(as_floats, picked=_floats(config, kernels, alone=mesh is None and shardings is None))
    tensors = held(tensors)
    if on_disk is not None:
        tensors, left = leave_on_disk(config, architecture, tensors, *on_disk)
    missing = canonical_shapes(config, architecture).keys() - tensors.keys() - left.keys()
    tensors = {**tensors, **_fresh(model, missing, seed)}
    if config.copied_head and architecture == "full":
        tensors = held(with_copied_head(config, tensors))
    _log_held(tensors)
    if config.scan_layers:
        tensors = stack_layers(tensors, config)
    place = _placement(shardings, mesh, model, tensors)
    arrays = {name: _to_device(tensor, place(name)) for name, tensor in tensors.items()}
    params = unflatten({**(arrays if on_disk is None else narrow(arrays)), **left})
    return Pretrained(config, model, params, vocabulary, architecture, defaults)


def _floats(config: SwitchConfig, kernels: str, *, alone: bool) -> Callable[[Sequence[int]], bool]:
    """Returns what says of the shape of a quantised kernel whether it is held as floats. alone: whether on one device."""
    one_of("kernels", kernels, KERNELS)
    check(
        kernels == "auto" or config.weights != "float",
        f"kernels={kernels!r} says how int8 or int4 kernels are held, and this model's are floats. Give weights='int8' with it, or "
        "leave it out.",
    )
    check(
        kernels != "floats" or alone,
        "kernels='floats' is for one device; shardings and a mesh lay integers out over several. Leave one of the two out.",
    )
    if kernels == "auto" and alone:
        return faster_as_floats
    return lambda shape: kernels == "floats"


def _log_held(tensors: Mapping[str, LazyTensor]) -> None:
    """Logs how quantised kernels are held, where some are floats."""
    values = [tensors[path.removesuffix(SCALE)] for path in tensors if path.endswith(SCALE)]
    floats = [tensor for tensor in values if tensor.dtype in DTYPES.values()]
    if floats:
        size = sum(tensor.nbytes for tensor in floats) / 2**20
        log.info(
            "%d of %d quantised kernels are held as float32 (%.1f MiB), with which products are faster here; kernels='integers' "
            "holds them as they are stored.", len(floats), len(values), size,
        )  # fmt: skip


def quantize(pretrained: Pretrained, weights: str, *, kernels: str = "auto", calibration: Calibration | None = None) -> Pretrained:
    """Returns a model with its kernels rounded to integers with scales, or to a float dtype; the given one stays as it is.

    Embeddings, norms, biases and routers keep their dtype. To load a model so without ever holding its floats, give
    `load_pretrained` the same `weights`. See docs/quantisation.md.

    Args:
      weights: "int8" (a scale for each output channel), "int4" (one for every 64 inputs, too), "bfloat16" or "float16".
      kernels: how those of integers are held, as for `load_pretrained`.
      calibration: for "int4", some hundred texts like those that the model will be given, which it answers greedily; or dicts of
        its arguments, such as ids and labels. Weights are then rounded to lose the least on them (GPTQ).

    Raises:
      ConfigError: for another name, a model quantised already, sizes that "int4" does not divide, a calibration for another form.
      CheckpointError: for a weight that is no finite number.
    """
    check(
        calibration is None or weights == "int4",
        f"calibration is for weights='int4', of which rounding takes the most; with weights={weights!r} leave it out.",
    )
    config, tensors = with_weights(pretrained.config, unscanned(pretrained.config, pretrained.params), weights)
    if calibration is not None:
        tensors = calibrated(pretrained, config, tensors, calibration)
    return built_of(pretrained, config, tensors, kernels=kernels)


def built_of(pretrained: Pretrained, config: SwitchConfig, tensors: Mapping[str, LazyTensor], kernels: str = "auto") -> Pretrained:
    """Returns a model that differs from another, which lies where it does, in its config and canonical tensors."""
    settings = (pretrained.vocabulary, pretrained.generation_defaults)
    built = _built(config, pretrained.architecture, tensors, *settings, mesh=mesh_of(pretrained.params), kernels=kernels)
    return built.replace(prefixes=pretrained.prefixes)


def _fresh(model: SwitchEncoder, paths: set[str], seed: int) -> dict[str, LazyTensor]:
    """Returns freshly initialised parameters for paths a checkpoint lacks; nothing else of the model is computed."""
    if not paths:
        return {}
    unscanned = model.clone(config=model.config.replace(scan_layers=False, weights="float"))
    pick = jax.jit(lambda rng: {path: leaf for path, leaf in flatten(init_params(unscanned, rng)).items() if path in paths})
    return quantized(model.config, {path: from_array(leaf) for path, leaf in pick(jax.random.key(seed)).items()})


def _placement(
    shardings: Shardings | None, mesh: Mesh | None, model: SwitchEncoder, tensors: Mapping[str, LazyTensor]
) -> Callable[[str], Sharding | None]:
    check(shardings is None or mesh is None, "Give shardings or a mesh, not both.")
    if mesh is not None:
        axes = flatten(logical_axes(model))
        shardings = tree_shardings({path: axes[path] for path in tensors}, dict(tensors), mesh)
    if shardings is None:
        return lambda path: None
    if callable(shardings):
        return shardings
    flat = flatten(dict(shardings))
    lacking = sorted(tensors.keys() - flat.keys())
    check(not lacking, f"the tree of shardings lacks {', '.join(lacking[:5])}.")
    return flat.__getitem__


def _to_device(tensor: LazyTensor, sharding: Sharding | None) -> Array:
    if sharding is None:
        return jnp.asarray(tensor.numpy())

    @functools.cache  # devices that hold the same block share one read
    def block(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return tensor.read(tuple(itertools.starmap(slice, bounds)))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX passes none for no array
        return block(tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in zip(index, tensor.shape, strict=True)))

    return jax.make_array_from_callback(tensor.shape, sharding, read)
