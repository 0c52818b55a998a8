"""From a config to batches: the same stream whatever workers, processes and restarts there are."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_switch.config import ConfigError, DataConfig
from flax_switch.data import Vocabulary, prepare, text_token_mask
from flax_switch.data.batches import IGNORED
from flax_switch.data.span_corruption import restore


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(params=["chunks", "packed"])
def either(request, config, vocabulary):
    """Prepared with and without packing, and with both objectives."""
    changed = config.replace(packing=request.param == "packed", prefix_lm_rate=0.5)
    return prepare(changed, vocabulary=vocabulary, quiet=True)


def original(batch, row, vocabulary):
    """The text of an unpacked span-corruption row."""
    inputs = batch["input_ids"][row][batch["attention_mask"][row] == 1]
    targets = batch["labels"][row][batch["labels"][row] != IGNORED]
    return restore(inputs, targets, top_sentinel=vocabulary.sentinel_id(0), num_sentinels=vocabulary.num_sentinels)


def test_batches_are_the_corpus_with_spans_masked(prepared, vocabulary, documents):
    batch = next(prepared.train_iterator())
    text = " ".join(documents)
    for row in range(8):
        words = vocabulary.decode(original(batch, row, vocabulary)).split()
        assert len(words) > 3 and all(word in text for word in words)


def test_an_epoch_sees_every_chunk_once_and_the_next_one_has_another_order(prepared):
    rows = prepared._train_maker.num_rows
    batches = take(prepared.train_iterator(), 2 * rows // 8 + 1)
    seen = np.concatenate([b["input_ids"] for b in batches])
    first, second = seen[:rows], seen[rows : 2 * rows]
    source = prepared._train_maker.source
    expected = source.examples(np.arange(rows), np.zeros(rows, int)).inputs
    order = np.lexsort(expected.T)
    np.testing.assert_array_equal(first[np.lexsort(first.T)], expected[order])
    assert (first != expected).any(axis=1).mean() > 0.9  # shuffled
    assert (first != second).any(axis=1).mean() > 0.9


def test_the_stream_depends_on_the_seed_alone(either):
    assert_same(take(either.train_iterator(), 5), take(either.train_iterator(), 5))
    other = dataclasses.replace(either, config=either.config.replace(seed=4))
    assert (next(either.train_iterator())["input_ids"] != next(other.train_iterator())["input_ids"]).any()


def test_without_shuffling_rows_come_in_the_corpus_s_order(prepared, vocabulary):
    unshuffled = dataclasses.replace(prepared, config=prepared.config.replace(shuffle=False))
    batch = next(unshuffled.train_iterator())
    text = np.concatenate([original(batch, row, vocabulary) for row in range(8)]).tolist()
    tokens = prepared.train.tokens[: len(text) + 100].tolist()
    assert any(tokens[start : start + len(text)] == text for start in range(100))


def test_iteration_resumes_at_any_batch_from_a_json_state(either):
    iterator = either.train_iterator()
    rows = either._train_maker.num_rows
    take(iterator, rows // 8 - 1)  # close to the end of the epoch
    state = json.loads(json.dumps(iterator.get_state()))
    rest = take(iterator, 4)
    resumed = either.train_iterator()
    take(resumed, 2)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(rest, take(resumed, 4))


@pytest.mark.parametrize("shares", [np.arange(8).reshape(4, 2), np.arange(8).reshape(4, 2).T], ids=["neighbours", "interleaved"])
def test_processes_make_the_rows_of_one_batch(either, shares):
    def joined(parts):  # what each process made, put where it belongs
        order = np.argsort(shares.ravel())
        return [{k: np.concatenate([p[k] for p in batch])[order] for k in batch[0]} for batch in zip(*parts, strict=True)]

    whole = take(either.train_iterator(), 3)
    assert_same(whole, joined([take(either.train_iterator(rows), 3) for rows in shares]))
    held = list(either.heldout_batches())
    assert_same(held, joined([list(either.heldout_batches(rows=rows)) for rows in shares]))


def test_a_position_is_valid_for_another_number_of_processes(either):
    half = either.train_iterator(np.arange(4))
    take(half, 5)
    whole = either.train_iterator()
    whole.set_state(half.get_state())
    assert_same(take(half, 2), [{k: a[:4] for k, a in batch.items()} for batch in take(whole, 2)])


def test_heldout_batches_are_fixed_finite_and_from_other_documents(either, documents, vocabulary):
    held = list(either.heldout_batches())
    assert_same(held, list(dataclasses.replace(either, config=either.config.replace(seed=9)).heldout_batches()))
    assert_same(held[:2], list(either.heldout_batches(2)))
    labels = sum(int(text_token_mask(b["labels"], vocabulary.num_pieces).sum()) for b in held)
    assert 0 < labels < either.heldout.num_tokens / 2
    assert all(b["labels"].shape == (8, 10) for b in held)
    trained = {either.train.document(i).tobytes() for i in range(either.train.num_documents)}
    assert not trained & {either.heldout.document(i).tobytes() for i in range(either.heldout.num_documents)}


def test_the_unigram_entropy_is_that_of_the_heldout_targets(prepared, vocabulary):
    labels = np.concatenate([b["labels"] for b in prepared.heldout_batches(3)])
    text = labels[(labels > 1) & (labels < vocabulary.num_pieces)]
    frequencies = np.unique(text, return_counts=True)[1] / len(text)
    assert np.isclose(prepared.heldout_unigram_entropy(3), -(frequencies * np.log(frequencies)).sum())


def test_a_position_in_another_stream_is_refused_naming_what_differs(prepared, config, documents, tmp_path):
    state = prepared.train_iterator().get_state()
    with pytest.raises(ConfigError, match=r"these differ: batch_size \(8, now 4\)"):
        dataclasses.replace(prepared, config=config.replace(batch_size=4)).train_iterator().set_state(state)
    other = prepare(config, vocabulary=Vocabulary.train(documents, 120, 20), quiet=True)
    with pytest.raises(ConfigError, match=r"these differ: fingerprint .* corpus, vocabulary and objectives"):
        other.train_iterator().set_state(state)
    for changes in (dict(packing=True), dict(prefix_lm_rate=1.0), dict(noise_density=0.2)):
        changed = prepare(config.replace(**changes), vocabulary=prepared.vocabulary, quiet=True)
        assert changed.fingerprint != prepared.fingerprint


SCRIPT = """
import sys
from flax_switch.config import DataConfig
from flax_switch.data import prepare

