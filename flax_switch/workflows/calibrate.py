"""A model rounded to four bits by texts like those that it will be given."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_switch.config import check, one_of
from flax_switch.convert.checkpoint import FORMATS, companion_files, open_checkpoint, source_identity, with_dtype, write_checkpoint
from flax_switch.convert.folder import claimed, local_destination
from flax_switch.convert.quantize import with_weights
from flax_switch.pretrained.calibration import calibrated
from flax_switch.pretrained.loading import from_checkpoint


def convert_calibrated(
    source: str | Path,
    destination: str | Path,
    texts: Sequence[str],
    *,
    to: str,
    changes: Mapping[str, Any],
    dtype: str | None = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    verify: bool = True,
    **writing: Any,
) -> Path:
    """Converts a float model to int4 as `flax_switch.quantize` does with `calibration=texts`; the float model is in memory.

    changes: with "weights", which must be "int4". writing: `max_shard_size`, `overwrite`, `on_bytes` and `on_open`; these and the
    other arguments are `convert`'s, as is what is raised.
    """
    one_of("to", to, FORMATS)
    changes = dict(changes)
    weights = changes.pop("weights", "float")
    check(weights == "int4", f"Calibration is for weights='int4', of which rounding takes the most, not for {weights!r}.")
    with claimed(destination := local_destination(destination)):
        opened = open_checkpoint(source, changes=changes, allow_missing=allow_missing, revision=revision, verify=verify)
        config, tensors = with_weights(opened.config, opened.tensors, weights)
        model = from_checkpoint(dataclasses.replace(opened, config=opened.config.replace(scan_layers=False)))
        made = dataclasses.replace(opened, config=config, tensors=calibrated(model, config, tensors, texts))
        made = made if dtype is None else with_dtype(made, dtype)
        identity = [source_identity(opened.path), list(texts)]
        return write_checkpoint(made, destination, to=to, files=companion_files(opened.path), source=identity, **writing)
