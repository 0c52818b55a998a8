"""Recipes from Python files (ml_collections) or gin files, with overrides from the command line: whole configs of any kind.

tiny                            one that comes with the package (flax_switch.config.shipped)
configs/tiny.py                 a file: def get_config() returns to_config_dict(ExperimentConfig(...))
--config.train.steps=500        changes one field
configs/gin/tiny.gin            recipe.base = 'configs/tiny.py' and bindings such as train.steps = 500
--gin.train.steps=500           changes one binding
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from flax_switch.config import ConfigError, check, one_line, shipped
from flax_switch.config.kinds import RECIPES, Recipe, kind_of
from flax_switch.config.ranges import shown
from flax_switch.config.values import parse_assignment

SECTIONS = ("model", "data", "optimizer", "mesh", "train", "distillation", "evaluation", "adapter")  # the last two: fine-tuning's


def to_config_dict(config: Recipe) -> ml_collections.ConfigDict:
    """Returns what a recipe's `get_config` returns: its fields as a ConfigDict, for ml_collections' flags and sweeps."""
    return ml_collections.ConfigDict(config.to_dict(), convert_dict=True)


def from_config_dict(values: ml_collections.ConfigDict) -> Recipe:
    """Returns the validated config; unknown keys raise `ConfigError` with the nearest name."""
    plain = values.to_dict()
    return RECIPES[kind_of(plain)].from_dict(plain)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Returns the config of a recipe, a file or a name such as 'tiny', with overrides like 'train.steps=500' applied in order.

    Recipes inherit with it: `load_recipe("tiny").replace(...)` is the one that comes with the package, changed.
    """
    listed = not isinstance(overrides, (str, Mapping))
    check(listed, f"Overrides are a list of texts, such as ['train.steps=500']; this is a {type(overrides).__name__}.")
    return from_config_dict(override(_config_dict(path), overrides))


def load_gin(paths: Sequence[str | Path], bindings: Iterable[str] = ()) -> Recipe:
    """Returns the config of gin files, by path or name: `recipe.base` names a recipe, bindings of the sections change its fields.

    A relative base is looked for from the working directory, then from the gin file's folder upwards; one of a gin file that comes
    with the package is the package's. Needs the extra `gin`.
    """
    if importlib.util.find_spec("gin") is None:
        raise ConfigError(
            "gin files need gin-config: pip install 'flax_switch[gin]'. The same recipes exist in Python: use --config."
        )
    import gin

    paths = [shipped.find(path, ".gin") for path in paths]
    with gin.unlock_config():
        gin.clear_config()
        sections = _gin_sections()
        try:
            gin.parse_config_files_and_bindings([str(p) for p in paths], list(bindings))
            bound = {name: section() for name, section in sections.items()}
        except (Exception, SystemExit) as error:  # gin raises whatever an import or a reference in the file raises
            raise ConfigError(
                f"The gin configuration cannot be read: {one_line(error)}. Here a gin file names a recipe (recipe.base = "
                "'tiny') and binds fields of its sections (train.steps = 500); T5X's own files, which import and include its "
                "modules, are not recipes."
            ) from error
        finally:
            gin.clear_config()
        base = bound["recipe"].get("base")
        if not isinstance(base, str):
            raise ConfigError("A gin file names the recipe it changes: recipe.base = 'tiny'.")
        values = _config_dict(_find_base(base, paths))
        for name in SECTIONS:
            for key, value in bound[name].items():
                _set(values, f"{name}.{key}", value)
    return from_config_dict(values)


@functools.cache
def _gin_sections() -> dict[str, Any]:
    """Returns gin configurables, registered once, that return their bindings."""
    import gin

    def returning_bindings(name: str) -> Any:
        def section(**bindings):
            return bindings

        register: Any = gin.configurable(name, module="flax_switch")
        return register(section)

    return {name: returning_bindings(name) for name in (*SECTIONS, "recipe")}


def _find_base(base: str, gin_paths: Sequence[Path]) -> Path:
    places = [parent for path in gin_paths for parent in path.resolve().parents]
    if not all(shipped.holds(path) for path in gin_paths):
        places = [Path.cwd(), *places]
    for place in places:
        if (place / base).is_file():
            return place / base
    try:
        return shipped.find(base)
    except ConfigError as error:
        raise ConfigError(f"recipe.base = {base!r} was not found here, nor in the gin file's folder or above it. {error}") from None


def _config_dict(given: str | Path) -> ml_collections.ConfigDict:
    path = shipped.find(given)
    try:
        module = runpy.run_path(str(path))
        if "get_config" not in module:
            raise ConfigError(f"{path} is not a recipe: it defines no get_config().")
        values = module["get_config"]()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a recipe is code, and raises what it likes
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"The recipe {path}{where} raises {type(error).__name__}: {one_line(error)}.") from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise ConfigError(f"{path} is not a recipe: its get_config() returns {type(values).__name__}, not to_config_dict(...).")
    return values


def override(values: ml_collections.ConfigDict, overrides: Iterable[str]) -> ml_collections.ConfigDict:
    """Applies overrides like 'model.num_experts=16' to `values`, and returns them."""
    for text in overrides:
        _set(values, *parse_assignment(text, "An override has the form section.field=value"))
    return values


def _set(values: ml_collections.ConfigDict, key: str, value: Any) -> None:
    section, _, field = key.partition(".")
    sections = [name for name in values if name in SECTIONS]
    if section not in sections or not field or "." in field:
        if section != "kind":
            RECIPES[kind_of(values.to_dict())].from_dict({section: {}})  # an unknown section is an error with the nearest name
        raise ConfigError(f"{key!r} names no field; write section.field, where section is one of {', '.join(sections)}.")
    with values.ignore_type(), values.unlocked():
        # Whether the field exists and the value fits is for the dataclass to say.
        fields: Any = values[section]
        try:
            fields[field] = value
        except OverflowError as error:  # an integer that ml_collections makes no float of
            raise ConfigError(f"{key} must be a number that a float can hold; it is {shown(value)}.") from error
