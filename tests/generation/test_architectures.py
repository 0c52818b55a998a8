"""Whatever the architecture: cached decoding says what the whole model says, and a row alone what it says in company.

The whole model is run in `architectures.Uncached` over all tokens so far, for every token anew, and searched by `textbook` in plain
Python. Where Hugging Face's classes can hold an architecture, a fixed capacity is held to transformers instead.
"""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from architectures import (
    ALONE,
    AXES,
    BASE,
    CAPACITIES,
    IMPOSSIBLE,
    TRAINING_ONLY,
    Uncached,
    combined,
    lively_params,
    pairwise,
    sources,
)
from textbook import beam_search, greedy_search

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.huggingface import SEMANTICS
from flax_switch.generation.generate import generate
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import save_pretrained

NEW, BEAMS, PREFIX = 7, 3, (11, 30)
EARLY_ENDS = (1, *range(20, 26))  # EOS tokens, so many that rows end at different steps

QUICK = {
    "scanned": dict.fromkeys(AXES, 0),
    "experts choose in bfloat16": {
        "who chooses": 1, "dtype": 1, "layers": 3, "experts": 0, "choices": 2, "biases": 2, "router": 2, "head": 2,
        "activations": 2, "executor": 1, "groups": 2,
    },
    "hash": {"who chooses": 3, "layers": 3, "executor": 1},
    "dense": {"layers": 2, "activations": 3, "dtype": 3, "sizes": 2, "norms": 2},
}  # fmt: skip
PAIRS = {f"pairs {number}": row for number, row in enumerate(pairwise())}
CASES = [
    *(pytest.param(row, id=name) for name, row in QUICK.items()),
    *(pytest.param(row, id=name, marks=pytest.mark.slow) for name, row in PAIRS.items()),
]


def test_every_field_of_a_config_is_varied_or_known_to_change_nothing():
    architectures = [changes for alternatives in AXES.values() for changes in alternatives]
    changed = {
        name
        for changes in (*architectures, *CAPACITIES, TRAINING_ONLY, *HUGGINGFACE.values(), *ALONE.values())
        for name, value in changes.items()
        if value != getattr(BASE, name)
    }
    changed |= {"architecture"}  # with which the tests of decoders alone vary the others
    changed |= {"attention_implementation"}  # of whole sequences, as tests/nn/test_fused_attention.py has them; a cache has its own
    changed |= {"weights"}  # integers are not drawn: tests/pretrained/test_weights.py decodes with them
    changed |= {"head", "labels", "classifier_dropout", "contrastive_temperature"}  # models with a head write nothing
    assert changed == {field.name for field in dataclasses.fields(SwitchConfig)}, "a field needs an alternative in AXES"


def test_the_slow_cases_hold_every_pair_of_alternatives():
    pairs = {frozenset(pair) for row in PAIRS.values() for pair in itertools.combinations(row.items(), 2)}
    for (a, i), (b, j) in itertools.combinations([(n, i) for n, choices in AXES.items() for i in range(len(choices))], 2):
        assert a == b or frozenset([(a, i), (b, j)]) in pairs | IMPOSSIBLE


@pytest.mark.parametrize("pair", [dict(pair) for pair in sorted(map(sorted, IMPOSSIBLE))], ids=str)
def test_alternatives_that_do_not_meet_are_refused_by_the_config(pair):
    with pytest.raises(ConfigError, match="router_type='hash'"):
        combined(**pair)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """An architecture with parameters, sources and its uncached model."""
    config = combined(**request.param)
    params, (ids, mask) = lively_params(config), sources(config)
    eos = (config.eos_token_id, *EARLY_ENDS[1:])
    room = 1 + len(PREFIX) + NEW
    exact = None  # the same in float32, where the architecture rounds
    routed = config.is_sparse and config.router_type != "hash"  # by a router's own numbers, in its own dtype
    if "bfloat16" in (config.dtype, config.is_sparse and config.expert_dtype, routed and config.router_dtype):
        unrounded = config.replace(dtype="float32", expert_dtype=None, router_dtype="float32")
        exact = Uncached(unrounded, params, ids, mask, room, BEAMS)
    uncached = Uncached(config, params, ids, mask, room, BEAMS)
    with pytest.MonkeyPatch.context() as patch:
        if config.moe_executor == "hit":
            keep_experts_stacked(patch)
        model = SwitchTransformer(config)
        yield SimpleNamespace(
            config=config, model=model, params=params, ids=ids, mask=mask, eos=eos, uncached=uncached, exact=exact
        )  # fmt: skip
    jax.clear_caches()  # all programs of all architectures need more memory mappings than a process may have


def keep_experts_stacked(patch):
    """Has generation read experts as where it does not run on one CPU."""
    patch.setattr(sys.modules["flax_switch.generation.generate"], "unstacked_experts", lambda *args: None)


def greedy(case, rows=(0, 1, 2, 3)):
    controls = dict(max_new_tokens=NEW, eos_token_id=case.eos, output_scores=True)
    return generate(case.model, case.params, case.ids[list(rows)], case.mask[list(rows)], **controls)


