"""Fine-tuning a converted Hugging Face model follows transformers, step by step."""

import jax
import numpy as np
import pytest
import torch
import transformers

from flax_switch.config import OptimizerConfig
from flax_switch.config.finetuning import FinetuneDataConfig, FinetuneRecipe, FinetuneTrainConfig
from flax_switch.data import Vocabulary
from flax_switch.data.pairs import Pairs, pair_iterator
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step
from flax_switch.workflows.start import open_start

STEPS, RATE, DECAY = 20, 3e-3, 0.01


def huggingface_folder(folder, vocabulary):
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_experts=4, expert_capacity=4, decoder_start_token_id=0, dropout_rate=0.0,
        router_jitter_noise=0.0, router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(folder)
    vocabulary.save(folder)
    return model


def batches_of(count):
    """Pairs of which the targets repeat a part of the inputs."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(3, 30, rng.integers(3, 10)).tolist() for _ in range(40)]
    data = FinetuneDataConfig(inputs_length=12, targets_length=6, batch_size=8)
    iterator = pair_iterator(Pairs(inputs, [i[:4] for i in inputs], inputs_length=12, targets_length=6), data)
    return [next(iterator) for _ in range(count)]


def torch_losses(model, batches, router_losses):
    torch.set_num_threads(1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    losses = []
    for batch in batches:
        # With the decoder's inputs and mask as they are: padding counts in the routers' losses, so it must be the same padding.
        tensors = {name: torch.from_numpy(values).long() for name, values in batch.items()}
        loss = model(**tensors, output_router_logits=router_losses).loss
        optimizer.zero_grad(set_to_none=False)  # else torch passes over an expert that no token of a batch went to
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("router_losses", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_follow_transformers_for_twenty_steps(router_losses, tmp_path, vocabulary):
    model = huggingface_folder(tmp_path, vocabulary)
    off = {} if router_losses else {"load_balancing_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    recipe = FinetuneRecipe(
        model={"dropout_rate": 0.0, "z_loss_coef": 0.0, **off},
        optimizer=FinetuneRecipe().optimizer.replace(name="adamw", learning_rate=RATE, weight_decay=DECAY),
        train=FinetuneTrainConfig(steps=STEPS),
    )
    start = open_start(str(tmp_path), recipe.model)
    assert isinstance(start.vocabulary, Vocabulary) and isinstance(recipe.optimizer, OptimizerConfig)
    run = build_run(recipe.resolve(start.config), create_mesh(recipe.mesh, jax.devices()[:1]))
    batches, losses = batches_of(STEPS), []
    state, step = start.state(run), compile_train_step(run)
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    expected = torch_losses(model, batches, router_losses)
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
