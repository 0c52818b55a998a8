"""Ids are those of transformers' T5Tokenizer, from a spiece.model or a tokenizer.json, and the export opens there."""

import io
import json
import sys

import hypothesis.strategies as st
import pytest
import sentencepiece
import transformers
from hypothesis import given, settings

from flax_switch.cli import main
from flax_switch.config import ConfigError
from flax_switch.config.finetuning import FinetuneDataConfig, FinetuneRecipe
from flax_switch.convert import convert, tokenizer
from flax_switch.convert.sentencepiece_proto import KINDS, UNIGRAM, model_proto
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.pretrained import load_pretrained
from flax_switch.workflows.finetune import finetune
from tests.convert import oracle

SENTINELS = 12


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    text = [
        line for i in range(60) for line in (f"The quick brown fox {i} jumps over the lazy dog.", "Façade naïve ﬁne ½ “quotes” — x")
    ]
    text += [f"Switch Transformers route token {i} to one expert; numbers {i * 37} (and punctuation)!" for i in range(60)]
    return Vocabulary.train(text, 120, num_sentinels=SENTINELS)


@pytest.fixture(scope="module")
def theirs(vocabulary, tmp_path_factory):
    """transformers' tokenizer of the files we export."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, contents in tokenizer.vocabulary_files(vocabulary).items():
        if name != "vocabulary.json":
            (folder / name).write_bytes(contents)
    return transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = (
    "", " ", "The quick brown fox.", "  two   spaces ", "tab\tnew\nline\r\n", "numbers 37 (and)!",
    "<extra_id_0>", " <extra_id_0> ", "a<extra_id_0>b", "<extra_id_0><extra_id_1>", "<extra_id_00>",
    "the <extra_id_0> fox <extra_id_1> dog <extra_id_11>", "<extra_id_12> <extra_id_99>", "a </s> b</s>", "<pad> x <unk>",
    "\ufb01 \u00bd \u2460 \uff21", "\u2581literal", "\u200bzero\u00a0width\u3000", "e\u0301 \u00e9",
    "\u65e5\u672c \U0001f600\U0001f600 x",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_t5_tokenizers_sentinels_and_whitespace_included(vocabulary, theirs, text):
    assert isinstance(theirs, transformers.T5Tokenizer)
    assert [*vocabulary.encode(text), vocabulary.eos_id] == theirs(text).input_ids


# Control characters apart: transformers keeps some (U+0085) that SentencePiece's own normaliser, and so ours, takes for spaces.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=4)
PARTS = st.one_of(st.sampled_from(["<extra_id_3>", "</s>", " ", "  ", "fox", "The", "½", "é", "(", "37", "."]), ANY_TEXT)


@given(st.lists(PARTS, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_ids_of_any_text_are_t5_tokenizers_or_an_equally_probable_split(vocabulary, theirs, text):
    mine, expected = vocabulary.encode(text), theirs(text).input_ids[:-1]
    if mine != expected:  # SentencePiece sums scores in float32, tokenizers in float64: exact ties may fall either way
        scores = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
        mine, expected = (sum(scores.GetScore(i) for i in ids if i < vocabulary.num_pieces) for ids in (mine, expected))
        assert mine == pytest.approx(expected, abs=1e-4), text


def test_the_fields_of_a_model_are_those_of_sentencepieces_own_classes(vocabulary):
    from google.protobuf.runtime_version import VersionError

    try:
        from sentencepiece import sentencepiece_model_pb2
    except VersionError as error:
        pytest.skip(f"this sentencepiece's classes refuse this protobuf: {error}")
    theirs = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model)
    ours = model_proto().FromString(vocabulary.model)
    for one, other in ((ours, theirs), (ours.trainer_spec, theirs.trainer_spec), (ours.normalizer_spec, theirs.normalizer_spec)):
        for name in [field.name for field in one.DESCRIPTOR.fields if not field.message_type]:
            assert getattr(one, name) == getattr(other, name), name
    assert [(p.piece, p.score, p.type) for p in ours.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
    assert vars(KINDS) == dict(sentencepiece_model_pb2.ModelProto.SentencePiece.Type.items())
    assert sentencepiece_model_pb2.TrainerSpec.UNIGRAM == UNIGRAM
    ours.trainer_spec.vocab_size = 77
    written = sentencepiece_model_pb2.ModelProto.FromString(ours.SerializeToString())
    theirs.trainer_spec.vocab_size = 77
    assert written == theirs, "what is no field of ours is kept"


def test_a_tokenizer_json_alone_gives_the_same_vocabulary(vocabulary, theirs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)  # it may not be importable beside a protobuf
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert not (tmp_path / "spiece.model").exists()
    loaded = tokenizer.load_vocabulary(tmp_path)
    assert (loaded.num_pieces, loaded.num_sentinels) == (vocabulary.num_pieces, SENTINELS)
    for text in TEXTS:
        assert loaded.encode(text) == vocabulary.encode(text), text
    ids = vocabulary.encode("The quick brown fox")
    assert loaded.decode(ids) == vocabulary.decode(ids)


def test_the_number_of_sentinels_is_found_wherever_it_is_written(vocabulary, tmp_path):
    (tmp_path / "spiece.model").write_bytes(vocabulary.model)
    assert tokenizer.load_vocabulary(tmp_path).num_sentinels == 100
    for values, count in (
        ({"extra_ids": 7}, 7),
        ({"additional_special_tokens": ["<extra_id_0>", {"content": "<extra_id_1>"}, "<other>"]}, 2),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        assert tokenizer.load_vocabulary(tmp_path).num_sentinels == count


def test_a_tokenizer_of_another_kind_is_logged_and_left_out(tmp_path, caplog):
    assert tokenizer.load_vocabulary(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}}))
    assert tokenizer.load_vocabulary(tmp_path) is None
    assert "unigram" in caplog.text


ADDED = ["{", "}", "<new tok>", "the"]


@pytest.fixture(scope="module")
def extended(vocabulary, theirs, tmp_path_factory):
    """transformers' tokenizer with tokens that a user added, and the vocabulary we read from its folder."""
    folder = tmp_path_factory.mktemp("extended")
    for name, contents in tokenizer.vocabulary_files(vocabulary).items():
        if name != "vocabulary.json":
            (folder / name).write_bytes(contents)
    grown = transformers.AutoTokenizer.from_pretrained(folder)
    grown.add_tokens(ADDED)
    grown.add_tokens(["<sep>"], special_tokens=True)
    grown.save_pretrained(folder)
    return grown, tokenizer.load_vocabulary(folder), folder


