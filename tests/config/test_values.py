"""Values read the same on every command line: of recipes, of checkpoints, of generation."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_switch.commands.checkpoints import changes_of
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.base import _Section
from flax_switch.config.generation import GenerationConfig
from flax_switch.config.recipes import load_recipe
from flax_switch.config.values import parse_assignment, parse_value
from flax_switch.serving.limits import Limits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-1", -1), ("1e-3", 1e-3), ("0.5", 0.5), ("true", True), ("False", False), ("NONE", None), ("null", None),
        ("('a', 'b')", ("a", "b")), ('["silu", "linear"]', ("silu", "linear")), ("[[1, 2], [3]]", ((1, 2), (3,))),
        ("'quoted'", "quoted"), ('"3"', "3"), ("", ""), ("mixed", "mixed"), ("c4/*.json.gz", "c4/*.json.gz"),
        ("gs://bucket/x", "gs://bucket/x"), ("a b", "a b"), ("1-2", "1-2"), ("nan", "nan"), ("f(x)", "f(x)"), ("(1,", "(1,"),
        ("[{'name': 'a', 'rate': 2.0}]", ({"name": "a", "rate": 2.0},)),
    ],
)  # fmt: skip
def test_a_value_is_a_literal_or_the_text_itself(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


numbers_texts_and_tuples = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner).map(tuple),
)


@given(numbers_texts_and_tuples)
def test_what_python_writes_is_read_back(value):
    assert parse_value(repr(value)) == value


@given(st.none() | st.booleans() | st.integers() | st.lists(st.integers() | st.text(alphabet="abc -.")))
def test_what_json_writes_is_read_as_well(value):
    assert parse_value(json.dumps(value)) == (tuple(value) if isinstance(value, list) else value)


def test_an_assignment_ends_its_name_at_the_first_equals_sign():
    assert parse_assignment("data.prefix=a=b", "x") == ("data.prefix", "a=b")
    assert parse_assignment("data.prefix=", "x") == ("data.prefix", "")
    with pytest.raises(ConfigError, match=r"^Write field=value; 'd_ff' has no '='\.$"):
        parse_assignment("d_ff", "Write field=value")


@pytest.mark.parametrize("text", ["(1,)", "[1]", "none", "null"])
def test_a_field_set_for_a_checkpoint_and_one_set_in_a_recipe_are_the_same(text):
    name = "encoder_sparse_layers"
    changes = changes_of(SimpleNamespace(set=[f"{name}={text}"]))
    assert load_recipe("tiny", [f"model.{name}={text}"]).model == load_recipe("tiny").model.replace(**changes)


def test_defaults_fit_their_fields_and_ranges():
    """A value that is its field's default is taken without a look, so every default is looked at here."""
    sections = [_Section]
    for section in sections:
        sections += section.__subclasses__()
    assert {SwitchConfig, GenerationConfig, Limits} < set(sections)
    for section in sections[1:]:
        for field in dataclasses.fields(section):
            if field.default is not dataclasses.MISSING:
                section.check_field(field.name, field.default)
