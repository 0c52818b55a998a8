"""Text that is read while it is trained on: the laws of the order, of resuming, and of what is held in memory."""

import dataclasses
import gzip
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from data_of_streams import documents_of_epochs, everything, take

from flax_switch.config import ConfigError
from flax_switch.data import cache, prepare, streams, texts

SIZES = (37, 5, 0, 60, 21)  # documents of the files, of which the third has none


@pytest.fixture(scope="module")
def hub(documents, tmp_path_factory):
    """A folder with the hub's layout: a data set of five files of several formats."""
    folder = tmp_path_factory.mktemp("hub")
    dataset = folder / "datasets" / "owner" / "words" / "en"
    dataset.mkdir(parents=True)
    remaining = iter(documents)
    for number, size in enumerate(SIZES):
        lines = "".join(json.dumps({"text": next(remaining)}) + "\n" for _ in range(size))
        (dataset / f"part-{number}.json.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def streamed(config, hub):
    """Settings that read the data set as a stream: blocks of ten documents."""
    return config.replace(source=f"{hub}/datasets/owner/words/en/*.json.gz", streaming=True, shuffle_buffer=20, prefetch=2)


@pytest.fixture(params=["chunks", "packed"])
def either(request, streamed, vocabulary):
    return prepare(streamed.replace(packing=request.param == "packed", prefix_lm_rate=0.5), vocabulary=vocabulary, quiet=True)


def same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("buffer", [2, 3, 20, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_document_once_whatever_the_buffer(streamed, vocabulary, documents, buffer, shuffle):
    config = streamed.replace(shuffle_buffer=buffer, shuffle=shuffle)
    wanted = [d for d in documents[: sum(SIZES)] if not cache.is_heldout(d, config.heldout_fraction)]
    ids = sorted(map(tuple, vocabulary.encode_documents(wanted)))
    first, second = documents_of_epochs(prepare(config, vocabulary=vocabulary, quiet=True), 2)
    assert sorted(first) == sorted(second) == ids
    assert (first == second) == (not shuffle)
    if not shuffle:
        assert first == [tuple(one) for one in vocabulary.encode_documents(wanted)]


def test_the_rows_of_an_epoch_are_all_of_its_text(streamed, vocabulary):
    prepared = prepare(
        streamed.replace(infilling_rate=1.0, span_corruption_rate=0.0, shuffle=False), vocabulary=vocabulary, quiet=True
    )
    (epoch,) = documents_of_epochs(prepared, 1)
    text = [i for document in epoch for i in document]
    rows = []
    iterator = prepared.train_iterator()
    while sum(map(len, rows)) < len(text):
        labels = next(iterator)["labels"]
        rows += [row[row >= 0][:-1].tolist() for row in labels]  # the whole text, and EOS
    iterator.close()
    assert [i for row in rows for i in row][: len(text)] == text


def test_another_epoch_masks_other_spans(streamed, vocabulary):
    prepared = prepare(streamed.replace(shuffle=False, shuffle_buffer=1000, batch_size=1), vocabulary=vocabulary, quiet=True)
    batches, states = everything(prepared, 300)
    second = [at["positions"][0][0] for at in states].index(1)
    assert second > 10
    text_of = lambda batch: sorted(i for i in [*batch["input_ids"][0], *batch["labels"][0]] if 1 < i < vocabulary.num_pieces)  # noqa: E731
    pairs = list(zip(batches[:second], batches[second : 2 * second], strict=True))
    assert all(text_of(one) == text_of(other) for one, other in pairs)
    assert sum((one["labels"] != other["labels"]).any() for one, other in pairs) > 0.9 * second


def test_seeds_differ_and_equal_seeds_agree(either):
    other = dataclasses.replace(either, config=either.config.replace(seed=4))
    same(take(either, 6), take(either, 6))
    assert (take(either, 1)[0]["labels"] != take(other, 1)[0]["labels"]).any()
    for one, another in zip(documents_of_epochs(either, 2), documents_of_epochs(other, 2), strict=True):
        assert one != another and sorted(one) == sorted(another)


def test_going_on_from_any_batch_equals_not_having_stopped(either):
    batches, states = everything(either, 40)
    epochs = [at["positions"][0][0] for at in states]
    assert epochs[0] == 0 and epochs[-1] >= 2  # epochs end on the way
    assert len({at["positions"][0][3] for at in states}) > 5  # and blocks
    for start in (0, 1, 2, 3, 7, *(epochs.index(1) + k for k in (-2, -1, 0, 1)), 30):
        assert len(json.dumps(states[start])) < 300
        iterator = either.train_iterator()
        iterator.set_state(json.loads(json.dumps(states[start])))
        assert iterator.get_state() == states[start]
        same(batches[start : start + 5], [next(iterator) for _ in range(5)])
        iterator.close()


@pytest.mark.parametrize("count", [2, 4])
def test_every_process_makes_its_rows_of_the_same_batches(either, count):
    whole = take(either, 12)
    shares = np.arange(8).reshape(count, -1) if count == 2 else np.arange(8).reshape(-1, count).T
    parts = [take(either, 12, rows) for rows in shares]
    order = np.argsort(shares.ravel())
    same(whole, [{k: np.concatenate([p[k] for p in batch])[order] for k in batch[0]} for batch in zip(*parts, strict=True)])
    none = take(either, 2, np.arange(0))
    assert [batch["labels"].shape for batch in none] == [(0, 10)] * 2


def test_a_position_is_valid_for_another_number_of_processes(either):
    _, states = everything(either, 8)
    iterator = either.train_iterator(np.array([5, 6]))
    iterator.set_state(states[7])
    same([{k: a[[5, 6]] for k, a in one.items()} for one in everything(either, 10)[0][7:]], [next(iterator) for _ in range(3)])
    iterator.close()


@pytest.mark.parametrize("buffer", [2, 12, 500])
def test_no_more_documents_are_held_than_the_buffer_has(streamed, vocabulary, monkeypatch, buffer):
    prepared = prepare(streamed.replace(shuffle_buffer=buffer), vocabulary=vocabulary, quiet=True)
    read, held, most = [0], {}, []

    def counted(read_documents):
        def reading(self, place):
            for found in read_documents(self, place):
                read[0] += 1
                yield found

        return reading

    def blocks(self, place, stopped):
        for block in stream_blocks(self, place, stopped):
            held[block.place.block] = block.text.num_documents
            yield block

    stream_blocks = streams.TextStream.blocks
    monkeypatch.setattr(streams.TextStream, "_documents", counted(streams.TextStream._documents))
    monkeypatch.setattr(streams.TextStream, "blocks", blocks)
    iterator = prepared.train_iterator()
    lane = []
    monkeypatch.setattr(streams._Lane, "__init__", remembering(streams._Lane.__init__, lane))
    for _ in range(20):
        next(iterator)
        block = lane[0]._place.block  # it may have gone on already, which makes the bound no looser
        most.append(read[0] - sum(count for number, count in held.items() if number < block))
    iterator.close()
    assert 0 < max(most) <= buffer
    if buffer == 12:
        assert max(most) > 6  # the next block is read ahead


def remembering(init, made):
    def wrapped(self, *arguments):
        init(self, *arguments)
        made.append(self)

    return wrapped


def test_a_stream_s_held_out_text_is_what_it_is_without_streaming(streamed, vocabulary):
    prepared = prepare(streamed, vocabulary=vocabulary, quiet=True)
    whole = prepare(streamed.replace(streaming=False), vocabulary=vocabulary, quiet=True)
    texts_of = lambda store: [store.document(i).tolist() for i in range(store.num_documents)]  # noqa: E731
    assert texts_of(prepared.heldout) == texts_of(whole.heldout)
    same(list(prepared.heldout_batches()), list(whole.heldout_batches()))
    fewer = prepare(streamed.replace(first_documents=80), vocabulary=vocabulary, quiet=True)  # sixteen of each file
    assert 0 < fewer.heldout.num_documents < whole.heldout.num_documents
    assert whole.describe()[0]["train"]["documents"] > 80
    assert prepared.describe() == [
        {
            "source": streamed.source,
            "train": {"files, read as a stream": len(SIZES)},
            "heldout": {"documents": whole.heldout.num_documents, "tokens": whole.heldout.num_tokens},
        }
    ]


def test_a_stream_s_vocabulary_is_trained_on_its_first_documents_and_found_again(streamed, tmp_path, monkeypatch):
    config = streamed.replace(first_documents=60, cache_dir=str(tmp_path), vocabulary_size=60)
    read = []
    first = texts.sources.first_documents
    monkeypatch.setattr(texts.sources, "first_documents", lambda *a: (read.append(d) or d for d in first(*a)))
    vocabulary = prepare(config, quiet=True).vocabulary
    assert vocabulary.num_pieces == 60
    assert len(read) == 2 * (12 + 5 + 12 + 12)  # for the vocabulary, and for what is held out
    assert prepare(config, quiet=True).vocabulary.fingerprint == vocabulary.fingerprint
    assert len(read) == 2 * 41  # from the cache


def test_a_position_of_another_stream_is_refused(streamed, vocabulary, prepared):
    one = prepare(streamed, vocabulary=vocabulary, quiet=True)
    state = one.train_iterator().get_state()
    for changes in (dict(shuffle_buffer=30), dict(heldout_fraction=0.2), dict(packing=True)):
        other = prepare(streamed.replace(**changes), vocabulary=vocabulary, quiet=True)
        with pytest.raises(ConfigError, match="another data stream; these differ: fingerprint"):
            other.train_iterator().set_state(state)
    with pytest.raises(ConfigError, match="another data stream"):
        prepared.train_iterator().set_state(state)


def test_what_cannot_be_streamed_is_an_error(streamed, vocabulary, tmp_path):
    with pytest.raises(ConfigError, match="the embedded corpus, 'default', is small and tokenised as a whole"):
        streamed.replace(source="default")
    with pytest.raises(ConfigError, match=r"No document fell into the held-out 0.00% of the first 50,000; raise data.heldout"):
        prepare(streamed.replace(heldout_fraction=1e-9), vocabulary=vocabulary, quiet=True)
    nearly_all = prepare(streamed.replace(heldout_fraction=1 - 1e-9), vocabulary=vocabulary, quiet=True).train_iterator()
    with pytest.raises(ConfigError, match="no document to train on in .*part-0.json.gz and the other files: all are blank or held"):
        next(nearly_all)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ba ke lo mi"}\n' * 300 + "{\n")
    fine = streamed.replace(source=str(bad), heldout_fraction=0.5, first_documents=2)
    prepared = prepare(fine.replace(heldout_fraction=0.9999), vocabulary=vocabulary, quiet=True)
    prepared = dataclasses.replace(prepared, config=fine.replace(heldout_fraction=1e-6))
    iterator = prepared.train_iterator()
    with pytest.raises(ConfigError, match=r"bad.jsonl, line 301"):
        for _ in range(100):
            next(iterator)


def test_what_reads_ahead_has_ended_once_a_stream_is_closed(streamed, vocabulary):
    before = set(threading.enumerate())
    iterator = prepare(streamed, vocabulary=vocabulary, quiet=True).train_iterator()
    next(iterator)
    readers = set(threading.enumerate()) - before
    iterator.close()
    assert readers and not any(reader.is_alive() for reader in readers)


def test_a_reader_that_ended_without_a_word_is_said_with_what_to_change(monkeypatch):
    monkeypatch.setattr(streams, "_fill", lambda *given: None)
    ahead = streams._Ahead(None, (0, []), 1, in_process=False)
    with pytest.raises(RuntimeError, match="reads the stream has ended") as raised:
        ahead.get()
    assert "data.num_workers=0 needs no such guard" in "".join(raised.value.__notes__)


SCRIPT = """
import hashlib, json, sys
from flax_switch.config import DataConfig
from flax_switch.data import prepare

if __name__ == "__main__":
    prepared = prepare(DataConfig.from_dict(json.loads(sys.argv[1])), quiet=True)
    for workers in map(int, sys.argv[3].split(",")):
        iterator = prepared.train_iterator(num_workers=workers)
        iterator.set_state(json.loads(sys.argv[2]))
        digest = hashlib.sha256()
        for _ in range(6):
            batch = next(iterator)
            digest.update(b"".join(k.encode() + batch[k].tobytes() for k in sorted(batch)))
        print(digest.hexdigest(), flush=True)
        iterator.close()
"""


@pytest.mark.slow
def test_the_order_is_the_same_for_0_1_and_2_workers_and_in_a_new_process(streamed, vocabulary, tmp_path):
    import hashlib

    vocabulary.save(tmp_path / "vocabulary")
    config = streamed.replace(vocabulary=str(tmp_path / "vocabulary" / "spiece.model"), packing=True)
    batches, states = everything(prepare(config, quiet=True), 9)
    digest = hashlib.sha256()
    for batch in batches[3:]:
        digest.update(b"".join(k.encode() + batch[k].tobytes() for k in sorted(batch)))
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, str(tmp_path / "script.py"), json.dumps(config.to_dict()), json.dumps(states[3]), "0,1,2"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest.hexdigest()] * 3
    assert "Traceback" not in done.stderr and "leaked" not in done.stderr


@pytest.mark.slow
def test_a_reading_process_that_fails_says_why(streamed, vocabulary, tmp_path):
    script = SCRIPT.replace('if __name__ == "__main__":', "if True:")
    (tmp_path / "script.py").write_text(script)
    vocabulary.save(tmp_path / "vocabulary")
    config = streamed.replace(vocabulary=str(tmp_path / "vocabulary" / "spiece.model"))
    state = json.dumps(prepare(config, quiet=True).train_iterator().get_state())
    arguments = [sys.executable, str(tmp_path / "script.py"), json.dumps(config.to_dict()), state, "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "data.num_workers=0 needs no such guard" in done.stderr
