"""Text is told piece by piece as tokens come, however they are cut; the pieces are the whole, and a stop sequence ends it."""

import hypothesis.strategies as st
import pytest
from client import small_model
from hypothesis import given

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.data.byte_vocabulary import ByteVocabulary
from flax_switch.generation.pieces import Output
from flax_switch.generation.text import texts_of
from flax_switch.serving.limits import Limits
from flax_switch.serving.loading import parse_model

CONFIG = SwitchConfig(vocab_size=512)
VOCABULARIES = {"pieces": small_model().vocabulary, "bytes": ByteVocabulary.with_sentinels()}


def told(vocabulary, tokens, cuts, stop=()):
    """The pieces, and the output at its end."""
    output, pieces = Output(vocabulary, CONFIG, stop), []
    for end in [*sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]:
        if output.finish_reason is None:
            pieces.append(output.add(tokens[:end], finished=end == len(tokens)))
    return pieces, output


@pytest.mark.parametrize("name", VOCABULARIES)
@given(tokens=st.lists(st.integers(0, 400), min_size=1), cuts=st.lists(st.integers(1, 40)))
def test_pieces_are_the_whole(name, tokens, cuts):
    pieces, output = told(VOCABULARIES[name], tokens, cuts)
    assert "".join(pieces) == output.told == texts_of([tokens], VOCABULARIES[name], CONFIG)[0]
    assert output.finish_reason == ("stop" if tokens[-1] == 1 else "length")
    assert list(output.shown) == (tokens[:-1] if tokens[-1] == 1 else tokens)
    offsets = output.offsets()
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(output.told), len(output.shown) + 1)


@given(text=st.text(min_size=1, max_size=20), stop=st.text(min_size=1, max_size=3), cuts=st.lists(st.integers(1, 60)))
def test_a_stop_sequence_ends_the_text_wherever_it_is_cut(text, stop, cuts):
    vocabulary = VOCABULARIES["bytes"]
    tokens = vocabulary.encode(text)
    pieces, output = told(vocabulary, tokens or [3], cuts, stop=(stop,))
    whole = vocabulary.decode(tokens or [3], skip_special_tokens=False)
    assert "".join(pieces) == whole.split(stop)[0]
    assert output.finish_reason == ("stop" if stop in whole else "length")
    if stop in whole:
        assert stop in vocabulary.decode(output.tokens, skip_special_tokens=False)
        assert stop not in vocabulary.decode(output.tokens[:-1], skip_special_tokens=False)


def test_lengths_have_buckets_and_slots_sizes():
    limits = Limits(slots=16, max_source_length=300)
    assert limits.buckets == (32, 128, 300)
    assert [limits.bucket(length) for length in (1, 32, 33, 128, 129, 300)] == [32, 32, 128, 128, 300, 300]
    assert (limits.sizes, Limits(slots=1).sizes) == ((1, 4, 8, 12, 16), (1,))
    with pytest.raises(ConfigError, match="slots must lie in"):
        Limits(slots=0)


def test_a_model_has_a_name_or_that_of_its_folder():
    assert parse_model("runs/tiny") == ("tiny", "runs/tiny")
    assert parse_model("small=runs/tiny") == ("small", "runs/tiny")
    assert parse_model("google/switch-base-8") == ("switch-base-8", "google/switch-base-8")
    for text in ("small=", "/", ""):
        with pytest.raises(ConfigError, match="NAME="):
            parse_model(text)
