"""NLLB-MoE: logits, losses, gradients and tokens are those of transformers with its experts put right; files keep every bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from flax_switch import ConfigError, SwitchConfig, load_pretrained
from flax_switch.config import ExperimentConfig
from flax_switch.config.sizes import count_parameters
from flax_switch.convert import convert, open_checkpoint
from flax_switch.convert.canonical import canonical_shapes, flatten
from flax_switch.convert.checkpoint import Checkpoint
from flax_switch.convert.huggingface_nllb import PREFIX, RULES
from flax_switch.convert.mapping import to_canonical
from flax_switch.convert.t5x_writing import t5x_files
from flax_switch.convert.tensors import from_array
from flax_switch.data.byte_vocabulary import ByteVocabulary
from flax_switch.export.dense import check_dense
from flax_switch.training.loop import check_vocabulary
from tests.convert import nllb, oracle
from tests.convert.test_roundtrip import assert_same_tensors, bin_folder, tensors_of, there_and_back


def slow_but(seed):
    """Marks all draws but one."""
    return [s if s == seed else pytest.param(s, marks=pytest.mark.slow) for s in range(len(nllb.DRAWS))]


def close(found, expected):
    """Within 2e-4 of the largest."""
    np.testing.assert_allclose(found, expected, atol=2e-4 * float(np.abs(expected).max()), rtol=0)


@pytest.fixture(scope="module")
def pair():
    model = nllb.model_of(0)
    return model, load_pretrained(model)


@pytest.mark.parametrize("padding", ["right", pytest.param("left", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", slow_but(0))
def test_logits_loss_and_generated_tokens_are_those_of_transformers(seed, padding, tmp_path):
    model = nllb.model_of(seed)
    ours = load_pretrained(oracle.save(model, tmp_path / "theirs"))
    batch, targets = nllb.batch_of(model.config, seed, padding), nllb.batch_of(model.config, seed)
    batch.decoder_input_ids, batch.decoder_attention_mask = targets.decoder_input_ids, targets.decoder_attention_mask
    with torch.no_grad():
        expected = model(**batch.torch())
    output = ours(**batch.numpy())
    real = batch.decoder_attention_mask == 1
    close(np.asarray(output.logits)[real], expected.logits.numpy()[real])
    labels = np.where(real, batch.labels, -100)
    with torch.no_grad():
        wanted = model(**{**batch.torch(), "labels": torch.tensor(labels)}).loss
    np.testing.assert_allclose(ours(**{**batch.numpy(), "labels": labels}).loss, wanted.numpy(), rtol=1e-5)
    for beams in (1, 3) if seed or padding == "left" else (1,):
        controls = dict(max_new_tokens=7, min_new_tokens=5, num_beams=beams, do_sample=False, forced_bos_token_id=9)
        theirs = model.generate(**batch.torch("input_ids", "attention_mask"), **controls).numpy()
        found = ours.generate(batch.input_ids, batch.attention_mask, **controls).sequences
        np.testing.assert_array_equal(found, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 15))
def test_random_models_agree_in_memory(seed):
    rng = np.random.default_rng(seed)
    changes = dict(
        encoder_layers=int(rng.integers(1, 5)), decoder_layers=int(rng.integers(1, 5)), num_experts=int(rng.integers(2, 9)),
        encoder_sparse_step=int(rng.integers(1, 3)), decoder_sparse_step=int(rng.integers(1, 3)), router_bias=bool(rng.integers(2)),
        batch_prioritized_routing=bool(rng.integers(2)), normalize_router_prob_before_dropping=bool(rng.integers(2)),
    )  # fmt: skip
    model = nllb.model_of(seed, **changes)
    batch = nllb.batch_of(model.config, seed)
    with torch.no_grad():
        expected = model(**batch.torch())
    ours = load_pretrained(model)
    real = batch.decoder_attention_mask == 1
    close(np.asarray(ours(**batch.numpy()).logits)[real], expected.logits.numpy()[real])
    controls = dict(max_new_tokens=7, min_new_tokens=5, num_beams=2, do_sample=False)
    theirs = model.generate(**batch.torch("input_ids", "attention_mask"), **controls).numpy()
    np.testing.assert_array_equal(ours.generate(batch.input_ids, batch.attention_mask, **controls).sequences, theirs)


def test_every_gradient_is_torchs(pair):
    model, ours = pair
    batch = nllb.batch_of(model.config, 1)
    fields = ("input_ids", "attention_mask", "labels")
    batch.labels = np.abs(batch.labels) % 50 + 3
    model.zero_grad()
    model(**batch.torch(*fields)).loss.backward()
    expected = {
        name.removeprefix(PREFIX): np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }
    tensors = {name: from_array(array) for name, array in expected.items()}
    expected = to_canonical(tensors, RULES, canonical_shapes(ours.config))
    loss = lambda params: ours.replace(params=params)(**batch.numpy(*fields)).loss  # noqa: E731
    found = flatten(jax.grad(loss)(ours.params))
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        wanted = expected[path].numpy()
        np.testing.assert_allclose(gradient, wanted, atol=2e-5 * max(1.0, float(np.abs(wanted).max())), err_msg=path)


@pytest.mark.parametrize("kind", ["NllbMoeForConditionalGeneration", "NllbMoeModel"])
@pytest.mark.parametrize("seed", slow_but(0))
def test_there_and_back_gives_the_same_bits_class_and_config(seed, kind, tmp_path):
    folder = oracle.save(nllb.model_of(seed, kind), tmp_path / "theirs")
    back = there_and_back(folder, tmp_path)
    assert_same_tensors(tensors_of(back), tensors_of(folder))
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    report = getattr(transformers, kind).from_pretrained(back, output_loading_info=True)[1]
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_bin_file_and_a_config_written_anew_describe_the_same_model(pair, tmp_path):
    model, ours = pair
    folder = bin_folder(model, tmp_path / "bin")
    back = convert(folder, tmp_path / "back", to="huggingface", dtype="bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors_of(back).items() if "router" not in name)
    values = open_checkpoint(folder).config.to_huggingface()
    assert SwitchConfig.from_huggingface(values) == ours.config
    again = transformers.NllbMoeConfig(**values)
    assert SwitchConfig.from_huggingface(again) == ours.config
    changed = load_pretrained(folder, dropout_rate=0.25)
    assert open_checkpoint(folder, changes={"dropout_rate": 0.25}).config == changed.config


def test_absent_keys_take_the_defaults_of_transformers():
    theirs = SwitchConfig.from_huggingface(transformers.NllbMoeConfig())
    assert SwitchConfig.from_huggingface({"model_type": "nllb-moe"}) == theirs
    assert theirs.encoder.sparse_layers == (3, 7, 11)


def test_the_number_of_parameters_is_that_of_the_tensors(pair):
    model, ours = pair
    assert count_parameters(ours.config).total == sum(p.numel() for p in model.parameters())


def test_a_row_padded_on_the_left_has_the_outputs_that_it_has_alone(pair):
    _, ours = pair
    row, target = np.array([[7, 9, 11, 4, 2]]), np.array([[2, 9, 8, 6]])
    batch = np.array([[1, 1, 1, *row[0]], [5] * 8])
    padded = ours(batch, batch != 1, decoder_input_ids=np.repeat(target, 2, 0)).logits[:1]
    np.testing.assert_allclose(padded, ours(row, decoder_input_ids=target).logits, atol=2e-5)


@pytest.mark.slow
def test_what_is_decoded_token_by_token_is_what_a_whole_pass_says(pair):
    _, ours = pair
    ids = np.array([[7, 9, 11, 4, 2], [8, 3, 2, 1, 1]])
    said = np.asarray(ours.generate(ids, ids != 1, max_new_tokens=8, min_new_tokens=8, forced_bos_token_id=9).sequences)
    logits = np.array(ours(ids, ids != 1, decoder_input_ids=said[:, :-1]).logits)
    logits[:, :, 2] = -np.inf  # min_new_tokens
    np.testing.assert_array_equal(logits.argmax(-1)[:, 1:], said[:, 2:])


@pytest.mark.slow
def test_packed_rows_compute_what_their_parts_do(pair):
    _, ours = pair
    parts, segments = np.array([[7, 9, 2], [8, 6, 2]]), np.array([[1, 1, 1, 2, 2, 2]])
    packed = ours.model.apply({"params": ours.params}, parts.reshape(1, 6), None, segment_ids=segments, method="encode")
    np.testing.assert_allclose(packed.last_hidden_state[0].reshape(2, 3, -1), ours.encode(parts).last_hidden_state, atol=2e-5)


@pytest.mark.slow
def test_it_trains_in_bfloat16_with_scanned_rematerialised_layers_and_every_dropout(tmp_path):
    changes = dict(encoder_layers=2, decoder_layers=2, encoder_sparse_step=2, decoder_sparse_step=2)
    folder = oracle.save(nllb.model_of(0, **changes), tmp_path / "theirs")
    plain = load_pretrained(folder)
    scanned = load_pretrained(
        folder, scan_layers=True, remat_policy="minimal", dropout_rate=0.1, attention_dropout_rate=0.1, activation_dropout_rate=0.1
    )
    batch = nllb.batch_of(transformers.NllbMoeConfig(**{**nllb.SIZES, **nllb.DRAWS[0]}), 0).numpy(
        "input_ids", "attention_mask", "labels"
    )
    np.testing.assert_allclose(scanned(**batch).logits, plain(**batch).logits, atol=2e-4)
    narrow = scanned.replace(model=scanned.model.clone(config=scanned.config.replace(dtype="bfloat16")))

    @jax.jit
    def step(params, key):
        rngs = dict(zip(("dropout", "jitter"), jax.random.split(key), strict=True))
        call = lambda p: narrow.replace(params=p)(**batch, deterministic=False, rngs=rngs, output_router_logits=True).loss  # noqa: E731
        loss, gradient = jax.value_and_grad(call)(params)
        return loss, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    params, losses = scanned.params, []
    for i in range(30):
        loss, params = step(params, jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.slow
def test_integers_disks_and_adapters_hold_it(pair, tmp_path):
    model, ours = pair
    folder = oracle.save(model, tmp_path / "theirs")
    batch = nllb.batch_of(model.config, 0).numpy("input_ids", "attention_mask", "labels")
    logits = np.asarray(ours(**batch).logits)
    on_disk = load_pretrained(folder, experts="disk")
    np.testing.assert_allclose(on_disk(**batch).logits, logits, atol=2e-4)
    source = batch["input_ids"], batch["attention_mask"]
    np.testing.assert_array_equal(on_disk.generate(*source).sequences, ours.generate(*source).sequences)
    integers = load_pretrained(folder, weights="int8")
    assert integers.params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]["bias"].dtype == jnp.float32
    assert np.abs(integers(**batch).logits - logits).max() < 0.1 * np.abs(logits).max()
    integers.generate(*source)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pefts_adapter_of_attention_and_experts_is_read_and_written(pair, tmp_path):
    peft = pytest.importorskip("peft")
    folder = oracle.save(nllb.model_of(0), tmp_path / "model")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "experts.expert_3.fc1", "fc2"])
    theirs = peft.get_peft_model(nllb.model_of(0), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = nllb.batch_of(pair[0].config, 0)
    with torch.no_grad():
        expected = theirs(**batch.torch()).logits.numpy()
    model = load_pretrained(folder, adapter=tmp_path / "theirs")
    real = batch.decoder_attention_mask == 1
    close(np.asarray(model(**batch.numpy()).logits)[real], expected[real])
    model.save_adapter(tmp_path / "ours")
    assert_same_tensors(
        *(safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(moe_eval_capacity_token_fraction=0.25), "moe_eval_capacity_token_fraction=0.25"),
        (dict(second_expert_policy="sampling"), "second_expert_policy='sampling'"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (dict(decoder_ffn_dim=32), "decoder_ffn_dim=32"),
        (dict(num_experts=1), "num_selected_experts"),
        (dict(encoder_sparse_step=-1), "encoder_sparse_step"),
        (dict(d_model=15), "d_model=15"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        SwitchConfig.from_huggingface({**transformers.NllbMoeConfig(**nllb.SIZES).to_dict(), **changes})


def test_what_its_class_does_not_compute_is_not_written_as_one(pair):
    _, ours = pair
    wrong = dict(norm="rms", extra_mlp=True, num_selected_experts=1, encoder_sparse_layers=(0,), scale_attention_logits=False)
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name if name != "encoder_sparse_layers" else "every n-th"):
            ours.config.replace(**{name: value}).to_huggingface()
    with pytest.raises(ConfigError, match="use_bias=True"):
        SwitchConfig(use_bias=True).to_huggingface()


def test_what_else_cannot_hold_it_refuses_it_before_any_work(pair, tmp_path):
    _, ours = pair
    with pytest.raises(ConfigError, match="norm='layer': T5X's T5 has none"):
        t5x_files(ours.config, "full", {}, 0)
    dense = ours.config.replace(encoder_sparse_layers=(), decoder_sparse_layers=())
    with pytest.raises(ConfigError, match="CTranslate2 is given models of T5's form"):
        check_dense(Checkpoint("huggingface", tmp_path, dense, "full", {}), "ctranslate2")
    with pytest.raises(ConfigError, match="decoder_start_token_id is 2.*loop of your own"):
        check_vocabulary(ExperimentConfig(model=ours.config), ByteVocabulary.with_sentinels())
    for field, value in dict(norm="layer", use_bias=True, embedding_scale="inputs", positions="sinusoidal").items():
        with pytest.raises(ConfigError, match=f"{field}={value!r} is not for architecture='decoder_only'"):
            SwitchConfig(architecture="decoder_only", **{field: value})
