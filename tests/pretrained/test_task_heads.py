"""Heads of tasks on models of our own, sparse ones: what they say of texts, that they are kept to the bit, and what is refused."""

import json

import jax
import numpy as np
import pytest

import flax_switch as fs
from flax_switch import ConfigError, cli, load_pretrained, save_pretrained
from flax_switch.config import ExperimentConfig
from flax_switch.config.heads import HEADS
from flax_switch.convert.canonical import canonical_shapes, flatten
from flax_switch.data import Vocabulary
from flax_switch.data.words import encode_context, encode_words, words_of
from flax_switch.export.programs import programs
from flax_switch.inspection.routing import explore
from flax_switch.nn.heads import build_model
from flax_switch.nn.init import init_params, logical_axes
from flax_switch.pretrained.tasks import span
from flax_switch.workflows.push import make_repository

TEXTS = ["the cat sat on the mat.", "a dog, a cat", "mat"]
LABELS = {
    "classification": ("bad", "good"),
    "multi_label_classification": ("bad", "good"),
    "token_classification": ("O", "B-X", "I-X"),
}
TASKS = [head for head in HEADS if head != "language_model"]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train([*TEXTS, "question: a cat context: a mat"] * 20, 26, num_sentinels=2)


@pytest.fixture(scope="module")
def plain(vocabulary, tmp_path_factory):
    """A sparse language model in a folder."""
    config = fs.SwitchConfig(
        vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, capacity_mode="dropless",
        ignore_padding_tokens=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    return save_pretrained(tmp_path_factory.mktemp("plain") / "model", config, params, vocabulary, "flax_switch")


@pytest.mark.parametrize("head", TASKS)
def test_a_new_head_is_the_same_to_the_bit_after_a_folder_of_ours(plain, head, tmp_path):
    ours = load_pretrained(plain, head=head, labels=LABELS.get(head, ()))
    before, found = flatten(load_pretrained(plain).params), flatten(ours.params)
    assert {path: leaf.shape for path, leaf in found.items()} == canonical_shapes(ours.config)
    assert all(np.array_equal(leaf, before[path]) for path, leaf in found.items() if path in before)
    assert ("decoder" in ours.params) == HEADS[head].reads_decoder
    again = load_pretrained(ours.save_pretrained(tmp_path / "saved", "flax_switch"))
    assert again.config == ours.config and again.architecture == head
    assert all(np.array_equal(leaf, found[path]) for path, leaf in flatten(again.params).items())
    scanned = load_pretrained(tmp_path / "saved", scan_layers=True)
    ids = [[5, 6, 7, 1]]
    np.testing.assert_allclose(scanned(ids).logits, ours(ids).logits, atol=1e-5)
    if head == "embedding":  # which is transformers' encoder
        assert load_pretrained(ours.save_pretrained(tmp_path / "theirs")).architecture == "encoder"
    else:
        with pytest.raises(ConfigError, match=f"no SwitchTransformers with a head for {head}; keep the model in the format"):
            ours.save_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("head", TASKS)
def test_every_parameter_of_a_head_has_axes_and_a_quantised_model_keeps_it(plain, head):
    ours = load_pretrained(plain, head=head, labels=LABELS.get(head, ()))
    axes = flatten(logical_axes(build_model(ours.config)))
    assert {path: len(names) for path, names in axes.items()} == {path: leaf.ndim for path, leaf in flatten(ours.params).items()}
    small = flatten(fs.quantize(ours, "int8").params)
    kept = [path for path in small if not path.startswith(("encoder/", "decoder/", "token_embedder/"))]
    assert all(np.array_equal(small[path], flatten(ours.params)[path]) for path in kept)
    assert len(kept) == {"classification": 4, "multi_label_classification": 4, "regression": 4, "embedding": 0}.get(head, 2)


def test_classes_and_numbers_of_texts_are_those_of_a_call_whatever_the_batch(plain, vocabulary):
    ours = load_pretrained(plain, head="classification", labels=LABELS["classification"], seed=3)
    found = ours.classify(TEXTS, batch_size=2)
    for text, one in zip(TEXTS, found, strict=True):
        logits = np.asarray(ours([[*vocabulary.encode(text), 1]]).logits)[0]
        np.testing.assert_allclose([one.scores[label] for label in ours.config.labels], jax.nn.softmax(logits), atol=1e-5)
        assert one.label == ours.config.labels[logits.argmax()] and one.score == max(one.scores.values())
    regression = load_pretrained(plain, head="regression", seed=3)
    np.testing.assert_allclose(
        regression.regress(TEXTS), [regression([[*vocabulary.encode(t), 1]]).logits[0, 0] for t in TEXTS], atol=1e-5
    )


def test_a_word_has_the_tag_of_its_first_token(plain, vocabulary):
    ours = load_pretrained(plain, head="token_classification", labels=LABELS["token_classification"], seed=1)
    text = TEXTS[0]
    (found,) = ours.tag(text)
    assert [one.word for one in found] == text.split()
    assert ours.tag([text.split()]) == [found]
    best = np.asarray(ours([[*vocabulary.encode(text), 1]]).logits)[0].argmax(-1)
    firsts = np.cumsum([0, *map(len, encode_words(text.split(), vocabulary))])[:-1]
    assert [one.label for one in found] == [ours.config.labels[best[i]] for i in firsts]


def test_a_span_is_cut_out_of_the_context(plain, vocabulary):
    ours = load_pretrained(plain, head="question_answering", seed=1)
    contexts = ["the cat  sat on the mat.", "a dog, a cat"]
    for context, found in zip(contexts, ours.answer(["a cat", "mat"], contexts), strict=True):
        assert context[found.start : found.end] == found.text and found.text.strip()
    encoded = encode_context("a cat", contexts[0], vocabulary)
    assert encoded.ids == vocabulary.encode(f"question: a cat context: {contexts[0]}")
    first, last = encoded.tokens_of(contexts[0].index("sat"), contexts[0].index("sat") + 3)
    logits = np.zeros((len(encoded.ids) + 1, 2), np.float32)
    logits[first, 0] = logits[last, 1] = logits[0, 0] = logits[-1, 1] = 9.0  # the question and EOS are no places for an answer
    assert span(logits, encoded.characters, contexts[0]).text == "sat"
    logits[last, 1] = 0.0
    logits[first - 1, 1] = 8.0  # an end before the start is none
    assert span(logits, encoded.characters, contexts[0]).start == contexts[0].index("sat")


def test_words_end_to_end_are_the_ids_of_the_text(vocabulary):
    for text in TEXTS:
        assert sum(encode_words([word.text for word in words_of(text)], vocabulary), []) == vocabulary.encode(text)


def test_embeddings_are_normalised_means_over_real_tokens(plain, vocabulary):
    whole, encoder = load_pretrained(plain), load_pretrained(plain, head="embedding")
    found = whole.embed(TEXTS, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=1e-5)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = [*vocabulary.encode(text), 1]
        mean = np.asarray(whole.encode([ids]).last_hidden_state)[0].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
        padded, mask = [[*ids, 0, 0, 0]], [[1] * len(ids) + [0] * 3]
        np.testing.assert_allclose(encoder(padded, mask).logits[0], vector, atol=1e-5)


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(head="classification"), "needs the names of its classes"),
        (dict(head="classification", labels=("a",)), "two or more"),
        (dict(head="classification", labels=("a", "b", "a")), "names 'a' twice"),
        (dict(head="embedding", labels=("a", "b")), "has no labels; leave labels="),
        (dict(head="regression", architecture="decoder_only"), "reads an encoder"),
        (dict(contrastive_temperature=0.0), "contrastive_temperature must be positive"),
        (dict(classifier_dropout=1.0), "classifier_dropout must lie in"),
    ],
)
def test_a_config_refuses_a_head_that_cannot_be(settings, why):
    with pytest.raises(ConfigError, match=why):
        fs.SwitchConfig(**settings)


