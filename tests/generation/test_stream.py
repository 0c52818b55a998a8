"""Tokens and text as they are made: joined they are what `generate` finds, and a step is taken when it is asked for."""

import contextlib
import io
import sys
from typing import ClassVar

import numpy as np
import pytest
from architectures import ALONE_BASE, BASE, lively_params, sources

from flax_switch import cli
from flax_switch.config import ConfigError
from flax_switch.data.byte_vocabulary import ByteVocabulary
from flax_switch.generation.generate import generate
from flax_switch.generation.stream import step_program, stream
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.pretrained import Pretrained

NEW = 9
ENDS = tuple(range(20, 30))  # so that rows end, and at different steps


def odd(source, tokens):
    return range(1, 64, 2)


CASES = {
    "greedy": (BASE, dict()),
    "samples of a decoder alone": (ALONE_BASE, dict(do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=2, seed=3)),
    "after a prefix, constrained": (BASE, dict(decoder_input_ids=[[9, 12]] * 4, prefix_allowed_tokens_fn=odd)),
    "scanned, in bfloat16, penalised": (
        BASE.replace(scan_layers=True, num_decoder_layers=4, decoder_sparse_layers=(1, 3), dtype="bfloat16"),
        dict(repetition_penalty=1.3, forced_eos_token_id=21),
    ),
    "fixed capacity": (BASE.replace(capacity_mode="fixed", expert_capacity=2), dict(encoder_no_repeat_ngram_size=2)),
    "one token": (BASE, dict(max_new_tokens=1)),
}  # fmt: skip
QUICK = "after a prefix, constrained"


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in CASES])
def test_tokens_joined_are_generates(name):
    config, controls = CASES[name]
    inputs = (SwitchTransformer(config), lively_params(config), *sources(config))
    controls = dict(max_new_tokens=NEW, eos_token_id=ENDS) | controls
    expected = generate(*inputs, **controls).sequences
    first, *others = list(stream(*inputs, **controls))
    assert all(one.shape == (len(expected), 1) for one in others)
    np.testing.assert_array_equal(np.concatenate([first, *others], axis=1), expected)


@pytest.fixture(scope="module")
def bytes_model():
    """A model that says bytes, most of which are parts of no character."""
    config = BASE.replace(vocab_size=384)
    return Pretrained(config, SwitchTransformer(config), lively_params(config), ByteVocabulary.with_sentinels(), prefixes=("go: ",))


SAMPLES = dict(max_new_tokens=24, do_sample=True, top_k=0)


def test_pieces_are_the_text_and_come_with_each_token(bytes_model):
    before = step_program._cache_size()
    for text, seed in (("abc", 1), ("Zürich", 2), ("€", 3)):
        expected = bytes_model.generate(text, seed=seed, **SAMPLES)
        pieces = list(bytes_model.stream(text, seed=seed, **SAMPLES))
        assert "".join(piece.text for piece in pieces) == expected.texts[0]
        assert [token for piece in pieces for token in piece.tokens] == expected.sequences[0].tolist()
        assert pieces[0].tokens == (0,) and all(len(piece.tokens) == 1 for piece in pieces)
        assert sum(bool(piece.text) for piece in pieces) > 5, "text that comes all at once tests little"
    assert step_program._cache_size() == before + 1


class Replacing:
    """Bytes as text, with the sign of SentencePiece for those of a character that lacks some."""

    languages: ClassVar = {}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(token - 3 for token in ids).decode(errors="replace")


def test_the_last_character_is_told_though_it_lacks_bytes(bytes_model):
    said = [byte + 3 for byte in "aé".encode()[:-1]]
    controls = dict(max_new_tokens=2, prefix_allowed_tokens_fn=lambda _, tokens: [said[len(tokens) - 1]])
    model = bytes_model.replace(vocabulary=Replacing())
    assert model.generate([[9, 1]], **controls).texts[0] == "a\ufffd"
    assert [piece.text for piece in model.stream([[9, 1]], **controls)] == ["", "a", "\ufffd"]


def test_a_decoder_alone_tells_its_inputs_first():
    config = ALONE_BASE.replace(vocab_size=384)
    model = Pretrained(config, SwitchTransformer(config), lively_params(config), ByteVocabulary.with_sentinels())
    first, *others = list(model.stream("Zürich", max_new_tokens=5))
    expected = model.generate("Zürich", max_new_tokens=5)
    assert first.text == "Zürich"
    assert first.text + "".join(piece.text for piece in others) == expected.texts[0]
    assert [*first.tokens, *(token for piece in others for token in piece.tokens)] == expected.sequences[0].tolist()


