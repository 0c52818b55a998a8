"""A model's generation_config.json gives the defaults, and a control that is given goes before them."""

import json

import numpy as np
import pytest
import torch
import transformers

from flax_switch.config import ConfigError
from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.defaults import read_defaults, with_defaults
from flax_switch.pretrained import load_pretrained

IDS = np.array([[5, 9, 33, 1], [7, 8, 1, 0]])


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5 if parameter.dim() > 1 else parameter.data
    return model


@pytest.mark.parametrize(
    "settings",
    [
        dict(decoder_start_token_id=7, num_beams=3, max_new_tokens=7, no_repeat_ngram_size=2, suppress_tokens=[20, 30]),
        dict(max_length=9, repetition_penalty=1.3, eos_token_id=[1, 40, 41]),
        dict(num_beams=2, length_penalty=0.4, early_stopping=True, max_new_tokens=6, min_length=5),
    ],
    ids=str,
)
def test_what_a_folder_asks_for_is_what_transformers_does(theirs, settings, tmp_path):
    theirs.generation_config = transformers.GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    theirs.generation_config.update(**settings)
    theirs.save_pretrained(tmp_path)
    mask = (IDS != 0).astype(int)
    with torch.inference_mode():
        expected = theirs.generate(torch.tensor(IDS), attention_mask=torch.tensor(mask)).numpy()
    np.testing.assert_array_equal(load_pretrained(tmp_path).generate(IDS, mask).sequences, expected)


def test_a_model_that_is_saved_keeps_its_defaults(theirs, tmp_path):
    theirs.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=7, num_beams=3, max_new_tokens=6, pad_token_id=0
    )
    theirs.generation_config.suppress_tokens = [20, 30]
    theirs.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    expected = loaded.generate(IDS).sequences
    tokens = {"eos_token_id": loaded.config.eos_token_id}  # the file has it, as transformers then asks the model no more
    for form in ("huggingface", "flax_switch"):
        again = load_pretrained(loaded.save_pretrained(tmp_path / form, format=form))
        assert again.generation_defaults == {**tokens, **loaded.generation_defaults}
        np.testing.assert_array_equal(again.generate(IDS).sequences, expected)
    loaded.save_pretrained(tmp_path / "model")  # over the model that it is of
    assert load_pretrained(tmp_path / "model").generation_defaults == {**tokens, **loaded.generation_defaults}
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "huggingface").num_beams == 3


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_a_default_that_a_given_control_makes_idle_is_left_out(tmp_path):
    defaults = read_defaults(write(tmp_path, num_beams=4, length_penalty=2.0, early_stopping=True, num_return_sequences=3))
    assert with_defaults(defaults, {"num_beams": 1}) == {"num_beams": 1}
    assert with_defaults(defaults, {"num_beams": 2})["num_beams"] == 2
    assert "num_return_sequences" not in with_defaults(defaults, {"num_beams": 2})
    sampling = read_defaults(write(tmp_path, do_sample=True, temperature=0.3, top_k=5))
    assert with_defaults(sampling, {"do_sample": False}) == {"do_sample": False}
    with pytest.raises(ConfigError, match="temperature=0.5 has no effect"):  # what was given is not dropped
        GenerationConfig(**with_defaults({}, {"temperature": 0.5}))
    assert with_defaults({"min_new_tokens": 9}, {"max_new_tokens": 4}) == {"max_new_tokens": 4}


def test_a_temperature_without_sampling_changes_nothing(tmp_path):
    assert with_defaults(read_defaults(write(tmp_path, temperature=0.7, max_length=5)), {}) == {"max_new_tokens": 4}


def test_what_is_not_followed_is_named_and_what_is_neutral_is_not(tmp_path, caplog):
    folder = write(
        tmp_path,
        guidance_scale=1.0,
        transformers_version="5",
        bos_token_id=3,
        renormalize_logits=True,
        watermark={"a": 1},
        top_p=None,
    )
    assert read_defaults(folder) == {}
    (record,) = caplog.records
    message = record.getMessage()
    assert "renormalize_logits=True" in message and "watermark" in message and "guidance_scale" not in message


def test_a_model_may_ask_for_groups_or_for_contrastive_search(tmp_path, caplog):
    groups = dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    assert with_defaults(read_defaults(write(tmp_path, **groups)), {}) == groups
    assert with_defaults(read_defaults(write(tmp_path, num_beam_groups=1, diversity_penalty=0.0, penalty_alpha=None)), {}) == {}
    assert with_defaults(read_defaults(write(tmp_path, penalty_alpha=0.6, top_k=4)), {}) == dict(penalty_alpha=0.6, top_k=4)
    assert not caplog.records


@pytest.mark.parametrize("values", [dict(num_beams="three"), dict(num_beams=0), dict(eos_token_id="x", max_new_tokens=-1)], ids=str)
def test_a_value_that_cannot_be_names_the_file(tmp_path, values):
    with pytest.raises(ConfigError, match="generation_config.json: "):
        read_defaults(write(tmp_path, **values))


@pytest.mark.parametrize(
    "values", [dict(max_length="20"), dict(max_length=True), dict(min_length=-3), dict(max_length=2.5)], ids=str
)
def test_a_length_that_counts_the_start_token_is_checked_as_those_that_do_not(tmp_path, values):
    with pytest.raises(ConfigError, match=f"generation_config.json: .*{next(iter(values))}"):
        read_defaults(write(tmp_path, **values))


def test_a_folder_without_the_file_has_no_defaults(tmp_path):
    assert read_defaults(tmp_path) == {}
