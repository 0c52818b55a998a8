"""Four bits by texts: which models take them, what they gain, and that files and commands have the same bits."""

import json

import jax
import numpy as np
import pytest
from same_tensors import assert_same

import flax_switch as fs
from flax_switch.cli import main
from flax_switch.config import MeshConfig
from flax_switch.config.weights import SCALE
from flax_switch.convert.canonical import flatten, weights_of
from flax_switch.data import Vocabulary
from flax_switch.nn.heads import build_model
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import calibration

SHAPE = dict(vocab_size=96, d_model=64, num_heads=2, d_kv=32, d_ff=64, num_experts=4, init_scale=1.0)
CONFIG = fs.SwitchConfig(
    **SHAPE, num_encoder_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
)  # fmt: skip
DECODER = fs.SwitchConfig(**SHAPE, architecture="decoder_only", num_decoder_layers=1, num_sparse_decoder_layers=1)
SPEAKING = CONFIG.replace(tie_word_embeddings=False)  # one that is tied, and of random numbers, says what it was told last
TEXTS = ["ba ke lo", "mi nu ra se ti", "vo zu", "lo lo ke ba mi", "se"] * 6


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train(["ba ke lo mi nu ra se ti vo zu"] * 40, 20, num_sentinels=4)


def model(config=CONFIG, architecture="full", vocabulary=None):
    made = build_model(config, architecture)
    params = fs.init_params(made, jax.random.key(0))
    return fs.Pretrained(config, made, params, vocabulary, architecture)


def calls(rows=16, seed=0, **names):
    rng = np.random.default_rng(seed)
    return [{name: rng.integers(3, 96, (rows, length)) for name, length in names.items()}]


def changed_by(pretrained, batches):
    """The kernels of four bits, and those of them whose integers calibration changed."""
    was, found = (
        flatten(fs.quantize(pretrained, "int4", kernels="integers", **of).params) for of in ({}, dict(calibration=batches))
    )
    assert was.keys() == found.keys()
    four = {path for path in was if weights_of(path, pretrained.config.replace(weights="int4")) == "int4"}
    for path, leaf in was.items():
        if path.removesuffix(SCALE) not in four:
            np.testing.assert_array_equal(leaf, found[path], err_msg=path)
    return four, {path for path in four if not np.array_equal(was[path], found[path])}


@pytest.mark.parametrize(
    ("config", "architecture", "batch"),
    [
        (CONFIG, "full", dict(input_ids=12, labels=9)),
        (CONFIG, "headless", dict(input_ids=12, decoder_input_ids=9)),
        (CONFIG, "encoder", dict(input_ids=12)),
        (DECODER, "full", dict(input_ids=12)),
        (CONFIG.replace(num_selected_experts=2, shared_expert=True, extra_mlp=True), "full", dict(input_ids=12, labels=9)),
        (CONFIG.replace(head="token_classification", labels=("a", "b")), "token_classification", dict(input_ids=12)),
    ],
    ids=["full", "headless", "encoder", "decoder only", "two experts and a shared one", "a head for tokens"],
)  # fmt: skip
def test_every_kernel_of_four_bits_is_rounded_anew_and_no_other(config, architecture, batch):
    four, changed = changed_by(model(config, architecture), calls(**batch))
    assert four and changed == four


@pytest.mark.parametrize("config", [SPEAKING, DECODER, CONFIG.replace(head="classification", labels=("a", "b"))])
def test_texts_are_answered_by_the_model_itself(config, vocabulary):
    four, changed = changed_by(model(config, "full" if config.head == "language_model" else config.head, vocabulary), TEXTS)
    assert changed == four


def test_what_a_text_is_answered_decides_and_so_does_a_prefix(vocabulary):
    whole = model(SPEAKING, vocabulary=vocabulary)
    (batch,) = calibration._of_texts(whole, TEXTS[:2])
    for text, said, labels in zip(TEXTS, whole.generate(TEXTS[:2], max_new_tokens=64).sequences, batch["labels"], strict=False):
        said = said[1:][said[1:] != 0]
        assert len(said) > 1
        np.testing.assert_array_equal(labels[labels >= 0], said, err_msg=text)
    with_prefix = whole.replace(prefixes=("first: ",))
    (other,) = calibration._of_texts(with_prefix, TEXTS[:2])
    assert other["attention_mask"].sum() > batch["attention_mask"].sum()


@pytest.mark.slow
def test_scanned_layers_and_groups_of_kernels_change_no_bit(monkeypatch):
    scanned = CONFIG.replace(scan_layers=True)
    batches = calls(input_ids=12, labels=9)
    one = fs.quantize(model(), "int4", calibration=batches)
    monkeypatch.setattr(calibration, "MOMENTS_BYTES", 1)
    assert_same(one.params, fs.quantize(model(), "int4", calibration=batches).params)
    from flax_switch.pretrained.loading import built_of
    from flax_switch.pretrained.saving import unscanned

    layers = built_of(model(), scanned, unscanned(CONFIG, model().params))
    stacked = fs.quantize(layers, "int4", calibration=batches)
    back = built_of(stacked, stacked.config.replace(scan_layers=False), unscanned(stacked.config, stacked.params))
    assert_same(one.params, back.params)


