"""Lines in: text or JSON, with what is wrong told by number; and the buckets they are padded to."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from architectures import BASE, lively_params

from flax_switch.config import ConfigError
from flax_switch.generation import text
from flax_switch.generation.generate import GenerationOutput, generate
from flax_switch.generation.text import bucket_of, generate_batches, generate_lines, read_lines
from flax_switch.nn.transformer import SwitchTransformer


def test_text_and_json_lines_are_read_with_their_numbers():
    lines = read_lines(["plain\n", "\n", '{"text": "a {b}"}\n', '{"src": "c"}\n', '{"text": \n'])
    assert [(line.number, line.text) for line in lines[:2]] == [(1, "plain"), (3, "a {b}")]
    assert "no text under 'text'; the fields are: src" in lines[2].error
    assert lines[3].number == 5
    assert "malformed JSON" in lines[3].error
    assert read_lines(['{"src": "c"}'], field="src")[0].text == "c"


def test_buckets_are_powers_of_two_up_to_the_longest():
    assert [bucket_of(n, 300) for n in (1, 16, 17, 129, 300)] == [16, 16, 32, 256, 300]


def test_lines_that_cannot_be_used_are_results_in_their_place():
    vocabulary = SimpleNamespace(encode_source=lambda text: [5] * len(text))
    pretrained = SimpleNamespace(vocabulary=vocabulary, config=BASE.replace(vocab_size=4))
    results = generate_lines(pretrained, read_lines(["abc", "x" * 9, "{"]), max_source_length=8)
    assert [result["line"] for result in results] == [1, 2, 3]
    assert "past the model's 4" in results[0]["error"]
    assert "10 tokens exceed max_source_length=8" in results[1]["error"]
    assert "malformed JSON" in results[2]["error"]


def test_a_checkpoint_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="no vocabulary"):
        generate_lines(SimpleNamespace(vocabulary=None, config=None), [])


# --- each line's outputs are its own


class Letters:
    """A vocabulary of letters, from id 10 on."""

    languages: ClassVar = {}

    def encode(self, text):
        return [10 + ord(letter) - ord("a") for letter in text]

    encode_source = encode

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(int(i) - 10 + ord("a")) for i in ids)


def pretrained(model=None, params=None):
    return SimpleNamespace(vocabulary=Letters(), config=BASE, model=model, params=params)


def lines_of(lengths, seed=0):
    """Lines of letters of these lengths; they lie in several buckets."""
    rng = np.random.default_rng(seed)
    return read_lines(["".join(rng.choice(list("abcdefghijklmnopqrst"), n)) for n in lengths])


LENGTHS = (3, 40, 1, 15, 16, 17, 30, 2, 63, 9, 8, 33, 5)


def reversing(num_return_sequences, calls):
    """In place of `generate`: every row backwards, then a letter for each of its outputs; the score is the sum of the row's ids."""

    def stub(model, params, ids, mask, *, seed, **controls):
        calls.append((ids.shape, tuple(seed)))
        rows, scores = [], []
        for row, real in zip(ids, mask, strict=True):
            tokens = row[real == 1][::-1].tolist()  # EOS comes first: it is not shown
            rows += [[0, *tokens, 10 + k] for k in range(num_return_sequences)]
            scores += [sum(tokens) - k / 8 for k in range(num_return_sequences)]
        longest = max(map(len, rows))
        sequences = np.array([row + [0] * (longest - len(row)) for row in rows])
        return GenerationOutput(sequences, np.array(scores))

    return stub


