"""Each control of the scores beside transformers' processor of the same name, on random scores and histories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from flax_switch.config import SwitchConfig
from flax_switch.config.generation import GenerationConfig, split_numbers
from flax_switch.generation import logits
from flax_switch.generation.beam_search import top_k

R, B, T, V = 6, 3, 9, 30
CONFIG = SwitchConfig(vocab_size=V, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


@pytest.fixture(params=[1, 2, 5, 8], ids="length{}".format)
def history(request):
    rng = np.random.default_rng(request.param)
    tokens, source = rng.integers(0, 5, (R, T)), rng.integers(0, 5, (B, 11))
    return logits.History(jnp.asarray(tokens), jnp.int32(request.param), 1, jnp.asarray(source), None)


def scores(seed=0):
    return np.random.default_rng(seed).normal(size=(R, V)).astype(np.float32) * 3


def applied(x, history, **controls):
    settings, numbers = split_numbers(GenerationConfig(**controls).for_model(CONFIG))
    return np.asarray(logits.process_scores(jnp.asarray(x), history, settings, jax.tree.map(jnp.asarray, numbers)))


def expected(x, history, processor):
    tokens = np.asarray(history.tokens)[:, : int(history.length)]
    return processor(torch.tensor(tokens), torch.from_numpy(x.copy())).numpy()


BAD_WORDS = [[3], [1, 4], [2, 2], [0, 1, 2], [4, 3, 2, 1]]


@pytest.mark.parametrize(
    ("controls", "make"),
    [
        (dict(repetition_penalty=1.5), lambda s: hf.RepetitionPenaltyLogitsProcessor(1.5)),
        (dict(no_repeat_ngram_size=1), lambda s: hf.NoRepeatNGramLogitsProcessor(1)),
        (dict(no_repeat_ngram_size=2), lambda s: hf.NoRepeatNGramLogitsProcessor(2)),
        (dict(no_repeat_ngram_size=3), lambda s: hf.NoRepeatNGramLogitsProcessor(3)),
        (dict(no_repeat_ngram_size=40), lambda s: hf.NoRepeatNGramLogitsProcessor(40)),
        (dict(encoder_no_repeat_ngram_size=1), lambda s: hf.EncoderNoRepeatNGramLogitsProcessor(1, s)),
        (dict(encoder_no_repeat_ngram_size=2), lambda s: hf.EncoderNoRepeatNGramLogitsProcessor(2, s)),
        (dict(encoder_no_repeat_ngram_size=3), lambda s: hf.EncoderNoRepeatNGramLogitsProcessor(3, s)),
        (dict(bad_words_ids=BAD_WORDS), lambda s: hf.NoBadWordsLogitsProcessor(BAD_WORDS, eos_token_id=1)),
        (dict(min_new_tokens=4), lambda s: hf.MinNewTokensLengthLogitsProcessor(1, 4, 1)),
        (dict(suppress_tokens=[2, 9]), lambda s: hf.SuppressTokensLogitsProcessor([2, 9])),
        (dict(begin_suppress_tokens=[2, 9]), lambda s: hf.SuppressTokensAtBeginLogitsProcessor([2, 9], 1)),
        (dict(forced_bos_token_id=7), lambda s: hf.ForcedBOSTokenLogitsProcessor(7)),
        (dict(forced_eos_token_id=[1, 3], max_new_tokens=8), lambda s: hf.ForcedEOSTokenLogitsProcessor(9, [1, 3])),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_may_be_said_is_transformers(history, controls, make):
    x = scores()
    source = torch.tensor(np.asarray(history.source))
    np.testing.assert_allclose(applied(x, history, **controls), expected(x, history, make(source)), rtol=1e-6)


SAMPLING = dict(do_sample=True, top_k=0)
UNIFORM_HISTORY = logits.History(jnp.zeros((R, T), jnp.int32), jnp.int32(3), 1, jnp.zeros((B, 11), jnp.int32), None)


@pytest.mark.parametrize(
    ("controls", "make"),
    [
        (dict(temperature=0.7), lambda keep: hf.TemperatureLogitsWarper(0.7)),
        (dict(top_k=5), lambda keep: hf.TopKLogitsWarper(5, min_tokens_to_keep=keep)),
        (dict(top_k=100), lambda keep: hf.TopKLogitsWarper(100, min_tokens_to_keep=keep)),
        (dict(top_p=0.8), lambda keep: hf.TopPLogitsWarper(0.8, min_tokens_to_keep=keep)),
        (dict(top_p=0.01), lambda keep: hf.TopPLogitsWarper(0.01, min_tokens_to_keep=keep)),
        (dict(min_p=0.2), lambda keep: hf.MinPLogitsWarper(0.2, min_tokens_to_keep=keep)),
        (dict(min_p=1.0), lambda keep: hf.MinPLogitsWarper(1.0, min_tokens_to_keep=keep)),
        (dict(typical_p=0.6), lambda keep: hf.TypicalLogitsWarper(0.6, min_tokens_to_keep=keep)),
        (dict(typical_p=0.01), lambda keep: hf.TypicalLogitsWarper(0.01, min_tokens_to_keep=keep)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_sampling_filters_are_transformers(controls, make, num_beams):
    for seed in range(4):
        x = scores(seed)
        x[:, seed] = -np.inf
        ours = applied(x, UNIFORM_HISTORY, **{**SAMPLING, **controls}, num_beams=num_beams)
        keep = 1 if num_beams == 1 else 2
        np.testing.assert_allclose(ours, expected(x, UNIFORM_HISTORY, make(keep)), rtol=1e-6)


def test_filters_are_applied_in_transformers_order():
    x = scores(11)
    controls = dict(temperature=0.6, top_k=12, top_p=0.9, min_p=0.05, typical_p=0.7)
    processors = [
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.05),
        hf.TypicalLogitsWarper(0.7),
    ]
    ours = applied(x, UNIFORM_HISTORY, do_sample=True, **controls)
    np.testing.assert_allclose(ours, expected(x, UNIFORM_HISTORY, hf.LogitsProcessorList(processors)), rtol=1e-5)
    assert np.isfinite(ours).any(1).all() and np.isinf(ours).any(1).all()


def test_tokens_that_tie_at_the_border_of_top_p_are_kept_together():
    kept = np.isfinite(logits.keep_top_p(jnp.log(jnp.asarray([[0.4, 0.2, 0.2, 0.2]])), jnp.float32(0.5)))
    np.testing.assert_array_equal(kept, True)


def test_ngrams_of_padding_do_not_count_where_a_mask_says_so():
    source, tokens = jnp.asarray([[4, 5, 0, 0]]), jnp.asarray([[0, 0, 0]])
    masked = logits.History(tokens, jnp.int32(1), 1, source, jnp.asarray([[True, True, False, False]]))
    counted = masked.replace(source_mask=None)
    assert set(np.flatnonzero(logits.source_ngrams(counted, 1, 8)[0])) == {0, 4, 5}
    assert set(np.flatnonzero(logits.source_ngrams(masked, 1, 8)[0])) == {4, 5}
    assert set(np.flatnonzero(logits.source_ngrams(counted, 2, 8)[0])) == {0}
    assert not logits.source_ngrams(masked, 2, 8).any(), "the bigram (0, 0) is padding"


def test_the_two_round_top_k_is_top_k_ties_included():
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=(3, 5000)), rng.integers(0, 7, (3, 5000)), np.zeros((2, 4100)), np.full((1, 6000), -np.inf)):
        x = jnp.asarray(x, jnp.float32)
        for ours, theirs in zip(top_k(x, 8), jax.lax.top_k(x, 8), strict=True):
            np.testing.assert_array_equal(ours, theirs)
