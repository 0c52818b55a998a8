"""Adapters of random numbers."""

import numpy as np

from flax_switch.config.adapter import AdapterConfig
from flax_switch.convert.adapter import fingerprint, shapes, uniform
from flax_switch.convert.tensors import from_array
from flax_switch.pretrained.saving import unscanned


def drawn(model, seed, **settings):
    """An adapter of random numbers for a model."""
    config, rng = AdapterConfig(**{"rank": 4, "alpha": 8.0, "router": True, **settings}), np.random.default_rng(seed)
    arrays = {path: rng.normal(size=shape).astype(np.float32) * 0.15 for path, shape in shapes(model.config, config).items()}
    arrays = {path: np.abs(x) * 8 if path.endswith("magnitude") else x for path, x in arrays.items()}
    tensors = {path: from_array(x) for path, x in arrays.items()}
    known = fingerprint(unscanned(model.config, model.params), model.config.embedding_path)
    return uniform(config, tensors, "its base", known)
