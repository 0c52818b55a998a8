"""Models whose experts stay in their files: the same bits as in memory, few bytes, and clear words for broken files."""

import gc
import json
import os
import random
import threading
import time
import weakref

import jax
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.cli import main
from flax_switch.config import EXECUTORS, MeshConfig
from flax_switch.convert import safetensors_file
from flax_switch.convert.canonical import flatten, is_expert
from flax_switch.convert.checkpoint import open_checkpoint
from flax_switch.data import Vocabulary
from flax_switch.ops.kernels import narrow
from flax_switch.ops.kernels.on_disk import OnDisk
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import from_checkpoint
from flax_switch.pretrained import on_disk as reading

CONFIG = fs.SwitchConfig(
    vocab_size=96, d_model=64, num_heads=2, d_kv=32, d_ff=128, num_encoder_layers=1, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8, init_scale=1.0, router_init_std=0.3,
)  # fmt: skip
RICH = dict(
    num_selected_experts=2, mlp_activations=("gelu_new", "linear"), shared_expert=True, extra_mlp=True, router_bias=True,
    tie_word_embeddings=False, capacity_mode="dropless",
)  # fmt: skip
EXPERT = 2 * 64 * 128 * 4  # bytes of one in float32
IDS = np.random.default_rng(0).integers(3, 96, (4, 40))
TARGET = np.random.default_rng(1).integers(3, 96, (4, 9))
CONTROLS = {
    "greedy": dict(),
    "beams": dict(num_beams=3),
    "samples": dict(do_sample=True, top_k=20, num_return_sequences=2, seed=3),
}


def saved(folder, config=CONFIG, seed=0, vocabulary=None, **options):
    model = fs.SwitchEncoder(config) if options.pop("encoder", False) else config
    return fs.save_pretrained(folder, config, fs.init_params(model, jax.random.key(seed)), vocabulary, **options)


def pair(folder, memory=3 * EXPERT, **changes):
    """The model of a folder in memory, and with its experts on disk."""
    return fs.load_pretrained(folder, **changes), fs.load_pretrained(folder, experts="disk", expert_memory=memory, **changes)


