"""What `generate` refuses, and what it makes of masks, prefixes and seeds."""

import inspect

import numpy as np
import pytest
from architectures import BASE

from flax_switch.config import ConfigError
from flax_switch.config.generation import make_controls
from flax_switch.generation.generate import check_mask, check_seeds, generate, start_tokens
from flax_switch.nn.inputs import as_ids
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer

IDS = [[5, 6, 0], [7, 8, 9]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(input_ids=np.zeros((2, 0), int)), "at least one of each"),
        (dict(input_ids=[[5, -1]]), "input_ids holds -1, which is no id of the vocabulary of 64"),
        (dict(input_ids=[[5, 64]]), "input_ids holds 64"),
        (dict(input_ids=[[5, 6], [0, 0]]), "row 1 is padding only"),
        (dict(attention_mask=[[1, 1, 1]]), r"attention_mask must have the shape of input_ids, \[2, 3\]; it is \[1, 3\]"),
        (dict(attention_mask=[[0, 0, 0], [1, 1, 1]]), "row 0 is padding only"),
        (dict(decoder_input_ids=[[5]]), "decoder_input_ids has 1 rows and input_ids 2"),
        (dict(decoder_input_ids=[[5], [-2]]), "decoder_input_ids holds -2"),
        (dict(seed=-1), "seed must be an integer of at least 0"),
        (dict(seed=[1, 2, 3]), "one for each of the 2 sources"),
        (dict(max_tokens=3), "Did you mean 'max_new_tokens'"),
    ],
    ids=str,
)
def test_inputs_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        generate(SwitchTransformer(BASE), {}, **{"input_ids": IDS, **changes})


def test_ids_of_another_shape_or_kind_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"input_ids must be an array \[rows, tokens\].*its shape is \[1, 1, 2\]"):
        as_ids("input_ids", [[[5, 6]]], BASE)
    with pytest.raises(ConfigError, match="decoder_input_ids must hold integers; its dtype is float64"):
        as_ids("decoder_input_ids", [[1.5]], BASE)
    with pytest.raises(ConfigError, match=r"at least 0 and below 2\*\*32, or one for each of the 2 sources; it is 0.5"):
        inspect.unwrap(check_seeds)(0.5, 2)  # without the tests' checks of types


def test_a_model_without_decoder_or_head_is_refused():
    for model in (SwitchEncoder(BASE), SwitchTransformer(BASE, head=False)):
        with pytest.raises(ConfigError, match=f"this is a {type(model).__name__} without one"):
            generate(model, {}, IDS)


def test_the_mask_is_what_is_given_or_what_is_not_the_pad_token():
    settings = make_controls(dict(pad_token_id=9), BASE)
    ids = np.array(IDS)
    np.testing.assert_array_equal(check_mask(None, ids, settings), [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(check_mask([[1, 0, 0], [0, 2, 1]], ids, settings), [[1, 0, 0], [0, 1, 1]])


def test_the_start_token_comes_before_a_prefix_unless_a_row_begins_with_it():
    settings = make_controls(dict(decoder_start_token_id=7), BASE)
    np.testing.assert_array_equal(start_tokens(None, 2, settings, BASE), [[7], [7]])
    np.testing.assert_array_equal(start_tokens([[5, 6], [8, 7]], 2, settings, BASE), [[7, 5, 6], [7, 8, 7]])
    np.testing.assert_array_equal(start_tokens([[5, 6], [7, 8]], 2, settings, BASE), [[5, 6], [7, 8]])


def test_one_seed_tells_sources_apart_by_their_place_and_seeds_for_each_do_not():
    np.testing.assert_array_equal(check_seeds(3, 3), [[3, 0], [3, 1], [3, 2]])
    np.testing.assert_array_equal(check_seeds([4, 9], 2), [[4, 0], [9, 0]])
