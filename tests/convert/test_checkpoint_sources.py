"""Where checkpoints come from besides folders of others: the hub's cache, and training runs."""

import json
import os
from pathlib import PurePosixPath
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flax_switch import CheckpointError, SwitchConfig, load_pretrained
from flax_switch.config import ExperimentConfig, MeshConfig
from flax_switch.convert import checkpoint, convert, detect_format, hub, open_checkpoint, stack_layers
from flax_switch.convert.canonical import canonical_shapes, flatten, unflatten
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.checkpoint import Checkpoints, claim_workdir
from flax_switch.training.state import TrainState
from tests.convert import oracle

CONFIG = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=4, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=4,
)  # fmt: skip


def random_params(config: SwitchConfig = CONFIG) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in canonical_shapes(config).items()}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache as the hub lays it out, with google/switch-test in it, and the network off."""
    import huggingface_hub.constants

    model = tmp_path / "hub" / "models--google--switch-test"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    saved = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "saved")
    for i, path in enumerate(sorted(saved.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_name_is_found_in_the_local_cache_offline(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("google/switch-test").path == hub_cache
    assert convert("google/switch-test", tmp_path / "ours", to="flax_switch").is_dir()
    assert load_pretrained("google/switch-test", revision="main").config.num_experts == 4


@pytest.mark.parametrize(("stored", "asked"), [("model.safetensors", ["safetensors"]), ("model.bin", ["safetensors", "bin"])])
def test_torch_files_are_fetched_only_where_there_are_no_safetensors(tmp_path, monkeypatch, stored, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / stored).touch()
    fetched = []

    def snapshot_download(name, *, revision, allow_patterns):
        fetched.append((name, revision, allow_patterns[-1]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.local_folder("google/switch-test", revision="v1") == tmp_path / "snapshot"
    assert fetched == [("google/switch-test", "v1", f"*.{ending}") for ending in asked]


def test_a_name_the_cache_lacks_and_a_path_that_is_absent_say_so(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="google/other.*does not have it"):
        open_checkpoint("google/other")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("./runs/absent/checkpoint")


def test_a_hub_name_without_the_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"flax_switch\[hub\]"):
        open_checkpoint("google/switch-base-8")


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def run(request, tmp_path):
    """A run's folder with two checkpoints and a vocabulary, as training writes it."""
    config = CONFIG.replace(scan_layers=request.param, relative_attention_per_layer=request.param)
    workdir = tmp_path / "run"
    claim_workdir(workdir, ExperimentConfig(model=config))
    vocabulary = Vocabulary.train(["the cat sat on the mat and looked at the other cat"] * 3, 20, num_sentinels=2)
    (workdir / "vocabulary").mkdir()
    vocabulary.save(workdir / "vocabulary")
    checkpoints = Checkpoints(workdir)
    for step, scale in ((3, 0.5), (20, 1.0)):
        params = {path: jnp.asarray(array * np.float32(scale)) for path, array in random_params(config).items()}
        params = unflatten(stack_layers(params, config) if config.scan_layers else params)
        checkpoints.save(TrainState(jnp.int32(step), params, {"m": jnp.zeros(3)}, jnp.zeros(2, jnp.uint32)), {})
    checkpoints.close()
    return workdir


def test_a_training_run_opens_at_its_latest_step_or_the_one_named(run):
    assert detect_format(run) == "orbax"
    latest, earlier = open_checkpoint(run), open_checkpoint(run / "checkpoints" / "3")
    params = random_params(latest.config)
    assert latest.tensors.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(latest.tensors[path].numpy(), array)
        np.testing.assert_array_equal(earlier.tensors[path].numpy(), array * np.float32(0.5))


def test_a_training_run_loads_with_its_vocabulary_in_the_form_its_config_says(run):
    pretrained = load_pretrained(run)
    assert pretrained.vocabulary.num_sentinels == 2
    paths = flatten(pretrained.params)
    assert any("subblock_" in path for path in paths) == pretrained.config.scan_layers
    unrolled = load_pretrained(run, scan_layers=False)
    assert "encoder/layers_3/mlp/expert/wi/kernel" in flatten(unrolled.params)