def slow_but(names, *quick):
    """The names as parameters, all but some of them for the slow part."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def assert_same_bits(resident, on_disk, *controls):
    for name in controls:
        options = dict(max_new_tokens=6, output_scores=True, **CONTROLS[name])
        want, got = (m.generate(IDS, **options) for m in (resident, on_disk))
        np.testing.assert_array_equal(got.sequences, want.sequences)
        np.testing.assert_array_equal(got.step_scores, want.step_scores)
    want, got = (m(IDS, decoder_input_ids=TARGET, output_router_logits=True) for m in (resident, on_disk))
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.encoder_router_logits[0], want.encoder_router_logits[0])


LAYOUTS = {
    "Hugging Face's, one file": dict(format="huggingface"),
    "Hugging Face's, in shards": dict(format="huggingface", max_shard_size="100KB"),
    "ours, one file": dict(format="flax_switch"),
    "ours, stacks in parts": dict(format="flax_switch", max_shard_size="150KB"),
}


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "Hugging Face's, in shards"))
def test_every_layout_gives_the_bits_of_the_model_in_memory(tmp_path, layout):
    resident, on_disk = pair(saved(tmp_path / "model", **LAYOUTS[layout]))
    assert_same_bits(resident, on_disk, "greedy")
    np.testing.assert_array_equal(on_disk.encode(IDS).last_hidden_state, resident.encode(IDS).last_hidden_state)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(saved(tmp_path_factory.mktemp("plain") / "model", format="flax_switch"))


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("rich") / "model", CONFIG.replace(**RICH), format="flax_switch")


@pytest.mark.parametrize("controls", slow_but(CONTROLS, "greedy", "beams"))
def test_greedy_beams_and_samples_are_those_of_the_model_in_memory(models, controls):
    assert_same_bits(*models, controls)


@pytest.mark.parametrize("weights", slow_but(["bfloat16", "int8", "int4"], "int8"))
def test_every_form_gives_the_bits_of_the_model_in_memory(rich, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(narrow, "LEAST_WEIGHTS", 0)  # so that kernels as small as these are multiplied as large ones are
    small = fs.load_pretrained(rich, weights=weights)
    small.save_pretrained(tmp_path / "small", format="flax_switch")
    on_disk = fs.load_pretrained(tmp_path / "small", experts="disk", expert_memory=3 * EXPERT)
    assert_same_bits(small, on_disk, "greedy", "beams")
    for rows, prefix in ((1, [[0]]), (1, [[5, 6, 7, 8, 9]]), (2, [[5, 6]] * 2)):
        options = dict(decoder_input_ids=prefix, max_new_tokens=6, output_scores=True)
        want, got = (model.generate(IDS[:rows], **options).step_scores for model in (small, on_disk))
        np.testing.assert_array_equal(got, want)
    rounded_on_reading = fs.load_pretrained(rich, weights=weights, experts="disk")
    np.testing.assert_array_equal(*(m.encode(IDS).last_hidden_state for m in (small, rounded_on_reading)))


ROUTINGS = {
    **{executor: dict(moe_executor=executor) for executor in EXECUTORS},
    "buffers of a small capacity": dict(eval_capacity_factor=0.5),
    "a fixed capacity": dict(capacity_mode="fixed", expert_capacity=3),
    "experts choose": dict(router_type="experts_choose", capacity_factor=1.0, eval_capacity_factor=1.0),
    "hash": dict(router_type="hash"),
    "groups of tokens": dict(routing_group="tokens", group_size=32, num_selected_experts=2),
    "exact gelu": dict(mlp_activations=("gelu",), capacity_mode="dropless"),
    "computed in bfloat16": dict(dtype="bfloat16", mlp_activations=("silu", "linear")),
}


@pytest.mark.quick
@pytest.mark.parametrize("routing", slow_but(ROUTINGS, "gather", "experts choose"))
def test_every_way_to_route_and_to_execute_gives_the_bits_of_the_model_in_memory(tmp_path, routing):
    folder = saved(tmp_path / "model", CONFIG.replace(**ROUTINGS[routing]), format="flax_switch")
    assert_same_bits(*pair(folder, memory=6 * EXPERT))


def test_an_encoder_alone_and_a_single_token_have_the_same_bits_too(tmp_path, models):
    alone = pair(saved(tmp_path / "encoder", encoder=True, format="flax_switch"))
    np.testing.assert_array_equal(*(m.encode(IDS).last_hidden_state for m in alone))
    np.testing.assert_array_equal(*(m(IDS[:1, :1], decoder_input_ids=TARGET[:1, :1]).logits for m in models))
    one = dict(max_new_tokens=5, output_scores=True)
    np.testing.assert_array_equal(*(m.generate(IDS[:1], **one).step_scores for m in models))


@pytest.fixture(params=["a kernel after the other", "kernels at a time"])
def threads(request, monkeypatch):
    """Has an expert's kernels read by one thread or, as those of large experts are, by several."""
    monkeypatch.setattr(reading, "LARGE", 0 if request.param == "kernels at a time" else reading.LARGE)
    return request.param


def test_kernels_that_are_read_at_a_time_have_the_bits_of_the_model_in_memory(rich, monkeypatch):
    monkeypatch.setattr(reading, "LARGE", 0)
    at_work, original = set(), reading._one

    def seen(*args, **options):
        at_work.add(threading.current_thread())
        return original(*args, **options)

    monkeypatch.setattr(reading, "_one", seen)
    assert_same_bits(*pair(rich), "greedy")
    assert any(thread.name.startswith("experts' kernels") for thread in at_work), at_work


def test_an_expert_is_read_once_however_many_rows_hit_it_and_stays_where_there_is_room(tmp_path, threads):
    folder = saved(tmp_path / "model", format="huggingface")
    model = fs.load_pretrained(folder, experts="disk", expert_memory=24 * EXPERT)
    first = model.generate(IDS, max_new_tokens=6)
    again = model.generate(IDS, max_new_tokens=6)
    assert first.expert_reads.misses > 0 and first.expert_reads.bytes_read == first.expert_reads.misses * EXPERT
    assert again.expert_reads.misses == again.expert_reads.bytes_read == 0 and again.expert_reads.hit_rate == 1
    assert model.expert_reads.hits == first.expert_reads.hits + again.expert_reads.hits


