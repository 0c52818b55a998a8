"""Token for token as transformers: greedy, beams, and every control, with the same weights."""

import numpy as np
import pytest
import torch

from flax_switch.generation.generate import generate


def theirs(pair, ids, mask, **controls):
    if "decoder_input_ids" in controls:
        controls["decoder_input_ids"] = torch.from_numpy(np.asarray(controls["decoder_input_ids"], np.int64))
    with torch.inference_mode():
        return pair.torch.generate(
            torch.from_numpy(ids.astype(np.int64)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            return_dict_in_generate=True,
            output_scores=True,
            **controls,
        )


def assert_same(pair, ids, mask, **controls):
    controls = {"max_new_tokens": 12, **controls}
    expected = theirs(pair, ids, mask, **controls)
    output = generate(pair.model, pair.params, ids, mask, **controls)
    np.testing.assert_array_equal(output.sequences, expected.sequences.numpy())
    if controls.get("num_beams", 1) > 1:
        np.testing.assert_allclose(output.scores, expected.sequences_scores.numpy(), atol=1e-4)
    else:
        assert output.scores is None
    return output


def test_greedy_search_is_transformers_and_pads_with_pad(trained, sources):
    sequences = assert_same(trained, *sources).sequences
    ended = [list(row).index(1) for row in sequences if 1 in row]
    assert len(set(ended)) > 1, "rows that end at different steps"
    for row in sequences:
        if 1 in row:
            assert (row[list(row).index(1) + 1 :] == 0).all()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_beams_are_transformers_for_every_length_penalty(trained, sources, num_beams, early_stopping):
    for length_penalty in (0.0, 1.0, 2.0, -1.0):
        assert_same(trained, *sources, num_beams=num_beams, early_stopping=early_stopping, length_penalty=length_penalty)


def test_several_beams_are_returned_best_first_and_padded_with_eos(trained, sources):
    output = assert_same(trained, *sources, num_beams=4, num_return_sequences=3)
    scores = output.scores.reshape(-1, 3)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (output.sequences[:, 1:] != 0).all()


CONTROLS = {
    "min_new_tokens": dict(min_new_tokens=10),
    "repetition_penalty": dict(repetition_penalty=1.7),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "encoder_no_repeat_ngram_size": dict(encoder_no_repeat_ngram_size=1),
    "bad_words_ids": dict(bad_words_ids=[[5], [24, 29], [9], [33, 34, 35], [1]]),
    "suppress_tokens": dict(suppress_tokens=[5, 6, 7, 20, 21]),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(3, 30))),
    "forced_bos_token_id": dict(forced_bos_token_id=9, begin_suppress_tokens=list(range(3, 30))),
    "forced_eos_token_id": dict(forced_eos_token_id=1, max_new_tokens=5, min_new_tokens=5),
    "eos_token_id": dict(eos_token_id=[1, 20, 21, 22, 23, 24]),
    "decoder_input_ids": dict(decoder_input_ids=[[9, 12, 7]] * 6),
}


@pytest.mark.parametrize("num_beams", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_is_transformers(trained, sources, name, num_beams):
    assert_same(trained, *sources, **CONTROLS[name], num_beams=num_beams)


def test_every_control_makes_a_difference_to_these_sources(trained, sources):
    plain = theirs(trained, *sources, max_new_tokens=12).sequences.numpy()
    same = [
        name
        for name, controls in CONTROLS.items()
        if np.array_equal(theirs(trained, *sources, **{"max_new_tokens": 12, **controls}).sequences.numpy(), plain)
    ]
    assert same == []


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "controls",
    [
        dict(no_repeat_ngram_size=1),
        dict(no_repeat_ngram_size=3, repetition_penalty=0.7),
        dict(encoder_no_repeat_ngram_size=2, min_new_tokens=11),
        dict(encoder_no_repeat_ngram_size=20),
        dict(bad_words_ids=[list(range(3, 30))], max_new_tokens=4),
        dict(max_new_tokens=1),
        dict(forced_bos_token_id=9, decoder_input_ids=[[9, 12]] * 6),
        dict(begin_suppress_tokens=list(range(3, 30)), decoder_input_ids=[[9, 12]] * 6),
        dict(decoder_input_ids=[[0, 9], [0, 8], [5, 9], [0, 9], [0, 9], [0, 9]]),
        dict(pad_token_id=5),
        dict(decoder_start_token_id=7),
    ],
    ids=str,
)
def test_odd_combinations_are_transformers(trained, sources, controls, num_beams):
    assert_same(trained, *sources, **controls, num_beams=num_beams)


@pytest.mark.slow
def test_a_scarce_capacity_drops_in_the_source_and_the_prefix_but_never_in_single_steps(scarce, sources):
    prefix = np.random.default_rng(3).integers(3, 48, (6, 5))
    for controls in (dict(), dict(num_beams=3), dict(decoder_input_ids=prefix), dict(decoder_input_ids=prefix, num_beams=2)):
        assert_same(scarce, *sources, **controls)


def test_without_a_mask_padding_is_masked(trained, sources):
    ids, mask = sources
    expected = theirs(trained, ids, mask, max_new_tokens=12).sequences.numpy()
    np.testing.assert_array_equal(generate(trained.model, trained.params, ids, max_new_tokens=12).sequences, expected)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_scores_of_every_step_are_transformers(trained, sources, num_beams):
    controls = dict(max_new_tokens=6, num_beams=num_beams, repetition_penalty=1.3, suppress_tokens=[7])
    expected = theirs(trained, *sources, **controls)
    output = generate(trained.model, trained.params, *sources, output_scores=True, **controls)
    np.testing.assert_allclose(output.step_scores, torch.stack(expected.scores).numpy(), atol=2e-4)
