"""Diverse beam search beside a textbook's, on random tables of next tokens and on models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ALONE_BASE, BASE, Uncached, lively_params, sources
from test_beam_search import CONFIG, EOS, START, assert_same, next_log_probs, tables
from textbook import beam_search, diverse_beam_search

from flax_switch.config import ConfigError
from flax_switch.config.generation import GenerationConfig, make_controls, split_numbers
from flax_switch.generation.defaults import with_defaults
from flax_switch.generation.diverse_search import best_of_groups, extend_groups, start_groups
from flax_switch.generation.generate import generate
from flax_switch.generation.logits import History
from flax_switch.nn.transformer import SwitchTransformer

PAD = 0


@functools.partial(jax.jit, static_argnums=(2, 3))
def search(logits, numbers, settings, prefix):
    """Tokens, scores and counts of new tokens that a whole search over a table [B, V, V, V] finds."""
    B, V, P = len(logits), logits.shape[-1], len(prefix)

    def step(state):
        tokens = state.tokens
        last, before = tokens[:, :, state.length - 1], jnp.where(state.length > 1, tokens[:, :, state.length - 2], START)
        rows = logits[jnp.arange(B)[:, None], before, last].reshape(-1, V)
        history = History(tokens.reshape(len(rows), -1), state.length, P, jnp.ones((B, 1), jnp.int32), None)
        return extend_groups(state, rows, history, settings, numbers)

    start = start_groups(jnp.tile(jnp.array(prefix, jnp.int32), (B, 1)), jax.random.split(jax.random.key(0), B), settings, V)
    best = best_of_groups(jax.lax.while_loop(lambda state: ~state.done, step, start))
    return best.finished_tokens, best.finished_scores, best.finished_lengths


def searched(logits, prefix=(START,), **controls):
    settings, numbers = split_numbers(make_controls(controls, CONFIG))
    tokens, scores, lengths = jax.device_get(search(logits, numbers, settings, prefix))

    def beam(b, j):
        return tuple(tokens[b, j, : len(prefix) + lengths[b, j]].tolist()), float(scores[b, j])

    return [[beam(b, j) for j in range(settings.num_beams)] for b in range(len(logits))]


def by_the_book(logits, prefix=(START,), eos=(EOS,), **controls):
    return [diverse_beam_search(next_log_probs(table), prefix, eos=eos, pad=PAD, **controls) for table in logits]


SHAPES = [(6, 3), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((4, 2), (3, 3), (6, 2)))]


@pytest.mark.parametrize("early_stopping", [False, *(pytest.param(how, marks=pytest.mark.slow) for how in (True, "never"))])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_find_what_the_textbook_finds(shape, early_stopping):
    num_beams, groups = shape
    logits = tables(32, seed=num_beams, favour=1.5)
    for length_penalty in (-1.0, 0.0, 0.6, 2.0):
        for penalty in (0.3, 2.0):
            controls = dict(
                num_beams=num_beams, num_beam_groups=groups, diversity_penalty=penalty, max_new_tokens=7,
                early_stopping=early_stopping, length_penalty=length_penalty,
            )  # fmt: skip
            assert_same(searched(logits, **controls), by_the_book(logits, **controls))


@pytest.mark.slow
def test_several_ends_and_a_prefix_are_the_textbooks():
    controls = dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.8, max_new_tokens=6)
    ends = (EOS, 4, 7)
    logits = tables(24, ends)
    assert_same(searched(logits, eos_token_id=ends, **controls), by_the_book(logits, eos=ends, **controls))
    prefix = (START, 5, 3)
    assert_same(searched(logits, prefix, **controls), by_the_book(logits, prefix, **controls))


@pytest.mark.slow
def test_groups_differ_as_beams_of_one_search_do_not():
    logits = tables(24, seed=9, favour=-60.0)
    controls = dict(num_beams=4, max_new_tokens=6)
    plain = [{t for t, _ in beam_search(next_log_probs(table), (START,), eos=(EOS,), **controls)} for table in logits]
    diverse = [{t for t, _ in row} for row in searched(logits, num_beam_groups=4, diversity_penalty=50.0, **controls)]
    firsts = [np.mean([len({t[1] for t in row}) for row in found]) for found in (plain, diverse)]
    assert firsts[1] == 4 > firsts[0] + 1


MODELS = {
    "sparse": (BASE, dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7)),
    "after a prefix": (BASE, dict(num_beams=4, num_beam_groups=4, diversity_penalty=0.7, decoder_input_ids=[[11, 30]] * 4)),
    "scanned": (
        BASE.replace(scan_layers=True, num_decoder_layers=4, decoder_sparse_layers=(1, 3)),
        dict(num_beams=6, num_beam_groups=3, diversity_penalty=0.4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["sparse", "after a prefix", pytest.param("scanned", marks=pytest.mark.slow)])
def test_a_model_says_what_the_textbook_finds_with_its_uncached_logits(name):
    config, controls = MODELS[name]
    params, (ids, mask), ends = lively_params(config), sources(config), tuple(range(20, 28))
    J = controls["num_beams"]
    given = dict(controls, max_new_tokens=7, eos_token_id=ends, num_return_sequences=J)
    output = generate(SwitchTransformer(config), params, ids, mask, output_scores=True, **given)
    prefix = (config.decoder_start_token_id, *controls.get("decoder_input_ids", [()])[0])
    uncached = Uncached(config, params, ids, mask, len(prefix) + 7, J)
    book = {name: value for name, value in controls.items() if name != "decoder_input_ids"}
    for i, sequences in enumerate(output.sequences.reshape(len(ids), J, -1).tolist()):
        expected = diverse_beam_search(uncached.log_probs(i), prefix, eos=ends, pad=PAD, max_new_tokens=7, **book)
        for found, (tokens, _) in zip(sequences, expected, strict=True):
            assert tuple(found[: len(tokens)]) == tokens
            assert set(found[len(tokens) :]) <= {config.pad_token_id}
        np.testing.assert_allclose(output.scores.reshape(-1, J)[i], [score for _, score in expected], rtol=1e-4, atol=1e-4)
    assert output.step_scores.shape[1:] == (len(ids) * J, config.vocab_size)


def test_a_row_says_what_it_says_in_other_company():
    for config in (BASE, ALONE_BASE):
        params, (ids, mask) = lively_params(config), sources(config)

        def run(rows, config=config, params=params, ids=ids, mask=mask):
            controls = dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, max_new_tokens=5, num_return_sequences=2)
            return generate(SwitchTransformer(config), params, ids[rows], mask[rows], **controls)

        together, alone = run([0, 1, 2, 3]), run([1, 2, 1, 2])
        width = alone.sequences.shape[1]
        np.testing.assert_array_equal(alone.sequences[:4], together.sequences[2:6, :width])
        np.testing.assert_allclose(alone.scores[:4], together.scores[2:6], rtol=1e-5)


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (
            dict(num_beams=4, num_beam_groups=3, diversity_penalty=1.0),
            r"num_beams \(4\) must be a multiple of num_beam_groups",
        ),
        (dict(num_beams=4, num_beam_groups=2), "num_beam_groups=2 needs a diversity_penalty above 0"),
        (dict(num_beams=4, diversity_penalty=1.0), "diversity_penalty=1.0 has no effect without num_beam_groups"),
        (dict(num_beam_groups=2, diversity_penalty=1.0), "num_beam_groups=2 has no effect without num_beams"),
        (dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1.0), "diversity_penalty must lie in"),
        (
            dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, do_sample=True),
            "do_sample=True is none of diverse",
        ),
        (dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, search="t5x"), "num_beam_groups=2 is none of T5X's"),
    ],
    ids=str,
)
def test_groups_that_cannot_be_are_refused_by_name(controls, message):
    with pytest.raises(ConfigError, match=message):
        make_controls(controls, CONFIG)


def test_a_models_groups_give_way_to_what_is_given():
    defaults = dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    assert with_defaults(defaults, {}) == defaults
    for given in (dict(num_beams=1), dict(num_beams=3), dict(do_sample=True), dict(num_beam_groups=1), dict(search="t5x")):
        assert not {"diversity_penalty"} & with_defaults(defaults, given).keys(), given
        GenerationConfig(**with_defaults(defaults, given))
    assert "do_sample" not in with_defaults(dict(do_sample=True, temperature=0.5), defaults)
    GenerationConfig(**with_defaults(dict(do_sample=True, temperature=0.5), defaults))
