"""The probe: what the encoder is worth, on a model built to copy and on one whose encoder is zeroed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, SwitchConfig, TrainConfig
from flax_switch.data import prepare
from flax_switch.data.batches import IGNORED
from flax_switch.data.objectives import OBJECTIVES
from flax_switch.nn.outputs import ModelOutput
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels.head_loss import Head
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.placement import ONE_DEVICE
from flax_switch.training.findings import findings
from flax_switch.training.probe import Probe, describe
from flax_switch.training.state import build_run, init_state

MODEL = SwitchConfig(
    vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), random.integers(1, 6))) for _ in range(150)]
    lines = [" ".join(random.choice(words, 20)) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    config = DataConfig(
        source=str(folder / "corpus.txt"), vocabulary_size=90, num_sentinels=20, inputs_length=24, targets_length=28,
        batch_size=8, heldout_fraction=0.1, cache_dir=str(folder / "cache"), span_corruption_rate=1.0, infilling_rate=1.0,
    )  # fmt: skip
    return prepare(config, quiet=True)


def probe_of(prepared, devices=1):
    config = ExperimentConfig(model=MODEL, data=prepared.config, train=TrainConfig(steps=1, eval_batches=12))
    run = build_run(config, create_mesh(config.mesh, jax.devices()[:devices]))
    return Probe.of(run, prepared)


class Copier(SwitchTransformer):
    """A model whose logits are four times how often a token stands in the inputs, and which knows seven of eight tokens besides."""

    def apply(self, variables, input_ids, decoder_input_ids, attention_mask, decoder_attention_mask, **_):
        counts = (jax.nn.one_hot(input_ids, 128) * attention_mask[:, :, None]).sum(1)
        knows = sum(jnp.indices(decoder_input_ids.shape)) % 8 > 0
        known = jax.nn.one_hot(jnp.roll(decoder_input_ids, -1, axis=1), 128) * knows[:, :, None]
        nothing = jnp.zeros((*decoder_input_ids.shape, 1))
        head = Head(4.0 * counts[:, None] + 40.0 * known, jnp.eye(128), 128, 1.0, True, ONE_DEVICE)
        return ModelOutput(logits=None, decoder_last_hidden_state=nothing, encoder_last_hidden_state=nothing, head=head)


def by_hand(prepared, batches):
    """Sums of cross-entropy (own, other), hits and tokens by class, and spans, token by token."""
    sums = {name: np.zeros(4) for name in ("span_corruption", "infilling", "masked")}
    spans = []
    for own, other in prepared.heldout_probes(batches):
        for b in range(len(own["labels"])):
            objective, open_span = tuple(OBJECTIVES)[own["objective"][b]], False
            for t, label in enumerate(own["labels"][b]):
                text = label not in (IGNORED, 0, 1) and label < prepared.vocabulary.num_pieces
                masked = text and objective == "infilling" and own["masked"][b, t]
                if not masked:
                    open_span = False
                if not text:
                    continue
                losses, hit = [], False
                for batch in (own, other):
                    real = batch["input_ids"][b][batch["attention_mask"][b] == 1]
                    logits = 4.0 * np.bincount(real, minlength=128)
                    if (b + t) % 8 > 0 and t + 1 < len(own["labels"][b]):
                        logits[own["decoder_input_ids"][b, t + 1]] += 40.0
                    losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
                    hit = logits.argmax() == label if batch is own else hit
                sums[objective] += [*losses, hit, 1]
                if masked:
                    sums["masked"] += [*losses, hit, 1]
                    if not open_span:
                        spans.append(True)
                    spans[-1] &= bool(hit)
                    open_span = True
    return sums, spans


def test_the_probe_of_a_model_built_to_copy_is_what_a_loop_over_tokens_finds(prepared):
    run = probe_of(prepared).run
    probe = Probe.of(run.replace(model=Copier(MODEL)), prepared)
    found = probe(init_state(run).params)
    sums, spans = by_hand(prepared, probe.batches)
    for name, (own, other, _, tokens) in sums.items():
        np.testing.assert_allclose(found[f"encoder_gain/{name}"], (other - own) / tokens, rtol=1e-4, atol=1e-5)
    own, _, hits, tokens = sums["masked"]
    np.testing.assert_allclose(found["masked_cross_entropy"], own / tokens, rtol=1e-4)
    np.testing.assert_allclose(found["masked_accuracy"], hits / tokens, rtol=1e-5)
    np.testing.assert_allclose(found["masked_spans_exact"], np.mean(spans), rtol=1e-5)
    assert 0.1 < found["masked_spans_exact"] < 0.8
    assert found["encoder_gain/infilling"] > 0.1 and not findings(MODEL, found)
    assert "infilling" in describe(found)


def test_an_encoder_that_is_zeroed_is_worth_nothing_and_the_report_says_so(prepared):
    probe = probe_of(prepared)
    params = jax.tree.map(jnp.asarray, init_state(probe.run).params)
    used = probe(params)
    params["encoder"]["encoder_norm"]["scale"] = jnp.zeros_like(params["encoder"]["encoder_norm"]["scale"])
    found = probe(params)
    gains = [value for name, value in found.items() if name.startswith("encoder_gain/")]
    np.testing.assert_allclose(gains, 0.0, atol=1e-6)
    assert max(abs(used[name]) for name in used if name.startswith("encoder_gain/")) > 1e-4
    assert [said for said in findings(MODEL, found) if "encoder is not used" in said]


def test_devices_do_not_change_what_is_found(prepared):
    params = init_state(probe_of(prepared).run).params
    one, four = probe_of(prepared)(params), probe_of(prepared, devices=4)
    four = four(init_state(four.run).params)
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_unigram_statistics_are_those_of_the_masked_text_alone(prepared):
    probe = probe_of(prepared)
    counts = np.zeros(prepared.vocabulary.num_pieces, int)
    for own, _ in prepared.heldout_probes(probe.batches):
        for b, t in zip(*np.nonzero(own["masked"]), strict=True):
            label = own["labels"][b, t]
            if tuple(OBJECTIVES)[own["objective"][b]] == "infilling" and label > 1 and label < prepared.vocabulary.num_pieces:
                counts[label] += 1
    np.testing.assert_array_equal(probe.masked_counts, counts)
