"""Every field of every foreign JSON takes every kind of value, one at a time: it is used, or refused by its name."""

import copy
import json
import logging

import pytest

from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.huggingface import check_schema, with_huggingface_semantics
from flax_switch.convert.doors import check_counts
from flax_switch.convert.huggingface import find_architecture
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.generation.defaults import read_defaults
from tests.fuzz.mutations import NUMBERS, VALUES
from tests.fuzz.readers.models import DENSE, SMALL, _tokenizer_json, vocabulary

SWITCH = with_huggingface_semantics(SMALL)[0].to_huggingface() | {
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "torch_dtype": "float32",
}
T5 = with_huggingface_semantics(DENSE)[0].to_huggingface() | {"scale_decoder_outputs": True, "torch_dtype": "float32"}
GENERATION = {
    "max_length": 9, "min_length": 1, "max_new_tokens": 3, "min_new_tokens": 1, "num_beams": 2, "num_return_sequences": 2,
    "do_sample": True, "length_penalty": 1.0, "early_stopping": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5,
    "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]], "suppress_tokens": [3], "begin_suppress_tokens": [3], "forced_bos_token_id": 3,
    "forced_eos_token_id": 1, "eos_token_id": [1, 3], "pad_token_id": 0, "decoder_start_token_id": 0, "use_cache": True,
    "num_beam_groups": 1,
}  # fmt: skip


def damaged(values):
    """Yields (what was done, a copy with one part replaced or removed), for every part and every kind of value."""
    waiting = [()]
    while waiting:
        path = waiting.pop()
        part = values
        for key in path:
            part = part[key]
        for key in (
            list(part)[:6] if isinstance(part, dict) and path else part if isinstance(part, dict) else range(min(len(part), 2))
        ):
            waiting += [(*path, key)] if isinstance(part[key], (dict, list)) else []
            for value in (..., *VALUES, *NUMBERS):
                whole = copy.deepcopy(values)
                holder = whole
                for step in path:
                    holder = holder[step]
                if value is ...:
                    del holder[key]
                else:
                    holder[key] = value
                yield (*path, key, value), whole


def never_raw(read, values):
    """Calls `read` with every damaged copy; returns what it raised that is no `ConfigError` of one line."""
    raw = []
    for what, whole in damaged(values):
        try:
            read(whole)
        except ConfigError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                raw.append((what, str(error)))
        except Exception as error:  # noqa: BLE001 - what is looked for
            raw.append((what, repr(error)))
    return raw


@pytest.mark.parametrize("values", [SWITCH, T5], ids=["switch_transformers", "t5"])
def test_every_field_of_config_json(values):
    def read(whole):
        check_schema(whole)
        check_counts(whole, {}, "config.json")
        find_architecture(whole, {})
        SwitchConfig.from_huggingface(whole)

    assert SwitchConfig.from_huggingface(values).vocab_size == 96
    assert never_raw(read, values) == []


def test_every_field_of_generation_config_json(tmp_path):
    def read(whole):
        (tmp_path / "generation_config.json").write_text(json.dumps(whole))
        read_defaults(tmp_path)

    logging.disable()
    try:
        assert never_raw(read, GENERATION) == []
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocabulary.json"])
def test_every_field_of_a_tokenizers_files(tmp_path, name):
    if name == "tokenizer.json":
        _tokenizer_json(tmp_path)
        (tmp_path / "vocabulary.json").unlink(missing_ok=True)
    else:
        vocabulary().save(tmp_path)
        if name == "tokenizer_config.json":
            (tmp_path / "vocabulary.json").unlink()
            (tmp_path / name).write_text(
                json.dumps({"extra_ids": 4, "additional_special_tokens": ["<extra_id_0>", {"content": "a"}]})
            )
    good = json.loads((tmp_path / name).read_text())

    def read(whole):
        (tmp_path / name).write_text(json.dumps(whole))
        load_vocabulary(tmp_path)

    logging.disable()
    try:
        read(good)
        assert never_raw(read, good) == []
    finally:
        logging.disable(logging.NOTSET)