def test_a_training_run_converts_to_hugging_face_with_its_tokenizer(run, tmp_path):
    opened = open_checkpoint(run)
    if opened.config.relative_attention_per_layer:
        with pytest.raises(ValueError, match="relative_attention_per_layer"):
            convert(run, tmp_path / "theirs", to="huggingface")
        return
    import transformers

    theirs = convert(run, tmp_path / "theirs", to="huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    text = "the cat <extra_id_1> mat"
    assert tokenizer(text).input_ids == [*load_pretrained(run).vocabulary.encode(text), 1]
    values = json.loads((theirs / "config.json").read_text())
    assert values["expert_capacity"] == 64  # a capacity factor becomes Hugging Face's fixed capacity
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(theirs)
    np.testing.assert_array_equal(model.shared.weight.detach(), random_params()["token_embedder/embedding"])


def test_a_run_without_a_checkpoint_yet_says_so(tmp_path):
    claim_workdir(tmp_path / "run", ExperimentConfig(model=CONFIG))
    with pytest.raises(CheckpointError, match="without a complete checkpoint"):
        open_checkpoint(tmp_path / "run")


@pytest.fixture
def saved(tmp_path):
    """A folder of ours."""
    from flax_switch import save_pretrained

    save_pretrained(tmp_path / "saved", CONFIG, random_params(), format="flax_switch", max_shard_size="2KB")
    return tmp_path / "saved"


def test_parameters_land_in_the_shardings_asked_for_and_each_block_is_read_once(saved, monkeypatch):
    mesh = create_mesh(MeshConfig(data=1, expert=4, model=2))
    reads = []
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: (reads.append(kwargs["count"]), fromfile(*args, **kwargs))[1])
    pretrained = load_pretrained(saved, mesh=mesh)
    params = flatten(pretrained.params)
    experts = params["encoder/layers_1/mlp/expert/wi/kernel"]
    assert experts.sharding.spec[0] == "expert" and experts.addressable_shards[0].data.shape == (1, 8, 8)
    for path, array in random_params().items():
        np.testing.assert_array_equal(params[path], array)
    total = sum(array.nbytes for array in random_params().values())
    assert sum(reads) < 2.1 * total  # column shards read whole rows, once for each half; nothing is read once per device


def test_shardings_can_be_a_function_or_a_tree(saved):
    mesh = create_mesh(MeshConfig(data=8))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_function = load_pretrained(saved, shardings=lambda path: everywhere if path.startswith("encoder") else None)
    assert len(by_function.params["encoder"]["encoder_norm"]["scale"].sharding.device_set) == 8
    assert len(by_function.params["decoder"]["decoder_norm"]["scale"].sharding.device_set) == 1
    tree = jax.tree.map(lambda _: everywhere, by_function.params)
    by_tree = load_pretrained(saved, shardings=tree)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(by_tree.params))
    del tree["token_embedder"]
    with pytest.raises(ValueError, match="token_embedder/embedding"):
        load_pretrained(saved, shardings=tree)


def test_scanned_parameters_load_into_shardings_of_their_own_paths(saved):
    mesh = create_mesh(MeshConfig(data=2, expert=4))
    pretrained = load_pretrained(saved, mesh=mesh, scan_layers=True)
    leaf = flatten(pretrained.params)["encoder/encoder/subblock_1/mlp/expert/wi/kernel"]
    assert leaf.shape == (4, 2, 8, 16) and leaf.sharding.spec[0] == "expert"
    expected = [random_params()[f"encoder/layers_{i}/mlp/expert/wi/kernel"] for i in (1, 3)]
    np.testing.assert_array_equal(leaf, np.stack(expected, 1))


def test_loading_never_touches_the_source(saved):
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    for path in saved.iterdir():
        path.chmod(0o444)
    os.chmod(saved, 0o555)
    load_pretrained(saved)
    os.chmod(saved, 0o755)
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before


def test_a_folder_in_a_store_is_the_same_in_whatever_order_it_is_listed(monkeypatch):
    class File(PurePosixPath):
        def is_file(self):
            return self.suffix != ""

        def stat(self):
            return SimpleNamespace(length=len(self.name), mtime=float(len(self.stem)))

    found = [File("gs://bucket/model") / name for name in ("a.json", "b.bin", "folder", "c.safetensors")]
    monkeypatch.setattr(checkpoint, "in_store", lambda folder: True)
    listed = [
        checkpoint.source_identity(SimpleNamespace(iterdir=lambda order=order: iter(order))) for order in (found, found[::-1])
    ]
    assert listed[0][1:] == listed[1][1:] == [["a.json", 6, 1.0], ["b.bin", 5, 1.0], ["c.safetensors", 13, 1.0]]
