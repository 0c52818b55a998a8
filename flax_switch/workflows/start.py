"""What fine-tuning starts from: a checkpoint's parameters, laid straight into their shardings, or random ones in its place."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.config.presets import PRESETS
from flax_switch.convert.canonical import architecture_of, flatten, unflatten
from flax_switch.convert.checkpoint import open_checkpoint
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.host.files import expanded
from flax_switch.pretrained import load_pretrained
from flax_switch.training.state import Run, TrainState, init_state, state_shardings

RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint whose headers are read and whose parameters are not yet; `source` is None for random parameters."""

    config: SwitchConfig
    vocabulary: Vocabulary
    source: str | None
    changes: Mapping[str, Any]
    verify: bool = True
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of `load_pretrained`

    def params(self, run: Run) -> Any:
        """Returns parameters in the run's shardings and dtypes; of a checkpoint each process reads what its devices hold.

        Kernels that were asked for in a form of their own (the change "weights") have that. Experts may stay on disk on one device.
        """
        if self.source is None:
            return init_state(run).params
        on_disk, asked = self.loading.get("experts") == "disk", "weights" in self.changes
        check(
            not on_disk or run.mesh.size == 1,
            f"experts='disk' serves one device, and this mesh has {run.mesh.size}. Leave it out, or show the program one.",
        )
        options: dict[str, Any] = dict(
            verify=self.verify, dtype=None if asked else run.config.model.param_dtype, **self.loading, **self.changes
        )
        quantised = run.config.model.weights != "float"
        options.setdefault("kernels", "integers" if quantised else "auto")  # those that a state has
        picked = run.mesh.size == 1 and quantised and options["kernels"] != "integers"
        shardings = None if on_disk or picked else state_shardings(run).params
        loaded = load_pretrained(self.source, shardings=shardings, **options).params
        if asked:
            return loaded
        abstract = flatten(run.abstract_state.params)

        def fitting(path: str, p: Any) -> Any:
            dtype = abstract[path].dtype
            return p if p.dtype == dtype or not jnp.issubdtype(dtype, jnp.floating) else p.astype(dtype)

        return unflatten({path: fitting(path, p) for path, p in flatten(loaded).items()})

    def state(self, run: Run) -> TrainState:
        """Returns the state of step 0."""
        return init_state(run) if self.source is None else init_state(run, self.params(run))


def open_start(
    init: str,
    changes: Mapping[str, Any],
    vocabulary: str | None = None,
    verify: bool = True,
    loading: Mapping[str, Any] | None = None,
) -> Start:
    """Opens what `--init` names.

    Args:
      init: anything `load_pretrained` opens, or "random:" and such a thing or a preset's name: random parameters of that shape.
      changes: fields of the config to change.
      vocabulary: a SentencePiece model or a folder with a vocabulary, in place of the checkpoint's own.
      verify: as for `open_checkpoint`.

    Raises:
      ConfigError: where there is no such checkpoint, it lacks a decoder or head, or no vocabulary is known.
    """
    source = init.removeprefix(RANDOM)
    random = source != init
    found = None
    if random and source in PRESETS:
        config = PRESETS[source].replace(**changes)
    else:
        try:
            opened = open_checkpoint(source, changes=changes, verify=verify)
        except ConfigError as error:
            near = difflib.get_close_matches(source, PRESETS, n=1) if random else []
            hint = f" Did you mean {RANDOM}{near[0]}?" if near else f" (or a preset: {', '.join(PRESETS)})" if random else ""
            raise ConfigError(f"--init {init}: {error}{hint}") from error
        check(
            opened.architecture == architecture_of(opened.config),
            f"--init {init}: text-to-text tasks need a decoder and a head; this checkpoint is {opened.architecture!r}.",
        )
        config = opened.config
        found = load_vocabulary(opened.path) if vocabulary is None else None
    if vocabulary is not None:
        found = read_vocabulary(vocabulary)
    if found is None:
        raise ConfigError(
            f"--init {init} comes without a vocabulary; name one with --vocabulary: a spiece.model, or a folder that has one."
        )
    return Start(config, found, None if random else source, dict(changes), verify, loading or {})


def read_vocabulary(path: str) -> Vocabulary:
    """Reads the vocabulary in a SentencePiece model's file or a folder (a run's, a model's); raises `ConfigError` for none."""
    folder = expanded(path)
    if not folder.is_dir():
        return Vocabulary.from_sentencepiece(path)
    for place in (folder, folder / "vocabulary"):
        found = load_vocabulary(place)
        if found is not None:
            return found
    raise ConfigError(f"--vocabulary {path}: the folder holds no spiece.model, vocabulary.json or tokenizer.json.")
