"""Every field of every foreign JSON takes every kind of value, one at a time: it is used, or refused by its name."""

import ast
import copy
import json
import logging
from pathlib import Path

import pytest

import flax_switch
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.huggingface import check_schema, with_huggingface_semantics
from flax_switch.convert.adapter_folder import open_adapter
from flax_switch.convert.doors import check_counts
from flax_switch.convert.huggingface import find_architecture
from flax_switch.convert.tokenizer import load_vocabulary
from flax_switch.generation.defaults import read_defaults
from flax_switch.inspection.adapter import describe_adapter
from tests.fuzz.mutations import NUMBERS, VALUES
from tests.fuzz.readers import adapters
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
        find_architecture(SwitchConfig.from_huggingface(whole), whole, {})

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


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocabulary.json", "byt5/tokenizer_config.json"])
def test_every_field_of_a_tokenizers_files(tmp_path, name):
    if name.startswith("byt5"):
        name = "tokenizer_config.json"
        values = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 4, "additional_special_tokens": ["<extra_id_0>"]}
        (tmp_path / name).write_text(json.dumps(values | {"extra_special_tokens": [{"content": "<extra_id_0>"}]}))
    elif name == "tokenizer.json":
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


@pytest.mark.parametrize(("reader", "name"), [("adapter", "flax_switch_adapter.json"), ("adapter-peft", "adapter_config.json")])
def test_every_field_of_an_adapters_settings(tmp_path, reader, name):
    adapters.READERS[reader].make(tmp_path)
    good = json.loads((tmp_path / name).read_text())

    def read(whole):
        (tmp_path / name).write_text(json.dumps(whole))
        describe_adapter(tmp_path)
        open_adapter(tmp_path, SMALL)

    read(good)
    assert never_raw(read, good) == []


# --- and in the source
READS = ("read_json", "json_object", "parse_json")  # what gives the value of a foreign text
PACKAGE = Path(flax_switch.__file__).parent


def name_of(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def fields_of(function):
    """(expression, field, how it is used) of what a function takes by [...] or .get(...) out of a value that it has read."""
    is_read = lambda node: isinstance(node, ast.Call) and name_of(node.func) in READS  # noqa: E731
    nodes = list(ast.walk(function))
    given = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value)
             for node in nodes if isinstance(node, ast.Assign | ast.NamedExpr)]  # fmt: skip
    for target, value in given:
        pairs = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        if pairs and not any(isinstance(element, ast.Starred) for element in value.elts):
            given += zip(target.elts, value.elts, strict=True)
    given = [(target, value.body if isinstance(value, ast.IfExp) else value) for target, value in given]
    names = {target.id for target, value in given if isinstance(target, ast.Name) and is_read(value)}
    user = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    for node in nodes:
        holder = key = None
        if isinstance(node, ast.Subscript):
            holder, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop") and node.args:
            holder, key = node.func.value, node.args[0]
        if isinstance(key, ast.Constant | ast.Name) and (is_read(holder) or (isinstance(holder, ast.Name) and holder.id in names)):
            yield ast.unparse(node), ast.unparse(key), user[node]


def unchecked(source):
    """The fields of what functions have read that are neither compared, nor asked for their type where they are used."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            fields = list(fields_of(function))
            asked = {key for _, key, use in fields if isinstance(use, ast.Call) and name_of(use.func) == "isinstance"}
            found += [text for text, key, use in fields if key not in asked and not isinstance(use, ast.Compare)]
    return found


def test_no_field_of_a_foreign_json_is_used_unchecked():
    found = {path.relative_to(PACKAGE).as_posix(): unchecked(path.read_text()) for path in PACKAGE.rglob("*.py")}
    del found["parallel/processes.py"]  # settings of another process of this run, which are shown
    assert {name: fields for name, fields in found.items() if fields} == {}, "take it with host.json_text.field"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("size = values['size']", ["values['size']"]),
        ("size = values.get('size', 3)", ["values.get('size', 3)"]),
        ("size = read_json(path)['size']", ["read_json(path)['size']"]),
        ("other, again = 3, read_json(path); size = again['size']", ["again['size']"]),
        ("again = read_json(path) if path else {}; size = again['size']", ["again['size']"]),
        ("size = field(values, 'size', int, 'x')", []),
        ("same = values.get('kind') == 'a'", []),
        ("size = values['size'] if isinstance(values.get('size'), int) else 0", []),
    ],
)
def test_the_search_finds_what_is_used_unchecked(line, names):
    assert unchecked(f"def read(path):\n    values = read_json(path)\n    {line}\n") == names
