"""The vocabulary: T5's ids, sentinels, encoding and decoding, and what is refused."""

import io

import pytest
import sentencepiece

from flax_switch.config import ConfigError
from flax_switch.data import Vocabulary
from flax_switch.data.vocabulary import MODEL_FILE


def model_with(documents, **settings) -> bytes:
    written = io.BytesIO()
    settings = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | settings
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(documents), model_writer=written, vocab_size=100, minloglevel=2, **settings
    )
    return written.getvalue()


def test_sentinels_descend_from_the_highest_id_and_sizes_add_up(vocabulary):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert (vocabulary.num_pieces, vocabulary.size, vocabulary.padded_size) == (128, 148, 256)
    assert [vocabulary.sentinel_id(i) for i in (0, 1, 19)] == [147, 146, 128]
    assert Vocabulary(vocabulary.model, 0).padded_size == 128
    with pytest.raises(ConfigError, match="There are 20 sentinels; <extra_id_20>"):
        vocabulary.sentinel_id(20)


def test_text_survives_encoding_and_decoding(vocabulary, documents):
    for document, ids in zip(documents[:50], vocabulary.encode_documents(documents[:50]), strict=True):
        assert vocabulary.decode(ids) == document
        assert vocabulary.encode(document) == ids
        assert vocabulary.eos_id not in ids and max(ids) < vocabulary.num_pieces


def test_sentinels_in_a_text_become_their_ids_whatever_the_space_around_them(vocabulary):
    expected = [*vocabulary.encode("bake"), 147, *vocabulary.encode("lomi"), 146]
    assert vocabulary.encode("bake <extra_id_0> lomi <extra_id_1>") == expected
    assert vocabulary.encode("bake<extra_id_0>lomi<extra_id_1>") == expected
    assert vocabulary.decode(expected) == "bake lomi"
    assert vocabulary.decode([*expected, 1, 0], skip_special_tokens=False) == "bake<extra_id_0> lomi<extra_id_1></s><pad>"


def test_a_sentinel_beyond_the_vocabulary_s_is_plain_text(vocabulary):
    assert max(vocabulary.encode("ba <extra_id_20> ke <extra_id_007>")) < vocabulary.num_pieces


def test_corpus_text_never_yields_sentinels(vocabulary):
    assert max(vocabulary.encode_documents(["ba <extra_id_0> ke"])[0]) < vocabulary.num_pieces


def test_ids_past_the_end_decode_to_nothing_or_to_unk(vocabulary):
    assert vocabulary.decode([200]) == ""
    assert vocabulary.decode([200], skip_special_tokens=False) == "<unk>"


def test_saving_and_loading_keeps_everything(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert (loaded.fingerprint, loaded.size, loaded.model) == (vocabulary.fingerprint, vocabulary.size, vocabulary.model)
    from_file = Vocabulary.from_sentencepiece(tmp_path / MODEL_FILE, 20)
    assert from_file.fingerprint == vocabulary.fingerprint
    assert Vocabulary.from_sentencepiece(vocabulary.model, 21).fingerprint != vocabulary.fingerprint


def test_training_twice_gives_the_same_vocabulary(vocabulary, documents):
    assert Vocabulary.train(documents, 128, num_sentinels=20).fingerprint == vocabulary.fingerprint


def test_files_of_two_vocabularies_are_refused(vocabulary, documents, tmp_path):
    vocabulary.save(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(model_with(documents))
    with pytest.raises(ConfigError, match="do not belong together"):
        Vocabulary.load(tmp_path)
    with pytest.raises(ConfigError, match="holds no saved vocabulary"):
        Vocabulary.load(tmp_path / "nowhere")
    (tmp_path / MODEL_FILE).write_bytes(vocabulary.model[:100])
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no saved vocabulary: .* damaged one"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(pad_id=-1, eos_id=1, unk_id=0, bos_id=2), "pad id none"),
        (dict(pad_id=3), "pad id 3"),
        (dict(eos_id=3), "EOS id 3"),
        (dict(user_defined_symbols=["<extra_id_0>"]), "already holds a piece <extra_id_0>"),
    ],
)
def test_a_model_whose_ids_do_not_fit_is_refused_with_the_reason(documents, settings, reason):
    if settings.get("pad_id") == 3:
        settings["eos_id"], settings["unk_id"] = 1, 0
    with pytest.raises(ConfigError, match=reason):
        Vocabulary.from_sentencepiece(model_with(documents, **settings))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no SentencePiece model"):
        Vocabulary.from_sentencepiece(b"something else")
    with pytest.raises(ConfigError, match="Cannot read .*nothing.model: No such file"):
        Vocabulary.from_sentencepiece(tmp_path / "nothing.model")


def test_training_says_what_is_wrong(documents):
    with pytest.raises(ConfigError, match="empty corpus"):
        Vocabulary.train([" ", ""], 100)
    with pytest.raises(ConfigError, match=r"A vocabulary of 5000 pieces cannot be trained: this corpus has text for \d+ at most"):
        Vocabulary.train(documents, 5000)
    with pytest.raises(ConfigError, match="cannot be trained"):
        Vocabulary.train(documents, 5)


def test_an_error_in_reading_the_corpus_is_not_taken_for_one_of_training():
    def documents():
        yield "ba ke lo"
        raise ConfigError("corpus.txt, line 2: not UTF-8")

    with pytest.raises(ConfigError, match="^corpus.txt, line 2: not UTF-8$"):
        Vocabulary.train(documents(), 100)
