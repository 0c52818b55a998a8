"""Hugging Face to ours and back gives the same bits; what we write opens in transformers."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from flax_switch import CheckpointError, ConfigError, SwitchConfig, load_pretrained, save_pretrained
from flax_switch.convert import convert, open_checkpoint, stack_layers
from flax_switch.convert.canonical import canonical_shapes, flatten, unflatten
from flax_switch.convert.huggingface import huggingface_tensors
from flax_switch.convert.tensors import from_array
from flax_switch.nn.transformer import SwitchTransformer
from tests.convert import oracle

Switch = transformers.SwitchTransformersForConditionalGeneration


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def assert_same_tensors(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
        assert torch.equal(ours[name].view(bits), tensor.contiguous().view(bits)), name


def there_and_back(folder, tmp_path, **options):
    convert(folder, tmp_path / "ours", to="flax_switch", **options)
    return convert(tmp_path / "ours", tmp_path / "back", to="huggingface", **options)


@pytest.mark.parametrize("seed", range(8))
def test_there_and_back_again_gives_the_same_bits_and_config(tmp_path, seed):
    folder = oracle.save(oracle.huggingface_model(oracle.draw_config(seed), seed), tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    assert_same_tensors(tensors_of(back), tensors_of(folder))
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_bfloat16_file_with_a_float32_router_keeps_both(tmp_path):
    model = oracle.huggingface_model(oracle.huggingface_config()).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("classifier"):
            module.float()
    folder = oracle.save(model, tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    kept = tensors_of(back)
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16, torch.float32}
    assert_same_tensors(kept, tensors_of(folder))
    params = flatten(load_pretrained(folder).params)
    assert {path for path, leaf in params.items() if leaf.dtype == np.float32} == {
        f"{stack}/layers_1/mlp/router/router_weights/w/kernel" for stack in ("encoder", "decoder")
    }


def test_shards_on_the_way_change_nothing(tmp_path):
    model = oracle.huggingface_model(oracle.huggingface_config())
    folder = oracle.save(model, tmp_path / "theirs", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    back = there_and_back(folder, tmp_path, max_shard_size="12KB")
    for stem, place in (("params", tmp_path / "ours"), ("model", back)):
        index = json.loads((place / f"{stem}.safetensors.index.json").read_text())
        files = sorted(path.name for path in place.glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(place).values())
    parts = [name for name in tensors_of(tmp_path / "ours") if "[" in name]
    assert parts and all("/mlp/expert/" in name for name in parts)  # stacks larger than a shard are divided by expert
    assert_same_tensors(tensors_of(back), tensors_of(folder))


def bin_folder(model, folder, *, shards: int = 1, zipped: bool = True):
    """What transformers 4 wrote without safetensors."""
    folder.mkdir()
    state = model.state_dict()
    model.config.save_pretrained(folder)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    names = sorted(state)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_bin_files_give_the_same_bits_and_their_copies_are_dropped(tmp_path, shards, zipped, dtype):
    model = oracle.huggingface_model(oracle.huggingface_config()).to(dtype)
    folder = bin_folder(model, tmp_path / "bin", shards=shards, zipped=zipped)
    converted = convert(folder, tmp_path / "converted", to="huggingface")
    assert_same_tensors(tensors_of(converted), tensors_of(oracle.save(model, tmp_path / "theirs")))


def test_a_tied_model_whose_copies_differ_is_refused(tmp_path):
    model = oracle.huggingface_model(oracle.huggingface_config())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"][3, 4] += 1
    folder = bin_folder(model, tmp_path / "bin")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="lm_head.weight differs from shared.weight"):
        open_checkpoint(folder)


def test_an_untied_file_of_transformers_4_falls_back_to_the_shared_table(tmp_path):
    model = oracle.huggingface_model(oracle.huggingface_config(tie_word_embeddings=False))
    folder = oracle.save(model, tmp_path / "theirs")
    four = tensors_of(folder)
    two = {name: tensor for name, tensor in four.items() if not name.endswith("embed_tokens.weight")}
    safetensors.torch.save_file(two, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight.copy_(model.shared.weight)
    ours = load_pretrained(folder)
    assert not ours.config.separate_embeddings
    batch = oracle.draw_batch(model.config, 0)
    with torch.no_grad():
        expected = model(**batch.torch()).logits.numpy()
    np.testing.assert_allclose(ours(**batch.numpy()).logits, expected, atol=2e-4 * np.abs(expected).max())
    # Written again it has all four: transformers 5 would draw the absent two at random.
    back = Switch.from_pretrained(convert(folder, tmp_path / "back", to="huggingface"))
    assert torch.equal(back.encoder.embed_tokens.weight, two["shared.weight"])
    assert torch.equal(back.lm_head.weight, two["lm_head.weight"])


def test_an_untied_model_keeps_its_four_tables(tmp_path):
    model = oracle.huggingface_model(oracle.huggingface_config(tie_word_embeddings=False))
    params = flatten(load_pretrained(oracle.save(model, tmp_path)).params)
    tables = {path for path in params if "token_embedder" in path or "logits" in path}
    assert tables == {
        "token_embedder/embedding", "encoder/token_embedder/embedding", "decoder/token_embedder/embedding",
        "decoder/logits_dense/kernel",
    }  # fmt: skip


def test_what_is_exported_stays_as_it_was():
    config = SwitchConfig(vocab_size=9, d_model=4, num_heads=1, d_kv=4, d_ff=4, tie_word_embeddings=False)
    tensors = {path: from_array(np.zeros(shape, np.float32)) for path, shape in canonical_shapes(config).items()}
    before = dict(tensors)
    written = huggingface_tensors(config, "full", "switch_transformers", tensors)
    assert "decoder.embed_tokens.weight" in written and tensors == before


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_ours_opens_in_transformers_and_gives_the_same_logits(tmp_path, tied):
    config = SwitchConfig(
        vocab_size=50, d_model=16, num_heads=2, d_kv=4, d_ff=24, num_encoder_layers=2, num_decoder_layers=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, num_experts=3, tie_word_embeddings=tied, init_scale=1.0,
        capacity_mode="fixed", zero_padding_activations=False, scan_layers=True,
    )  # fmt: skip
    model = SwitchTransformer(config)
    rng = np.random.default_rng(0)
    shapes = canonical_shapes(config)
    params = unflatten({path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()})
    params = stack_layers(params, config)
    save_pretrained(tmp_path / "saved", config, params)
    theirs = Switch.from_pretrained(tmp_path / "saved").eval()
    batch = oracle.draw_batch(theirs.config, 0)
    inputs = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        expected = theirs(**batch.torch(*inputs)).logits.numpy()
    logits = jax.jit(model.apply)({"params": params}, **batch.numpy(*inputs)).logits
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())


def test_transformers_loads_what_we_write_without_a_missing_or_unexpected_tensor(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.draw_config(5)), tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    model, report = Switch.from_pretrained(back, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tensors({k: v for k, v in model.state_dict().items() if k in tensors_of(folder)}, tensors_of(folder))


@pytest.mark.parametrize("kind", [transformers.SwitchTransformersModel, transformers.SwitchTransformersEncoderModel])
@pytest.mark.parametrize("tied", [True, False])
def test_the_encoder_alone_and_the_headless_model_survive_the_round_trip(tmp_path, kind, tied):
    config = oracle.huggingface_config(tie_word_embeddings=tied)
    folder = oracle.save(oracle.huggingface_model(config, kind=kind), tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    assert_same_tensors(tensors_of(back), tensors_of(folder))
    assert json.loads((back / "config.json").read_text())["architectures"] == [kind.__name__]


def t5_model(*, gated: bool, tied: bool):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=2, num_decoder_layers=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if gated else "relu", decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not tied:
        model.config.scale_decoder_outputs = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 16))
    return model


@pytest.mark.parametrize(("gated", "tied"), [(False, True), (True, False)])
def test_dense_t5_1_0_and_1_1_load_as_models_without_sparse_layers(tmp_path, gated, tied):
    model = t5_model(gated=gated, tied=tied)
    folder = tmp_path / "t5"
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    if tied:
        del state["lm_head.weight"]
    folder.mkdir()
    values = model.config.to_dict()
    if not tied:  # as transformers 4 wrote them
        values["tie_word_embeddings"] = False
        del values["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(values))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    safetensors.torch.save_file({**state, unused: torch.zeros(32, 2)}, folder / "model.safetensors", {"format": "pt"})
    ours = load_pretrained(folder)
    assert not ours.config.is_sparse
    batch = oracle.draw_batch(model.config, 0)
    with torch.no_grad():
        expected = model(**batch.torch())
    output = ours(**batch.numpy())
    np.testing.assert_allclose(output.logits, expected.logits.numpy(), atol=2e-4 * float(expected.logits.abs().max()))
    np.testing.assert_allclose(output.loss, expected.loss.detach().numpy(), rtol=1e-4)
    assert_same_tensors(tensors_of(there_and_back(folder, tmp_path)), state)


def test_a_cast_keeps_the_routers_precision(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    cast = convert(folder, tmp_path / "cast", to="huggingface", dtype="bfloat16")
    for name, tensor in tensors_of(cast).items():
        original = tensors_of(folder)[name]
        if "router" in name:
            assert torch.equal(tensor, original)
        else:
            assert torch.equal(tensor, original.to(torch.bfloat16)), name
    assert json.loads((cast / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_hugging_face_cannot_hold_is_refused_and_writes_nothing(tmp_path):
    config = SwitchConfig(
        vocab_size=20, d_model=4, num_heads=1, d_kv=4, d_ff=4, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, mlp_activations=("gelu_new", "linear"),
    )  # fmt: skip
    params = {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(config).items()}
    with pytest.raises(ConfigError, match="mlp_activations"):
        save_pretrained(tmp_path / "saved", config, params)
    assert not list(tmp_path.iterdir())
    save_pretrained(tmp_path / "saved", config, params, format="flax_switch")
    assert load_pretrained(tmp_path / "saved").config == config


def test_parameters_that_do_not_fit_the_config_are_named(tmp_path):
    config = SwitchConfig(
        vocab_size=20, d_model=4, num_heads=1, d_kv=4, d_ff=4, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2,
    )  # fmt: skip
    params = {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(config).items()}
    del params["decoder/decoder_norm/scale"]
    params["encoder/extra"] = np.zeros(3)
    params["token_embedder/embedding"] = np.zeros((4, 20))
    with pytest.raises(CheckpointError, match=r"missing: decoder/decoder_norm/scale.*left over: encoder/extra.*wrong shape"):
        save_pretrained(tmp_path / "saved", config, params, format="flax_switch")


def test_missing_tensors_can_be_forgiven_by_name_and_are_then_fresh(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    tensors = tensors_of(folder)
    lost = [name for name in tensors if name.startswith("encoder.block.1.layer.1.mlp.router")]
    for name in lost:
        del tensors[name]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing: encoder.block.1.layer.1.mlp.router.classifier.weight"):
        load_pretrained(folder)
    params = flatten(load_pretrained(folder, allow_missing=["*router*"]).params)
    fresh = params["encoder/layers_1/mlp/router/router_weights/w/kernel"]
    assert fresh.shape == (24, 4) and 0.005 < float(fresh.std()) < 0.05


def test_the_files_beside_the_weights_travel_along(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    (folder / "special_tokens_map.json").write_text("{}")
    back = there_and_back(folder, tmp_path)
    for name in ("generation_config.json", "special_tokens_map.json"):
        assert (back / name).read_text() == (folder / name).read_text()


def test_settings_of_behaviour_can_change_while_loading_but_sizes_cannot(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    assert load_pretrained(folder, expert_capacity=3).config.expert_capacity == 3
    with pytest.raises(ConfigError, match="num_experts"):
        load_pretrained(folder, num_experts=8)
    with pytest.raises(ConfigError, match="Did you mean 'expert_capacity'"):
        load_pretrained(folder, expert_capcity=3)


def test_a_saved_model_is_replaced_only_where_that_is_allowed(tmp_path):
    folder = oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")
    convert(folder, tmp_path / "ours", to="flax_switch")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(folder, tmp_path / "ours", to="flax_switch")
    pretrained = load_pretrained(folder)
    shutil.rmtree(folder)
    pretrained.save_pretrained(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
