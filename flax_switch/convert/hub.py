"""Models by their name on the Hugging Face hub, through huggingface_hub, its cache and its offline mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from etils import epath

from flax_switch.config.presets import PRESETS
from flax_switch.convert.tensors import CheckpointError
from flax_switch.host.files import expanded, in_store
from flax_switch.host.swap import set_aside

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SMALL = ("*.json", "spiece.model")


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint: the source itself if it is there (it may be in object storage), else the hub's snapshot
    of the model of that name.

    Only what is needed is fetched: configs, tokenizer, and safetensors, torch files where there are none, or Flax's.

    Raises:
      CheckpointError: if the source is neither, or the hub (or, offline, its cache) does not have it.
      ImportError: without huggingface_hub.
    """
    if in_store(source):
        folder: Any = epath.Path(source)  # with pathlib's interface
        if not folder.exists():
            raise CheckpointError(f"{source} does not exist, or may not be read from here.")
        return folder
    folder = expanded(source)
    if folder.exists():
        return folder
    if set_aside(folder).is_dir():
        raise CheckpointError(
            f"{folder} was being replaced when the conversion was killed. Run that again; the old model is in {set_aside(folder)}."
        )
    name = str(source)
    if name in PRESETS:
        raise CheckpointError(
            f"{name!r} is a preset: a shape without weights. fs.init_params(fs.PRESETS[{name!r}], key) makes parameters for it, "
            f"--init random:{name} begins fine-tuning with fresh ones. To load trained ones, name a folder, or a model on the hub "
            "with its owner, such as 'google/switch-base-8'."
        )
    if isinstance(source, Path) or not _NAME.fullmatch(name):
        raise CheckpointError(f"{source} does not exist, and is no name of a model on the Hugging Face hub (owner/model).")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here. If it is a model on the Hugging Face hub, install pip install 'flax_switch[hub]'."
        ) from error
    try:
        for weights in ("*.safetensors", "*.bin", "*.msgpack"):
            snapshot = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_SMALL, weights]))
            if any(snapshot.glob(weights)):
                break
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no folder here, and the Hugging Face hub (or, offline, its local cache) does not have it: {reason}"
        ) from error
    return snapshot
