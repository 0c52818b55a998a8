"""Heads of tasks: transformers' own T5, mT5 and UMT5 with random weights, from folder and memory, and back to the same bits."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from flax_switch import CheckpointError, ConfigError, load_pretrained
from flax_switch.convert import convert
from flax_switch.convert.canonical import flatten
from flax_switch.convert.huggingface import huggingface_tensors
from flax_switch.convert.tensors import from_array
from flax_switch.ops.task_losses import task_loss
from flax_switch.pretrained.outputs import as_task_labels
from tests.convert import oracle
from tests.convert.test_roundtrip import assert_same_tensors, tensors_of

KINDS = {"classification": "ForSequenceClassification", "multi_label_classification": "ForSequenceClassification",
         "regression": "ForSequenceClassification", "token_classification": "ForTokenClassification",
         "question_answering": "ForQuestionAnswering"}  # fmt: skip


def model_of(name, head, seed=0, **changes):
    """A model of random weights and its batch: two rows with one EOS each, of which one is padded."""
    outputs = {
        "classification": 3,
        "multi_label_classification": 4,
        "regression": 1,
        "token_classification": 5,
        "question_answering": 2,
    }[head]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=2, num_decoder_layers=2, dropout_rate=0.0,
        classifier_dropout=0.1, initializer_factor=0.7, decoder_start_token_id=0, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, num_labels=outputs, feed_forward_proj="gated-gelu",
        **({"problem_type": head} if head == "multi_label_classification" else {}), **changes,
    )  # fmt: skip
    model = oracle.huggingface_model(config, seed, getattr(transformers, f"{name}{KINDS[head]}"))
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 61, (3, 9))
    mask = np.ones_like(ids)
    for row, length in enumerate((9, 6, 4)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 1, 0, 0
    labels = {
        "classification": rng.integers(0, 3, 3),
        "multi_label_classification": rng.integers(0, 2, (3, 4)).astype(np.float32),
        "regression": rng.normal(size=3).astype(np.float32),
        "token_classification": np.where(mask, rng.integers(0, 5, ids.shape), -100),
        "question_answering": np.array([[1, 4], [0, 0], [9, 12]]),  # of the last row the span was cut off
    }[head]
    return model, ids, mask, labels


def expected_of(model, ids, mask, labels, head):
    given = {"labels": torch.from_numpy(labels)}
    if head == "question_answering":
        given = {"start_positions": torch.from_numpy(labels[:, 0]), "end_positions": torch.from_numpy(labels[:, 1])}
    found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **given)
    if head == "question_answering":
        return torch.stack([found.start_logits, found.end_logits], -1).detach().numpy(), found.loss
    return found.logits.detach().numpy(), found.loss


@pytest.mark.parametrize(
    "name, head", [*(("T5", head) for head in KINDS), ("MT5", "classification"), ("UMT5", "token_classification")]
)
def test_logits_and_loss_are_those_of_transformers_and_the_way_back_has_the_same_bits(name, head, tmp_path):
    model, ids, mask, labels = model_of(name, head)
    folder = oracle.save(model, tmp_path / "theirs")
    logits, loss = expected_of(model, ids, mask, labels, head)
    for source in (folder, model):
        ours = load_pretrained(source)
        assert (ours.config.head, ours.architecture) == (head, head)
        output = ours(ids, mask, labels=labels)
        np.testing.assert_allclose(output.logits, logits, atol=2e-4 * float(np.abs(logits).max()))
        np.testing.assert_allclose(output.loss, loss.item(), rtol=1e-4)
    native = convert(folder, tmp_path / "ours", to="flax_switch")
    back = convert(native, tmp_path / "back", to="huggingface")
    assert_same_tensors(tensors_of(back), tensors_of(folder))
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    saved = ours.save_pretrained(tmp_path / "saved")  # with a config.json of our own
    again, report = getattr(transformers, f"{name}{KINDS[head]}").from_pretrained(saved, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(expected_of(again.eval(), ids, mask, labels, head)[0], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", KINDS)
def test_gradients_of_the_loss_are_those_of_transformers(head):
    model, ids, mask, labels = model_of("T5", head, seed=1)
    if head == "question_answering":
        labels[2] = 3  # starts and ends that count are as many: the mean over both is the mean of their means
    expected_of(model, ids, mask, labels, head)[1].backward()
    ours = load_pretrained(model)
    config = ours.config.replace(load_balancing_loss_coef=0.0)

    def loss_of(params):
        output = ours.model.apply({"params": params}, ids, mask)
        return task_loss(output, as_task_labels(labels, output.logits.shape, config), config).loss

    grads = huggingface_tensors(
        config, head, "t5", {k: from_array(v) for k, v in flatten(jax.jit(jax.grad(loss_of))(ours.params)).items()}
    )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted = parameter.grad.numpy()
            np.testing.assert_allclose(grads[name].numpy(), wanted, atol=1e-5 * float(np.abs(wanted).max()) + 1e-7, err_msg=name)


def test_what_cannot_be_opened_is_refused_by_name(tmp_path):
    model, ids, mask, _ = model_of("T5", "classification")
    folder = oracle.save(model, tmp_path / "theirs")
    ours = load_pretrained(folder, labels=["no", "maybe", "yes"])  # nobody had named them
    assert ours.config.labels == ("no", "maybe", "yes")
    named = ours.save_pretrained(tmp_path / "named")
    for changes, why in (
        ({"head": "question_answering"}, "has a head for classification, which head='question_answering' would throw away"),
        ({"head": "language_model"}, "would throw away"),
        ({"labels": ["a", "b"]}, r"a head of 3 classes \(no, maybe, yes\); labels names 2: a, b"),
        ({"labels": ["a", "b", "c"]}, "would give them other names"),
        ({"labels": "abc"}, "labels must be a list of names"),
        ({"head": "classifier"}, "Did you mean 'classification'"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_pretrained(named, **changes)
    with pytest.raises(ConfigError, match="has a head for classification, not a language model's"):
        ours.generate(ids)
    with pytest.raises(ConfigError, match="leave other inputs out"):
        ours(ids, mask, decoder_input_ids=ids)
    with pytest.raises(ConfigError, match="labels holds 3, which is none of the 3 classes no, maybe, yes"):
        ours(ids, mask, labels=[0, 3, 1])
    with pytest.raises(ConfigError, match="has no EOS"):
        ours([[5, 6, 7]])
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(CheckpointError, match=r"classification_head.out_proj.weight is \[3, 16\] where \[2, 16\]"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**values, "problem_type": "ordinal"}))
    with pytest.raises(ConfigError, match="problem_type='ordinal'; known are"):
        load_pretrained(folder)