{guard}
    import hashlib, json, time
    prepared = prepare(DataConfig.from_dict(json.loads(sys.argv[1])), quiet=True)
    iterator = prepared.train_iterator(num_workers=0)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    for workers in map(int, sys.argv[2].split(",")):
        iterator = prepared.train_iterator(num_workers=workers)
        iterator.set_state(state)
        digest = hashlib.sha256()
        for _ in range(6):
            batch = next(iterator)
            digest.update(b"".join(k.encode() + batch[k].tobytes() for k in sorted(batch)))
        print(digest.hexdigest(), flush=True)
        {end}
"""


def start_script(tmp_path, config, workers, guard="if __name__ == '__main__':", end="iterator.close()"):
    (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard, end=end))
    arguments = [sys.executable, str(tmp_path / "script.py"), json.dumps(config.to_dict()), workers]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_order_is_the_same_for_0_1_and_2_workers(config, tmp_path):
    script = start_script(tmp_path, config.replace(prefix_lm_rate=0.5), "0,1,2")
    output, errors = script.communicate(timeout=120)
    assert script.returncode == 0, errors
    assert len(output.split()) == 3 and len(set(output.split())) == 1
    assert "Traceback" not in errors and "leaked" not in errors


@pytest.mark.slow
def test_workers_without_a_main_guard_fail_with_advice(config, tmp_path):
    script = start_script(tmp_path, config, "1", guard="if True:")
    _, errors = script.communicate(timeout=120)
    assert script.returncode != 0
    assert "data.num_workers=0 needs no such guard" in errors


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(config, tmp_path):
    script = start_script(tmp_path, config, "2", end="print('ready', flush=True); time.sleep(600)")
    assert script.stdout.readline() and script.stdout.readline() == "ready\n"
    children = children_of(script.pid)
    assert len(children) >= 2
    os.kill(script.pid, signal.SIGKILL)
    script.communicate(timeout=60)
    assert script.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with open(f"/proc/{entry}/stat") as file:
            if int(file.read().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found


# --- prepare


def test_a_vocabulary_is_trained_once_saved_in_the_workdir_and_found_there_again(config, tmp_path):
    first = prepare(config, workdir=tmp_path / "run", quiet=True)
    saved = Vocabulary.load(tmp_path / "run" / "vocabulary")
    assert saved.fingerprint == first.vocabulary.fingerprint
    assert (first.vocabulary.num_pieces, first.vocabulary.num_sentinels) == (128, 20)
    again = prepare(config.replace(cache_dir=str(tmp_path / "empty")), workdir=tmp_path / "run", quiet=True)
    assert again.fingerprint == first.fingerprint
    assert not list((tmp_path / "empty").glob("vocabulary-*"))  # it was not trained again


def test_a_given_model_is_used_and_a_workdir_of_another_vocabulary_is_refused(config, documents, tmp_path):
    given = Vocabulary.train(documents, 110, 20)
    given.save(tmp_path / "given")
    with_model = config.replace(vocabulary=str(tmp_path / "given" / "spiece.model"))
    assert prepare(with_model, workdir=tmp_path / "run", quiet=True).vocabulary.fingerprint == given.fingerprint
    assert prepare(with_model, workdir=tmp_path / "run", quiet=True).vocabulary.fingerprint == given.fingerprint
    for other in (config, with_model.replace(num_sentinels=30)):
        with pytest.raises(ConfigError, match="holds a vocabulary of 110 pieces and 20 sentinels .* but the config asks for"):
            prepare(other, workdir=tmp_path / "run", quiet=True)


def test_the_heldout_documents_are_kept_from_the_vocabulary_s_training(config, documents, tmp_path):
    from flax_switch.data import cache

    trained = prepare(config, quiet=True).vocabulary
    kept = [d for d in documents if not cache.is_heldout(d, config.heldout_fraction)]
    assert trained.fingerprint == Vocabulary.train(kept, 128, 20).fingerprint


def test_a_short_corpus_still_makes_batches(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_text("ba ke lo\nmi nu ra\nse ti\nvo zu\nba ba\n")
    config = DataConfig(
        source=str(tmp_path / "a.txt"), inputs_length=64, targets_length=20, batch_size=4, num_sentinels=20,
        heldout_fraction=0.4, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    for packing in (False, True):
        prepared = prepare(config.replace(packing=packing), vocabulary=vocabulary, quiet=True)
        batch = next(prepared.train_iterator())
        assert batch["input_ids"].shape == (4, 64) and batch["attention_mask"].sum() > 0
        assert len(list(prepared.heldout_batches())) == 1


def test_a_corpus_without_heldout_documents_is_an_error_with_advice(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_text("ba ke lo mi nu ra se ti vo zu\n")
    config = DataConfig(source=str(tmp_path / "a.txt"), heldout_fraction=1e-6, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="No document fell into the held-out .* raise data.heldout_fraction"):
        prepare(config.replace(inputs_length=32, targets_length=10), vocabulary=vocabulary, quiet=True)


def test_a_vocabulary_with_too_few_sentinels_is_refused_before_tokenising(config, vocabulary):
    with pytest.raises(ConfigError, match="needs 28 sentinels, but the vocabulary has 20"):
        prepare(config.replace(inputs_length=512, targets_length=114), vocabulary=vocabulary, quiet=True)
