"""A run is told where its dtype is slow on this CPU, and only then."""

import time

import jax
import pytest

import flax_switch as fs
from flax_switch.ops.kernels import slow_dtype as probe

MODEL = fs.SwitchConfig(vocab_size=96, d_model=64, d_ff=128, num_heads=2, d_kv=32, num_experts=2, dtype="bfloat16")


@pytest.fixture
def timed(monkeypatch):
    """Has products of a dtype take so many seconds as are set for it; returns what was timed."""
    seconds, seen = {"bfloat16": 0.014, "float32": 0.002}, []

    def told(multiply, pair):
        seen.append((pair[0].shape, pair[1].shape, pair[0].dtype.name))
        time.sleep(1e-3)
        return seconds[pair[0].dtype.name]

    monkeypatch.setattr(probe, "_seconds", told)
    return seconds, seen


def test_a_dtype_that_is_slow_on_this_cpu_is_named_with_what_to_set(timed):
    said = probe.slow_dtype(MODEL)
    assert said is not None
    assert said.startswith(
        "model.dtype='bfloat16' is slow on this CPU: a product of 256 rows with 64 x 128 weights takes 7.0 times"
    )
    assert "Set model.dtype='float32' here" in said
    shapes, kinds = {case[:2] for case in timed[1]}, [case[2] for case in timed[1]]
    assert shapes == {((256, 64), (64, 128))} and kinds.count("bfloat16") == kinds.count("float32") > probe.LEAST


@pytest.mark.parametrize("narrow", [0.0010, 0.0021])
def test_nothing_is_said_where_it_is_as_fast(timed, narrow):
    timed[0]["bfloat16"] = narrow
    assert probe.slow_dtype(MODEL) is None


def test_nothing_is_timed_in_float32_or_on_an_accelerator(timed, monkeypatch):
    assert probe.slow_dtype(MODEL.replace(dtype="float32")) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert probe.slow_dtype(MODEL) is None
    assert timed[1] == []


def test_the_figure_is_that_of_products_on_this_machine(monkeypatch):
    monkeypatch.setattr(probe, "ROWS", 8)
    started = time.perf_counter()
    assert 0.01 < probe._ratio(64, 128, "bfloat16") < 100
    assert time.perf_counter() - started < 30
    assert 0.2 < probe._ratio(64, 128, "float32") < 5
