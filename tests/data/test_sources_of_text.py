"""Several sources of text, such as languages: their rates, their epochs, what is held out of each; tokenised, or streamed."""

from fractions import Fraction

import numpy as np
import pytest
from data_of_streams import documents_of_epochs, everything, take

from flax_switch.config import ConfigError, DataConfig, SourceConfig
from flax_switch.data import prepare, texts
from flax_switch.data.mixtures import seed_of, text_maker

LANGUAGES = {"ba": ["ba ke lo mi", "ke ba ba lo"], "zu": ["zu vo ti se", "vo zu se"], "nu": ["nu ra ra", "ra nu nu ra"]}
LINES = {"ba": 400, "zu": 100, "nu": 25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of every language; no word of one is a word of another."""
    path = tmp_path_factory.mktemp("languages")
    for name, sentences in LANGUAGES.items():
        lines = [f"{sentences[i % 2]} {' '.join(sentences[0].split()[: i % 5])} {sentences[1]}" for i in range(LINES[name])]
        (path / f"{name}.txt").write_text("".join(f"{' '.join([line] * (1 + i % 7))}\n" for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def mixed(folder, config):
    """Settings of the three languages, with the whole text as targets."""
    sources = tuple(SourceConfig(name=name, source=f"{folder}/{name}.txt") for name in LANGUAGES)
    objectives = dict(infilling_rate=1.0, span_corruption_rate=0.0, heldout_fraction=0.2, shuffle_buffer=16)
    return config.replace(source="default", mixture=sources, **objectives)


@pytest.fixture(params=[False, True], ids=["tokenised", "streamed"])
def prepared(request, mixed, vocabulary):
    return prepare(mixed.replace(streaming=request.param, packing=request.param), vocabulary=vocabulary, quiet=True)


def languages_of(prepared, batches):
    """The language of every row, told by its words; a row of two would be an error."""
    found = []
    for batch in batches:
        for labels in batch["labels"]:
            words = set(prepared.vocabulary.decode(labels[labels > 1]).split())
            found.append([name for name, sentences in LANGUAGES.items() if words & set(" ".join(sentences).split())])
    assert all(len(names) == 1 for names in found), found
    return [names[0] for names in found]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_at_the_rates_of_the_sizes_and_the_temperature(mixed, vocabulary, folder, temperature, streaming):
    changed = mixed.replace(mixing_temperature=temperature, streaming=streaming)
    prepared = prepare(changed, vocabulary=vocabulary, quiet=True)
    files = [(folder / f"{name}.txt").stat().st_size for name in LANGUAGES]
    sizes = np.array(files if streaming else [text.train.num_tokens for text in prepared.texts])
    expected = sizes ** (1 / temperature) / np.sum(sizes ** (1 / temperature))
    np.testing.assert_allclose([float(rate) for rate in prepared.rates], expected)
    drawn = languages_of(prepared, take(prepared, 25))
    counts = [drawn.count(name) for name in LANGUAGES]
    np.testing.assert_allclose(counts, 200 * expected, atol=3)
    assert [about["name"] for about in prepared.describe()] == list(LANGUAGES)
    np.testing.assert_allclose([about["rate"] for about in prepared.describe()], expected)


def test_given_rates_are_kept(mixed, vocabulary):
    rated = tuple(source.replace(rate=rate) for source, rate in zip(mixed.mixture, (1.0, 1.0, 6.0), strict=True))
    prepared = prepare(mixed.replace(mixture=rated), vocabulary=vocabulary, quiet=True)
    drawn = languages_of(prepared, take(prepared, 10))
    assert [drawn.count(name) for name in LANGUAGES] == [10, 10, 60]
    assert prepared.fingerprint != prepare(mixed, vocabulary=vocabulary, quiet=True).fingerprint


def test_going_on_and_processes_change_nothing(prepared):
    batches, states = everything(prepared, 30)
    for start in (0, 1, 13, 25):
        iterator = prepared.train_iterator()
        iterator.set_state(states[start])
        for batch in batches[start : start + 4]:
            again = next(iterator)
            assert all((batch[name] == again[name]).all() for name in batch)
        iterator.close()
    parts = [take(prepared, 4, rows) for rows in (np.arange(3), np.arange(3, 8))]
    for whole, *pieces in zip(batches, *parts, strict=False):
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([piece[name] for piece in pieces]))


def test_every_source_of_a_stream_has_epochs_of_its_own(mixed, vocabulary):
    prepared = prepare(mixed.replace(streaming=True, mixing_temperature=1000.0), vocabulary=vocabulary, quiet=True)
    _, states = everything(prepared, 120)
    epochs = [place[0] for place in states[-1]["positions"]]
    assert epochs[0] < epochs[1] < epochs[2]
    alone = prepare(mixed.replace(mixture=mixed.mixture[:1], streaming=True), vocabulary=vocabulary, quiet=True)
    (epoch,) = documents_of_epochs(alone, 1)
    assert len(epoch) > 250


def test_one_source_in_a_mixture_is_that_source(mixed, vocabulary, folder):
    plain = mixed.replace(mixture=(), source=f"{folder}/ba.txt")
    for streaming in (False, True):
        one = prepare(mixed.replace(mixture=mixed.mixture[:1], streaming=streaming), vocabulary=vocabulary, quiet=True)
        same = prepare(plain.replace(streaming=streaming), vocabulary=vocabulary, quiet=True)
        assert one.fingerprint == same.fingerprint
        for batch, other in zip(take(one, 3), take(same, 3), strict=True):
            assert all((batch[name] == other[name]).all() for name in batch)


@pytest.mark.parametrize("packing", [False, True])
def test_joined_texts_have_the_rows_of_each(mixed, vocabulary, packing):
    prepared = prepare(mixed.replace(packing=packing, prefix_lm_rate=1.0), vocabulary=vocabulary, quiet=True)
    stores = [text.train for text in prepared.texts]
    assert len({seed_of(5, k) for k in range(3)}) == 3  # sources with equal chunks have other masks
    joined, sizes = text_maker(stores, prepared._mixture, 5, whole=True)
    ids = np.random.default_rng(0).permutation(joined.num_rows)
    whole = joined(ids, np.zeros_like(ids))
    first = np.cumsum(sizes) - sizes
    for k, store in enumerate(stores):
        alone, (size,) = text_maker([store], prepared._mixture, seed_of(5, k), whole=True)
        assert size == sizes[k]
        places = np.flatnonzero((ids >= first[k]) & (ids < first[k] + size))
        part = alone(ids[places] - first[k], np.zeros_like(places))
        assert all((part[name] == whole[name][places]).all() for name in part)
        assert set(languages_of(prepared, [{name: a[places] for name, a in whole.items()}])) == {list(LANGUAGES)[k]}


def test_held_out_batches_are_of_all_sources_or_of_one(prepared):
    everywhere = languages_of(prepared, first_rows(prepared.heldout_batches()))
    assert set(everywhere) == set(LANGUAGES)
    for number, name in enumerate(LANGUAGES):
        assert set(languages_of(prepared, first_rows(prepared.heldout_batches(text=number)))) == {name}
    assert len(list(prepared.heldout_probes(2))) == 2


def first_rows(batches):
    """Batches without the rows of padding that fill the last up."""
    for batch in batches:
        real = (batch["labels"] >= 0).any(axis=1)
        yield {name: array[real] for name, array in batch.items()}


def test_a_vocabulary_is_trained_on_all_at_their_rates():
    parts = [["a" * 10] * 50, ["b" * 20] * 50, ["c"] * 4]
    turns = list(texts._in_turns(parts, [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]))
    assert sorted(turns) == sorted(sum(parts, []))
    first = "".join(turns[:30]) + "".join(turns[30:40]).replace("c", "")
    assert turns.index("c") < 5 and abs(first.count("a") - 2 * first.count("b")) <= 40


def test_a_vocabulary_that_is_not_given_has_the_words_of_every_source(mixed, tmp_path):
    config = mixed.replace(vocabulary_size=22, cache_dir=str(tmp_path))
    found = prepare(config, quiet=True).vocabulary
    for sentences in LANGUAGES.values():
        assert [found.decode(found.encode(sentence)) for sentence in sentences] == sentences


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(source="a.txt"), "With data.mixture every source names its own text; leave data.source out, which is 'a.txt'"),
        (dict(mixture=(SourceConfig(name="a"), SourceConfig(name="a"))), "need different names; these are a, a"),
        (dict(mixture=(SourceConfig(name="a", rate=1.0), SourceConfig(name="b"))), "Either every source of a mixture has a rate"),
        (dict(mixture=(SourceConfig(name="a"), SourceConfig(name="b", source="hf://datasets/o/n/x"))), "the embedded corpus"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(**{"mixture": (SourceConfig(name="a", source="a.txt"),), **changes})


def test_a_mixture_is_read_from_plain_values():
    values = {"mixture": [{"name": "en", "source": "en.txt"}, {"name": "fi", "source": ["fi.txt", "more.txt"], "rate": None}]}
    read = DataConfig.from_dict(values)
    assert read.mixture[1] == SourceConfig(name="fi", source=("fi.txt", "more.txt"))
    assert DataConfig.from_dict(read.to_dict()) == read
    with pytest.raises(ConfigError, match="SourceConfig has no field 'sorce'. Did you mean 'source'"):
        DataConfig.from_dict({"mixture": [{"sorce": "x"}]})
