"""Folders of adapters, ours and PEFT's: opened for a model, used, converted, inspected."""

import dataclasses
import functools
import random
from pathlib import Path

import numpy as np

from flax_switch import Pretrained, SwitchTransformer
from flax_switch.config.adapter import AdapterConfig
from flax_switch.convert.adapter import Adapter, shapes, uniform
from flax_switch.convert.adapter_folder import open_adapter, write_adapter
from flax_switch.convert.canonical import unflatten
from flax_switch.convert.tensors import from_array
from flax_switch.inspection.adapter import describe_adapter, render_adapter
from tests.fuzz.case import Reader
from tests.fuzz.readers.models import SMALL, flat


@functools.cache
def _model() -> Pretrained:
    return Pretrained(SMALL, SwitchTransformer(SMALL), unflatten(flat()))


def _adapter() -> Adapter:
    config = AdapterConfig(rank=2, use_dora=True)
    tensors = {path: from_array(np.ones(shape, np.float32)) for path, shape in shapes(SMALL, config).items()}
    return uniform(config, tensors, "base", ())


def _read(folder: Path, rng: random.Random) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        found = describe_adapter(folder)
        assert found is None or (render_adapter(found) and found.to_dict())
    elif kind == 1:
        adapter = open_adapter(folder, SMALL)
        write_adapter(folder.with_name("converted"), adapter, SMALL, format=rng.choice(("peft", "flax_switch")))
    else:
        _model().with_adapter(open_adapter(folder, SMALL))


def _make(format: str, folder: Path) -> None:
    adapter = _adapter()
    path = next(iter(adapter.kernels))
    other = dataclasses.replace(adapter.kernels[path], alphas=(3.0,) * len(adapter.kernels[path].alphas))
    write_adapter(folder, dataclasses.replace(adapter, kernels={**adapter.kernels, path: other}), SMALL, format=format)


READERS = {
    "adapter": Reader(functools.partial(_make, "flax_switch"), _read, warm=True),
    "adapter-settings": Reader(functools.partial(_make, "flax_switch"), _read, ("*.json",), warm=True),
    "adapter-peft": Reader(functools.partial(_make, "peft"), _read, warm=True),
    "adapter-peft-settings": Reader(functools.partial(_make, "peft"), _read, ("*.json",), warm=True),
}
