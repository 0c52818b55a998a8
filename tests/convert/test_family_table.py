"""Every family of models, from and to every form of file: the table of docs/conversion.md, checked against transformers."""

import json
import shutil
from pathlib import Path

import flax.serialization
import numpy as np
import pytest
import torch
import transformers

from flax_switch import load_pretrained
from flax_switch.config.base import differences
from flax_switch.convert import convert, open_checkpoint
from flax_switch.convert.canonical import unflatten
from tests.convert import nllb, oracle, t5x_files
from tests.convert.test_family import assert_same_outputs, folder_of, model_of
from tests.convert.test_flax_msgpack import as_flax
from tests.convert.test_roundtrip import assert_same_tensors, tensors_of, there_and_back
from tests.convert.test_t5x_writing import read_as_t5x, same_arrays

PAGE = Path(__file__).parents[2] / "docs/conversion.md"
SAME_OUTPUTS, SAME_BITS, NONE = "logits, greedy, beams", "same bits", "–"
FAMILIES = {  # the name that transformers' classes begin with, a seed that picks the activations, whether the head is its own
    "T5 1.0": ("T5", 1, False),
    "T5 1.1, FLAN, LM-adapted": ("T5", 0, True),
    "ByT5": ("T5", 3, True),
    "mT5": ("MT5", 0, True),
    "UMT5": ("UMT5", 0, True),
    "Switch Transformers": ("SwitchTransformers", 4, False),
    "NLLB-MoE": ("NllbMoe", 0, False),
}


def save_bin(model, source, folder):
    """transformers 4's torch file."""
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_msgpack(model, source, folder):
    """transformers 4's Flax file."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(unflatten(as_flax(state))))


def opened_from(model, source, form, place):
    """The model, read from a file of a form."""
    if form == "safetensors":
        return load_pretrained(source)
    if form == "T5X":
        first = open_checkpoint(source)
        folder = t5x_files.write(place, {path: tensor.numpy() for path, tensor in first.tensors.items()})
        untold = differences(first.config, open_checkpoint(folder).config)
        if not first.config.is_sparse:
            untold.pop("num_experts", None)  # which a dense model has none of
        assert not {"d_model", "d_ff", "num_heads", "num_experts", "vocab_size"} & untold.keys(), "shapes tell sizes"
        return load_pretrained(folder, **untold)
    place.mkdir()
    shutil.copy(source / "config.json", place)
    {".bin": save_bin, "msgpack": save_msgpack}[form](model, source, place)
    return load_pretrained(place)


def bits_agree(source, form, place):
    """Out in a form: the tensors that were there, as the form's own reader finds them."""
    if form == "to Hugging Face":
        back = there_and_back(source, place)
        assert_same_tensors(tensors_of(back), tensors_of(source))
        assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    else:
        found, _ = read_as_t5x(convert(source, place / "t5x", to="t5x") / "checkpoint_0")
        same_arrays(found, {path: tensor.numpy() for path, tensor in open_checkpoint(source).tensors.items()})
    return SAME_BITS


def t5_model(seed, vocab_size=60):
    """T5 1.1 and ByT5: gated, with a head of its own."""
    config = transformers.T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=5, num_heads=2, d_ff=24, num_layers=2 + seed % 3, num_decoder_layers=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        initializer_factor=0.7,
    )  # fmt: skip
    model = oracle.huggingface_model(config, seed, transformers.T5ForConditionalGeneration)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab_size, 16))
    model.config.tie_word_embeddings = False  # transformers 5 ties it all the same
    return model


def drawn(name):
    kind, seed, own_head = FAMILIES[name]
    if kind == "SwitchTransformers":
        config = oracle.draw_config(seed)
        return oracle.huggingface_model(config, seed)
    if kind == "NllbMoe":
        return nllb.model_of(seed)
    if kind == "T5" and own_head:
        return t5_model(seed)
    return model_of(kind, seed, own_head=own_head)


def documented():
    """The table of docs/conversion.md, by family and form."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.read_text().splitlines() if line[:2] == "| "]
    head = next(row for row in rows if row[0] == "family")
    return {(row[0], form): cell for row in rows if row[0] in FAMILIES for form, cell in zip(head[1:], row[1:], strict=True)}


TABLE = documented()
CELLS = [cell for cell, said in TABLE.items() if said != NONE]


def test_the_table_names_every_family_and_form():
    forms = ("safetensors", ".bin", "msgpack", "T5X", "to Hugging Face", "to T5X")
    assert TABLE.keys() == {(name, form) for name in FAMILIES for form in forms}
    without = {cell for cell, said in TABLE.items() if said == NONE}
    no_classes = {(name, "msgpack") for name in ("UMT5", "Switch Transformers", "NLLB-MoE")}
    assert without == no_classes | {("NLLB-MoE", "T5X"), ("NLLB-MoE", "to T5X")}, "no Flax classes, or no layers of its kind"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), CELLS)
def test_a_cell_of_the_table_is_so(name, form, tmp_path):
    model = drawn(name)
    source = folder_of(model, tmp_path / "theirs")
    if form.startswith("to "):
        assert bits_agree(source, form, tmp_path) == TABLE[name, form]
    else:
        assert TABLE[name, form] == SAME_OUTPUTS
        assert_same_outputs(model, opened_from(model, source, form, tmp_path / "form"), 0)


@pytest.mark.slow
def test_byt5_reads_and_says_texts_as_its_tokenizer_does(tmp_path):
    tokenizer = transformers.ByT5Tokenizer()
    model = t5_model(0, 384)
    with torch.no_grad():
        model.lm_head.weight[[*range(3), *range(131, 384)]] = 0.0  # ASCII is said
    source = folder_of(model, tmp_path / "theirs")
    tokenizer.save_pretrained(source)
    for text in ("a cat", "née – 猫"):
        theirs = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        ours = load_pretrained(source).generate(text, max_new_tokens=8)
        np.testing.assert_array_equal(ours.sequences, theirs.numpy())
        assert list(ours.texts) == tokenizer.batch_decode(theirs, skip_special_tokens=True)
        assert len(ours.texts[0].encode()) > 3
