"""The token cache: written once, found again, and never used half-written."""

import errno
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from flax_switch.config import ConfigError
from flax_switch.data import Vocabulary, cache
from flax_switch.host import files


def tokenize(documents, vocabulary, folder, corpus="a corpus", fraction=0.2):
    return cache.tokenize(documents, vocabulary, folder, corpus_fingerprint=corpus, heldout_fraction=fraction, quiet=True)


def test_documents_come_back_in_order_each_in_the_split_of_its_hash(documents, vocabulary, tmp_path):
    stores = tokenize(documents, vocabulary, tmp_path)
    for split in cache.SPLITS:
        expected = [d for d in documents if cache.is_heldout(d, 0.2) == (split == "heldout")]
        found = [vocabulary.decode(stores[split].document(i)) for i in range(stores[split].num_documents)]
        assert found == expected
    assert 0.1 < stores["heldout"].num_documents / len(documents) < 0.3
    assert stores["train"].tokens.dtype == np.uint16


class NumberedWords:
    """A vocabulary of any size in which a text is the numbers that it spells out."""

    def __init__(self, size):
        self.size, self.fingerprint = size, f"numbers below {size}"

    def encode_documents(self, documents):
        return [[int(word) for word in document.split()] for document in documents]


@pytest.mark.parametrize(("size", "dtype"), [(2**15 + 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_as_long_as_they_fit(size, dtype, tmp_path):
    ids = [0, 7, size - 1]
    store = tokenize([" ".join(map(str, ids))], NumberedWords(size), tmp_path, fraction=0.0)["train"]
    assert store.tokens.dtype == dtype and store.document(0).tolist() == ids


def test_a_finished_cache_is_used_again_without_reading_the_corpus(documents, vocabulary, tmp_path):
    first = tokenize(documents, vocabulary, tmp_path)

    def unread():
        raise AssertionError("the corpus was read again")
        yield

    again = tokenize(unread(), vocabulary, tmp_path)
    np.testing.assert_array_equal(first["train"].tokens, again["train"].tokens)
    assert first["train"].fingerprint == again["train"].fingerprint


def test_another_corpus_vocabulary_or_split_has_another_cache(documents, vocabulary, tmp_path):
    other = Vocabulary(vocabulary.model, 21)
    tokenize(documents, vocabulary, tmp_path)
    tokenize(documents, vocabulary, tmp_path, corpus="another")
    tokenize(documents, other, tmp_path)
    tokenize(documents, vocabulary, tmp_path, fraction=0.3)
    assert len(list(tmp_path.glob("tokens-*"))) == 4


def test_the_fingerprint_is_of_the_tokens_and_where_documents_end(documents, vocabulary, tmp_path):
    one, same, joined = (
        tokenize(d, vocabulary, tmp_path / str(i))["train"].fingerprint
        for i, d in enumerate((documents, list(documents), [" ".join(documents[:2]), *documents[2:]]))
    )
    assert one == same != joined


def test_an_interrupted_writer_leaves_nothing(documents, vocabulary, tmp_path):
    def interrupted():
        yield from documents * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(interrupted(), vocabulary, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_s_remains_are_not_used_and_are_removed_later(documents, vocabulary, tmp_path):
    script = f"""
import os
from pathlib import Path
from flax_switch.data import Vocabulary, cache
def documents():
    yield from ["ba ke lo"] * 5000
    os.kill(os.getpid(), 9)
cache.tokenize(documents(), Vocabulary.load({str(tmp_path / "v")!r}), Path({str(tmp_path / "c")!r}),
               corpus_fingerprint="a corpus", heldout_fraction=0.2, quiet=True)
"""
    vocabulary.save(tmp_path / "v")
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert killed.returncode == -9
    (left,) = (tmp_path / "c").iterdir()
    assert ".tmp-" in left.name
    stores = tokenize(documents, vocabulary, tmp_path / "c")
    assert vocabulary.decode(stores["train"].document(0)) in documents
    for file in (left, *left.iterdir()):
        os.utime(file, (0, 0))
    with files.new_folder(stores["train"].folder) as temporary:
        (temporary / "x").write_text("x")
    assert not left.exists()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(documents, vocabulary, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(ConfigError, match="No space left to write .*tokens-.*nothing half-written was kept"):
        tokenize(documents, vocabulary, tmp_path)
    with pytest.raises(ConfigError, match="No space left"), files.new_folder(tmp_path / "x"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(documents, vocabulary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write .*Set data.cache_dir"):
        tokenize(documents, vocabulary, tmp_path / "file" / "cache")


def test_whoever_finishes_second_uses_the_first_one_s_folder(tmp_path):
    with files.new_folder(tmp_path / "x") as slow:
        (slow / "who").write_text("second")
        with files.new_folder(tmp_path / "x") as fast:
            (fast / "who").write_text("first")
    assert (tmp_path / "x" / "who").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_others_may_read_what_the_umask_lets_them_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "file", "x")
        with files.new_folder(tmp_path / "folder") as folder:
            (folder / "x").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_file_is_replaced_whole(tmp_path):
    files.write_text(tmp_path / "a" / "b.txt", "old")
    files.write_text(tmp_path / "a" / "b.txt", "new")
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_a_damaged_cache_is_refused_with_the_way_out(documents, vocabulary, tmp_path):
    store = tokenize(documents, vocabulary, tmp_path)["train"]
    tokens = store.folder / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="is damaged .*delete that folder"):
        tokenize(documents, vocabulary, tmp_path)


def test_an_empty_corpus_is_an_error(vocabulary, tmp_path):
    with pytest.raises(ConfigError, match="The corpus is empty"):
        tokenize(["", "  "], vocabulary, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_places_of_documents_have_64_bits_since_a_corpus_may_have_more_than_2_to_the_31_tokens():
    assert cache.Tokens.of([[1, 2], [3]]).offsets.dtype == np.int64


def test_a_store_travels_to_workers_as_a_path(documents, vocabulary, tmp_path):
    store = tokenize(documents, vocabulary, tmp_path)["train"]
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, store.tokens)


def test_caches_lie_in_the_user_s_cache_folder_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert files.cache_folder(None) == tmp_path / "flax_switch"
    assert files.cache_folder(str(tmp_path / "x")) == tmp_path / "x"
