"""A destination holds the old model or the new one, whole, and one conversion at a time: whoever is killed, whatever was there."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from flax_switch import ConfigError, SwitchConfig, save_pretrained
from flax_switch.convert import convert, open_checkpoint
from flax_switch.convert.canonical import canonical_shapes, unflatten
from flax_switch.convert.upcycle import upcycle

SMALL = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=2, capacity_mode="fixed",
)  # fmt: skip
DENSE = SMALL.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


def params(config: SwitchConfig = SMALL, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in canonical_shapes(config).items()})


def model(path: Path, format: str = "huggingface", config: SwitchConfig = SMALL, seed: int = 0, **options) -> Path:
    return save_pretrained(path, config, params(config, seed), format=format, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _slow_conversion(source: Path, destination: Path, far, go_on) -> None:
    def wait(count: int) -> None:
        far.set()
        go_on.wait(60)

    convert(source, destination, to="flax_switch", on_bytes=wait)


def test_a_second_conversion_into_a_destination_is_refused_and_the_first_is_not_disturbed(tmp_path):
    source = model(tmp_path / "source")
    context = multiprocessing.get_context("spawn")
    far, go_on = context.Event(), context.Event()
    first = context.Process(target=_slow_conversion, args=(source, tmp_path / "out", far, go_on))
    first.start()
    assert far.wait(60)
    for other in (
        lambda: convert(source, tmp_path / "out", to="flax_switch", overwrite=True),
        lambda: upcycle(source, tmp_path / "out", num_experts=2),
        lambda: model(tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=f"out is in use.*pid {first.pid} "):
            other()
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == contents(convert(source, tmp_path / "alone", to="flax_switch"))
    assert sorted(os.listdir(tmp_path)) == ["alone", "out", "source"]


def test_a_conversion_that_fails_leaves_no_lock(tmp_path):
    with pytest.raises(ConfigError):
        convert(tmp_path / "nothing", tmp_path / "out", to="flax_switch")
    assert not any(tmp_path.iterdir())
    open_checkpoint(model(tmp_path / "out"))
