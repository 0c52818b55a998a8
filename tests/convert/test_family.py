"""mT5 and UMT5: what transformers computes with random weights, from every kind of file, and back to the same bits."""

import json

import numpy as np
import pytest
import torch
import transformers

from flax_switch import ConfigError, SwitchConfig, load_pretrained
from flax_switch.convert import convert
from flax_switch.convert.checkpoint import open_checkpoint
from tests.convert import oracle
from tests.convert.test_roundtrip import assert_same_tensors, bin_folder, tensors_of, there_and_back

FAMILY = ("MT5", "UMT5")


def model_of(name, seed, kind="ForConditionalGeneration", *, own_head=True):
    """A model of random shape; its head is one of its own, as in the released files, or the embedding again.

    transformers 5 forgets that a config says "not tied", and scales UMT5's output; the model of before is made by telling it again.
    """
    rng = np.random.default_rng(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=int(rng.integers(40, 90)), d_model=16, d_kv=int(rng.integers(3, 7)), num_heads=2, d_ff=24,
        num_layers=int(rng.integers(1, 4)), num_decoder_layers=int(rng.integers(1, 4)), dropout_rate=0.0, initializer_factor=0.7,
        feed_forward_proj=("gated-gelu", "relu", "gated-silu")[seed % 3], decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    model = oracle.huggingface_model(config, seed, getattr(transformers, f"{name}{kind}"))
    if own_head and kind == "ForConditionalGeneration":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 16))
    model.config.tie_word_embeddings = not own_head
    return model


def folder_of(model, folder):
    """The folder as the released ones are: config.json says whether anything is tied."""
    tied = model.config.tie_word_embeddings
    oracle.save(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": tied}))
    return folder


def assert_same_outputs(model, ours, seed):
    """Logits, loss, greedy tokens and those of three beams."""
    batch = oracle.draw_batch(model.config, seed)
    with torch.no_grad():
        expected = model(**batch.torch())
    output = ours(**batch.numpy())
    np.testing.assert_allclose(output.logits, expected.logits.numpy(), atol=2e-4 * float(expected.logits.abs().max()))
    np.testing.assert_allclose(output.loss, expected.loss.detach().numpy(), rtol=1e-4)
    for beams in (1, 3):
        controls = dict(max_new_tokens=6, num_beams=beams, do_sample=False)
        theirs = model.generate(**batch.torch("input_ids", "attention_mask"), **controls).numpy()
        found = ours.generate(batch.input_ids, batch.attention_mask, max_new_tokens=6, num_beams=beams).sequences
        np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAMILY)
def test_logits_loss_and_generated_tokens_are_those_of_transformers(name, seed, own_head, tmp_path):
    model = model_of(name, seed, own_head=own_head)
    folder = folder_of(model, tmp_path / "theirs")
    ours = load_pretrained(folder)
    assert not ours.config.is_sparse and ours.config.relative_attention_per_layer is (name == "UMT5")
    assert_same_outputs(model, ours, seed)


@pytest.mark.parametrize("kind", ["ForConditionalGeneration", "Model", "EncoderModel"])
@pytest.mark.parametrize("name", FAMILY)
def test_there_and_back_gives_the_same_bits_class_and_config(name, kind, tmp_path):
    folder = folder_of(model_of(name, 1, kind), tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    assert_same_tensors(tensors_of(back), tensors_of(folder))
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    report = getattr(transformers, f"{name}{kind}").from_pretrained(back, output_loading_info=True)[1]
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", FAMILY)
def test_a_bin_file_and_a_cast_keep_the_family(name, tmp_path):
    model = model_of(name, 2)
    folder = bin_folder(model, tmp_path / "bin")
    back = convert(folder, tmp_path / "back", to="huggingface", dtype="bfloat16")
    values = json.loads((back / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == (name.lower(), [f"{name}ForConditionalGeneration"])
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(back).values())
    assert torch.equal(tensors_of(back)["lm_head.weight"], model.lm_head.weight.detach().bfloat16())


def test_a_model_of_ours_with_a_table_for_each_layer_is_written_as_umt5(tmp_path):
    checkpoint = open_checkpoint(folder_of(model_of("UMT5", 0), tmp_path / "theirs"))
    for tied in (True, False):
        values = checkpoint.config.replace(tie_word_embeddings=tied).to_huggingface()
        assert (values["model_type"], values["tie_word_embeddings"]) == ("umt5", tied)
    sparse = checkpoint.config.replace(num_sparse_encoder_layers=1, num_encoder_layers=2, relative_attention_per_layer=True)
    with pytest.raises(ConfigError, match="relative_attention_per_layer=True"):
        sparse.to_huggingface()


@pytest.mark.parametrize("name", FAMILY)
def test_absent_keys_take_the_defaults_of_transformers(name):
    theirs = getattr(transformers, f"{name}Config")()
    assert SwitchConfig.from_huggingface({"model_type": name.lower(), "d_model": 512}) == SwitchConfig.from_huggingface(
        theirs.to_dict()
    )


@pytest.mark.parametrize(("model_type", "near"), [("t5gemma", "t5"), ("mt6", "mt5"), ("umt5_moe", "umt5")])
def test_another_architecture_is_refused_by_name_with_the_nearest(model_type, near):
    with pytest.raises(ConfigError, match=f"model_type {model_type!r}.*nearest is '{near}'"):
        SwitchConfig.from_huggingface({"model_type": model_type})
