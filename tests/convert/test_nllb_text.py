"""NLLB's tokenizer: its ids, with a language's first, and texts translated from one language into another."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from flax_switch import ConfigError, load_pretrained
from flax_switch.cli import main
from flax_switch.convert.tokenizer import load_vocabulary
from tests.convert import nllb, oracle

LANGUAGES = ["eng_Latn", "fra_Latn", "zho_Hans"]
TEXTS = ("A cat sat.", "  two  spaces ", "", "née – 猫", "fra_Latn un chat", "a </s> b", "cat eng_Latn dog")


@pytest.fixture(scope="module")
def theirs():
    """transformers' own class, with a small vocabulary of pairs of characters."""
    text = "A cat sat on the mat. Un chat est sur le tapis. dog two spaces née"
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    plain.train_from_iterator([text] * 3, trainer)
    model = json.loads(plain.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.NllbTokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=LANGUAGES)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("nllb")
    model = nllb.model_of(0, vocab_size=len(theirs))
    oracle.save(model, path)
    theirs.save_pretrained(path)
    return path, model


def test_ids_are_transformers_with_the_language_first(theirs, folder):
    vocabulary = load_vocabulary(folder[0])
    assert vocabulary.languages == {code: theirs.convert_tokens_to_ids(code) for code in LANGUAGES}
    for text in TEXTS:
        if not text.startswith("fra_Latn"):
            assert vocabulary(text).input_ids == theirs(text).input_ids, text
    theirs.src_lang = "fra_Latn"
    assert vocabulary("fra_Latn" + TEXTS[0]).input_ids == theirs(TEXTS[0]).input_ids
    theirs.src_lang = "eng_Latn"
    batch = theirs(list(TEXTS[:3]), padding=True)
    ours = vocabulary(list(TEXTS[:3]), padding=True)
    assert (ours.input_ids, ours.attention_mask) == (batch.input_ids, batch.attention_mask)


def test_a_text_is_translated_as_transformers_does(theirs, folder, tmp_path, capsys):
    path, model = folder
    ours = load_pretrained(path)
    theirs.src_lang = "fra_Latn"
    asked = theirs(["Un chat.", "le tapis est sur le chat"], padding=True, return_tensors="pt")
    controls = dict(max_new_tokens=6, min_new_tokens=5, do_sample=False)
    with torch.no_grad():
        said = model.generate(**asked, forced_bos_token_id=theirs.convert_tokens_to_ids("zho_Hans"), **controls).numpy()
    languages = dict(source_language="fra_Latn", target_language="zho_Hans")
    found = ours.generate(["Un chat.", "le tapis est sur le chat"], **languages, max_new_tokens=6, min_new_tokens=5)
    np.testing.assert_array_equal(found.sequences, said)
    expected = theirs.batch_decode(said, skip_special_tokens=True)
    assert [text.replace("<unk>", "").split() for text in found.texts] == [text.split() for text in expected]
    source = tmp_path / "source.txt"
    source.write_text("Un chat.\n")
    command = ["generate", "--checkpoint", str(path), "--input", str(source), "--format", "plain", "--batch-size", "2"]
    more = ["--source-language", "fra_Latn", "--target-language", "zho_Hans", "--max-new-tokens", "6", "--min-new-tokens", "5"]
    assert main([*command, *more]) == 0
    assert capsys.readouterr().out == f"{found.texts[0]}\n"
    with pytest.raises(ConfigError, match="target_language must be one of .* Did you mean 'fra_Latn'"):
        ours.generate("A cat.", target_language="fra_Lat")
    with pytest.raises(ConfigError, match="no tokens for languages"):
        ours.replace(vocabulary=None).generate("A cat.", source_language="fra_Latn")
