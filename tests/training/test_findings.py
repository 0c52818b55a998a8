"""What a run's figures say in plain words, and masked text shown at the end of a run."""

import math

import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.data import Vocabulary
from flax_switch.training.findings import findings
from flax_switch.workflows.finish import _pieces, first_documents

MODEL = SwitchConfig(
    num_experts=4, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
)
WELL = {
    "encoder_gain/infilling": 2.0,
    "encoder_gain/masked": 0.0,
    "routers/router_entropy": [0.5, 1.3],
    "routers/tokens_per_expert": [[10.0, 10, 10, 10], [19.0, 7, 7, 7]],
    "routers/fraction_tokens_left_behind": [0.0, 0.04],
}


def test_where_all_is_well_nothing_is_said():
    assert findings(MODEL, WELL) == []
    assert findings(MODEL, {"cross_entropy": 1.0}) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_gain/infilling": 0.04}, ["encoder is not used", "0.04 nats"]),
        ({"routers/router_entropy": [math.log(4), 1.3]}, ["encoder 1 has not specialised", "1.39 of 1.39"]),
        ({"routers/router_entropy": [0.5, 1.37]}, ["decoder 1 has not specialised"]),
        ({"routers/tokens_per_expert": [[10.0, 10, 10, 10], [22.0, 6, 6, 6]]}, ["decoder 1 takes 2.2 times"]),
        ({"routers/fraction_tokens_left_behind": [0.12, 0.0]}, ["encoder 1 leaves 12 %"]),
    ],
)
def test_each_fault_has_its_sentence(changes, said):
    (sentence,) = findings(MODEL, WELL | changes)
    assert all(part in sentence for part in said)


class Letters(Vocabulary):
    """A vocabulary whose token 3 is 'a', 4 is 'b' and so on; sentinels from 90 on."""

    def __init__(self):
        self.num_pieces = 90

    def decode(self, ids, skip_special_tokens=True):
        ids = [i for i in ids if i > 2] if skip_special_tokens else ids
        return "".join("<>" if i >= 90 else "_.?"[i] if i < 3 else chr(ord("a") + i - 3) for i in ids)


def ids(text):
    return np.array([{"X": 99, "Y": 98, ".": 1, "_": 0}.get(c, ord(c) - ord("a") + 3) for c in text])


@pytest.mark.parametrize(
    ("source", "predicted", "target", "pieces"),
    [
        ("abXefY.__", "_XcdYgh.", "XccYg.__", ["ab", ("cd", "cc"), "ef", ("gh", "g")]),  # span corruption
        ("abXefY.", "_cdgh.", "XccYg.", ["ab", ("", "cc"), "ef", ("", "g")]),  # it did not spell out a thing
        ("abXefY.", "_abcdefgh.", "abccefg.", ["ab", ("cd", "cc"), "ef", ("gh", "g")]),  # infilling
        ("XefYij.", "_cdefghij.", "cefgij.", [("cd", "c"), "ef", ("gh", "g"), "ij"]),
        ("abXef.", "_abef.", "abcef.", ["ab", ("", "c"), "ef"]),
        ("abXef.", "_abcdeg.", "abcdef.", ["ab<>ef", ("abcdeg", "abcdef")]),  # what was shown did not come back
        ("abXef.", "_zabcef.", "abcef.", ["ab<>ef", ("zabcef", "abcef")]),
        ("abXef.", "_abcefz.", "abcef.", ["ab<>ef", ("abcefz", "abcef")]),
    ],
)
def test_fills_are_found_between_what_the_source_shows(source, predicted, target, pieces):
    found = _pieces(Letters(), ids(source), ids(predicted), ids(target))
    assert found == [p if isinstance(p, str) else {"model": p[0], "text": p[1]} for p in pieces]


def test_of_packed_rows_the_first_document_alone_is_shown():
    packed = {
        "input_ids": np.asarray([[5, 6, 1, 7, 1, 0]]), "input_segment_ids": np.asarray([[1, 1, 1, 2, 2, 0]]),
        "labels": np.asarray([[5, 1, 7, 1]]), "decoder_segment_ids": np.asarray([[1, 1, 2, 2]]),
        "attention_mask": np.asarray([[1, 1, 1, 1, 1, 0]]),
    }  # fmt: skip
    first = first_documents(packed)
    assert first["input_ids"].tolist() == [[5, 6, 1, 0, 0, 0]] and first["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert first["labels"].tolist() == [[5, 1, -100, -100]]
    plain = {name: packed[name] for name in ("input_ids", "labels", "attention_mask")}
    assert first_documents(plain) is plain
