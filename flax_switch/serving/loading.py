"""What a server is told to serve: models by name, and adapters of these by names of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.convert.adapter_folder import adapter_format
from flax_switch.convert.checkpoint import open_checkpoint
from flax_switch.pretrained import Pretrained, from_checkpoint
from flax_switch.pretrained.adapter import adapter_of

_NAME = re.compile(r"[\w.:-]{1,100}")


class Asked(NamedTuple):
    """A model to serve, or, where `base` is the name of one, an adapter of it."""

    path: str
    base: str | None = None


def parse_model(text: str) -> tuple[str, str]:
    """Returns the name and the path of NAME=PATH, or of a PATH, whose last part is the name."""
    name, equals, path = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, path = PurePath(text).name or text, text
    check(path, f"{text!r} names no model: give a PATH, or NAME=PATH.")
    check(_NAME.fullmatch(name), f"{shown(name)} is no name to ask for a model by; give one, as in NAME={path}.")
    return name, path


def parse_models(texts: Sequence[str]) -> dict[str, Asked]:
    """Returns what to serve by name: models, and adapters, which are folders with one, or MODEL+PATH with a model's name.

    Raises:
      ConfigError: for two of one name, and an adapter whose model is not named or not known.
    """
    named = [parse_model(text) for text in texts]
    paths = dict(named)
    check(
        len(paths) == len(named),
        f"Two models have one name ({', '.join(name for name, _ in named)}); give names, as in a=PATH b=PATH.",
    )
    bases = {name: _base_of(path, paths) for name, path in paths.items()}
    models = [name for name, base in bases.items() if base is None]
    return {name: _asked(name, path, bases[name], models) for name, path in paths.items()}


def _base_of(path: str, names: Mapping[str, str]) -> str | None:
    """Returns the model that an adapter says it is for, "" where it says none, and None for a model."""
    base, plus, _ = path.partition("+")
    if plus and base in names and not Path(path).exists():
        return base
    return "" if Path(path).is_dir() and adapter_format(Path(path)) is not None else None


def _asked(name: str, path: str, base: str | None, models: Sequence[str]) -> Asked:
    if base is None:
        return Asked(path)
    if not base:
        check(models, f"{path} is an adapter, and no model is served that it can be for; give its model, too: MODEL {name}={path}.")
        check(
            len(models) == 1,
            f"{path} is an adapter of one of several models ({', '.join(models)}); say which: {name}={models[0]}+{path}.",
        )
        return Asked(path, models[0])
    check(base in models, f"{name}={path} is an adapter of {base!r}, which is an adapter itself; give the name of a model.")
    return Asked(path.removeprefix(f"{base}+"), base)


def load(asked: Mapping[str, Asked], *, changes: Mapping[str, Any], verify: bool = True, **options: Any) -> dict[str, Pretrained]:
    """Loads models, each once, and adapters beside them; all that can be refused is, before weights are read.

    Args:
      changes: of the models' configs.
      options: of `from_checkpoint`.

    Raises:
      CheckpointError: for what is no model, and an adapter of another model, by its name.
    """
    opened = {
        name: open_checkpoint(one.path, changes=dict(changes), verify=verify) for name, one in asked.items() if one.base is None
    }
    adapters = {name: {} for name in opened}
    for name, one in asked.items():
        if one.base is not None:
            try:
                adapters[one.base][name] = adapter_of(one.path, opened[one.base], verify=verify)
            except ConfigError as error:
                raise type(error)(f"{name}, for the model {one.base}: {error}") from error
    models = {name: from_checkpoint(checkpoint, **options).with_adapter(adapters[name]) for name, checkpoint in opened.items()}
    return {name: models[one.base or name].use_adapter(name if one.base else None) for name, one in asked.items()}