ADDED_TEXTS = (
    "class {x}", " { the }  x", "the other {{the}}", "a<new tok>b  the<extra_id_3> { y", "\uff5b wide", "a<sep> b</s>", "th\u200be",
    "{",
)  # fmt: skip


@pytest.mark.parametrize("text", [*ADDED_TEXTS, *TEXTS])
def test_added_tokens_have_their_ids_and_their_text(extended, text):
    grown, ours, _ = extended
    ids = grown(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    assert ours.encode_documents([text]) == [ids] or "<extra_id" in text or "</s>" in text
    assert ours.decode(ids, skip_special_tokens=False) == grown.decode(ids)
    assert ours.decode(ids) == grown.decode(ids, skip_special_tokens=True)


def test_added_tokens_survive_our_files_and_open_in_transformers(extended, tmp_path):
    grown, ours, _ = extended
    assert ours.size == len(grown)
    assert ours.sentinel_id(0) == grown.convert_tokens_to_ids("<extra_id_0>")
    ours.save(tmp_path / "ours")
    again = Vocabulary.load(tmp_path / "ours")
    assert again.added == ours.added and again.fingerprint == ours.fingerprint
    (tmp_path / "theirs").mkdir()
    for name, contents in tokenizer.vocabulary_files(ours).items():
        (tmp_path / "theirs" / name).write_bytes(contents)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ADDED_TEXTS:
        assert opened(text, add_special_tokens=False).input_ids == again.encode(text) == ours.encode(text), text


MARK = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [t["normalizer"], {"type": "Lowercase"}]}),
        lambda t: t.update(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True}),
        lambda t: t["pre_tokenizer"]["pretokenizers"].append({"type": "Digits", "individual_digits": True}),
        lambda t: t["added_tokens"][-1].update(lstrip=True),
        lambda t: t["added_tokens"][3].update(rstrip=True),
        lambda t: t["added_tokens"][3].update(single_word=True),
        lambda t: t.update(pre_tokenizer=MARK | {"prepend_scheme": "first"}),
        lambda t: t.update(pre_tokenizer=MARK | {"split": False}),
        lambda t: t.update(pre_tokenizer=t["pre_tokenizer"]["pretokenizers"][1]),
        lambda t: t.update(pre_tokenizer=t["pre_tokenizer"]["pretokenizers"][0]),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t["pre_tokenizer"]["pretokenizers"].reverse(),
        lambda t: t.update(normalizer=None),
        lambda t: t.update(normalizer={"type": "NFKC"}),
        lambda t: t.update(normalizer={"type": "Prepend", "prepend": "\u2581"}),
        lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "fox"}, "content": "dog"}),
        lambda t: t["model"].update(unk_id=3),
        lambda t: t["added_tokens"][4].update(normalized=True),
        lambda t: t["added_tokens"].pop(4),
        lambda t: t["added_tokens"][3].update(id=t["added_tokens"][4]["id"], content="<extra_id_1>")
        or t["added_tokens"][4].update(id=t["added_tokens"][4]["id"] - 1, content="<extra_id_2>"),
    ],
    ids=[
        "lowercase", "more lowercase", "no prefix", "digits", "a token that takes blanks", "blanks after it", "whole words",
        "a prefix at the beginning", "words that are not split", "blanks kept", "no mark", "no pre-tokeniser", "marks first",
        "no normaliser", "NFKC", "a mark as normaliser", "another word", "another unknown token", "a sentinel in normalised text",
        "a sentinel that is a piece", "other ids of sentinels",
    ],
)  # fmt: skip
def test_parts_that_sentencepiece_has_not_give_the_tokenizers_own_ids(extended, tmp_path, change):
    from tokenizers import Tokenizer

    values = json.loads((extended[2] / "tokenizer.json").read_text())
    change(values)
    values["added_tokens"] = [token for token in values["added_tokens"] if "extra_id" in token["content"] or token["id"] < 3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    oracle, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tokenizer.load_vocabulary(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text
    assert ours.encode("<extra_id_0>") == [oracle.token_to_id("<extra_id_0>")]
    ours.save(tmp_path / "saved")
    again = Vocabulary.load(tmp_path / "saved")
    assert again.encode("The quick 37 fox") == ours.encode("The quick 37 fox")
    assert again.decode(ours.encode("quick fox")) == oracle.decode(ours.encode("quick fox"))


@pytest.mark.parametrize("length", [4096, 1_000_000])
def test_a_piece_that_would_end_the_process_is_refused(extended, tmp_path, length):
    values = json.loads((extended[2] / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Lowercase"}  # so that the package tokenizers runs it
    values["model"]["vocab"][5][0] = "x" * length
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    if length > 4096:
        with pytest.raises(ConfigError, match="a piece of 1,000,000 characters, where 4,096 are the most"):
            tokenizer.load_vocabulary(tmp_path)
    else:
        assert tokenizer.load_vocabulary(tmp_path).encode("quick")


def test_text_for_which_a_tokenizer_has_no_piece_is_refused_where_it_knows_no_unknown_one(extended, tmp_path):
    values = json.loads((extended[2] / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Lowercase"}
    values["model"]["unk_id"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    opened = tokenizer.load_vocabulary(tmp_path)
    assert opened.encode("quick")
    for encode in (lambda: opened.encode("\u4e2d"), lambda: opened.encode_documents(["quick", "\u4e2d"])):
        with pytest.raises(ConfigError, match="does not serve for this text: .*unk_id"):
            encode()


def test_added_tokens_whose_ids_have_a_gap_get_those_that_tokenizers_counts(extended, tmp_path):
    from tokenizers import Tokenizer

    values = json.loads((extended[2] / "tokenizer.json").read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != ADDED[0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    oracle, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tokenizer.load_vocabulary(tmp_path)
    for text in ADDED_TEXTS:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text


def test_of_two_tokenizers_in_a_folder_the_one_that_transformers_takes_is_used(vocabulary, theirs, tmp_path, caplog):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(vocabulary.model)
    assert tokenizer.load_vocabulary(tmp_path).fingerprint == vocabulary.fingerprint, "they are the same"
    other = Vocabulary.train([f"Another text of {i} words." for i in range(90)], 30, num_sentinels=SENTINELS)
    (tmp_path / "spiece.model").write_bytes(other.model)
    found, opened = tokenizer.load_vocabulary(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "another tokenizer than spiece.model" in caplog.text
    for text in TEXTS:
        assert found.encode(text) == opened(text, add_special_tokens=False).input_ids == vocabulary.encode(text)


def test_byte_pieces_are_decoded_as_sentencepiece_does():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20), model_writer=model, vocab_size=290, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    ours, oracle = Vocabulary(model.getvalue(), 4), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("caf\u00e9 fox", "\u65e5\u672c \U0001f600", "the fox"):
        ids = ours.encode(text)
        assert ours.decode(ids) == oracle.decode(ids) == text
        assert ours.decode(ids[:-1]) == oracle.decode(ids[:-1])  # half a character, too


def broken_models(good: bytes) -> dict[str, bytes]:
    return {"empty": b"", "cut": good[: len(good) // 2], "zeros": bytes(len(good)), "a page": b"<html>404</html>"}


@pytest.mark.parametrize("kind", ["empty", "cut", "zeros", "a page"])
def test_a_broken_spiece_model_is_an_error_wherever_a_vocabulary_is_needed_or_carried_along(vocabulary, tmp_path, kind, capsys):
    source = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "model")
    (source / "spiece.model").write_bytes(broken_models(vocabulary.model)[kind])
    out = tmp_path / "out"
    recipe = FinetuneRecipe(data=FinetuneDataConfig(train="examples.tsv"))
    for use in (
        lambda: tokenizer.load_vocabulary(source),
        lambda: load_pretrained(source),
        lambda: convert(source, out, to="flax_switch"),
        lambda: convert(source, out, to="huggingface"),
        lambda: finetune(recipe, out, init=str(source)),
    ):
        with pytest.raises(ConfigError, match="The vocabulary in .* cannot be used: .*damaged one"):
            use()
    assert main(["generate", "--checkpoint", str(source), "--input", __file__]) == 2
    assert "cannot be used: This is no SentencePiece model" in capsys.readouterr().err
    assert not out.exists()
