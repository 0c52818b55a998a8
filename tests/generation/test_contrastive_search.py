"""Contrastive search beside a textbook's, with a model that decodes its whole prefix each time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ALONE_BASE, BASE, Uncached, lively_params, sources
from textbook import contrastive_search

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.generation import GenerationConfig, make_controls
from flax_switch.generation.defaults import with_defaults
from flax_switch.generation.generate import generate
from flax_switch.generation.program import run_program
from flax_switch.generation.stream import stream
from flax_switch.nn.transformer import SwitchTransformer

NEW, ENDS = 8, tuple(range(20, 26))
CONFIG = SwitchConfig(vocab_size=20, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
MODELS = {
    "sparse": (BASE, ()),
    "dense, after a prefix": (BASE.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0), (11, 30)),
    "scanned, experts are hit": (
        BASE.replace(scan_layers=True, num_decoder_layers=4, decoder_sparse_layers=(1, 3), moe_executor="hit"), (),
    ),
    "tables in every layer, untied": (BASE.replace(relative_attention_per_layer=True, tie_word_embeddings=False), (9,)),
}  # fmt: skip
SLOW = list(MODELS)[2:]


def run(config, rows=(0, 1, 2, 3), **controls):
    params, (ids, mask) = lively_params(config), sources(config)
    controls = dict(max_new_tokens=NEW, eos_token_id=ENDS, top_k=4) | controls
    return generate(SwitchTransformer(config), params, ids[list(rows)], mask[list(rows)], **controls)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS])
def test_a_model_says_what_the_textbook_says_with_its_uncached_states(name):
    config, prompt = MODELS[name]
    params, (ids, mask), start = lively_params(config), sources(config), (config.decoder_start_token_id, *prompt)
    uncached = Uncached(config, params, ids, mask, len(start) + NEW, 1)
    given = dict(decoder_input_ids=np.tile(prompt, (len(ids), 1))) if prompt else {}
    found = []
    for alpha in (0.2, 0.8):
        sequences = run(config, penalty_alpha=alpha, **given).sequences
        for i, row in enumerate(sequences.tolist()):
            expected = contrastive_search(uncached.run(i), start, penalty_alpha=alpha, top_k=4, max_new_tokens=NEW, eos=ENDS)
            assert tuple(row[: len(expected)]) == expected
            assert set(row[len(expected) :]) <= {config.pad_token_id}
        found.append(sequences.tolist())
    greedy = run(config, top_k=50, **given).sequences.tolist()
    assert found[0] != found[1] != greedy, "a penalty that changes nothing tests little"


def alone(config, params, length):
    """What the textbook asks of a decoder alone, whose experts have room for every token."""
    model = SwitchTransformer(config.replace(capacity_mode="dropless"))

    @jax.jit
    def decode(tokens):
        output = model.apply({"params": params}, tokens)
        return jax.nn.log_softmax(output.logits[0]), output.decoder_last_hidden_state[0]

    def log_probs_and_states(tokens):
        log_probs, states = decode(jnp.asarray([[*tokens, *[1] * (length - len(tokens))]]))
        return np.asarray(log_probs, np.float64)[len(tokens) - 1], np.asarray(states, np.float64)[: len(tokens)]

    return log_probs_and_states


def test_a_decoder_alone_is_compared_with_its_inputs_and_not_with_their_padding():
    params, (ids, mask) = lively_params(ALONE_BASE), sources(ALONE_BASE)
    start, P = ALONE_BASE.decoder_start_token_id, ids.shape[1] + 1
    sequences = run(ALONE_BASE, penalty_alpha=0.6).sequences
    textbook = alone(ALONE_BASE, params, P + NEW)
    for row, inputs, real in zip(sequences.tolist(), ids, mask, strict=True):
        inputs = (start, *inputs[real == 1].tolist())
        expected = contrastive_search(textbook, inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=NEW, eos=ENDS)[len(inputs) :]
        assert tuple(row[P : P + len(expected)]) == expected


def test_without_a_penalty_it_is_greedy_and_all_penalties_share_a_program():
    expected = run(BASE, top_k=50).sequences
    compiled = run_program._cache_size()
    np.testing.assert_array_equal(run(BASE, penalty_alpha=0.0).sequences, expected)
    assert (run(BASE, penalty_alpha=1.0).sequences[:, :4] != expected[:, :4]).any()
    assert run_program._cache_size() <= compiled + 1


def test_a_row_says_what_it_says_in_other_company_and_as_it_is_streamed():
    together, others = run(BASE, penalty_alpha=0.5), run(BASE, rows=(1, 2, 1, 2), penalty_alpha=0.5)
    width = others.sequences.shape[1]
    np.testing.assert_array_equal(others.sequences[:2], together.sequences[1:3, :width])
    params, (ids, mask) = lively_params(BASE), sources(BASE)
    controls = dict(max_new_tokens=NEW, eos_token_id=ENDS, top_k=4, penalty_alpha=0.5)
    told = list(stream(SwitchTransformer(BASE), params, ids, mask, **controls))
    np.testing.assert_array_equal(np.concatenate(told, axis=1), together.sequences)


def test_what_else_may_be_said_is_heeded_and_told():
    asked = []

    def even(source, tokens):
        asked.append(len(tokens))
        return range(2, 64, 2)

    output = run(BASE, penalty_alpha=0.5, prefix_allowed_tokens_fn=even, min_new_tokens=NEW, output_scores=True)
    assert (output.sequences % 2 == 0).all()
    assert max(asked) == NEW, "nobody asks what follows the last token"
    assert output.step_scores.shape == (NEW, 4, 64)
    assert np.isneginf(output.step_scores[..., 1::2]).all() and np.isneginf(output.step_scores[..., list(ENDS)]).all()
    best = np.sort(output.step_scores, axis=-1)[..., -4]
    chosen = np.take_along_axis(output.step_scores, output.sequences[:, 1:].T[..., None], axis=-1)[..., 0]
    assert (chosen >= best).all(), "what is taken is among the top_k"


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (dict(penalty_alpha=0.6, top_k=1), "penalty_alpha needs a top_k of at least 2, of which it chooses; it is 1"),
        (dict(penalty_alpha=0.6, top_k=0), "penalty_alpha needs a top_k of at least 2"),
        (dict(penalty_alpha=1.5), r"penalty_alpha must lie in \[0, 1\]; it is 1.5. None turns it off"),
        (dict(penalty_alpha=0.6, do_sample=True), "do_sample=True is none of contrastive search"),
        (dict(penalty_alpha=0.6, num_beams=2), "num_beams=2 is none of contrastive search"),
        (dict(penalty_alpha=0.6, num_return_sequences=2), "num_return_sequences=2 needs do_sample=True or beams"),
        (dict(penalty_alpha=0.6, temperature=0.5), "temperature=0.5 has no effect without do_sample"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(controls, message):
    with pytest.raises(ConfigError, match=message):
        make_controls(controls, CONFIG)


def test_more_candidates_than_tokens_are_all_tokens():
    assert make_controls(dict(penalty_alpha=0.6), CONFIG).rows_per_source == 20


def test_a_models_penalty_gives_way_to_what_is_given():
    defaults = dict(penalty_alpha=0.6, top_k=4)
    assert with_defaults(defaults, {}) == defaults
    assert with_defaults(defaults, dict(do_sample=True)) == dict(do_sample=True, top_k=4)
    assert with_defaults(defaults, dict(num_beams=3)) == dict(num_beams=3)
    assert with_defaults(defaults, dict(penalty_alpha=None)) == dict(penalty_alpha=None)
    sampling = dict(do_sample=True, temperature=0.5, num_beams=4, length_penalty=2.0)
    assert with_defaults(sampling, defaults) == defaults
    GenerationConfig(**with_defaults(sampling, defaults))
