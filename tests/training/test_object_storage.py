"""A run whose workdir and text lie in object storage writes, resumes and is read there, as it is on a disk."""

import gzip
import json

import jax
import numpy as np
import pytest
from etils import epath
from object_store import fake_bucket

import flax_switch as fs
from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.convert.tensors import CheckpointError
from flax_switch.data import sources
from flax_switch.host import files
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.training.metrics import MetricsWriter, read_metrics
from flax_switch.workflows.finish import finish
from flax_switch.workflows.pretrain import pretrain
from flax_switch.workflows.report import write_report

TIMING = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")


TINY = SwitchConfig(
    vocab_size=128, d_model=8, d_ff=16, num_heads=2, d_kv=4, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=4,
)  # fmt: skip


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with fake_bucket(tmp_path / "buckets", monkeypatch) as written:
        yield written


def text_lines(count=300):
    words = ["switch", "router", "expert", "token", "capacity", "layer", "sparse", "dense", "batch", "mesh"]
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(words, 12)) for _ in range(count)]


def put_text():
    """Text in a bucket, in a folder of a folder, some of it compressed."""
    folder = epath.Path("gs://texts/corpus/deep")
    folder.mkdir(parents=True)
    lines = text_lines()
    (folder / "a.txt").write_text("\n".join(lines[:150]))
    records = "\n".join(json.dumps({"text": line}) for line in lines[150:])
    (folder.parent / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (folder / "readme.rst").write_text("not text of ours")
    return lines


def test_text_is_read_from_files_folders_and_globs_in_a_bucket(bucket):
    lines = put_text()
    names = ["gs://texts/corpus/b.jsonl.gz", "gs://texts/corpus/deep/a.txt"]
    assert [str(path) for path in sources.find_files("gs://texts/corpus")] == names
    assert [str(path) for path in sources.find_files("gs://texts/corpus/deep/*.txt")] == names[1:]
    found = sources.find_files(tuple(names[::-1]))
    assert list(sources.documents(found)) == lines
    before = sources.fingerprint(found, "text", "line")
    found[0].write_text("something else")
    assert sources.fingerprint(found, "text", "line") != before
    with pytest.raises(ConfigError, match="gs://texts/nothing"):
        sources.find_files("gs://texts/nothing")


def test_what_needs_a_disk_says_so(bucket, tmp_path):
    with pytest.raises(ConfigError, match="must be a folder on this machine"):
        files.cache_folder("gs://texts/cache")
    config = fs.PRESETS["switch-tiny"]
    with pytest.raises(CheckpointError, match="written to disks"):
        fs.save_pretrained("gs://models/tiny", config, {})
    with pytest.raises(CheckpointError, match="gs://models/none does not exist"):
        fs.load_pretrained("gs://models/none")


def test_metrics_in_a_bucket_are_whole_at_every_flush(bucket):
    epath.Path("gs://runs/one").mkdir(parents=True)
    writer = MetricsWriter("gs://runs/one")
    writer.write(1, "train", {"loss": 2.0})
    writer.flush()
    writer.write(2, "train", {"loss": 1.0})
    assert [line["step"] for line in read_metrics("gs://runs/one")] == [1]
    writer.close()
    again = MetricsWriter("gs://runs/one", resume_step=1)
    again.write(2, "train", {"loss": 1.5})
    again.close()
    assert [line["loss"] for line in read_metrics("gs://runs/one")] == [2.0, 1.5]


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_reports_and_loads_as_one_on_a_disk(bucket, tmp_path):
    put_text()
    config = ExperimentConfig(
        model=TINY,
        data=DataConfig(
            source="gs://texts/corpus", vocabulary_size=30, num_sentinels=10, inputs_length=16, targets_length=8, batch_size=8,
            heldout_fraction=0.1, cache_dir=str(tmp_path / "cache"),
        ),
        optimizer=OptimizerConfig(warmup_steps=4, min_dim_size_to_factor=4),
        mesh=MeshConfig(expert=4),
        train=TrainConfig(steps=4, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2, keep_last=1, sample_spans=1),
    )  # fmt: skip
    whole = pretrain(config, tmp_path / "disk")
    bucket.clear()
    pretrain(config.replace(train=config.train.replace(steps=2)), "gs://runs/stored")
    assert any("/checkpoints/" in name for name in bucket)  # tensorstore wrote arrays over HTTP
    result = pretrain(config, "gs://runs/stored")

    def losses(workdir):
        lines = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir)]
        return [line for line in lines if (line["step"], line["kind"]) != (2, "eval")]  # at the end of the first call

    assert losses("gs://runs/stored") == losses(tmp_path / "disk")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.state.params), jax.device_get(whole.state.params))
    finish(result, "gs://runs/stored")
    assert write_report("gs://runs/stored").read_text().startswith("<!doctype html>")
    loaded = fs.load_pretrained("gs://runs/stored")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), jax.device_get(result.state.params))
    assert loaded.vocabulary.fingerprint == whole.prepared.vocabulary.fingerprint


@pytest.mark.slow
def test_a_converted_model_loads_from_a_bucket(bucket, tmp_path):
    params = init_params(SwitchTransformer(TINY), jax.random.key(0))
    fs.save_pretrained(tmp_path / "buckets" / "models" / "tiny", TINY, params, format="flax_switch")
    loaded = fs.load_pretrained("gs://models/tiny")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), jax.device_get(params))
