"""The memory of experts: what stays, what goes, what is read ahead, and how it is counted."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from flax_switch.config import ConfigError
from flax_switch.host import expert_cache
from flax_switch.host.expert_cache import ExpertCache

SIZE = 8  # bytes of an expert


def cache_of(room, layers=("a", "b"), experts=16, read=None):
    """A cache with room for so many experts, and the list of what is read."""
    log = []

    def read_one(layer, expert):
        log.append((layer, expert))
        return {"wi/kernel": np.full(2, expert, np.int32)}, SIZE

    parts = {layer: {"wi/kernel": ((experts, 2), np.dtype(np.int32))} for layer in layers}
    return ExpertCache(parts, read or read_one, int(room * SIZE)), log


def settle(cache):
    while cache._coming_in:
        time.sleep(1e-4)


def ask(cache, layer, hit, experts=16):
    """One pass over a layer, as a program makes it."""
    rows = np.bincount(hit, minlength=experts)
    for expert in sorted(set(hit)):
        assert (cache.get(layer, expert, rows)["wi/kernel"] == expert).all()


def passes(seed=0, number=300):
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.full(16, 0.3), 2)
    for i in range(number):
        yield "ab"[i % 2], rng.choice(16, rng.integers(1, 5), p=likely[i % 2]).tolist()


def textbook(room, trace):
    """LFU with ageing, in a few lines: (hits, misses)."""
    held, often, age, hits, misses, clock = {}, Counter(), 0, 0, 0, 0
    for layer, hit in trace:
        hit = sorted(set(hit))
        for place, expert in enumerate(hit):
            key, clock = (layer, expert), clock + 1
            often[key] += 1
            if key in held:
                hits += 1
            else:
                misses += 1
                coming = {(layer, e) for e in hit[place + 1 :]}
                while len(held) >= room:
                    open_ones = [k for k in held if k not in coming] or list(held)
                    age = min(held[k][0] for k in open_ones)
                    del held[min(open_ones, key=held.__getitem__)]
            held[key] = (age + often[key], clock)
    return hits, misses


@pytest.mark.parametrize("room", [1, 3, 8, 32])
def test_without_reading_ahead_it_keeps_what_the_textbook_keeps(room, monkeypatch):
    monkeypatch.setattr(expert_cache, "READERS", 0)
    cache, log = cache_of(room)
    for layer, hit in passes():
        ask(cache, layer, hit)
    reads = cache.reads
    assert (reads.hits, reads.misses) == textbook(room, passes())
    assert len(log) == reads.misses and reads.bytes_read == reads.misses * SIZE and reads.unused == 0
    assert reads.hit_rate == reads.hits / (reads.hits + reads.misses)


@pytest.mark.parametrize("room", [1, 2, 5, 12, 32])
def test_reading_ahead_reads_what_is_asked_for_and_hardly_more(room):
    cache, log = cache_of(room)
    for layer, hit in passes(number=2000):
        ask(cache, layer, hit)
    settle(cache)
    reads = cache.reads
    left = len(cache._not_hit)
    assert len(log) == reads.misses + reads.unused + left
    assert reads.unused + left <= 0.05 * reads.misses + expert_cache.READERS
    assert reads.hits + reads.misses == sum(len(set(hit)) for _, hit in passes(number=2000))


def test_what_is_held_and_being_read_never_exceeds_the_budget():
    most, lock, room = [0], threading.Lock(), 6

    def read(layer, expert):
        with lock:
            most[0] = max(most[0], cache._taken)
        return {"wi/kernel": np.full(2, expert, np.int32)}, SIZE

    cache, _ = cache_of(room, read=read)
    for layer, hit in passes(number=500):
        ask(cache, layer, hit)
        assert len(cache._held) <= room
    assert 0 < most[0] <= room * SIZE


def test_an_expert_that_always_follows_another_is_read_before_it_is_asked_for():
    cache, log = cache_of(4, layers=("a", "b", "c"))
    for turn in range(40):  # more experts than there is room for, in a fixed order
        for layer in "abc":
            ask(cache, layer, [(turn * 5) % 15])
            settle(cache)
    before = cache.reads
    ask(cache, "a", [(40 * 5) % 15])
    settle(cache)
    assert ("b", (40 * 5) % 15) in cache._held, "its guess comes true"
    assert cache.reads.misses >= before.misses


def test_the_experts_of_a_layer_are_read_while_the_first_is_at_work():
    started, go = [], threading.Event()

    def read(layer, expert):
        started.append(expert)
        if expert:
            go.wait(5)
        return {"wi/kernel": np.full(2, expert, np.int32)}, SIZE

    cache, _ = cache_of(16, read=read)
    rows = np.ones(16, np.int32)
    cache.get("a", 0, rows)
    for _ in range(1000):
        if len(started) >= expert_cache.READERS:
            break
        time.sleep(0.005)
    assert sorted(started)[:2] == [0, 1] and len(started) <= 1 + expert_cache.READERS
    go.set()
    for expert in range(1, 16):
        assert (cache.get("a", expert, rows)["wi/kernel"] == expert).all()
    assert sorted(started) == list(range(16)), "each is read once"


def test_what_cannot_be_read_is_an_error_to_who_asks_and_is_tried_again():
    broken = {3}

    def read(layer, expert):
        if expert in broken:
            raise OSError("gone")
        return {"wi/kernel": np.full(2, expert, np.int32)}, SIZE

    cache, _ = cache_of(8, read=read)
    with pytest.raises(OSError, match="gone"):
        ask(cache, "a", [1, 3])
    broken.clear()
    ask(cache, "a", [1, 3])
    assert cache._taken == SIZE * len(cache._held)


def test_threads_that_ask_at_once_get_what_they_ask_for():
    cache, log = cache_of(5)
    problems = []

    def work(seed):
        try:
            for layer, hit in passes(seed, 400):
                ask(cache, layer, hit)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems
    assert cache._taken == SIZE * (len(cache._held) + len(cache._coming_in))


def test_a_memory_too_small_for_one_expert_is_refused_with_what_it_takes():
    with pytest.raises(ConfigError, match="must hold an expert, which takes 8 bytes; it is 4"):
        cache_of(0.5)
