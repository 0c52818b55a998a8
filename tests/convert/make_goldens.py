"""Writes goldens/: what the packages installed here write that we read. Run it once with each supported version of them.

orbax-VERSION.json                  the tree's metadata of a small checkpoint
KIND.transformers-VERSION.json      the config and the tensors' names and shapes of a small model, switch_transformers and t5
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"
TREE = {"token_embedder": {"embedding": (6, 4)}, "decoder": {"layers_0": {"mlp": {"wi": {"kernel": (4, 8)}}}}}
SIZES = dict(vocab_size=11, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=2, num_decoder_layers=2)
SPARSE = dict(num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)


def write(name: str, package: str, value: object) -> None:
    """One golden, named by the package's version."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}-{importlib.metadata.version(package)}.json"
    file.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(file.name)


def orbax_metadata() -> dict:
    """What Orbax writes beside the arrays of `TREE`."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(lambda shape: np.zeros(shape, np.float32), TREE, is_leaf=lambda leaf: isinstance(leaf, tuple))
    with tempfile.TemporaryDirectory() as folder, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(folder) / "params", arrays)
        return json.loads((Path(folder) / "params" / "_METADATA").read_text())


def huggingface(kind: str) -> dict:
    """The config.json of a small model, and its tensors' shapes by name."""
    import transformers

    model_class = {
        "switch_transformers": transformers.SwitchTransformersForConditionalGeneration,
        "t5": transformers.T5ForConditionalGeneration,
    }[kind]
    config = model_class.config_class(**SIZES, **(SPARSE if kind == "switch_transformers" else {}), decoder_start_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        model = model_class(config)
        model.save_pretrained(folder)
        from safetensors import safe_open

        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {"config": json.loads((Path(folder) / "config.json").read_text()), "tensors": shapes}


def main() -> None:
    write("orbax", "orbax-checkpoint", orbax_metadata())
    if importlib.util.find_spec("transformers"):
        for kind in ("switch_transformers", "t5"):
            write(f"{kind}.transformers", "transformers", huggingface(kind))


if __name__ == "__main__":
    main()
