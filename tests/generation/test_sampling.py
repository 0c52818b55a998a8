"""Sampling draws from exactly the distribution that its filters leave, and the same seed draws the same."""

import numpy as np
import pytest
import scipy.stats
import torch

from flax_switch.generation.generate import generate

DRAWS = 4096


def distribution(trained, ids, **controls):
    """transformers' probabilities of the first token, [V]: what its own filters leave, after softmax."""
    with torch.inference_mode():
        output = trained.torch.generate(
            torch.from_numpy(ids.astype(np.int64)),
            do_sample=True,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
            **{"top_k": 0, **controls},
        )
    return torch.softmax(output.scores[0].double(), -1).numpy()[0]


def draws(trained, ids, **controls):
    """How often each token is drawn first, [V]."""
    output = generate(
        trained.model, trained.params, ids, do_sample=True, max_new_tokens=1, num_return_sequences=DRAWS, **{"top_k": 0, **controls}
    )
    return np.bincount(output.sequences[:, 1], minlength=trained.config.vocab_size)


FILTERS = [
    dict(),
    *(
        pytest.param(controls, marks=pytest.mark.slow)
        for controls in (
            dict(temperature=1.7),
            dict(temperature=0.6),
            dict(top_k=5),
            dict(top_p=0.8),
            dict(min_p=0.05),
            dict(typical_p=0.7),
        )
    ),
    dict(temperature=1.5, top_k=20, top_p=0.9),
    dict(repetition_penalty=1.5, suppress_tokens=[5, 6, 7], min_p=0.02),
]


@pytest.mark.parametrize("controls", FILTERS, ids=str)
def test_tokens_are_drawn_from_the_distribution_that_the_filters_leave(trained, sources, controls):
    ids = sources[0][:1]
    probs = distribution(trained, ids, **controls)
    counts = draws(trained, ids, **controls)
    assert counts.sum() == DRAWS
    assert not counts[probs == 0].any(), "a token that the filters forbid was drawn"
    # Tokens expected fewer than five times are judged together, as a chi-square test wants it.
    order = np.argsort(probs)
    rare = np.cumsum(probs[order]) * DRAWS < 5
    expected = np.append(probs[order][~rare], probs[order][rare].sum()) * DRAWS
    observed = np.append(counts[order][~rare], counts[order][rare].sum())
    possible = expected > 1e-9
    assert possible.sum() > 1, "one token alone can be drawn: nothing is tested"
    assert scipy.stats.chisquare(observed[possible], expected[possible], sum_check=False).pvalue > 1e-3


def test_the_chi_square_test_can_tell_a_temperature_apart(trained, sources):
    ids = sources[0][:1]
    probs = distribution(trained, ids, temperature=1.2)
    counts = draws(trained, ids)
    common = probs * DRAWS > 5
    expected = probs[common] * counts[common].sum() / probs[common].sum()
    assert scipy.stats.chisquare(counts[common], expected, sum_check=False).pvalue < 1e-3


def test_a_seed_repeats_itself_and_another_does_not(trained, sources):
    sample = lambda seed: generate(trained.model, trained.params, *sources, do_sample=True, max_new_tokens=12, seed=seed).sequences  # noqa: E731
    np.testing.assert_array_equal(sample(3), sample(3))
    assert not np.array_equal(sample(3), sample(4))


def test_with_a_seed_for_each_source_a_source_draws_the_same_wherever_it_stands(trained, sources):
    ids, mask = sources
    order = np.array([4, 2, 0, 5, 1, 3])

    def sample(order):
        controls = dict(do_sample=True, max_new_tokens=12, seed=[10 + int(i) for i in order])
        return generate(trained.model, trained.params, ids[order], mask[order], **controls).sequences

    np.testing.assert_array_equal(sample(np.arange(6))[order], sample(order))


def test_samples_of_one_source_differ(trained, sources):
    output = generate(
        trained.model, trained.params, sources[0][:1], do_sample=True, max_new_tokens=12, num_return_sequences=8, temperature=2.0
    )
    assert len({tuple(row) for row in output.sequences}) > 1


def test_steps_samples_and_sources_draw_independently(trained, sources):
    """Where all tokens are nearly equally likely, two draws agree in one of V cases."""
    ids, n, V = np.tile(sources[0][:1], (2, 1)), 400, trained.config.vocab_size
    flat = dict(do_sample=True, temperature=1e4, top_k=0, num_return_sequences=n, max_new_tokens=3, min_new_tokens=3)
    tokens = generate(trained.model, trained.params, ids, **flat).sequences.reshape(2, n, 4)[:, :, 1:]
    pairs = {
        "one step and the next": (tokens[:, :, :-1], tokens[:, :, 1:]),
        "one sample and the next": (tokens[:, :-1], tokens[:, 1:]),
        "one source and the next": (tokens[0], tokens[1]),
    }
    for name, (some, others) in pairs.items():
        assert scipy.stats.binomtest(int((some == others).sum()), some.size, 1 / V).pvalue > 1e-3, name