def test_a_slow_disk_of_which_the_system_keeps_no_pages_costs_time_and_no_token(tmp_path, monkeypatch, threads):
    resident, on_disk = pair(saved(tmp_path / "model", format="flax_switch"), memory=2 * EXPERT)
    original, delays = safetensors_file.read_block, random.Random(0)

    def slow(path, *block):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(delays.uniform(0.001, 0.01))
        return original(path, *block)

    monkeypatch.setattr(safetensors_file, "read_block", slow)
    assert_same_bits(resident, on_disk, "greedy")
    reads = on_disk.expert_reads
    assert reads.misses > 10 and reads.seconds_waited > 0.001 * reads.misses


def test_loading_reads_no_expert(tmp_path, monkeypatch):
    folder, read = saved(tmp_path / "model", format="flax_switch"), []
    original = safetensors_file.read_block

    def counted(path, offset, shape, dtype, index):
        block = original(path, offset, shape, dtype, index)
        read.append(block.nbytes)
        return block

    monkeypatch.setattr(safetensors_file, "read_block", counted)
    model = fs.load_pretrained(folder, experts="disk", expert_memory=EXPERT)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert sum(read) == held
    every = flatten(model.params)
    experts = [leaf for path, leaf in every.items() if is_expert(path)]
    assert experts and all(isinstance(leaf, OnDisk) for leaf in experts)
    whole = fs.load_pretrained(folder)
    assert every.keys() == flatten(whole.params).keys()
    assert repr(model) == repr(whole), "the table of parameters says what the model has, wherever that lies"


def test_what_was_held_goes_with_the_model(tmp_path):
    model = fs.load_pretrained(saved(tmp_path / "model", format="flax_switch"), experts="disk")
    model.generate(IDS, max_new_tokens=2)
    cache = weakref.ref(next(leaf for leaf in flatten(model.params).values() if isinstance(leaf, OnDisk)).cache)
    assert cache() is not None
    del model
    gc.collect()
    assert cache() is None, "a compiled program must not keep experts in memory"


def test_threads_that_generate_at_once_get_their_own_tokens(models):
    resident, on_disk = models
    want = [resident.generate(IDS[i : i + 1], max_new_tokens=6).sequences for i in range(4)]
    got = [None] * 4

    def run(i):
        got[i] = on_disk.generate(IDS[i : i + 1], max_new_tokens=6).sequences

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def change(path):
    """Changes a byte of an expert, as a write in place does."""
    with open(path, "r+b") as file:
        file.seek(-9, os.SEEK_END)
        byte = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def change_and_hide(path):
    times = os.stat(path)
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGE = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 100), "has changed since the model was opened"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "changed": (change, "has changed since the model was opened"),
    "changed, with its old time": (change_and_hide, "has changed since the model was opened"),
    "another": (lambda path: path.write_bytes(path.read_bytes()), "has changed since the model was opened"),
}


RUNS = {
    "encode": lambda model: model.encode(IDS),
    "call": lambda model: model(IDS, decoder_input_ids=TARGET),
    "generate": lambda model: model.generate(IDS, max_new_tokens=4),
}


@pytest.mark.parametrize(
    ("damage", "run"), [*((damage, "encode") for damage in DAMAGE), ("changed", "call"), ("changed", "generate")]
)
def test_a_damaged_file_ends_in_a_sentence_that_names_the_expert(tmp_path, damage, run, capfd, threads):
    folder = saved(tmp_path / "model", format="flax_switch")
    model = fs.load_pretrained(folder, experts="disk", expert_memory=2 * EXPERT)
    break_it, words = DAMAGE[damage]
    break_it(folder / "params.safetensors")
    for _ in range(2):
        with pytest.raises(fs.CheckpointError, match=rf"^Expert \d of encoder/layers_0 cannot be read: .*{words}") as raised:
            RUNS[run](model)
        assert str(raised.value).count(". ") <= 1 and str(raised.value).endswith(".")
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_is_damaged_while_the_model_runs_costs_the_tokens_and_not_their_truth(tmp_path):
    folder = saved(tmp_path / "model", format="flax_switch")
    model = fs.load_pretrained(folder, experts="disk", expert_memory=EXPERT)
    want = model.encode(IDS).last_hidden_state
    np.testing.assert_array_equal(model.encode(IDS).last_hidden_state, want)
    change(folder / "params.safetensors")
    with pytest.raises(fs.CheckpointError, match="has changed since the model was opened"):
        model.encode(IDS)


