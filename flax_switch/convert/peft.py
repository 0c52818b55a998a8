"""PEFT's folder of a LoRA adapter, read and written: adapter_config.json and adapter_model.safetensors.

Its tensors have the names of transformers' modules: `base_model.model.MODULE.lora_A.weight` [r, D], `lora_B.weight` [F, r] and, of
DoRA, `lora_magnitude_vector` [F]. Each expert is a module there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.config import huggingface as config_huggingface
from flax_switch.config.adapter import AdapterConfig
from flax_switch.config.ranges import shown
from flax_switch.convert.adapter import Adapter, Ranks, refuse
from flax_switch.convert.canonical import canonical_shapes, is_expert
from flax_switch.convert.huggingface import prefix_of, rules_for
from flax_switch.convert.mapping import rule_of
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.tensors import CheckpointError, Index, LazyTensor, abstract, stack, take, transpose
from flax_switch.host.json_text import field, read_json

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_COPY = ".base_layer.weight"  # of a head that has an adapter: what the model itself has, which PEFT saves, too
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
# Settings that make another function of the same tensors, and the values that do not.
_PLAIN = {
    "bias": ("none", None), "lora_bias": (False, None), "fan_in_fan_out": (False, None), "use_qalora": (False, None),
    "use_bdlora": (None, False), "modules_to_save": (None, []), "layer_replication": (None, []),
    "trainable_token_indices": (None, []), "alora_invocation_tokens": (None, []), "arrow_config": (None,),
    "megatron_config": (None,), "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the model, too
}  # fmt: skip


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns what an adapter_config.json says; raises `CheckpointError` for what is no LoRA, or one that computes otherwise."""
    values, where = read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE)
    kind = field(values, "peft_type", str, where, "")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {shown(kind)}; adapters that can be read are 'LORA'.")
    for name, value in values.items():
        if name in _PLAIN and value not in _PLAIN[name]:
            raise CheckpointError(
                f"{where}: {name}={shown(value)} cannot be followed; it must be {_PLAIN[name][0]!r}. Merge the adapter with PEFT, "
                "and load the model that comes out."
            )
    return values