def beams(case, rows=(0, 1, 2, 3)):
    """With a prefix, which beams share."""
    prefix = np.tile(PREFIX, (len(rows), 1))
    controls = dict(max_new_tokens=NEW, eos_token_id=case.eos, num_beams=BEAMS, num_return_sequences=BEAMS)
    return generate(case.model, case.params, case.ids[list(rows)], case.mask[list(rows)], decoder_input_ids=prefix, **controls)


def rounding(case, source, tokens):
    """By how much bfloat16 changes the logits of each step along some tokens, root mean square; None in float32."""
    if case.exact is None:
        return None
    rough, exact = (model.logits(source, [tokens])[0, : len(tokens)] for model in (case.uncached, case.exact))
    return rms(rough - exact)


def rms(x):
    """Root mean square over the vocabulary."""
    return np.sqrt(np.square(x).mean(-1))


def typical_rounding(case):
    """The median over sources and steps of what bfloat16 changes; a mean would be that of a router's few other choices."""
    start = case.config.decoder_start_token_id
    paths = [greedy_search(case.uncached.log_probs(i), (start,), max_new_tokens=NEW, eos=case.eos) for i in range(len(case.ids))]
    return float(np.median(np.concatenate([rounding(case, i, path)[:-1] for i, path in enumerate(paths)])))


