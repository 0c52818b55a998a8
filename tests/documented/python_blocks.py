"""Runs the Python blocks of a page one after the other, with what its text speaks of as given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from documented.finding import python_blocks
from documented.running import World


def _tokens() -> dict[str, Any]:
    import numpy as np

    ids = np.random.default_rng(0).integers(3, 200, (2, 9))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, :5]}


def _training() -> dict[str, Any]:
    import jax

    tokens = _tokens()
    rngs = {name: jax.random.key(seed) for seed, name in enumerate(("dropout", "jitter"))}
    return {**tokens, "batch": tokens, "rngs": rngs, "jax": jax}


def _pairs() -> dict[str, Any]:
    from flax_switch.config import DataConfig
    from flax_switch.data import Vocabulary
    from flax_switch.data.pairs import Pairs

    questions, answers = [f"What is {n} and {n}?" for n in range(60)], [f"It is {2 * n}." for n in range(60)]
    vocabulary = Vocabulary.train([*questions, *answers], 40)
    config = DataConfig(inputs_length=32, targets_length=16, batch_size=4)
    held_out = Pairs.encode(questions[:6], answers[:6], vocabulary, config)
    return {"questions": questions, "answers": answers, "vocabulary": vocabulary, "config": config, "held_out_pairs": held_out}


def _settings() -> dict[str, Any]:
    from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig

    return {"FinetuneDataConfig": FinetuneDataConfig, "TaskConfig": TaskConfig}


def _compiled() -> dict[str, Any]:
    import jax

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    values = jax.ShapeDtypeStruct((8, 4), "float32", sharding=sharded)
    return {"compiled": jax.jit(lambda x: x.sum(0)).lower(values).compile()}


# Page -> what its text has defined before its code. README stands for itself, and so do pages that are not named.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/coming_from_transformers.md": _training,
    "docs/data.md": _pairs,
    "docs/finetuning.md": _settings,
    "docs/generation.md": _tokens,
    "docs/parallelism.md": _compiled,
}
PAGES = list(dict.fromkeys(block.where.split(":")[0] for block in python_blocks()))


def run_page(page: str, world: World, folder: Path) -> dict[str, Any]:
    """Executes a page's blocks in a folder that has what they name; returns the names that they leave."""
    blocks = [block for block in python_blocks() if block.where.split(":")[0] == page]
    world.provide(folder, "\n".join(block.text for block in blocks))
    names: dict[str, Any] = GIVEN.get(page, dict)()
    with contextlib.chdir(folder):
        for block in blocks:
            exec(compile(block.text, block.where, "exec"), names)
    return names