def adapter_config(folder: Path) -> AdapterConfig:
    """Returns the settings of the adapter in a folder, as far as we have them."""
    values, where = read_settings(folder), str(folder / CONFIG_FILE)
    try:
        return AdapterConfig(
            rank=field(values, "r", int, where),
            alpha=field(values, "lora_alpha", (int, float), where),
            targets=_named(values, where),
            dropout=field(values, "lora_dropout", (int, float), where, 0.0),
            use_rslora=field(values, "use_rslora", bool, where, False),
            use_dora=field(values, "use_dora", bool, where, False),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def _named(values: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
    """Returns what has an adapter: modules, and parameters by their own names, which are a module's and ".weight"."""
    named = field(values, "target_modules", (str, list, type(None)), where, None) or []
    parameters = field(values, "target_parameters", (list, type(None)), where, None) or []
    if isinstance(named, str) and not parameters:
        return re.escape(named)
    names = [named] if isinstance(named, str) else [*named]
    return tuple(re.escape(str(name).removesuffix(".weight")) for name in [*names, *parameters]) or "all"


def read_peft(folder: Path, config: SwitchConfig, architecture: str) -> Adapter:
    """Reads the adapter in a folder for a model; raises `CheckpointError` that names what the model has no place for."""
    settings, values = adapter_config(folder), read_settings(folder)
    found = modules(read_tensors(folder), folder)
    base = base_of(folder)
    alpha_of = _alphas(values, settings, folder)
    tensors: dict[str, LazyTensor] = {}
    kernels: dict[str, Ranks] = {}
    wrong: list[str] = []
    for path, names in module_names(config, architecture).items():
        if not any(name in found for name in names):
            continue
        shape = canonical_shapes(config.replace(weights="float"), architecture)[path][-2:]
        members = [found.pop(name, None) for name in names]
        bad = {name: _wrong(one, shape, settings) for name, one in zip(names, members, strict=True)}
        wrong += [f"{name}: {what}" for name, what in bad.items() if what]
        if not wrong:
            ranks = tuple(0 if one is None else one["a"].shape[0] for one in members)
            kernels[path] = Ranks(ranks, tuple(map(alpha_of, names)))
            tensors |= _stacked(path, members, shape, max(ranks))
    refuse(folder, base, list(found), wrong)
    return Adapter(settings, tensors, kernels, base)


def base_of(folder: Path) -> str:
    """Returns the name of the model that the adapter in a folder was trained on, where it is said."""
    where = str(folder / CONFIG_FILE)
    return field(read_settings(folder), "base_model_name_or_path", (str, type(None)), where, None) or ""


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Returns the tensors in a folder, by PEFT's names."""
    path = folder / f"{STEM}.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds an {CONFIG_FILE} and no {path.name}. Save it anew with PEFT: of an older form it is a .bin."
        )
    return read_safetensors(path)


def modules(tensors: Mapping[str, LazyTensor], where: object) -> dict[str, dict[str, LazyTensor]]:
    """Returns the tensors by module and part; raises `CheckpointError` for names that are none of LoRA's."""
    found: dict[str, dict[str, LazyTensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        if name.endswith(_COPY):
            continue
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            strange.append(name)
        else:
            found.setdefault(match[1], {})[_PARTS[match[2]]] = tensor
    refuse(where, "", strange, [])
    return found


def module_names(config: SwitchConfig, architecture: str) -> dict[str, list[str]]:
    """Returns transformers' modules that each of a model's kernels is; of experts one each. Raises where it has no such model."""
    config = config_huggingface.with_huggingface_semantics(config.replace(weights="float"))[0]
    model_type = config.to_huggingface()["model_type"]
    rules, before = rules_for(model_type), prefix_of(model_type, architecture)
    shapes = {path: shape for path, shape in canonical_shapes(config, architecture).items() if path.endswith("/kernel")}
    names = {path: rule_of(path, rules).to_foreign(path, abstract(shape)) for path, shape in shapes.items()}
    return {path: [f"{before}{name.removesuffix('.weight')}" for name in foreign] for path, foreign in names.items()}


def _alphas(values: Mapping[str, Any], settings: AdapterConfig, folder: Path) -> Any:
    """Returns the function that says the alpha of a module."""
    where = str(folder / CONFIG_FILE)
    pattern = field(values, "alpha_pattern", (dict, type(None)), where, None) or {}
    try:
        compiled = [(re.compile(rf"(.*\.)?({key})"), float(alpha)) for key, alpha in pattern.items()]
    except (re.error, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: alpha_pattern must be numbers by regular expression ({error}).") from error
    return lambda name: next((alpha for key, alpha in compiled if key.fullmatch(name)), settings.alpha)


def _wrong(parts: Mapping[str, LazyTensor] | None, shape: Sequence[int], settings: AdapterConfig) -> str:
    """Says what is wrong with a module's tensors, where something is."""
    if parts is None:
        return ""
    needed = {"a", "b", "magnitude"} if settings.use_dora else {"a", "b"}
    if parts.keys() != needed:
        return f"has {', '.join(sorted(parts))} where {', '.join(sorted(needed))} are wanted"
    D, F = shape
    a, b = parts["a"].shape, parts["b"].shape
    if a[1:] != (D,) or b != (F, a[0]):
        return f"lora_A {list(a)} and lora_B {list(b)} are for another kernel than [{F}, {D}]"
    return f"lora_magnitude_vector has not {F} numbers" if settings.use_dora and parts["magnitude"].shape != (F,) else ""


def _stacked(
    path: str, members: Sequence[Mapping[str, LazyTensor] | None], shape: Sequence[int], rank: int
) -> dict[str, LazyTensor]:
    """Returns the parts of a kernel, or of all experts: those of smaller rank, or of none, are filled up with zeros."""
    D, F = shape
    sizes = {"a": (D, rank), "b": (rank, F), "magnitude": (F,)}
    first = next(one for one in members if one is not None)
    result = {}
    for name, tensor in first.items():
        parts = [_filled(None if one is None else transpose(one[name]), sizes[name], tensor.dtype) for one in members]
        result[f"{path}/{name}"] = stack(parts) if is_expert(path) else parts[0]
    return result


def _filled(tensor: LazyTensor | None, shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
    if tensor is not None and tensor.shape == shape:
        return tensor

    def read(index: Index) -> np.ndarray:
        out = np.zeros(shape, dtype)
        if tensor is not None:
            out[tuple(slice(0, size) for size in tensor.shape)] = tensor.numpy()
        return out[index]

    return LazyTensor(shape, dtype, read)


def peft_tensors(adapter: Adapter, config: SwitchConfig) -> tuple[dict[str, LazyTensor], bytes]:
    """Returns an adapter's tensors by PEFT's names, and the text of its adapter_config.json."""
    every = module_names(config, "full")
    tensors: dict[str, LazyTensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, found in adapter.kernels.items():
        check(path in every, f"PEFT has no name for the adapter of {path}.")
        for e, (name, rank) in enumerate(zip(every[path], found.ranks, strict=True)):
            if rank == 0:
                continue
            ranks[name], alphas[name] = rank, found.alphas[e]
            for foreign, part in _PARTS.items():
                tensor = adapter.tensors.get(f"{path}/{part}")
                if tensor is not None:
                    tensor = take(tensor, e) if is_expert(path) else tensor
                    tensors[f"{_PREFIX}{name}.{foreign}"] = transpose(_cut(tensor, part, rank))
    text = json.dumps(_settings(adapter, ranks, alphas, [name for names in every.values() for name in names]), indent=2)
    return tensors, f"{text}\n".encode()


def _cut(tensor: LazyTensor, part: str, rank: int) -> LazyTensor:
    """Returns a part without the ranks that it was filled up by."""
    if part == "magnitude":
        return tensor
    shape = (tensor.shape[0], rank) if part == "a" else (rank, tensor.shape[1])
    return LazyTensor(shape, tensor.dtype, tensor.read)


def _settings(adapter: Adapter, ranks: Mapping[str, int], alphas: Mapping[str, float], every: Iterable[str]) -> dict[str, Any]:
    config = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base or None,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": _targets(ranks, every),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: _number(alpha) for name, alpha in alphas.items() if alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _targets(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """Returns the modules as PEFT's target_modules: by the last part of their names where all modules that have it are meant."""
    by_end: dict[str, set[str]] = {}
    for name in every:
        by_end.setdefault(name.rpartition(".")[2], set()).add(name)
    chosen = set(chosen)
    whole = {end for end, names in by_end.items() if names <= chosen}
    return [*sorted(whole), *sorted(name for name in chosen if name.rpartition(".")[2] not in whole)]
