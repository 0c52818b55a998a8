"""lm-eval on an exported model: it scores what `generate` says, and chooses by our log-probabilities."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import SwitchConfig
from flax_switch.data.vocabulary import Vocabulary

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra harness)"),
]
WORDS = ["red", "blue", "tall", "small", "house", "river", "cloud", "stone"]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
"""
GENERATED = """\
generation_kwargs: {until: ["</s>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
CHOSEN = """\
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


def lively(rng, path, leaf):
    """Draws parameters with which outputs change from text to text."""
    name = jax.tree_util.keystr(path)
    deviation = 0.3 if "scale" in name or "token_embedder" in name else 3.5 if "rel_embedding" in name else 0.7
    return jnp.asarray(rng.normal(1.0 if "scale" in name else 0.0, deviation, leaf.shape), jnp.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder for transformers, and the model that it holds."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary.train([" ".join(rng.choice(WORDS, 8)) for _ in range(200)], 28, num_sentinels=8)
    config = SwitchConfig(
        vocab_size=vocabulary.size, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, capacity_mode="fixed", expert_capacity=64,
        routing_group="sequence", ignore_padding_tokens=False, zero_padding_activations=False, cast_router_probs=True,
    )  # fmt: skip
    params = jax.tree_util.tree_map_with_path(functools.partial(lively, rng), fs.init_params(config, jax.random.key(0)))
    folder = tmp_path_factory.mktemp("exported") / "model"
    fs.save_pretrained(folder, config, params, vocabulary, format="huggingface")
    return folder, fs.load_pretrained(folder)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(12)]


def log_probability(pretrained, text, continuation):
    """The sum over the continuation's tokens, EOS apart, as lm-eval takes it."""
    labels = jnp.asarray([pretrained.vocabulary.encode(continuation)])
    logits = pretrained(input_ids=[[*pretrained.vocabulary.encode(text), 1]], labels=labels).logits
    return float(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).sum())


def evaluated(folder, place, kind, target, more, examples):
    """What the harness finds, run as its command runs it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    file, name = place / "examples.jsonl", f"toy_{kind}"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (place / "toy.yaml").write_text(TASK.format(name=name, file=file, kind=kind, target=target, more=more))
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},backend=seq2seq,dtype=float32", tasks=[name], device="cpu", batch_size=1,
        task_manager=TaskManager(include_path=str(place)), bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return found["results"][name]


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.parametrize("shift", [0, 1])
def test_exact_matches_are_counted_of_what_generate_says(shift, model, texts, tmp_path):
    folder, ours = model
    # The harness counts the source and the start token among the tokens that max_gen_toks allows an encoder-decoder.
    said = [ours.generate(text, max_new_tokens=8 + len(ours.vocabulary.encode(text))).texts[0] for text in texts]
    assert len(set(said)) > 4
    examples = [{"text": text, "target": target} for text, target in zip(texts, said[shift:] + said[:shift], strict=True)]
    found = evaluated(folder, tmp_path, "generate_until", "'{{target}}'", GENERATED, examples)
    same = np.mean([a == b for a, b in zip(said, said[shift:] + said[:shift], strict=True)])
    assert found["exact_match,none"] == pytest.approx(same) and (same == 1) == (shift == 0)


@pytest.mark.parametrize("best", [True, False])
def test_choices_are_those_of_our_log_probabilities(best, model, texts, tmp_path):
    folder, ours = model
    choices = ["red river", "tall stone", "small blue cloud"]
    scores = np.array([[log_probability(ours, text, choice) for choice in choices] for text in texts])
    chosen = scores.argmax(1) if best else scores.argmin(1)
    assert len(set(scores.argmax(1))) > 1
    examples = [{"text": text, "choices": choices, "target": int(number)} for text, number in zip(texts, chosen, strict=True)]
    assert evaluated(folder, tmp_path, "multiple_choice", "target", CHOSEN, examples)["acc,none"] == float(best)
