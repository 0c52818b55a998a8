"""`flax-switch push`: what reaches the hub is what transformers opens, with a card that says how the model was made."""

import json
import re

import numpy as np
import pytest
import yaml
from fake_hub import running

import flax_switch
from flax_switch.cli import main
from flax_switch.config import ExperimentConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.workflows.model_card import model_card
from flax_switch.workflows.pretrain import pretrain

NAME = "ada/switch-mine"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls httpx


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short pre-training run on a file whose folder nobody should learn of."""
    folder = tmp_path_factory.mktemp("secret-place")
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bklmn" for b in "aeiou"]
    (folder / "letters.txt").write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(120)))
    model = SwitchConfig(
        vocab_size=128, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
    )  # fmt: skip
    config = ExperimentConfig(
        model=model, optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-3, warmup_steps=0),
        train=TrainConfig(steps=4, log_every=2, eval_every=4, eval_batches=2, checkpoint_every=4),
    )  # fmt: skip
    data = config.data.replace(
        source=str(folder / "letters.txt"), vocabulary_size=32, num_sentinels=16, inputs_length=24, targets_length=10, batch_size=8,
        heldout_fraction=0.2, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    pretrain(config.replace(data=data), folder / "run")
    return folder / "run"


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, in place of the real one, that knows the token that is stored here."""
    with running() as hub:
        _use(monkeypatch, hub, hub.token)
        yield hub


def _use(monkeypatch, hub, token):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)  # of newer versions
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def push(*arguments):
    return main(["push", *map(str, arguments), "--license", "apache-2.0", "--no-progress"])


def test_what_is_on_the_hub_is_the_model(run, hub, tmp_path, capsys):
    assert push(run, NAME, "--private", "--message", "First") == 0
    assert f"{hub.address}/{NAME}/commit" in capsys.readouterr().out
    files = hub.repositories[NAME]["main"]
    assert hub.private[NAME] and hub.messages == ["First"]
    assert {"README.md", "config.json", "model.safetensors", "spiece.model", "tokenizer_config.json", "loss.png"} <= files.keys()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ids = np.arange(3, 15).reshape(2, 6)
    ours, theirs = flax_switch.load_pretrained(run), flax_switch.load_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(ids, labels=ids).logits, theirs(ids, labels=ids).logits)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    opened = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = opened(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs(ids, labels=ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("letter").input_ids[-1] == 1


def test_the_card_says_what_the_run_was_and_nothing_of_this_machine(run, hub, capsys):
    assert push(run, NAME, "--dry-run", "--language", "en") == 0
    said = capsys.readouterr().out
    assert not hub.repositories and "Nothing was pushed" in said
    card = said[: said.index("```\n\n</details>")]
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["library_name"], head["language"]) == ("apache-2.0", "transformers", ["en"])
    assert "mixture-of-experts" in head["tags"] and head["pipeline_tag"] == "text2text-generation"
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    [result] = head["model-index"][0]["results"]
    assert {m["name"]: m["value"] for m in result["metrics"]}["held-out cross-entropy, nats/token"] == round(
        last["cross_entropy"], 4
    )
    assert f"| held-out cross-entropy, nats/token | {last['cross_entropy']:.3f} |" in card
    assert "4 of 4 steps" in card and "letters.txt" in card and "![Cross-entropy by step](loss.png)" in card
    assert re.search(r"\| encoder 1 \| [\d.]+ to [\d.]+ \| [\d.]+ of 1\.39 \| [\d.]+ % \|", card)
    session = json.loads((run / "sessions.jsonl").read_text().splitlines()[0]) if (run / "sessions.jsonl").exists() else {}
    for secret in ("secret-place", str(run), session.get("host", "secret-place")):
        assert secret not in said
    assert all(f"  {name}\n" in said for name in ("README.md", "model.safetensors", "spiece.model"))


def test_the_cards_python_is_right_for_our_library(run, tmp_path, capsys):
    assert push(run, NAME, "--dry-run", "--folder", tmp_path / "out") == 0
    block = (tmp_path / "out" / "README.md").read_text().split("```python\n")[2].split("```")[0]
    exec(block.replace(f'"{NAME}"', f'"{tmp_path / "out"}"').replace("max_new_tokens=32", "max_new_tokens=2"), {})
    assert push(run, NAME, "--dry-run", "--folder", tmp_path / "out") == 2  # a model is there
    assert "--overwrite" in capsys.readouterr().err
    assert push(run, NAME, "--dry-run", "--folder", tmp_path / "out", "--overwrite") == 0


def test_a_branch_is_made_and_main_stays_as_it_is(run, hub):
    assert push(run, NAME) == 0
    before = dict(hub.repositories[NAME]["main"])
    assert push(run, NAME, "--branch", "half", "--dtype", "bfloat16") == 0
    assert hub.repositories[NAME]["main"] == before
    weights = hub.repositories[NAME]["half"]["model.safetensors"]
    assert len(weights) < 0.6 * len(before["model.safetensors"])


def test_a_folder_that_is_no_run_has_a_card_without_figures(run, tmp_path):
    flax_switch.load_pretrained(run).save_pretrained(tmp_path / "plain")
    assert push(tmp_path / "plain", NAME, "--dry-run", "--folder", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Use it" in card and "## Results" not in card and "loss.png" not in card


@pytest.mark.parametrize(("token", "expected"), [(None, "hf auth login"), ("hf_wrong", "hf auth login")], ids=["none", "wrong"])
def test_who_may_not_push_is_told_before_anything_is_converted(run, monkeypatch, tmp_path, capsys, token, expected):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running() as hub:
        _use(monkeypatch, hub, token)
        assert push(run, NAME, "--folder", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_a_commit_that_fails_is_told_with_the_hubs_reason(run, monkeypatch, capsys):
    with running(refuse_commits=True) as hub:
        _use(monkeypatch, hub, hub.token)
        assert push(run, NAME) == 2
    said = capsys.readouterr().err
    assert f"{NAME} was not pushed" in said and "Traceback" not in said
    assert hub.repositories[NAME]["main"] == {}


def test_what_is_no_name_is_refused(run, capsys):
    assert push(run, "switch-mine", "--dry-run") == 2
    assert "OWNER/MODEL" in capsys.readouterr().err


def test_cards_of_dense_models_and_encoders_name_their_classes():
    dense = SwitchConfig(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    assert "T5ForConditionalGeneration" in (card := model_card(NAME, dense, licence="mit")) and "mixture" not in card
    assert "SwitchTransformersEncoderModel" in model_card(NAME, SwitchConfig(), licence="mit", encoder_only=True)
    assert '"summarize: A text of yours."' in model_card(NAME, dense, licence="mit", prefixes=("summarize: ", "x: "))
