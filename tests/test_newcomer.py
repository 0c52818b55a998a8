"""What somebody who has never seen the library does wrong, and what is said: never a word of JAX's or Python's insides.

It runs in a process of its own, where no test's checks of types come first.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEFORE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import flax_switch as fs
config = fs.PRESETS["switch-tiny"].replace(vocab_size=64, d_model=8, d_ff=8, num_heads=1, d_kv=8, num_experts=2)
network, key = fs.SwitchTransformer(config), jax.random.key(0)
params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: fs.init_params(config, key)))
model, optimizer = fs.Pretrained(config, network, params), fs.optimizer(config)
state = fs.TrainState.create(params, optimizer)
used = jnp.zeros(3)
used.delete()
output = jax.eval_shape(lambda: model([[3, 4]], labels=[[3]]))
def apply(*inputs):
    return jax.eval_shape(lambda: network.apply({"params": params}, *map(np.array, inputs)))
def said(expression):
    try:
        return "nothing: " + repr(eval(expression))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""
WRONG = {  # what is called -> what the message must say
    "fs.load_pretrained(3)": "a folder, a model's name on the hub, or a model of transformers, not a int",
    "fs.load_pretrained(config)": "not a SwitchConfig. For a config of ours fs.init_params",
    "fs.load_pretrained(params)": "not a dict",
    "fs.load_pretrained('nothing', dtype='fp16')": "nothing does not exist, and is no name of a model",
    "fs.init_params('switch-tiny', key)": r"model must be of type SwitchConfig or SwitchEncoder; it is of type str.*fs.PRESETS",
    "fs.init_params(config, 0)": r"rng must be a key, such as jax.random.key\(0\); it is of type int",
    "fs.SwitchTransformer('switch-tiny').init(key, np.ones((1, 1), int), np.ones((1, 1), int))": "config must be of type Swi",
    "fs.SwitchConfig(num_expert=3)": "Did you mean 'num_experts'",
    "fs.SwitchConfig(num_experts='8')": r"num_experts must be int; it is '8' \(str\)",
    "fs.PRESETS['switch-bas-8']": "Did you mean 'switch-base-8'",
    "apply([3, 4], [3])": r"The encoder takes ids as integers \[rows, tokens\]; these are int32\[2\]",
    "apply([[3.0]], [[3]])": r"these are float32\[1, 1\]",
    "apply([[3, 4]], [[3], [4]])": "The encoder has 1 rows and the decoder 2",
    "apply([[3, 4]], [[3]], [[1, 1, 1]])": r"attention_mask must have the shape of the ids, \[1, 2\]; it is \[1, 3\]",
    "apply([[3, 4]], [[3]], [[1, 1]], [[1, 1]])": "decoder_attention_mask must have the shape of the ids",
    "model([[3, 4]], labels=[[3], [4]])": "The encoder has 1 rows and the decoder 2",
    "model.replace(params={'encoder': used})([[3, 4]], labels=[[3]])": "parameters were used up by a train step.*model.replace",
    "fs.generate(params, network, [[3]])": "model must be of type SwitchEncoder; it is of type dict. Call generate",
    "fs.generate(model, params, [[3]])": "the .generate.input_ids. of a loaded model",
    "fs.generate(network, {'params': params}, [[3]])": "Take what is inside 'params'",
    "fs.seq2seq_loss(output, np.ones((1, 1), int), config)": "this is a Seq2SeqLMOutput. A loaded model.*has its loss already",
    "fs.save_pretrained('x', params, config)": "config must be of type SwitchConfig; it is of type dict",
    "fs.load_recipe('tinny')": "Did you mean --config tiny",
    "fs.load_recipe('tiny', 'train.steps=3')": "Overrides are a list of texts",
    "fs.load_recipe('tiny', {'train.steps': 3})": "Overrides are a list of texts.*this is a dict",
    "fs.pretrain('tiny', 'x')": "must be of type ExperimentConfig; it is of type str. Give a recipe's, such as fs.load_recipe",
    "fs.pretrain(fs.load_recipe('finetune_summarization'), 'x')": "it is of type FinetuneRecipe",
    "fs.finetune(fs.load_recipe('tiny'), 'x', init='y')": "recipe must be of type FinetuneRecipe",
    "fs.finetune(fs.load_recipe('finetune_summarization'), 'x', init=model)": r"model.save_pretrained\(FOLDER\) makes a folder",
    "fs.optimizer(optimizer)": "config must be of type SwitchConfig",
    "fs.train_step(optimizer, config, state, {})": r"Arguments are train_step\(config, optimizer, state, batch\)",
    "fs.train_step(config, optimizer, state, {'inputs': [[3]]})": "A batch has input_ids and labels",
    "fs.train_step(config, optimizer, state.replace(params={'a': used}), {})": "go on with the state that it returned",
    "fs.SwitchTransformersForConditionalGeneration": "What transformers' classes open, fs.load_pretrained",
    "fs.load_pretraned": "Did you mean 'load_pretrained'",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    code = f"{BEFORE}\nprint(json.dumps([said(one) for one in {list(WRONG)!r}]))"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path_factory.mktemp("home"))}
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("here"), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("call", WRONG)
def test_a_mistake_is_one_sentence_that_says_what_to_give(call, answers):
    assert re.match("(ConfigError|CheckpointError|AttributeError): ", answers[call]), answers[call]
    assert re.search(WRONG[call], answers[call]), answers[call]
    assert "\n" not in answers[call] and "jax" not in answers[call].replace("jax.random.key", "")
