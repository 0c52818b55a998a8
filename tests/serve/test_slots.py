"""Rows that join and leave between steps say what `generate` says of each alone, whatever the model is made of."""

import jax
import numpy as np
import pytest
from client import small_model

import flax_switch as fs
from flax_switch.config import ConfigError
from flax_switch.generation.generate import generate
from flax_switch.generation.slots import Row, level_of
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.serving.limits import Limits
from flax_switch.serving.models import Served

SLOTS, SOURCE, NEW = 4, 12, 10
MODELS = {
    "dropless": {},
    "fixed capacity": dict(capacity_mode="fixed", expert_capacity=2),
    "experts choose": dict(router_type="experts_choose", capacity_mode="factor", eval_capacity_factor=1.0),
    "tables in every layer": dict(relative_attention_per_layer=True),
    "scanned": dict(
        scan_layers=True, num_encoder_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    ),
    "int8": {},
    "experts on disk": {},
}  # fmt: skip
DEFAULTS = {
    "none": {},
    "many": dict(
        repetition_penalty=1.3, no_repeat_ngram_size=2, suppress_tokens=(5,), min_new_tokens=3,
        forced_bos_token_id=7, encoder_no_repeat_ngram_size=2
    ),
}  # fmt: skip


def rows(count, vocab_size):
    """Sources and controls of all three levels."""
    rng = np.random.default_rng(0)
    for i in range(count):
        ids = [*rng.integers(2, vocab_size, rng.integers(1, SOURCE)).tolist(), 1]
        controls = dict(max_new_tokens=int(rng.integers(3, NEW + 1)))
        if i % 3:
            controls |= dict(do_sample=True, temperature=float(rng.uniform(0.3, 2)), top_k=(0, 5)[i % 2])
        if i % 3 == 2:
            controls |= dict(top_p=float(rng.uniform(0.3, 1)))
        yield ids, controls, int(rng.integers(2**32))


def decoded(decoder, wanted):
    """What slots say when rows join at random times."""
    rng, slots = np.random.default_rng(1), decoder.empty(SLOTS, SOURCE)
    waiting, running, found = list(enumerate(wanted)), {}, {}
    while waiting or running:
        new = {}
        for slot in [slot for slot in range(SLOTS) if slot not in running][: int(rng.integers(0, 3))]:
            if waiting:
                number, new[slot] = waiting.pop(0)
                running[slot] = number, new[slot].controls
        if new:
            slots = decoder.admit(slots, new, 2)
        if not running:
            continue
        active = np.array([slot in running for slot in range(1 if max(running) == 0 else SLOTS)])
        level = max(level_of(controls) for _, controls in running.values())
        slots, report = decoder.run(slots, active, int(rng.integers(1, 5)), level, *(bool(one) for one in rng.integers(2, size=2)))
        report = jax.device_get(report)
        for slot in [slot for slot in running if report.finished[slot]]:
            found[running.pop(slot)[0]] = report.tokens[slot, : report.lengths[slot]].tolist()
    return [found[number] for number in range(len(wanted))]


def as_served(kind, pretrained, folder):
    """The model that a server has, and the one whose outputs it must have."""
    if kind == "int8":
        pretrained = fs.quantize(pretrained, "int8")
    if kind != "experts on disk":
        return pretrained, pretrained
    pretrained.save_pretrained(folder / "model", format="flax_switch")
    return fs.load_pretrained(folder / "model", experts="disk", expert_memory=3 * 2 * 16 * 32 * 4), pretrained  # three experts


SLOW = {"int8", "experts on disk"}
CASES = [*((kind, "none") for kind in MODELS), ("dropless", "many")]


@pytest.mark.parametrize(
    ("kind", "defaults"), [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in CASES]
)
def test_a_row_among_others_is_the_row_alone(kind, defaults, tmp_path):
    there, pretrained = as_served(kind, small_model(**MODELS[kind]).replace(generation_defaults=DEFAULTS[defaults]), tmp_path)
    served = Served(kind, there, Limits(max_tokens=NEW))
    wanted = [(ids, served.controls(controls), seed) for ids, controls, seed in rows(12, pretrained.config.vocab_size)]
    found = decoded(served.decoder, [Row(ids, controls, (seed, 0, 0)) for ids, controls, seed in wanted])
    for (ids, controls, seed), tokens in zip(wanted, found, strict=True):
        padded = np.zeros((1, SOURCE), np.int32)
        padded[0, : len(ids)] = ids
        given = {**vars(controls), "max_new_tokens": NEW}
        alone = generate(pretrained.model, pretrained.params, padded, padded != 0, seed=[seed], **given)
        alone = alone.sequences[0, 1:].tolist()
        expected = alone[: alone.index(1) + 1] if 1 in alone else alone
        assert tokens == expected[: controls.max_new_tokens], (ids, controls)
    assert len({tuple(tokens) for tokens in found}) > 6, "outputs that differ can be told apart"
    if there is not pretrained:
        assert there.expert_reads.misses > 4, "the memory holds three of eight experts"


def test_where_somebody_waits_a_run_ends_with_the_first_row_else_with_the_last():
    served = Served("", small_model().replace(generation_defaults=dict(suppress_tokens=(1,))), Limits(max_tokens=NEW))
    two = {slot: Row([5, 6, 1], served.controls(dict(max_new_tokens=most)), (0, 0, 0)) for slot, most in ((0, 3), (1, 7))}
    for wanted, steps, finished in ((True, 3, [True, False]), (False, 7, [True, True])):
        slots = served.decoder.admit(served.decoder.empty(2, SOURCE), two, 2)
        _, report = served.decoder.run(slots, np.ones(2, bool), 100, 0, False, wanted)
        assert int(report.steps) == steps and report.finished.tolist() == finished


def test_a_model_of_another_architecture_has_no_slots():
    pretrained = small_model()
    encoder = SwitchTransformer.__mro__[1](pretrained.config)
    half = {name: pretrained.params[name] for name in ("token_embedder", "encoder")}
    served = Served("half", pretrained.replace(model=encoder, params=half, architecture="encoder"), Limits(max_source_length=32))
    assert served.decoder is None
    assert np.linalg.norm(served.embed([5, 6, 1])) == pytest.approx(1.0, abs=1e-5)
    assert [stack.stack for stack in served.routing([5, 6, 1], [])] == ["encoder"]


def test_a_decoder_alone_is_refused_by_name():
    pretrained = small_model(
        architecture="decoder_only", bidirectional_inputs=True, num_encoder_layers=0, num_sparse_encoder_layers=0
    )
    with pytest.raises(ConfigError, match="'alone' is a decoder alone"):
        Served("alone", pretrained, Limits(max_tokens=NEW))
