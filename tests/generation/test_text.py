"""Lines in: text or JSON, with what is wrong told by number; and the buckets they are padded to."""

from types import SimpleNamespace

import pytest

from flax_switch.config import ConfigError
from flax_switch.generation.text import bucket_of, generate_lines, read_lines


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
    vocabulary = SimpleNamespace(encode=lambda text: [5] * len(text))
    pretrained = SimpleNamespace(vocabulary=vocabulary, config=SimpleNamespace(eos_token_id=1, vocab_size=4))
    results = generate_lines(pretrained, read_lines(["abc", "x" * 9, "{"]), max_source_length=8)
    assert [result["line"] for result in results] == [1, 2, 3]
    assert "past the model's 4" in results[0]["error"]
    assert "10 tokens exceed max_source_length=8" in results[1]["error"]
    assert "malformed JSON" in results[2]["error"]


def test_a_checkpoint_without_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="no vocabulary"):
        generate_lines(SimpleNamespace(vocabulary=None, config=None), [])
