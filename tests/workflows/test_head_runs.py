"""Fine-tuning of tasks' heads: they learn, are scored, resume exactly, and do the same on a mesh; what cannot be is refused."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from flax_switch import cli
from flax_switch.config import ConfigError, MeshConfig
from flax_switch.config.adapter import AdapterConfig
from flax_switch.config.finetuning import HEAD_METRICS, METRICS, EvaluationConfig, FinetuneConfig
from flax_switch.convert.canonical import flatten
from flax_switch.data.labelled import encode_labelled
from flax_switch.data.tasks import read_task
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import load_adapter, load_pretrained
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.finetune import finetune, recipe_of
from tests.workflows.conftest import WORDS, lists, write_jsonl

TASKS = ("classification", "multi_label_classification", "regression", "token_classification", "question_answering", "embedding")
SLOW = ("multi_label_classification", "regression", "token_classification", "question_answering")
LABELS = {"classification": ("low", "high"), "multi_label_classification": ("ba", "lo", "zu"), "token_classification": ("O", "B-X")}


def tag(word):
    return LABELS["token_classification"][word in WORDS[5:]]


def records(count, seed):
    for text, first in lists(count, seed):
        words = text.split()
        yield {
            "text": text, "class": LABELS["classification"][first in WORDS[5:]], "number": len(words) / 4, "first": first,
            "classes": [word for word in LABELS["multi_label_classification"] if word in words],
            "words": words, "tags": [tag(word) for word in words], "answers": {"text": [first, "ba"]},
        }  # fmt: skip


FIELDS = {
    "classification": dict(inputs="text", targets="class"),
    "multi_label_classification": dict(inputs="text", targets="classes"),
    "regression": dict(inputs="text", targets="number"),
    "token_classification": dict(inputs="words", targets="tags"),
    "question_answering": dict(inputs="first", context="text", targets="answers.text", inputs_length=64),
    "embedding": dict(inputs="text", targets="first", targets_length=4),
}


@pytest.fixture(scope="module")
def recipes(recipe, tmp_path_factory):
    """A recipe for each head."""
    folder = tmp_path_factory.mktemp("records")
    train, held = (write_jsonl(folder / f"{name}.jsonl", records(*of)) for name, of in (("a", (8, 0)), ("b", (12, 1))))

    def of(head):
        data = recipe.data.replace(train=train, validation=held, prefix="", **FIELDS[head])
        return recipe.replace(
            model={"head": head, **({"labels": LABELS[head]} if head in LABELS else {})},
            data=data,
            train=recipe.train.replace(steps=40, eval_every=20, checkpoint_every=20, log_every=1, keep_last=3),
            evaluation=EvaluationConfig(metrics=HEAD_METRICS[head]),
        )

    return {head: of(head) for head in TASKS}


@pytest.mark.quick
@pytest.mark.parametrize("head", [pytest.param(head, marks=pytest.mark.slow if head in SLOW else ()) for head in TASKS])
def test_a_head_learns_is_scored_resumes_to_the_bit_and_can_be_used(head, recipes, checkpoint, mesh, tmp_path):
    result = finetune(recipes[head], tmp_path / "run", init=checkpoint, mesh=mesh)
    lines = read_metrics(tmp_path / "run")
    losses = [line["cross_entropy"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])  # eight examples, again and again
    assert all(
        line["load_balancing_loss"] > 0 and line["loss"] > line["cross_entropy"] for line in lines if line["kind"] == "train"
    )
    scores = [score for metric in HEAD_METRICS[head] for score in METRICS[metric]]
    assert set(scores) <= result.evaluation.keys() and np.isfinite([result.evaluation[name] for name in scores]).all()
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "step_40.jsonl").read_text().splitlines()]
    assert len(predictions) == 12
    best = load_pretrained(tmp_path / "run" / "best")
    assert best.config == load_pretrained(tmp_path / "run").config and best.config.head == head
    texts = [p["inputs"] for p in predictions]
    last = load_pretrained(tmp_path / "run")
    say = {
        "classification": lambda: [one.label for one in last.classify(texts)],
        "multi_label_classification": lambda: [", ".join(one.labels) for one in last.label(texts)],
        "regression": lambda: last.regress(texts),
        "token_classification": lambda: [" ".join(word.label for word in one) for one in last.tag(texts)],
        "question_answering": lambda: [one.text for one in last.answer(texts, [row["text"] for row in records(12, 1)])],
        "embedding": lambda: _nearest(last, texts, [p["references"][0] for p in predictions]),
    }[head]()
    if head == "regression":
        np.testing.assert_allclose(say, [float(p["prediction"]) for p in predictions], atol=1e-4)
    else:
        assert list(say) == [p["prediction"] for p in predictions]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    again = finetune(recipes[head], tmp_path / "run", init=checkpoint, mesh=mesh)
    assert [line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"] == [
        line["loss"] for line in lines if line["kind"] == "train"
    ]
    for path, leaf in flatten(again.state.params).items():
        np.testing.assert_array_equal(leaf, flatten(result.state.params)[path])


@pytest.mark.slow
def test_an_adapter_of_the_encoder_learns_embeddings(recipes, checkpoint, mesh, tmp_path):
    recipe = recipes["embedding"].replace(adapter=AdapterConfig(rank=4))
    result = finetune(recipe, tmp_path / "run", init=checkpoint, mesh=mesh)
    lines = read_metrics(tmp_path / "run")
    losses = [line["cross_entropy"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "step_40.jsonl").read_text().splitlines()]
    texts = [p["inputs"] for p in predictions]
    base = load_pretrained(checkpoint)  # a language model, whose encoder is what the adapter is for
    adapted = base.with_adapter(tmp_path / "run")
    assert _nearest(adapted, texts, [p["references"][0] for p in predictions]) == [p["prediction"] for p in predictions]
    alone = load_pretrained(checkpoint, head="embedding").with_adapter(tmp_path / "run")
    np.testing.assert_allclose(alone.embed(texts), adapted.embed(texts), atol=1e-6)
    assert np.abs(adapted.embed(texts) - base.embed(texts)).max() > 1e-3
    assert load_adapter(tmp_path / "run" / "best", base).config == AdapterConfig(rank=4)
    alone.save_adapter(tmp_path / "peft")
    np.testing.assert_array_equal(base.with_adapter(tmp_path / "peft").embed(texts), adapted.embed(texts))
    assert all("encoder" in path for path in flatten(result.state.params["adapter"]))


def _nearest(model, texts, targets):
    found = list(dict.fromkeys(targets))
    return [found[i] for i in (model.embed(texts) @ model.embed(found).T).argmax(1)]


@pytest.mark.parametrize("head", [pytest.param("classification", marks=pytest.mark.slow), "embedding"])
def test_a_mesh_makes_the_updates_of_one_device(head, recipes, checkpoint, mesh, tmp_path):
    recipe = recipes[head].replace(train=recipes[head].train.replace(steps=2, eval_every=2, checkpoint_every=2))
    one = finetune(recipe, tmp_path / "one", init=checkpoint, mesh=mesh)
    config = MeshConfig(data=2, expert=2, fsdp=True)
    recipe = recipe.replace(mesh=config)
    four = finetune(recipe, tmp_path / "four", init=checkpoint, mesh=create_mesh(config, jax.devices()[:4]))
    assert any(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(four.state.params))
    for path, leaf in flatten(four.state.params).items():
        np.testing.assert_allclose(leaf, flatten(one.state.params)[path], atol=2e-4, err_msg=path)


@pytest.mark.slow  # two commands
def test_the_commands_train_and_score_a_csv_file(recipes, checkpoint, tmp_path, monkeypatch, mesh, capsys):
    monkeypatch.setattr("flax_switch.workflows.finetune.create_mesh", lambda config: mesh)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "class"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "class": int(row["class"] == "high")} for row in records(40, 0))
    given = ["--config.data.train", str(tmp_path / "train.csv"), "--config.data.inputs=text", "--config.data.targets=class"]
    given += ["--config.data.validation_fraction=0.3", "--config.data.inputs_length=16", "--config.data.batch_size=8"]
    given += ["--config.train.steps=2", "--config.evaluation.metrics=('f1',)", "--config.data.packing=False"]
    given += ["--config.model.head=classification", "--config.model.labels=('low','high')", "--config.data.labels=()"]
    given += ["--config.data.batch_tokens=None", "--config.data.prefix="]
    run = tmp_path / "run"
    command = ["finetune", "--config", "finetune_classification", "--init", checkpoint, "--workdir", str(run), *given]
    assert cli.main(command) == 0
    assert "classify(...)" in capsys.readouterr().out
    validation = f"--config.data.validation={tmp_path / 'train.csv'}"
    assert cli.main(["evaluate", "--checkpoint", str(run), validation, "--output", str(tmp_path / "scores")]) == 0
    assert "f1" in json.loads((tmp_path / "scores" / "metrics.json").read_text())


def examples_of(recipe, head):
    config = recipe.resolve(FinetuneConfig().model.replace(head=head, labels=LABELS.get(head, ())))
    return config, read_task(config.data.mixture[0], config.data, model=config.model)[0]


def test_labels_stand_where_the_words_and_the_span_are(recipes, vocabulary):
    config, examples = examples_of(recipes["token_classification"], "token_classification")
    pairs = encode_labelled(examples, vocabulary, config.data, config.model).examples(np.arange(2), np.zeros(2, int))
    for example, ids, length, labels in zip(examples, pairs.inputs, pairs.input_lengths, pairs.targets, strict=False):
        counted = labels[:length] >= 0
        assert [config.model.labels[i] for i in labels[:length][counted]] == example.references[0].split()
        assert vocabulary.decode(ids[:length]) == example.inputs and labels[length - 1] == -100
    config, examples = examples_of(recipes["question_answering"], "question_answering")
    pairs = encode_labelled(examples, vocabulary, config.data, config.model).examples(np.arange(8), np.zeros(8, int))
    for example, ids, (start, end) in zip(examples, pairs.inputs, pairs.targets, strict=False):
        assert vocabulary.decode(ids[start : end + 1].tolist()) == example.references[0]
        assert "context:" not in vocabulary.decode(ids[start:].tolist())
    short = config.data.replace(inputs_length=int(pairs.input_lengths.min()))
    cut = encode_labelled(examples, vocabulary, short, config.model).examples(np.arange(8), np.zeros(8, int)).targets
    assert ((cut == -100).all(1) | (cut == pairs.targets).all(1)).all()
    with pytest.raises(ConfigError, match="no answer lies within data.inputs_length=6 tokens"):
        encode_labelled(examples, vocabulary, config.data.replace(inputs_length=6), config.model)


@pytest.mark.parametrize(
    "head, changes, row, why",
    [
        ("classification", {}, {"class": "odd"}, "line 1: 'odd' is none of the classes .low, high."),
        ("classification", {}, {"class": 2}, "'2' is none of the classes"),
        ("regression", {}, {"number": "many"}, "must be a number; it is 'many'"),
        ("token_classification", {}, {"tags": ["O"]}, "there are 2 words and 1 tags"),
        ("token_classification", {}, {"tags": ["O", "B-Y"]}, "'B-Y' is none of the classes"),
        ("question_answering", {}, {"answers": {"text": ["elsewhere"]}}, "'elsewhere' does not stand in the context"),
    ],
)
def test_a_bad_example_is_refused_with_its_place(head, changes, row, why, recipes, tmp_path):
    good = {"text": "ba ke", "class": "low", "number": 1, "first": "ba", "words": ["ba", "ke"], "tags": ["O", "O"]}
    file = write_jsonl(tmp_path / "bad.jsonl", [{**good, "answers": {"text": ["ba"]}, **row}])
    with pytest.raises(ConfigError, match=why):
        examples_of(recipes[head].replace(data=recipes[head].data.replace(train=file)), head)


@pytest.mark.parametrize(
    "head, section, changes, why",
    [
        ("classification", "data", dict(packing=True), "data.packing puts several examples in a row"),
        ("classification", "data", dict(context="text"), "data.context is the field in which a span is found"),
        ("question_answering", "data", dict(context=None), "data.context is the field"),
        ("token_classification", "data", dict(prefix="tag: "), "data.prefix would need tags of its own"),
        ("embedding", "train", dict(microbatches=2), "compares every row of a batch with all others"),
        ("classification", "adapter", dict(rank=4), "the head 'classification' would stay as it began"),
        ("classification", "evaluation", dict(metrics=("rouge",)), "a metric with head='classification' must be one of"),
        ("embedding", "evaluation", dict(metrics=("accuracy",)), "a metric with head='embedding' must be one of 'retrieval'"),
    ],
)
def test_settings_that_do_not_suit_a_head_are_refused(head, section, changes, why, recipes):
    with pytest.raises(ConfigError, match=why):
        recipes[head].replace(**{section: getattr(recipes[head], section).replace(**changes)})


def test_a_head_is_not_trained_as_another_nor_as_text(recipes, checkpoint, mesh, tmp_path):
    model = load_pretrained(checkpoint, head="classification", labels=LABELS["classification"])
    saved = str(model.save_pretrained(tmp_path / "model", "flax_switch"))
    for changes, why in (
        (recipes["regression"], "has a head for classification, which head='regression' would throw away"),
        (recipes["classification"].replace(model={"head": "classification", "labels": ("a", "b", "c")}), "labels names 3: a, b, c"),
        (recipes["classification"].replace(model={"head": "classification", "labels": ("a", "b")}), "other names"),
    ):
        with pytest.raises(ConfigError, match=why):
            finetune(changes, tmp_path / "run", init=saved, mesh=mesh)
    assert not (tmp_path / "run").exists()
    config = recipes["classification"].resolve(model.config)
    assert dataclasses.asdict(recipe_of(config).resolve(model.config)) == dataclasses.asdict(config)