@pytest.mark.parametrize("num_return_sequences", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_output_and_scores_of_a_line_are_of_its_own_text(monkeypatch, batch_size, num_return_sequences):
    calls, finished = [], []
    monkeypatch.setattr(text, "generate", reversing(num_return_sequences, calls))
    lines = lines_of(LENGTHS)
    lines[4:4] = read_lines(["x" * 80, '{"a": 1}'])  # neither can be used
    results = generate_lines(
        pretrained(), lines, batch_size=batch_size, max_source_length=64, on_batch=lambda *numbers: finished.append(numbers)
    )
    assert len(results) == len(LENGTHS) + 2
    for line, result in zip(lines, results, strict=True):
        assert result["line"] == line.number
        if line in lines[4:6]:
            assert result.keys() == {"line", "error"}
            continue
        sum_of_ids = sum(Letters().encode(line.text)) + 1
        assert result["input"] == line.text
        assert result["outputs"] == [line.text[::-1] + "abc"[k] for k in range(num_return_sequences)]
        assert result["scores"] == [sum_of_ids - k / 8 for k in range(num_return_sequences)]
    assert {shape for shape, _ in calls} == {(batch_size, length) for length in (16, 32, 64)}
    assert sum(lines for lines, _ in finished) == len(LENGTHS)
    letters = sum(n + 2 for n in LENGTHS)  # EOS and the letter that tells outputs apart
    assert sum(tokens for _, tokens in finished) == num_return_sequences * letters


def test_a_source_s_seed_comes_from_its_number_and_the_seed_alone(monkeypatch):
    def seeds(batch_size, seed, numbers):
        calls, by_number = [], {}
        monkeypatch.setattr(text, "generate", reversing(1, calls))
        sources = [(i, [10] * LENGTHS[i]) for i in numbers]
        batches = generate_batches(None, None, sources, batch_size=batch_size, longest=64, seed=seed)
        for (found, *_), (_, used) in zip(list(batches), calls, strict=True):
            by_number |= dict(zip(found, used, strict=False))
        return by_number

    some = seeds(3, 5, range(13))
    assert len(set(some.values())) == 13
    assert seeds(4, 5, range(12, -1, -1)) == some
    assert not set(seeds(3, 6, range(13)).values()) & set(some.values())
    with pytest.raises(ConfigError, match="seed must be an integer of at least 0"):
        seeds(3, -1, range(2))


def test_shuffled_lines_have_the_outputs_of_their_lines_with_a_real_model():
    model, params = SwitchTransformer(BASE), lively_params(BASE)
    lines = lines_of((3, 20, 5, 9, 25, 2, 12))
    options = dict(batch_size=3, max_source_length=32, max_new_tokens=5, num_beams=2, num_return_sequences=2)
    results = generate_lines(pretrained(model, params), lines, **options)
    assert len({tuple(result["outputs"]) for result in results}) >= 6, "lines that are answered alike test nothing"
    order = [4, 1, 6, 0, 2, 5, 3]
    shuffled = generate_lines(pretrained(model, params), [lines[i] for i in order], **options)
    for i, result in zip(order, shuffled, strict=True):
        assert {name: result[name] for name in ("line", "input", "outputs")} == {
            name: results[i][name] for name in ("line", "input", "outputs")
        }
        np.testing.assert_allclose(result["scores"], results[i]["scores"], rtol=1e-5)
    ids = np.array([[*Letters().encode(lines[1].text), 1]])
    alone = generate(model, params, ids, max_new_tokens=5, num_beams=2, num_return_sequences=2)
    np.testing.assert_allclose(results[1]["scores"], alone.scores, rtol=1e-5)


def test_a_lines_draws_follow_its_number(monkeypatch):
    """The turns of a conversation, each alone, draw what lines with the same numbers draw in one batch, and each otherwise."""

    def seeds(batches):
        calls = []
        monkeypatch.setattr(text, "generate", reversing(1, calls))
        for lines in batches:
            generate_lines(pretrained(), lines, batch_size=len(lines), seed=5)
        return [seed for _, batch in calls for seed in batch]

    lines = [text.Line(number, "abc") for number in (1, 2, 7)]
    apart = seeds([[line] for line in lines])
    assert apart == seeds([lines]) and len(set(apart)) == 3