def test_padding_says_nothing(monkeypatch):
    monkeypatch.setattr(calibration.jax.random, "categorical", lambda rng, logits: logits.argmin(-1))
    (batch,) = calls(input_ids=12, labels=9)
    longer = {name: np.pad(values, ((0, 0), (0, 5)), constant_values=7) for name, values in batch.items()}
    longer["labels"][:, 9:] = -100
    longer |= dict(attention_mask=np.tile(np.arange(17) < 12, (16, 1)))  # labels alone say where the decoder ends
    whole = model(CONFIG.replace(capacity_mode="dropless"))  # else padding takes places
    paths = [f"{stack}/layers_0/mlp/expert/{name}/kernel" for stack in ("encoder", "decoder") for name in ("wi", "wo")]
    want, found = (calibration._moments(whole, [one], paths) for one in (batch, longer))
    for path in paths:
        np.testing.assert_allclose(found[path], want[path], rtol=1e-4, atol=1e-4 * want[path].max(), err_msg=path)


@pytest.mark.quick
def test_a_folder_and_the_command_have_the_same_bits(tmp_path, vocabulary, capsys):
    whole = model(vocabulary=vocabulary)
    whole.save_pretrained(tmp_path / "float", format="flax_switch")
    want = fs.quantize(whole, "int4", calibration=TEXTS)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"en": text, "it": "x"}) + "\n" for text in TEXTS))
    arguments = ["convert", str(tmp_path / "float"), str(tmp_path / "small"), "--to", "flax_switch", "--no-progress"]
    assert main([*arguments, "--weights", "int4", "--calibration", str(lines), "--field", "en"]) == 0
    assert f"Rounding for {len(TEXTS)} texts" in capsys.readouterr().err
    assert_same(want.params, fs.load_pretrained(tmp_path / "small").params)
    want.save_pretrained(tmp_path / "saved", format="flax_switch")
    assert_same(want.params, fs.load_pretrained(tmp_path / "saved").params)
    floats = ["convert", str(tmp_path / "float"), str(tmp_path / "hf"), "--to", "huggingface", "--no-progress"]
    assert main([*floats, "--weights", "int4", "--calibration", str(lines), "--field", "en"]) == 0
    kernel = "encoder/layers_0/mlp/expert/wi/kernel"
    mean = flatten(fs.load_pretrained(tmp_path / "small", kernels="floats").params)[kernel]
    np.testing.assert_array_equal(flatten(fs.load_pretrained(tmp_path / "hf").params)[kernel], mean)

    for more, said in (
        (["--weights", "int8", "--calibration", str(lines)], "--calibration is for --weights int4"),
        (["--weights", "int4", "--calibration", str(lines)], "line 1: there is no text under 'text'; the fields are: en, it"),
        (["--weights", "int4", "--calibration", str(tmp_path / "absent")], "Cannot read the calibration"),
        (["--weights", "int4", "--calibration", str(tmp_path)], "Cannot read the calibration"),
    ):
        assert main([*arguments, "--overwrite", *more]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n \n")
    assert main([*arguments, "--overwrite", "--weights", "int4", "--calibration", str(tmp_path / "empty")]) == 2
    assert "holds no text" in capsys.readouterr().err
    assert_same(want.params, fs.load_pretrained(tmp_path / "small").params)


def test_what_cannot_be_is_refused_in_a_sentence(vocabulary, tmp_path):
    whole = model(vocabulary=vocabulary)
    for weights, given, said in (
        ("int8", TEXTS, "calibration is for weights='int4'"),
        ("bfloat16", TEXTS, "calibration is for weights='int4'"),
        ("int4", [], "calibration is a list of texts"),
        ("int4", "ba ke", "calibration is a list of texts"),
        ("int4", [*TEXTS, {"input_ids": [[3]]}], "the one or the other"),
        ("int4", [[3, 4]], "not list"),
    ):
        with pytest.raises(fs.ConfigError, match=said):
            fs.quantize(whole, weights, calibration=given)
    with pytest.raises(fs.ConfigError, match="the model has no vocabulary"):
        fs.quantize(model(), "int4", calibration=TEXTS)
    with pytest.raises(fs.ConfigError, match="has no head to answer texts with"):
        fs.quantize(model(CONFIG, "headless", vocabulary), "int4", calibration=TEXTS)
    with pytest.raises(fs.ConfigError, match="The decoder has no input"):
        fs.quantize(whole, "int4", calibration=calls(input_ids=12))
    whole.save_pretrained(tmp_path, format="flax_switch")
    placed = fs.load_pretrained(tmp_path, mesh=create_mesh(MeshConfig(data=4, expert=2)))
    with pytest.raises(fs.ConfigError, match="runs on one device"):
        fs.quantize(placed, "int4", calibration=TEXTS)
    with pytest.raises(fs.ConfigError, match="need every parameter in memory|experts='disk'"):
        fs.quantize(fs.load_pretrained(tmp_path, experts="disk"), "int4", calibration=TEXTS)