def test_what_experts_on_disk_cannot_do_is_refused_by_name(tmp_path, models):
    folder, on_disk = saved(tmp_path / "model", format="flax_switch"), models[1]
    disk = dict(experts="disk")
    for arguments, words in (
        (dict(experts="dis"), "experts must be one of 'memory', 'disk'.*Did you mean 'disk'"),
        (dict(expert_memory="4GB"), "expert_memory='4GB' bounds the memory of experts on disk; with it goes experts='disk'"),
        (dict(disk, expert_memory="much"), "a size is a positive number and a unit"),
        (dict(disk, expert_memory=1000), f"must hold an expert, which takes {EXPERT:,} bytes; it is 1,000"),
        (dict(disk, mesh=create_mesh(MeshConfig())), "experts='disk' serves one device"),
        (dict(disk, shardings=lambda path: None), "experts='disk' serves one device"),
        (dict(disk, scan_layers=True), "leave scan_layers=True out"),
    ):
        with pytest.raises(fs.ConfigError, match=words):
            fs.load_pretrained(folder, **arguments)
    with pytest.raises(fs.ConfigError, match="Saving or quantising a model needs all parameters in memory"):
        on_disk.save_pretrained(tmp_path / "copy")
    with pytest.raises(fs.ConfigError, match="Saving or quantising a model needs all parameters in memory"):
        fs.quantize(on_disk, "int8")
    with pytest.raises(fs.ConfigError, match="A training state needs all parameters in memory"):
        fs.TrainState.create(on_disk.params, fs.optimizer(on_disk.config))
    with pytest.raises(fs.ConfigError, match="Training needs all parameters in memory"):
        on_disk(IDS, decoder_input_ids=TARGET, deterministic=False, rngs={"dropout": jax.random.key(0)})
    dense = saved(
        tmp_path / "dense", CONFIG.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0), format="flax_switch"
    )
    with pytest.raises(fs.ConfigError, match="is for sparse models"):
        fs.load_pretrained(dense, **disk)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "flax_model.msgpack"])
def test_files_of_which_no_expert_can_be_read_by_itself_are_refused(tmp_path, name):
    folder = saved(tmp_path / "model", format="huggingface")
    opened = open_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(fs.CheckpointError, match=r"reads them from safetensors files .* Convert it first: flax-switch convert"):
        from_checkpoint(opened, experts="disk")


TEXTS = ["the cat sat on the mat", "a dog ran"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    vocabulary = Vocabulary.train(["the cat sat on the mat and a dog ran after the cat"] * 30, 21, num_sentinels=4)
    return saved(tmp_path_factory.mktemp("spoken") / "model", vocabulary=vocabulary, format="flax_switch")


def said(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr()


def test_the_commands_say_what_they_say_with_experts_in_memory_and_what_they_read(spoken, tmp_path, capsys):
    (tmp_path / "in").write_text("\n".join(TEXTS))
    on_disk = ["--experts", "disk", "--expert-memory", "1MB"]
    generate = ["generate", "--checkpoint", spoken, "--input", tmp_path / "in", "--max-new-tokens", 4]
    inspect = ["inspect", spoken, *(a for text in TEXTS for a in ("--text", text)), "--json"]
    for command in (generate, [*generate, "--weights", "int8"], inspect):
        want, got = said(capsys, *command), said(capsys, *command, *on_disk)
        assert got.out == want.out and want.err == ""
        assert "Experts from disk: of " in got.err and " MB in all; " in got.err
    assert json.loads(got.out)["num_experts"] == 8
    for command in (generate, inspect):
        assert main([str(a) for a in [*command, "--expert-memory", "1MB"]]) == 2
        assert "with it goes experts='disk'" in capsys.readouterr().err


@pytest.mark.parametrize("weights", slow_but(["float32", "bfloat16", "int8", "int4"], "bfloat16"))
def test_generate_holds_weights_in_the_form_that_is_asked_for(spoken, tmp_path, capsys, weights):
    (tmp_path / "in").write_text("\n".join(TEXTS))
    out = said(
        capsys, "generate", "--checkpoint", spoken, "--input", tmp_path / "in", "--max-new-tokens", 4, "--weights", weights
    ).out
    model = fs.load_pretrained(spoken, weights=weights)
    want = [model.generate(text, max_new_tokens=4).texts[0] for text in TEXTS]
    assert [json.loads(line)["outputs"][0] for line in out.splitlines()] == want
