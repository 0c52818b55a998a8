"""Every public name, used as the README uses it. Nothing runs this file: basedpyright checks it, and every type it states.

A name that became `Any`, or a result of another type than stated, fails the lint step.
"""

# pyright: strict

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np

import flax_switch as fs
from flax_switch.config import ExperimentConfig
from flax_switch.config.finetuning import FinetuneRecipe


def configs() -> None:
    config = fs.SwitchConfig(num_experts=16, capacity_factor=1.5, mlp_activations=("gelu_new", "linear"))
    assert_type(config, fs.SwitchConfig)
    assert_type(config.num_experts, int)
    assert_type(config.replace(num_experts=8), fs.SwitchConfig)
    assert_type(fs.SwitchConfig.from_dict({"num_experts": 8}), fs.SwitchConfig)
    assert_type(fs.PRESETS, dict[str, fs.SwitchConfig])
    assert_type(fs.PRESETS["switch-base-8"], fs.SwitchConfig)
    fs.SwitchConfig(num_expert=3)  # pyright: ignore[reportCallIssue] - the lint step fails where this is no error
    fs.SwitchConfig(num_experts="3")  # pyright: ignore[reportArgumentType]


def models(params: dict[str, Any], ids: jax.Array, arrays: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    config = fs.PRESETS["switch-base-8"]
    model = fs.SwitchTransformer(config)
    assert_type(model.init(jax.random.key(0), ids, ids), dict[str, Any])
    output = model.apply({"params": params}, ids, ids, ids)
    assert_type(output, fs.ModelOutput)
    assert_type(output.logits, jax.Array | None)
    assert_type(output.encoder_last_hidden_state, jax.Array | None)
    loss = fs.seq2seq_loss(output, arrays, config)
    assert_type(loss, fs.LossOutput)
    assert_type(loss.loss, jax.Array)
    encoded = fs.SwitchEncoder(config).apply({"params": params}, ids)
    assert_type(encoded.last_hidden_state, jax.Array)
    generated = fs.generate(model, params, arrays, num_beams=4, max_new_tokens=64)
    assert_type(generated, fs.GenerationOutput)
    assert_type(generated.texts, tuple[str, ...] | None)
    assert_type(fs.generate(model, params, [1, 2, 3]), fs.GenerationOutput)
    for tokens in fs.stream(model, params, arrays, do_sample=True, seed=1):
        assert_type(tokens.tolist(), Any)
    fs.generate(model, params, "text")  # pyright: ignore[reportArgumentType] - a model alone has no vocabulary


def calls(model: fs.Pretrained, ids: jax.Array, arrays: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    output = model(input_ids=[[1, 2]], attention_mask=arrays, labels=ids, output_router_logits=True)
    assert_type(output.loss, jax.Array | None)
    assert_type(output.logits, jax.Array)
    assert_type(output.to_tuple(), tuple[Any, ...])
    assert_type(model.encode(ids).last_hidden_state, jax.Array)
    for source in ("a text", ["texts"], [1, 2], ids, arrays):
        assert_type(model.generate(source, num_beams=2), fs.GenerationOutput)
    for piece in model.stream("a text", do_sample=True):
        assert_type(piece.text, str | None)
        assert_type(piece.tokens, tuple[int, ...])
    vocabulary = model.vocabulary
    if vocabulary is not None:
        assert_type(vocabulary(["a text"], text_target=["another"], padding=True, return_tensors="np").input_ids, Any)
        assert_type(vocabulary.batch_decode([[1, 2]]), list[str])
    model(label=ids)  # pyright: ignore[reportCallIssue]


def loops(batch: dict[str, Any], key: jax.Array) -> None:
    config = fs.PRESETS["switch-tiny"]
    params = fs.init_params(config, key)
    optimizer = fs.optimizer(config, steps=100, name="adamw", learning_rate=1e-3)
    state = fs.TrainState.create(params, optimizer, key)
    assert_type(state, fs.TrainState)
    state, metrics = fs.train_step(config, optimizer, state, batch)
    assert_type(state, fs.TrainState)
    assert_type(metrics, dict[str, Any])


def runs(workdir: Path) -> None:
    recipe = fs.load_recipe("tiny", ["train.steps=10"])
    if isinstance(recipe, ExperimentConfig):
        result = fs.pretrain(recipe, workdir)
        assert_type(result.model, fs.Pretrained)
        assert_type(result.step, int)
    else:
        assert_type(recipe, FinetuneRecipe)
        assert_type(fs.finetune(recipe, workdir, init="runs/tiny").model, fs.Pretrained)


def checkpoints(path: Path) -> None:
    try:
        pretrained = fs.load_pretrained("google/switch-base-8", dtype="bfloat16")
    except fs.CheckpointError as error:
        assert_type(error, fs.CheckpointError)
        return
    except fs.ConfigError as error:
        raise ValueError("no such model") from error
    assert_type(pretrained, fs.Pretrained)
    assert_type(pretrained.config, fs.SwitchConfig)
    assert_type(pretrained.replace(params={}), fs.Pretrained)
    assert_type(fs.quantize(pretrained, "int8"), fs.Pretrained)
    assert_type(pretrained.with_adapter(fs.load_adapter(path, pretrained)).merge_adapter(), fs.Pretrained)
    tokens = fs.generate(pretrained.model, pretrained.params, [[1, 2, 3]])
    assert_type(tokens, fs.GenerationOutput)
    assert_type(pretrained.generate(np.zeros((1, 2), np.int32)), fs.GenerationOutput)
    saved = fs.save_pretrained(path, pretrained.config, pretrained.params, pretrained.vocabulary, format="huggingface")
    assert_type(saved, Path)
    assert_type(fs.__version__, str)
