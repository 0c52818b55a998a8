"""Merging and pruning by text: what it costs is measured on other text than decided, and copies that merge cost nothing."""

import numpy as np
import pytest

from flax_switch import cli
from flax_switch.config import ConfigError
from flax_switch.config.finetuning import FinetuneDataConfig
from flax_switch.convert.canonical import flatten
from flax_switch.pretrained import load_pretrained, save_pretrained
from flax_switch.workflows.regroup import cross_entropy, fewer
from tests.workflows.conftest import lists, write_jsonl


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    rows = [{"list": text, "first": word} for text, word in lists(24, seed=5)]
    return FinetuneDataConfig(
        validation=write_jsonl(path, rows), inputs="list", targets="first", inputs_length=16, targets_length=4, batch_size=4
    )


def copies(checkpoint, folder):
    """The checkpoint with its second expert and its column of the router as the first, nearly."""
    model = load_pretrained(checkpoint)
    params = {path: np.array(leaf) for path, leaf in flatten(model.params).items()}
    for path, leaf in params.items():
        if "/expert/" in path:
            leaf[1] = leaf[0]
        if "/router/" in path:
            leaf[:, 1] = leaf[:, 0] + 1e-6 * np.random.default_rng(0).standard_normal(len(leaf))
    return save_pretrained(folder, model.config, params, model.vocabulary, "flax_switch")


@pytest.mark.slow
def test_copies_cost_nothing_and_what_is_printed_is_the_loss_of_what_was_written(checkpoint, examples, tmp_path):
    made = fewer(copies(checkpoint, tmp_path / "copies"), tmp_path / "one", num_experts=1, merge=True, examples=examples)
    assert made.after == pytest.approx(made.before, abs=1e-5)
    for name, options in {"merged": {"merge": True}, "pruned": {"merge": False}}.items():
        other = fewer(checkpoint, tmp_path / name, num_experts=1, examples=examples, **options)
        assert other.before is not None and abs(other.after - other.before) > 1e-4
        written = load_pretrained(other.path)
        assert written.config.num_experts == 1 and written.vocabulary is not None
        from flax_switch.data.tasks import prepare_tasks

        batches = list(prepare_tasks(examples, written.vocabulary, train=False).validation_batches())
        assert cross_entropy(written.replace(config=written.config), batches[1::2]) == pytest.approx(other.after, rel=1e-5)


@pytest.mark.slow
def test_commands_merge_prune_and_grow_and_say_what_it_cost(checkpoint, examples, tmp_path, capsys):
    text = ["--examples", examples.validation, "--inputs", "list", "--targets", "first", "--batch-size", "4", "--length", "16"]
    for command in ("merge", "prune"):
        assert cli.main([command, checkpoint, str(tmp_path / command), "--num-experts", "1", "--no-progress", *text]) == 0
        assert "nats a token before" in capsys.readouterr().out
    assert cli.main(["grow", checkpoint, str(tmp_path / "grown"), "--num-experts", "4", "--no-progress"]) == 0
    assert load_pretrained(tmp_path / "grown").config.num_experts == 4
    with pytest.raises(ConfigError, match="is no run, so it has no held-out text of its own; name examples"):
        fewer(checkpoint, tmp_path / "none", num_experts=1, merge=True)
    with pytest.raises(ConfigError, match="must be at least the 1 that a token chooses and less than the 2"):
        fewer(checkpoint, tmp_path / "none", num_experts=2, merge=True, examples=examples)
    with pytest.raises(ConfigError, match="fills 1 batches; it takes two"):
        fewer(checkpoint, tmp_path / "none", num_experts=1, merge=True, examples=examples.replace(batch_size=64))
    assert not (tmp_path / "none").exists()


def test_every_other_batch_decides_and_the_rest_says_what_it_cost(checkpoint, examples, tmp_path, monkeypatch):
    decided, judged = [], []

    def logits(model, batches):
        decided.extend(batches)
        return [np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) for _ in range(2)]

    def loss(model, batches):
        judged.append((model.config.num_experts, list(batches)))
        return float(len(judged))

    monkeypatch.setattr("flax_switch.workflows.regroup.router_logits", logits)
    monkeypatch.setattr("flax_switch.workflows.regroup.cross_entropy", loss)
    made = fewer(checkpoint, tmp_path / "one", num_experts=1, merge=True, examples=examples, batches=5)
    assert (made.before, made.after) == (1.0, 2.0) and [experts for experts, _ in judged] == [2, 1]
    assert len(decided) == 3 and len(judged[0][1]) == len(judged[1][1]) == 2
    texts = lambda batches: {batch["input_ids"].tobytes() for batch in batches}  # noqa: E731
    assert not texts(decided) & texts(judged[0][1]) and texts(judged[0][1]) == texts(judged[1][1])
    with pytest.raises(ConfigError, match="fills 1 batches; it takes two"):
        fewer(checkpoint, tmp_path / "none", num_experts=1, merge=True, examples=examples, batches=1)