def assert_same_path(case, source, found, expected, scores, expected_scores):
    """The same tokens with the same logits (scores: of each new token).

    Rounded to bfloat16, every step may be as far from the expected one, or from the float32 model's, as rounding itself is, and
    then differ in a token that is nearly as good. Where a router's choice is nearly a tie, another way of rounding takes
    another expert: that may happen as often as between bfloat16 and float32, or once.
    """
    first = next((t for t, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    steps = min(len(found), len(expected)) - 1 if first is None else first
    scores, expected_scores = scores[:steps], expected_scores[:steps]
    if case.exact is None:
        assert found == expected
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-4)
        return
    error = typical_rounding(case)
    exact = case.exact.logits(source, [found])[0, :steps]
    elsewhere = np.minimum(rms(scores - expected_scores), rms(scores - exact)) > 2 * error
    ties = rms(expected_scores - exact) > 2 * error
    assert elsewhere.sum() <= (max(1, ties.sum()) if case.config.is_sparse else 0)
    if first is None:
        assert found == expected
    elif not elsewhere[-1]:
        assert min(logits[-1].max() - logits[-1, found[first]] for logits in (expected_scores, exact)) <= 8 * error


def test_greedy_search_says_what_the_whole_model_says(case):
    output = greedy(case)
    assert output.step_scores[0].std(axis=0).max() > 0.05, "sources that are answered alike test little"
    start = (case.config.decoder_start_token_id,)
    for i, row in enumerate(output.sequences.tolist()):
        found = upto_end(row, 1, case.eos)
        assert set(row[len(found) :]) <= {case.config.pad_token_id}
        book = greedy_search(case.uncached.log_probs(i), start, max_new_tokens=NEW, eos=case.eos)
        assert_same_path(case, i, found, book, output.step_scores[:, i], case.uncached.logits(i, [book])[0])


def test_beams_say_what_the_whole_model_says(case):
    output = beams(case)
    prefix = (case.config.decoder_start_token_id, *PREFIX)
    for i in range(len(case.ids)):
        log_probs = case.uncached.log_probs(i)
        book = beam_search(log_probs, prefix, num_beams=BEAMS, max_new_tokens=NEW, eos=case.eos)
        scores = output.scores.reshape(-1, BEAMS)[i]
        sequences = output.sequences.reshape(len(case.ids), BEAMS, -1)[i]
        found = [upto_end(row.tolist(), len(prefix), case.eos) for row in sequences]
        if case.exact is None:
            assert found == [tokens for tokens, _ in book]
            np.testing.assert_allclose(scores, [score for _, score in book], rtol=1e-4, atol=1e-4)
            continue
        error = 2 * typical_rounding(case)
        for tokens, score in zip(found, scores, strict=True):
            steps = [
                [said([tokens[:t]])[0, tokens[t]] for t in range(len(prefix), len(tokens))]
                for said in (log_probs, case.exact.log_probs(i))
            ]
            assert np.min(steps, axis=0).mean() - error <= score <= np.max(steps, axis=0).mean() + error
        assert scores[0] >= book[0][1] - 4 * max(error, float(rms(rounding(case, i, found[0]))))


def upto_end(tokens, prefix_length, eos):
    """Tokens up to the first EOS after the prefix."""
    ends = [t for t in range(prefix_length, len(tokens)) if tokens[t] in eos]
    return tuple(tokens[: ends[0] + 1] if ends else tokens)


@pytest.mark.parametrize("company", ["none", "others"])
def test_a_row_says_what_it_says_alone_and_in_other_company(case, company, request):
    rows = (1,) if company == "none" else (1, 2, 1, 2)
    together, alone = greedy(case), greedy(case, rows)
    found, expected = (upto_end(row.tolist(), 1, case.eos) for row in (alone.sequences[0], together.sequences[1]))
    assert_same_path(case, 1, found, expected, alone.step_scores[:, 0], together.step_scores[:, 1])
    if company == "none" and request.node.get_closest_marker("slow") is None:
        return  # another program, which takes seconds to compile
    together, alone = beams(case), beams(case, rows)
    scores, expected = alone.scores[:BEAMS], together.scores[BEAMS : 2 * BEAMS]
    if case.exact is None:
        T = min(together.sequences.shape[1], alone.sequences.shape[1])
        np.testing.assert_array_equal(alone.sequences[:BEAMS, :T], together.sequences[BEAMS : 2 * BEAMS, :T])
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_allclose(scores[0], expected[0], atol=8 * typical_rounding(case))


def test_samples_of_a_source_continue_its_prefix_each_by_itself(monkeypatch):
    """With more experts than tokens, of which an accelerator then gathers those that are hit."""
    config = BASE.replace(num_experts=13, moe_executor="hit")
    params, (ids, mask) = lively_params(config), sources(config)
    uncached = Uncached(config, params, ids, mask, 1 + len(PREFIX) + NEW)
    prefixes = np.arange(8, 8 + 2 * len(ids)).reshape(len(ids), 2)
    controls = dict(do_sample=True, top_k=0, num_return_sequences=2, output_scores=True, decoder_input_ids=prefixes)
    keep_experts_stacked(monkeypatch)
    output = generate(SwitchTransformer(config), params, ids, mask, max_new_tokens=NEW, eos_token_id=EARLY_ENDS, **controls)
    assert len({tuple(row) for row in output.sequences}) == 2 * len(ids)
    for row, tokens in enumerate(output.sequences.tolist()):
        assert tokens[:3] == [config.decoder_start_token_id, *prefixes[row // 2]]
        end = len(upto_end(tokens, 3, EARLY_ENDS))
        logits = uncached.logits(row // 2, [tokens])[0, 2 : end - 1]
        np.testing.assert_allclose(output.step_scores[: end - 3, row], logits, rtol=1e-4, atol=1e-4)


def plain(config, params):
    ids, mask = sources(config)
    return generate(SwitchTransformer(config), params, ids, mask, max_new_tokens=NEW, output_scores=True)


def test_settings_of_training_change_nothing_to_the_bit():
    params = lively_params(BASE)
    expected, trained_otherwise = plain(BASE, params), plain(BASE.replace(**TRAINING_ONLY), params)
    np.testing.assert_array_equal(trained_otherwise.sequences, expected.sequences)
    np.testing.assert_array_equal(trained_otherwise.step_scores, expected.step_scores)


@pytest.mark.slow
def test_capacities_change_nothing():
    params = lively_params(BASE)
    expected = plain(BASE, params)
    for changes in CAPACITIES:
        np.testing.assert_allclose(plain(BASE.replace(**changes), params).step_scores, expected.step_scores, atol=1e-5)


# --- beside transformers, with its capacity

SPARSE = dict(SEMANTICS, sparse_layout="huggingface", expert_capacity=2)
DENSE = dict(SEMANTICS, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
HUGGINGFACE = {
    "scarce, biased, untied": dict(
        SPARSE, router_bias=True, tie_word_embeddings=False, separate_embeddings=True, num_heads=3, d_kv=6,
        mlp_activations=("gelu",), relative_attention_num_buckets=4, relative_attention_max_distance=5,
    ),
    "gated T5": dict(DENSE, mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False),
    "scarce": SPARSE,
    "all sparse": dict(SPARSE, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, layer_norm_epsilon=0.05),
    # transformers makes its cache for as many layers as the encoder has, so the decoder may not have more.
    "more layers": dict(SPARSE, num_encoder_layers=4, num_decoder_layers=3, num_sparse_encoder_layers=2),
    "special tokens": dict(SPARSE, pad_token_id=3, eos_token_id=5, decoder_start_token_id=7, num_experts=3),
    "T5": dict(DENSE, pad_token_id=3, decoder_start_token_id=7),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i < 2 else pytest.mark.slow) for i, name in enumerate(HUGGINGFACE)]
)
def test_a_fixed_capacity_says_what_transformers_says(name, tmp_path):
    config = BASE.replace(**HUGGINGFACE[name])
    params, (ids, mask) = lively_params(config), sources(config)
    save_pretrained(tmp_path, config, params)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    special = {name: getattr(config, name) for name in ("pad_token_id", "decoder_start_token_id")}
    controls = dict(max_new_tokens=NEW, eos_token_id=[config.eos_token_id, *EARLY_ENDS[1:]], **special)
    for search in (dict(), dict(num_beams=BEAMS, num_return_sequences=BEAMS)):
        with torch.inference_mode():
            tensors = dict(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
            theirs = model.generate(**tensors, **controls, **search, output_scores=True, return_dict_in_generate=True)
        ours = generate(SwitchTransformer(config), params, ids, mask, **controls, **search, output_scores=True)
        np.testing.assert_array_equal(ours.sequences, theirs.sequences.numpy())
        if search:
            np.testing.assert_allclose(ours.scores, theirs.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_allclose(ours.step_scores, torch.stack(theirs.scores).numpy(), rtol=1e-4, atol=1e-4)