def test_a_model_without_the_head_says_how_to_open_it(plain, vocabulary):
    model = load_pretrained(plain)
    asked = {"classify": TEXTS, "regress": TEXTS, "tag": TEXTS}
    for name, texts in asked.items():
        with pytest.raises(ConfigError, match=f"{name} needs a head for .*; this is a language model.*head="):
            getattr(model, name)(texts)
    with pytest.raises(ConfigError, match="answer needs a head for question_answering"):
        model.answer("a", "b")
    with pytest.raises(ConfigError, match="texts must be a text or a list of texts"):
        model.embed([])
    with pytest.raises(ConfigError, match="has no vocabulary"):
        model.replace(vocabulary=None).embed("a")


def test_the_command_says_what_the_model_does(plain, tmp_path, capsys):
    def said(head, text, status=0):
        model = load_pretrained(plain, head=head, labels=LABELS.get(head, ()), seed=2)
        path = model.save_pretrained(tmp_path / head, "flax_switch")
        (tmp_path / "in.txt").write_text(text)
        assert cli.main(["predict", "--checkpoint", str(path), "--input", str(tmp_path / "in.txt")]) == status
        return model, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    model, lines = said("classification", 'a cat\n\n{"text": "mat"}\n{"other": 1}\n', status=1)
    assert [line["line"] for line in lines] == [1, 3, 4] and "no text under 'text'" in lines[2]["error"]
    assert [line["label"] for line in lines[:2]] == [one.label for one in model.classify(["a cat", "mat"])]
    row = json.dumps({"text": "a cat", "context": TEXTS[0]})
    model, lines = said("question_answering", f"{row}\nno context\n", status=1)
    (answer,) = model.answer("a cat", TEXTS[0])
    assert (lines[0]["answer"], lines[0]["start"]) == (answer.text, answer.start) and "needs a context" in lines[1]["error"]
    model, lines = said("embedding", "a cat\n")
    np.testing.assert_allclose(lines[0]["embedding"], model.embed("a cat")[0], atol=1e-6)
    assert said("regression", "a cat\n")[1][0].keys() == {"line", "input", "value"}
    assert [word["word"] for word in said("token_classification", "a cat\n")[1][0]["words"]] == ["a", "cat"]
    assert cli.main(["predict", "--checkpoint", str(plain)]) == 2
    assert "is a language model, which has no head for a task: use flax-switch generate" in capsys.readouterr().err


def test_what_does_not_know_the_head_says_so(plain, tmp_path):
    model = load_pretrained(plain, head="classification", labels=LABELS["classification"])
    with pytest.raises(ConfigError, match="Routing is shown of language models; this one has a head for classification"):
        explore(model, ["a cat"])
    with pytest.raises(ConfigError, match="A head for classification is not exported"):
        programs(model.config, {}, architecture=model.architecture)
    saved = model.save_pretrained(tmp_path / "model", "flax_switch")
    with pytest.raises(ConfigError, match="has a head for classification, of which no card is written"):
        make_repository(saved, "owner/model", tmp_path / "repository", licence="apache-2.0")
    with pytest.raises(ConfigError, match="model.head='classification' is trained by flax-switch finetune"):
        ExperimentConfig(model=model.config)
