"""ByT5's vocabulary gives the ids and texts of transformers' ByT5Tokenizer, and is kept in runs and folders."""

import json

import hypothesis
import jax
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

from flax_switch import ConfigError, SwitchConfig, load_pretrained, save_pretrained
from flax_switch.convert import convert
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.data.byte_vocabulary import ByteVocabulary
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer

THEIRS = transformers.ByT5Tokenizer()
OURS = ByteVocabulary.with_sentinels()
MALFORMED = ([], {"extra_ids": 10**9}, {"extra_ids": -1}, {"extra_special_tokens": 5}, {"additional_special_tokens": {"a": 1}})


@pytest.mark.parametrize("values", [*MALFORMED, {"additional_special_tokens": [3, None]}], ids=str)
def test_settings_that_cannot_be_are_one_error(values, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer_config.json"):
        ByteVocabulary(json.dumps(values).encode())


def test_a_sentinel_of_thousands_of_digits_is_text():
    for text in ("<extra_id_" + "1" * 5000 + ">", "<extra_id_1\u0661>"):
        assert OURS.decode(OURS.encode(text)) == text
        assert len(OURS.encode(text)) == len(text.encode())


PIECES = (
    "</s>",
    "<pad>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_124>",
    "<extra_id_125>",
    "<extra_id_07>",
    " ",
    "  ",
    "\n",
    "\u2003",
    "é",
)


@hypothesis.given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join))
@hypothesis.example("a </s> b<extra_id_1> c")
@hypothesis.settings(max_examples=300, deadline=None)
def test_ids_and_texts_are_those_of_transformers(text):
    text = text.encode("utf-8", "ignore").decode()  # transformers raises for half a surrogate pair
    ids = OURS.encode(text)
    assert ids == THEIRS(text, add_special_tokens=False).input_ids
    for skip in (True, False):
        assert OURS.decode(ids, skip_special_tokens=skip) == THEIRS.decode(ids, skip_special_tokens=skip)


@hypothesis.given(st.lists(st.integers(0, 383), max_size=12), st.booleans())
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_in_transformers(ids, skip):
    assert OURS.decode(ids, skip_special_tokens=skip) == THEIRS.decode(ids, skip_special_tokens=skip)


def test_sizes_sentinels_and_documents():
    assert (OURS.size, OURS.padded_size, OURS.sentinel_id(0), OURS.sentinel_id(124)) == (len(THEIRS), 384, 259, 383)
    assert OURS.encode_documents(["é</s>", ""]) == [[198, 172, *(ord(c) + 3 for c in "</s>")], []]
    batch = OURS(["abc", "é"], padding=True)
    np.testing.assert_array_equal(batch["input_ids"], THEIRS(["abc", "é"], padding=True)["input_ids"])


@pytest.mark.parametrize(
    ("values", "sentinels"),
    [({}, 125), ({"extra_ids": 7}, 7), ({"extra_ids": 0, "extra_special_tokens": ["<extra_id_0>", "<extra_id_1>"]}, 2)],
)
def test_the_number_of_sentinels_is_what_transformers_takes_it_for(values, sentinels, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", **values}))
    found = load_vocabulary(tmp_path)
    assert isinstance(found, ByteVocabulary) and found.num_sentinels == sentinels
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == found.size


def test_it_survives_a_run_and_both_conversions(tmp_path):
    OURS.save(tmp_path / "run")
    again = Vocabulary.load(tmp_path / "run")
    assert isinstance(again, ByteVocabulary) and again.fingerprint == OURS.fingerprint
    config = SwitchConfig(
        vocab_size=384, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, capacity_mode="dropless",
    )  # fmt: skip
    params = init_params(SwitchTransformer(config), jax.random.key(0))
    save_pretrained(str(tmp_path / "hf"), config, params, OURS)
    convert(tmp_path / "hf", tmp_path / "ours", to="flax_switch")
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    assert type(transformers.AutoTokenizer.from_pretrained(tmp_path / "back")).__name__ == "ByT5Tokenizer"
    model = load_pretrained(tmp_path / "back")
    assert isinstance(model.vocabulary, ByteVocabulary)
    output = model.generate("né", max_new_tokens=4)
    assert output.texts == (OURS.decode([i for i in output.sequences[0] if i > 2], skip_special_tokens=False),)


def test_bytes_beside_a_sentencepiece_model_are_refused(tmp_path):
    OURS.save(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match="names ByT5Tokenizer, whose tokens are bytes, beside a spiece.model"):
        load_vocabulary(tmp_path)