def test_a_step_is_taken_when_its_token_is_asked_for(bytes_model):
    asked = []

    def noted(source, tokens):
        asked.append(len(tokens))
        return range(3, 300)

    found = bytes_model.stream("abc", max_new_tokens=1000, prefix_allowed_tokens_fn=noted)
    assert asked == []
    assert [next(found).tokens[0] for _ in range(4)][0] == 0
    assert asked == [1, 2, 3]
    found.close()


def test_without_a_vocabulary_pieces_have_tokens_alone(bytes_model):
    model, ids = bytes_model.replace(vocabulary=None), [10, 11, 1] + [0] * 13  # as long as the texts above
    pieces = list(model.stream(ids, **SAMPLES))
    assert {piece.text for piece in pieces} == {None}
    assert [token for piece in pieces for token in piece.tokens] == model.generate(ids, **SAMPLES).sequences[0].tolist()


@pytest.mark.parametrize(
    ("source", "controls", "message"),
    [
        ("abc", dict(num_beams=3), "num_beams=3 is not streamed: which beam is best shows at the end"),
        ("abc", dict(output_scores=True), "output_scores=True is not streamed"),
        (["abc", "d"], dict(), "Pieces are of one sequence, and these would be of 2"),
        ("abc", dict(do_sample=True, num_return_sequences=2), "Pieces are of one sequence, and these would be of 2"),
        ("abc", dict(streamer=print), "streamer=.* is no control: iterate over stream"),
        ("abc", dict(temperature=0.5), "temperature=0.5 has no effect"),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_refused_at_once(bytes_model, source, controls, message):
    with pytest.raises(ConfigError, match=message):
        bytes_model.stream(source, **controls)


def test_beams_that_a_models_defaults_ask_for_are_refused_and_can_be_turned_off(bytes_model):
    model = bytes_model.replace(generation_defaults=dict(num_beams=4, length_penalty=0.6))
    with pytest.raises(ConfigError, match="Set num_beams=1"):
        model.stream("abc")
    model.stream("abc", num_beams=1)


# --- on the command line


@pytest.fixture(scope="module")
def folder(bytes_model, tmp_path_factory):
    return bytes_model.replace(prefixes=()).save_pretrained(tmp_path_factory.mktemp("model") / "model", format="flax_switch")


LINES = ["abc", "Zürich", "x" * 40]
SAMPLING = ["--do-sample", "--top-k", "0", "--max-new-tokens", "12", "--seed", "4", "--max-source-length", "32"]


def run(argv, capsys):
    capsys.readouterr()
    code = cli.main(argv)
    return code, capsys.readouterr()


class Noted(io.StringIO):
    """Standard output that notes what it is given at a time."""

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def test_a_command_streams_what_it_would_print(folder, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    argv = ["generate", "--checkpoint", str(folder), "--input", str(tmp_path / "in.txt"), *SAMPLING]
    code, plain = run([*argv, "--format", "plain", "--batch-size", "1"], capsys)
    output = Noted()
    with contextlib.redirect_stdout(output):
        assert cli.main([*argv, "--stream"]) == code == 1  # the last line is too long
    assert output.getvalue() == plain.out
    assert len([text for text in output.writes if text.strip()]) > 8, "pieces are written as they come"
    assert "line 3: its 41 tokens exceed" in plain.err
    assert capsys.readouterr().err == plain.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-beams", "3"], "num_beams=3 is not streamed"),
        (["--output", "x.jsonl"], "--stream writes plain text to standard output"),
        (["--format", "json"], "--stream writes plain text to standard output"),
        (["--do-sample", "--num-return-sequences", "2"], "leave out --num-return-sequences"),
    ],
    ids=str,
)
def test_what_a_command_cannot_stream_is_refused(folder, capsys, more, message):
    code, said = run(["generate", "--checkpoint", str(folder), "--input", "x.txt", "--stream", *more], capsys)
    assert code != 0 and message in said.err


@pytest.mark.parametrize("beams", [[], pytest.param(["--num-beams", "2"], marks=pytest.mark.slow)], ids=str)
def test_a_conversation_says_piece_by_piece_what_lines_say(folder, tmp_path, capsys, monkeypatch, beams):
    (tmp_path / "in.txt").write_text("\n".join(LINES), encoding="utf-8")
    argv = ["generate", "--checkpoint", str(folder), *SAMPLING, *beams]
    plain = run([*argv, "--input", str(tmp_path / "in.txt"), "--format", "plain", "--batch-size", "1"], capsys)[1].out
    turns = iter([*LINES, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(turns))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, said = run(argv, capsys)
    assert code == 0 and "its 41 tokens exceed" in said.out
    assert plain in said.out
