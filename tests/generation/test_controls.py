"""Controls: what is refused, by which name, and what needs no program of its own."""

import dataclasses

import numpy as np
import pytest
from transformers.generation.configuration_utils import GenerationConfig as Theirs

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.generation import GenerationConfig, make_controls, split_numbers

CONFIG = SwitchConfig(vocab_size=20, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1; it is 0"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be int"),
        (dict(num_beams=True), "num_beams must be int"),
        (dict(min_new_tokens=-1), "min_new_tokens must not be negative"),
        (dict(min_new_tokens=30), r"min_new_tokens \(30\) is more than max_new_tokens \(20\)"),
        (
            dict(do_sample=True, temperature=0.0),
            "temperature must be at least 1e-10; it is 0.0. do_sample=False",
        ),
        (dict(do_sample=True, temperature=float("inf")), "temperature must be at least 1e-10 and at most"),
        (dict(do_sample=True, top_p=1.5), "top_p must lie in \\(0, 1\\]; it is 1.5. 1 turns it off"),
        (dict(do_sample=True, top_p=0.0), "top_p"),
        (dict(do_sample=True, min_p=-0.1), "min_p must lie in \\[0, 1\\]"),
        (dict(do_sample=True, typical_p="high"), "typical_p must be float"),
        (dict(do_sample=True, top_k=-1), "top_k must not be negative; it is -1. 0 turns it off"),
        (dict(repetition_penalty=0.0), "repetition_penalty must lie in"),
        (dict(temperature=0.7), "temperature=0.7 has no effect without do_sample=True"),
        (dict(top_k=5), "top_k=5 has no effect without do_sample"),
        (dict(length_penalty=2.0), "length_penalty=2.0 has no effect without num_beams"),
        (dict(early_stopping=True), "early_stopping=True has no effect"),
        (dict(num_beams=2, early_stopping="sometimes"), "early_stopping must be False, True or 'never'"),
        (dict(num_beams=2, length_penalty=float("nan")), "length_penalty must lie in \\[-10, 10\\]; it is nan"),
        (dict(num_beams=2, length_penalty=2.0, brevity_penalty=0.6), "length_penalty and brevity_penalty both"),
        (dict(num_beams=2, num_return_sequences=3), r"num_return_sequences \(3\) is more than num_beams \(2\)"),
        (dict(num_return_sequences=2), "num_return_sequences=2 needs do_sample=True or beams"),
        (dict(forced_eos_token_id=1, suppress_tokens=[1, 2]), "forced_eos_token_id forces .1., which suppress_tokens forbids"),
        (dict(suppress_tokens=list(range(20))), "suppress_tokens forbids all 20 tokens"),
        (dict(suppress_tokens=[20]), "suppress_tokens holds 20, which is no id of the vocabulary of 20"),
        (dict(bad_words_ids=[[3, -4]]), "bad_words_ids must not be negative; it is -4"),
        (dict(bad_words_ids=[[]]), "bad_words_ids holds an empty word"),
        (dict(eos_token_id=[]), "eos_token_id is empty"),
        (dict(eos_token_id=list(range(20))), "eos_token_id names all 20 tokens"),
        (dict(pad_token_id=99), "pad_token_id holds 99"),
        (dict(routing="sometimes"), "routing must be one of"),
        (dict(max_tokens=4), "no field 'max_tokens'. Did you mean 'max_new_tokens'?"),
    ],
    ids=str,
)
def test_impossible_controls_are_refused_by_name(controls, message):
    with pytest.raises(ConfigError, match=message):
        make_controls(controls, CONFIG)


def test_experts_that_choose_cannot_be_dropless():
    config = SwitchConfig(vocab_size=20, router_type="experts_choose")
    with pytest.raises(ConfigError, match="routing='dropless' needs tokens that choose"):
        make_controls(dict(routing="dropless"), config)
    make_controls(dict(routing="auto"), config)


def test_special_tokens_default_to_the_models():
    controls = make_controls({}, CONFIG.replace(eos_token_id=5, pad_token_id=3, decoder_start_token_id=2))
    assert (controls.eos_token_id, controls.pad_token_id, controls.decoder_start_token_id) == ((5,), 3, 2)


def test_every_end_of_sequence_id_of_the_model_ends_one_unless_others_are_asked_for():
    several = SwitchConfig(eos_token_id=7, extra_eos_token_ids=(1, 5))
    assert GenerationConfig().for_model(several).eos_token_id == (7, 1, 5)
    assert GenerationConfig(eos_token_id=3).for_model(several).eos_token_id == (3,)


def test_values_of_numbers_share_a_program_and_switches_do_not():
    def program(**controls):
        return split_numbers(make_controls(controls, CONFIG))[0]

    sampling = dict(do_sample=True, top_k=0)
    assert program(**sampling, temperature=0.3) == program(**sampling, temperature=2.0)
    assert program(**sampling, temperature=0.3) != program(**sampling)
    assert program(num_beams=2, length_penalty=0.5) == program(num_beams=2, brevity_penalty=0.6)
    assert program(min_new_tokens=3) == program(min_new_tokens=7)
    assert program(repetition_penalty=1.2) == program(repetition_penalty=3.0) != program()
    assert program(num_beams=2) != program(num_beams=3)


def test_scores_are_divided_by_the_length_penalty_or_t5xs_brevity_penalty():
    def divisors(**controls):
        return split_numbers(make_controls(dict(num_beams=2, max_new_tokens=4, **controls), CONFIG))[1]["length_divisors"]

    np.testing.assert_allclose(divisors(length_penalty=2.0)[1:], [1, 4, 9, 16])
    np.testing.assert_allclose(divisors(length_penalty=-1.0)[1:], [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(divisors(brevity_penalty=0.6)[1:], [1, (7 / 6) ** 0.6, (8 / 6) ** 0.6, 1.5**0.6], rtol=1e-6)


def test_defaults_are_transformers():
    defaults = Theirs._get_default_generation_params()
    for field in dataclasses.fields(GenerationConfig):
        if defaults.get(field.name) is not None:
            assert getattr(GenerationConfig(), field.name) == defaults[field.name], field.name
