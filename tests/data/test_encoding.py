"""A vocabulary is called as transformers' T5 tokenizer is, and gives what it gives."""

import numpy as np
import pytest

from flax_switch.config import ConfigError
from flax_switch.convert import tokenizer
from flax_switch.data import Vocabulary

TEXTS = ["The quick brown fox.", "a <extra_id_0> dog", "", "jumps over the lazy dog and the fox 1 2 3"]
TARGETS = ["fox", "lazy", "The", "a b"]


@pytest.fixture(scope="module")
def spoken() -> Vocabulary:
    return Vocabulary.train([f"The quick brown fox {i} jumps over the lazy dog, and a b." for i in range(80)], 48, num_sentinels=6)


@pytest.fixture(scope="module")
def theirs(spoken, tmp_path_factory):
    """transformers' tokenizer of the files we export."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, contents in tokenizer.vocabulary_files(spoken).items():
        if name != "vocabulary.json":
            (folder / name).write_bytes(contents)
    return transformers.AutoTokenizer.from_pretrained(folder)


OPTIONS = [
    dict(),
    dict(add_special_tokens=False),
    dict(padding=True),
    dict(padding="longest", pad_to_multiple_of=8),
    dict(padding="max_length", max_length=40),
    dict(padding="max_length", max_length=9, truncation=True),
    dict(padding="max_length", max_length=6),  # longer rows stay
    dict(truncation=True, max_length=5),
    dict(truncation=True, max_length=1),
    dict(truncation=True, max_length=5, add_special_tokens=False),
    dict(padding=True, truncation="longest_first", max_length=12),
    dict(padding=False, truncation=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", [dict(text=TEXTS), dict(text=TEXTS, text_target=TARGETS), dict(text_target=TARGETS)], ids=list)
def test_a_call_gives_what_t5s_tokenizer_gives(spoken, theirs, given, options):
    assert dict(spoken(**given, **options)) == dict(theirs(**given, **options))


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[4:6], ids=str)
def test_a_single_text_gives_a_single_row(spoken, theirs, options):
    assert dict(spoken(TEXTS[0], **options)) == dict(theirs(TEXTS[0], **options))
    assert spoken(TEXTS[0], text_target="fox").labels == spoken("fox").input_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(padding="max_length", max_length=-1), "max_length must not be negative"),
        (dict(truncation=True, max_length=-1), "max_length must not be negative"),
        (dict(padding=True, pad_to_multiple_of=-8), "pad_to_multiple_of must be at least 1"),
    ],
    ids=str,
)
def test_a_length_that_cannot_be_is_refused_by_name(spoken, options, words):
    with pytest.raises(ConfigError, match=words):
        spoken(TEXTS, **options)


def test_arrays_are_what_lists_say(spoken, theirs):
    found = spoken(TEXTS, text_target=TARGETS, padding=True, return_tensors="np")
    expected = theirs(TEXTS, text_target=TARGETS, padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask", "labels"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])
    assert spoken(TEXTS[0], return_tensors="np").input_ids.shape == (1, len(spoken(TEXTS[0]).input_ids))


@pytest.mark.parametrize("skip", [True, False])
def test_batch_decode_gives_the_texts_back(spoken, theirs, skip):
    import torch

    ids = spoken(TEXTS, padding=True, return_tensors="np").input_ids
    expected = theirs.batch_decode(ids, skip_special_tokens=skip)
    for sequences in (ids, ids.tolist(), torch.tensor(ids)):
        assert spoken.batch_decode(sequences, skip_special_tokens=skip) == expected
    assert [spoken.decode(row, skip_special_tokens=skip) for row in ids] == expected
    if skip:
        assert expected == ["The quick brown fox.", "a dog", "", TEXTS[3]]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (TEXTS, dict(max_length=3), "max_length=3 does nothing alone; add truncation=True"),
        (TEXTS, dict(truncation=True), "truncation to which length"),
        (TEXTS, dict(padding="max_length"), "padding to which length"),
        (TEXTS, dict(padding="longst"), "Did you mean 'longest'"),
        (TEXTS, dict(truncation="only_second"), "truncation must be True or False"),
        (TEXTS, dict(truncation=True, max_length=0), "no room for the EOS token"),
        (TEXTS, dict(return_tensors="pt"), "return_tensors='pt' is not made here; 'np' is"),
        (TEXTS, dict(return_tensors="np"), "input_ids has rows of different lengths, which no array holds; pass padding=True"),
        (5, {}, "takes a text or a list of texts; this is a int"),
        (["a", None], {}, "a list with a NoneType in it"),
        ([["a", "b"]], {}, "a list with a list in it"),
        (None, {}, "Give a text, or text_target"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_sentence(spoken, given, options, message):
    with pytest.raises(ConfigError, match=message):
        spoken(given, **options)


def test_one_row_for_batch_decode_and_a_name_that_is_not_there_are_refused(spoken):
    with pytest.raises(ConfigError, match="for one row use decode"):
        spoken.batch_decode([5, 6, 7])
    with pytest.raises(AttributeError, match="has no labels; it has input_ids, attention_mask"):
        _ = spoken("fox").labels
