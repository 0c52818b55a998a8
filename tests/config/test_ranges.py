"""Every number of every section has a range, at its field; what lies outside is refused by name, whatever the section."""

import dataclasses
import math
import typing
from typing import Annotated

import numpy as np
import pytest

from flax_switch.config import ConfigError, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.config.base import _options, _Section
from flax_switch.config.finetuning import FinetuneRecipe
from flax_switch.config.generation import GenerationConfig
from flax_switch.config.kinds import RECIPES, RUNS
from flax_switch.config.ranges import LARGEST_FLOAT, LARGEST_INTEGER, Range


def sections(section):
    """The sections of a config, and those inside them."""
    yield section
    for hint in typing.get_type_hints(section).values():
        for inner in (hint, *typing.get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, _Section):
                yield from sections(inner)


SECTIONS = {one for config in (*RECIPES.values(), *RUNS.values(), GenerationConfig) for one in sections(config)}


def numbers(hint, wrap=lambda number: number):
    """(type, range, how a number becomes the field's value) of every number in an annotation."""
    for option in _options(hint):
        if option in (int, float):
            yield option, None, wrap
        elif typing.get_origin(option) is Annotated:
            kind, allowed = typing.get_args(option)
            yield kind, allowed, wrap
        elif typing.get_origin(option) is tuple:
            yield from numbers(typing.get_args(option)[0], lambda number: (wrap(number),))


FIELDS = [
    pytest.param(section, name, kind, allowed, wrap, id=f"{section.__name__}.{name}")
    for section in sorted(SECTIONS, key=lambda one: one.__name__)
    for name, hint in typing.get_type_hints(section, include_extras=True).items()
    if name in {field.name for field in dataclasses.fields(section)}
    for kind, allowed, wrap in numbers(hint)
]


def test_the_walk_finds_the_sections_and_their_numbers():
    names = {section.__name__ for section in SECTIONS}
    assert {"SwitchConfig", "DataConfig", "TaskConfig", "EvaluationConfig", "DistillationConfig", "GenerationConfig"} <= names
    assert len(FIELDS) > 130


@pytest.mark.parametrize(("section", "name", "kind", "allowed", "wrap"), FIELDS)
def test_every_number_has_a_range_and_what_lies_outside_is_refused(section, name, kind, allowed, wrap):
    assert isinstance(allowed, Range), "write its range in the annotation, as its neighbours do"
    outside = [(allowed.largest or LARGEST_INTEGER) + 1 if allowed.most is None else allowed.most + 1, 10**400, 16**10000]
    outside += [end for end in (allowed.above, allowed.below) if end is not None]
    outside += [end - 1 for end in (allowed.least,) if end is not None and end - 1 not in allowed.also]
    if kind is float:
        outside = [*outside[1:], math.nan, math.inf, -math.inf, np.float32("nan"), 2 * LARGEST_FLOAT]
    for number in outside:
        with pytest.raises(ConfigError, match=rf"{name} must .*; it is "):
            section.check_field(name, wrap(number))
    for end in (allowed.least, allowed.most, allowed.largest, *allowed.also):
        if end is not None:
            section.check_field(name, wrap(kind(end)))


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda one: one.__name__))
def test_a_section_checks_the_ranges_when_it_is_made(section):
    made = section()
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if typing.get_origin(hint) is Annotated:
            with pytest.raises(ConfigError, match=f"{name} must"):
                made.replace(**{name: typing.get_args(hint)[0](-1e30)})


def test_the_message_says_what_turns_the_thing_off():
    for value in (0, 0.0, -1):
        with pytest.raises(ConfigError, match=rf"^optimizer.clip_global_norm must be positive; it is {value}. None clips no gradi"):
            OptimizerConfig(clip_global_norm=value)
    with pytest.raises(ConfigError, match=r"^train.eval_every must be at least 1; it is 0. To have it at the end alone, set it to"):
        TrainConfig(eval_every=0)
    with pytest.raises(ConfigError, match=r"^dropout_rate must lie in \[0, 1\); it is 1.0. 0 turns it off.$"):
        SwitchConfig(dropout_rate=1.0)
    with pytest.raises(ConfigError, match=r"^mesh.data must be at least 1 or be -1; it is 0.$"):
        MeshConfig(data=0)


def test_a_recipe_of_finetuning_checks_the_models_fields_that_it_changes():
    with pytest.raises(ConfigError, match="dropout_rate must lie in"):
        FinetuneRecipe(model={"dropout_rate": 2.0})
    with pytest.raises(ConfigError, match="encoder_sparse_layers must not be negative"):
        FinetuneRecipe(model={"encoder_sparse_layers": [-1]})
