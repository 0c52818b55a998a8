"""A loaded model is called as transformers' are: any library's arrays, outputs by attribute, key and place, text in, text out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.data import Vocabulary

CONFIG = fs.SwitchConfig(
    vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
)  # fmt: skip
IDS, LABELS = [[5, 6, 7], [8, 9, 10]], [[4, 3, -100], [3, 1, 6]]


@pytest.fixture(scope="module")
def model() -> fs.Pretrained:
    return fs.Pretrained(CONFIG, fs.SwitchTransformer(CONFIG), fs.init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def speaking(model) -> fs.Pretrained:
    text = [f"The quick brown fox {i} jumps over the lazy dog." for i in range(60)]
    return model.replace(vocabulary=Vocabulary.train(text, 44, num_sentinels=8))


# --- what may be given
def kinds_of(ids):
    import torch

    return {
        "lists": ids,
        "tuples": tuple(map(tuple, ids)),
        "numpy": np.array(ids),
        "small integers": np.array(ids, np.int16),
        "jax": jnp.array(ids),
        "torch": torch.tensor(ids),
        "rows of numpy": [np.array(row) for row in ids],
    }


@pytest.mark.parametrize("kind", list(kinds_of([[1]])))
def test_lists_and_the_arrays_of_any_library_are_one(model, kind):
    expected = model(input_ids=np.array(IDS), labels=np.array(LABELS))
    found = model(input_ids=kinds_of(IDS)[kind], attention_mask=kinds_of([[1] * 3] * 2)[kind], labels=kinds_of(LABELS)[kind])
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(
        model.generate(kinds_of(IDS)[kind], max_new_tokens=3).sequences, model.generate(np.array(IDS), max_new_tokens=3).sequences
    )


def test_a_single_row_is_a_batch_of_one(model):
    alone, batch = (
        model(input_ids=IDS[0], attention_mask=[1, 1, 0], labels=LABELS[0]),
        model([IDS[0]], [[1, 1, 0]], labels=[LABELS[0]]),
    )
    np.testing.assert_array_equal(alone.logits, batch.logits)
    assert model.generate(IDS[0], max_new_tokens=2).sequences.shape[0] == 1
    assert fs.generate(model.model, model.params, IDS[0], max_new_tokens=2).sequences.shape[0] == 1


def test_embeddings_of_torch_in_bfloat16_are_embeddings(model):
    import torch

    embeds = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 16).bfloat16()
    found = model.encode(inputs_embeds=embeds).last_hidden_state
    np.testing.assert_array_equal(found, model.encode(inputs_embeds=embeds.float().numpy()).last_hidden_state)


def test_a_traced_call_has_the_gradient_of_its_loss(model):
    def loss(params, ids, labels):
        return model.replace(params=params)(ids, labels=labels).loss

    gradients = jax.jit(jax.grad(loss))(model.params, jnp.array(IDS), jnp.array(LABELS))
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


WRONG = [
    (dict(input_ids="The fox"), "input_ids is text, where a model takes ids"),
    (dict(input_ids=["The fox", "dog"]), "input_ids is text"),
    (dict(input_ids=[[5], [6, 7]]), "input_ids has rows of different lengths; pad them"),
    (dict(input_ids=[]), r"at least one of each; its shape is \[0\]"),
    (dict(input_ids=5), r"input_ids must be an array \[rows, tokens\], or one row \[tokens\]"),
    (dict(input_ids=[[5.0, 6.5]]), "input_ids must hold integers; its dtype is float64"),
    (dict(input_ids=[[5, 128]]), "input_ids holds 128, which is no id of the vocabulary of 128"),
    (dict(input_ids=jnp.array([[5, -100]])), "input_ids holds -100"),
    (dict(labels=[[5, 500, 1], [1, 1, 1]]), "labels holds 500"),
    (dict(labels=[[5, -1, 1], [1, 1, 1]]), "labels holds -1"),
    (dict(decoder_input_ids=[[5, -100], [1, 1]]), "decoder_input_ids holds -100"),
    (dict(attention_mask=[[1, 1], [1, 1]]), r"attention_mask must have the shape of input_ids, \[2, 3\]; it is \[2, 2\]"),
    (dict(decoder_attention_mask=[1, 1]), r"decoder_attention_mask must have the shape of decoder_input_ids"),
    (dict(inputs_embeds=np.zeros((2, 3, 16))), "Give input_ids or inputs_embeds, not both"),
    (dict(input_ids=None, inputs_embeds=np.zeros((2, 3, 5))), r"floats \[rows, tokens, d_model=16\]; it is float64\[2, 3, 5\]"),
    (dict(input_ids=None), "The encoder has no input"),
    (dict(labels=None), "The decoder has no input"),
    (dict(use_cache=True), "use_cache, past_key_values and cache"),
    (dict(past_key_values=((),)), "use_cache, past_key_values and cache"),
    (dict(cache="a cache"), "use_cache, past_key_values and cache"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_what_cannot_be_given_is_refused_by_name_and_in_our_words(model, changes, message):
    with pytest.raises(fs.ConfigError, match=message):
        model(**{"input_ids": IDS, "labels": LABELS, **changes})


def test_what_asks_for_no_cache_is_answered(model):
    output = model(IDS, labels=LABELS, use_cache=False, past_key_values=None, cache=None, return_dict=True)
    np.testing.assert_array_equal(output.loss, model(IDS, labels=LABELS).loss)


# --- what comes back
def test_outputs_are_had_by_attribute_key_and_place_and_what_is_not_there_has_no_place(model):
    output = model(IDS, labels=LABELS)
    assert output["loss"] is output.loss is output[0] and output[1] is output.logits
    assert list(output) == ["loss", "logits", "encoder_last_hidden_state"] and "encoder_z_loss" not in output
    assert dict(output)["logits"] is output.logits and len(output) == 3
    assert output[:2] == (output.loss, output.logits)
    with pytest.raises(KeyError, match="has no 'decoder_z_loss' here; it has loss, logits"):
        output["decoder_z_loss"]
    without = model(IDS, decoder_input_ids=[[0], [0]])
    assert without[0] is without.logits


def test_return_dict_false_gives_the_same_as_a_tuple(model):
    loss, logits, _ = model(IDS, labels=LABELS, return_dict=False)
    output = model(IDS, labels=LABELS)
    np.testing.assert_array_equal(loss, output.loss)
    np.testing.assert_array_equal(logits, output.logits)


def test_outputs_have_transformers_names_order_and_tuple():
    import torch
    from convert.oracle import huggingface_config, huggingface_model

    theirs = huggingface_model(huggingface_config())
    ids, labels = torch.tensor(IDS), torch.tensor(LABELS)
    expected = theirs(input_ids=ids, labels=labels, use_cache=False, output_hidden_states=True, output_attentions=True)
    found = fs.load_pretrained(theirs)(input_ids=ids, labels=labels, output_hidden_states=True, output_attentions=True)
    ours = [name for name in expected.keys() if name in found.keys()]  # noqa: SIM118 - both have keys
    assert list(found.keys()) == ours
    np.testing.assert_allclose(found[0], expected[0].detach(), rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1].detach(), rtol=2e-4, atol=2e-4)


def test_a_repr_tells_shapes_and_no_numbers_of_arrays(model):
    output = model(IDS, labels=LABELS, output_hidden_states=True)
    assert repr(output).startswith("Seq2SeqLMOutput(loss=")
    assert "logits=float32[2, 3, 128]" in repr(output) and "decoder_hidden_states=3 x float32[2, 3, 16]" in repr(output)
    assert len(repr(output)) < 400
    assert repr(jax.eval_shape(lambda: model(IDS, labels=LABELS))).startswith(
        "Seq2SeqLMOutput(loss=float32[], logits=float32[2, 3, 128]"
    )
    raw = jax.eval_shape(lambda: model.model.apply({"params": model.params}, np.array(IDS), np.array(IDS)))
    assert len(repr(raw)) < 2000 and "logits=float32[2, 3, 128]" in repr(raw)


# --- text
def test_text_in_text_out(speaking):
    one, many = (
        speaking.generate("The quick", max_new_tokens=4),
        speaking.generate(["The quick", "The dog jumps"], max_new_tokens=4),
    )
    assert isinstance(one, fs.GenerationOutput) and isinstance(many, fs.GenerationOutput)
    assert len(one.texts) == 1 and len(many.texts) == 2 and one.texts[0] == many.texts[0]
    ids = [*speaking.vocabulary.encode("The quick"), 1]
    by_ids = speaking.generate(ids, max_new_tokens=4)
    np.testing.assert_array_equal(by_ids.sequences, one.sequences)
    assert by_ids.texts == one.texts == by_ids["texts"]
    assert speaking.generate(**speaking.vocabulary("The quick"), max_new_tokens=4).texts == one.texts
    kept = [i for i in one.sequences[0].tolist() if i > 1]
    assert one.texts[0] == speaking.vocabulary.decode(kept, skip_special_tokens=False)


def test_a_model_takes_what_its_vocabulary_makes(speaking):
    batch = speaking.vocabulary(["The quick", "The lazy dog jumps"], text_target=["fox", "over"], padding=True)
    assert float(speaking(**batch).loss) > 0


def test_texts_are_none_without_a_vocabulary_and_text_is_refused(model, speaking):
    assert model.generate(IDS, max_new_tokens=2).texts is None
    with pytest.raises(fs.ConfigError, match="no vocabulary to tokenise text with"):
        model.generate("The fox")
    with pytest.raises(fs.ConfigError, match="attention_mask is for ids"):
        speaking.generate("The fox", [[1, 1]])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (dict(use_cache=False), "use_cache=False is no control: generation always keeps a cache"),
        (dict(return_dict_in_generate=False), "always a GenerationOutput"),
        (dict(past_key_values=()), "decoder_input_ids"),
        (dict(cache=()), "decoder_input_ids"),
        (dict(max_length=20), "set max_new_tokens, one less"),
        (dict(min_length=2), "set min_new_tokens, one less"),
    ],
    ids=str,
)
def test_options_of_transformers_that_are_no_controls_are_refused_by_name(model, control, message):
    with pytest.raises(fs.ConfigError, match=message):
        model.generate(IDS, **control)


def test_options_of_transformers_that_ask_for_what_happens_anyway_are_answered(model):
    found = model.generate(IDS, max_new_tokens=3, use_cache=True, return_dict_in_generate=True, past_key_values=None)
    np.testing.assert_array_equal(found.sequences, model.generate(IDS, max_new_tokens=3).sequences)


# --- where models come from
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["SwitchTransformersForConditionalGeneration", "SwitchTransformersEncoderModel"])
def test_a_model_in_memory_loads_as_its_folder_does(kind, dtype, tmp_path):
    import torch
    import transformers
    from convert.oracle import huggingface_config, huggingface_model

    theirs = huggingface_model(huggingface_config(), kind=getattr(transformers, kind)).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    live, from_disk = fs.load_pretrained(theirs), fs.load_pretrained(tmp_path)
    assert (live.config, live.architecture) == (from_disk.config, from_disk.architecture)
    assert jax.tree.structure(live.params) == jax.tree.structure(from_disk.params)
    for a, b in zip(jax.tree.leaves(live.params), jax.tree.leaves(from_disk.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_model_in_memory_brings_its_defaults_and_takes_changes():
    from convert.oracle import huggingface_config, huggingface_model

    theirs = huggingface_model(huggingface_config())
    theirs.generation_config.num_beams = 3
    loaded = fs.load_pretrained(theirs, dtype="bfloat16", dropout_rate=0.25)
    assert loaded.generation_defaults["num_beams"] == 3
    assert loaded.config.dropout_rate == 0.25 and loaded.params["token_embedder"]["embedding"].dtype == jnp.bfloat16
    with pytest.raises(fs.ConfigError, match="do not fit the checkpoint"):
        fs.load_pretrained(theirs, d_ff=80)


def test_a_model_of_another_family_is_refused_by_its_type():
    import transformers

    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(fs.ConfigError, match="model_type 'gpt2'"):
        fs.load_pretrained(transformers.GPT2LMHeadModel(config))


def test_a_config_object_and_its_dict_are_the_same_config():
    from convert.oracle import huggingface_config

    theirs = huggingface_config(num_experts=7)
    assert fs.SwitchConfig.from_huggingface(theirs) == fs.SwitchConfig.from_huggingface(theirs.to_dict())
    assert fs.SwitchConfig.from_huggingface(theirs).num_experts == 7
    with pytest.raises(fs.ConfigError, match="or its config.json as a dict; this is str"):
        fs.SwitchConfig.from_huggingface("google/switch-base-8")


def test_a_presets_name_is_told_from_a_checkpoints(tmp_path, monkeypatch):
    with pytest.raises(fs.ConfigError, match="'switch-base-8' is a preset: a shape without weights.*'google/switch-base-8'"):
        fs.load_pretrained("switch-base-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "switch-base-8").mkdir()
    with pytest.raises(fs.CheckpointError, match="holds no checkpoint"):  # a folder of that name is opened
        fs.load_pretrained("switch-base-8")


def test_a_mistyped_preset_names_the_nearest():
    with pytest.raises(fs.ConfigError, match=r"Did you mean 'switch-base-8'\?"):
        fs.PRESETS["switch-base8"]
    assert "switch-base8" not in fs.PRESETS and fs.PRESETS.get("switch-base8") is None
