"""The converted model computes what transformers' does: states, routing, losses, gradients and optimiser steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from flax_switch.convert.canonical import canonical_shapes, flatten
from flax_switch.convert.huggingface import SWITCH_RULES
from flax_switch.convert.mapping import to_canonical
from flax_switch.convert.tensors import from_array
from flax_switch.nn.moe import SparseMLP
from flax_switch.pretrained import load_pretrained
from tests.convert import oracle

PADDINGS = ("right", "left", "zeros")
OUTPUTS = dict(output_router_logits=True, output_hidden_states=True, output_attentions=True)
LAYERED = (
    "encoder_router_logits", "decoder_router_logits", "encoder_hidden_states", "decoder_hidden_states", "encoder_attentions",
    "decoder_attentions", "cross_attentions",
)  # fmt: skip
LOSSES = ("loss", "encoder_z_loss", "encoder_aux_loss", "decoder_z_loss", "decoder_aux_loss")


def relative_error(ours, theirs) -> float:
    """The largest difference, relative to the largest value of the other side (absolute where that is tiny)."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max(initial=0.0) / max(np.abs(theirs).max(initial=0.0), 1e-6))


def dispatch_of(model, call) -> dict[str, list[np.ndarray]]:
    """Which expert each token was sent to in transformers, [B, L, E] with 0 where it was dropped, layer by layer."""
    seen = {"encoder": [], "decoder": []}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            stack = seen[name.split(".")[0]]
            hooks.append(module.register_forward_hook(lambda _, __, out, stack=stack: stack.append(out[0].numpy())))
    call()
    for hook in hooks:
        hook.remove()
    return seen


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, inputs):
    return model.apply({"params": params}, **inputs)


def check_forward(folder, seed: int) -> None:
    config = oracle.draw_config(seed)
    theirs = oracle.huggingface_model(config, seed)
    ours = load_pretrained(oracle.save(theirs, folder))
    for padding in PADDINGS:
        batch = oracle.draw_batch(config, seed, padding=padding)
        output = ours(**batch.numpy(), **OUTPUTS)
        expected = {}
        with torch.no_grad():
            dispatch = dispatch_of(theirs, lambda b=batch, e=expected: e.update(theirs(**b.torch(), **OUTPUTS)))
        assert relative_error(output.logits, expected["logits"]) < 2e-4
        assert relative_error(output.encoder_last_hidden_state, expected["encoder_last_hidden_state"]) < 2e-4
        for name in LAYERED:
            mine = getattr(output, name) or ()
            assert len(mine) == len(expected[name] or ()), name
            for x, y in zip(mine, expected[name] or (), strict=True):
                assert relative_error(x, y) < 2e-4, name
        for name in LOSSES:
            assert relative_error(getattr(output, name), expected[name]) < 1e-4, name
        check_dispatch(ours, batch, dispatch)


def check_dispatch(ours, batch, dispatch) -> None:
    inputs = batch.numpy("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    output = run(ours.model, ours.params, inputs)
    for stack in ("encoder", "decoder"):
        routers = getattr(output, f"{stack}_router")
        assert len(routers) == len(dispatch[stack])
        for router, expected in zip(routers, dispatch[stack], strict=True):
            sent = jax.nn.one_hot(router.expert_index, ours.config.num_experts) * router.kept[..., None]
            np.testing.assert_array_equal(sent.sum(-2), expected)


def test_a_randomly_drawn_model_gives_the_same_states_routing_and_losses(tmp_path):
    check_forward(tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 40))
def test_many_more_randomly_drawn_models_give_the_same_states_routing_and_losses(tmp_path, seed):
    check_forward(tmp_path, seed)


def gradients_of(model, config) -> dict[str, np.ndarray]:
    """transformers' gradients as a canonical tree; a tensor without gradient has zeros."""
    named = {name: from_array((torch.zeros_like(p) if p.grad is None else p.grad).numpy()) for name, p in model.named_parameters()}
    return {path: t.numpy() for path, t in to_canonical(named, SWITCH_RULES, canonical_shapes(config)).items()}


def parameters_of(model, config) -> dict[str, np.ndarray]:
    named = {name: from_array(p.detach().numpy()) for name, p in model.named_parameters()}
    return {path: t.numpy() for path, t in to_canonical(named, SWITCH_RULES, canonical_shapes(config)).items()}


def check_training(folder, seed: int) -> None:
    config = oracle.draw_config(seed)
    theirs = oracle.huggingface_model(config, seed)
    ours = load_pretrained(oracle.save(theirs, folder))
    batches = [oracle.draw_batch(config, seed + i, padding=PADDINGS[i % 3]) for i in range(5)]

    def loss_of(params, batch):
        return ours.replace(params=params)(**batch, output_router_logits=True).loss

    loss_and_gradient = jax.jit(jax.value_and_grad(loss_of))
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    params, state = ours.params, optimizer.init(ours.params)
    for step, batch in enumerate(batches):
        loss, gradient = loss_and_gradient(params, batch.numpy())
        their_optimizer.zero_grad()
        their_loss = theirs(**batch.torch(), output_router_logits=True).loss
        their_loss.backward()
        assert relative_error(loss, their_loss.detach()) < 1e-4
        if step == 0:
            mine = flatten(gradient)
            for path, expected in gradients_of(theirs, ours.config).items():
                assert relative_error(mine[path], expected) < 1e-4, path
        for parameter in theirs.parameters():  # torch skips a tensor without gradient; optax decays it like the others
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        their_optimizer.step()
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    mine = flatten(params)
    for path, expected in parameters_of(theirs, ours.config).items():
        assert relative_error(mine[path], expected) < 1e-4, path


def test_gradients_and_five_adamw_steps_are_the_same(tmp_path):
    check_training(tmp_path, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 24))
def test_gradients_and_five_adamw_steps_are_the_same_for_many_more_models(tmp_path, seed):
    check_training(tmp_path, seed)


@pytest.mark.parametrize("tied", [True, False])
def test_the_encoder_alone_gives_the_same_states(tmp_path, tied):
    config = oracle.huggingface_config(tie_word_embeddings=tied)
    theirs = oracle.huggingface_model(config, kind=transformers.SwitchTransformersEncoderModel)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    batch = oracle.draw_batch(config, 0).numpy("input_ids", "attention_mask")
    output = ours(**batch, **OUTPUTS)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in batch.items()}, **OUTPUTS)
    assert ours.architecture == "encoder"
    assert not any(path.startswith("decoder") for path in flatten(ours.params))
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < 2e-4
    assert relative_error(output.router_logits[0], expected.router_logits[0]) < 2e-4
    assert relative_error(output.hidden_states[1], expected.hidden_states[1]) < 2e-4
    np.testing.assert_array_equal(ours.encode(**batch).last_hidden_state, output.last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_without_its_head_gives_the_same_states(tmp_path, tied):
    config = oracle.huggingface_config(tie_word_embeddings=tied)
    theirs = oracle.huggingface_model(config, kind=transformers.SwitchTransformersModel)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    inputs = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    batch = oracle.draw_batch(config, 0)
    output = ours(**batch.numpy(*inputs), **OUTPUTS)
    with torch.no_grad():
        expected = theirs(**batch.torch(*inputs), **OUTPUTS)
    assert not hasattr(output, "logits")
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < 2e-4
    assert relative_error(output.decoder_hidden_states[0], expected.decoder_hidden_states[0]) < 2e-4
    assert relative_error(output.decoder_router_logits[0], expected.decoder_router_logits[0]) < 2e-4


SMALLEST = oracle.huggingface_config(num_layers=1, num_decoder_layers=1, tie_word_embeddings=False, expert_capacity=3)


def test_greedy_generation_gives_the_same_sequences(tmp_path):
    theirs = oracle.huggingface_model(SMALLEST)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    inputs = ("input_ids", "attention_mask")
    batch = oracle.draw_batch(SMALLEST, 0)
    with torch.no_grad():
        expected = theirs.generate(**batch.torch(*inputs), max_new_tokens=9, num_beams=1, do_sample=False).numpy()
    sequences = ours.generate(**batch.numpy(*inputs), max_new_tokens=9, num_beams=1, do_sample=False).sequences
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(np.asarray(sequences)[:, : expected.shape[1]], expected)


def test_labels_embeddings_and_encoder_outputs_are_taken_as_transformers_takes_them(tmp_path):
    theirs = oracle.huggingface_model(SMALLEST)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    batch = oracle.draw_batch(SMALLEST, 1)
    mask = batch.torch("attention_mask")
    with torch.no_grad():
        by_labels = theirs(**batch.torch("input_ids", "attention_mask", "labels"))
        embeddings = theirs.shared(torch.tensor(batch.input_ids))
        encoded = theirs.get_encoder()(**batch.torch("input_ids", "attention_mask"))
        by_embeddings = theirs(inputs_embeds=embeddings, labels=torch.tensor(batch.labels), **mask)
    mine = ours(**batch.numpy("input_ids", "attention_mask", "labels"))
    assert mine.encoder_z_loss is None and mine.encoder_router_logits is None
    assert relative_error(mine.loss, by_labels.loss) < 1e-4
    assert relative_error(mine.logits, by_labels.logits) < 2e-4
    mask = batch.numpy("attention_mask")
    mine = ours(inputs_embeds=embeddings.numpy(), labels=batch.labels, **mask)
    assert relative_error(mine.logits, by_embeddings.logits) < 2e-4
    states = encoded.last_hidden_state.numpy()
    for outputs in (ours.encode(**batch.numpy("input_ids", "attention_mask")), (states,)):
        again = ours(encoder_outputs=outputs, labels=batch.labels, **mask)
        assert relative_error(again.logits, by_labels.logits) < 2e-4


def test_bfloat16_probabilities_break_ties_as_transformers_does(tmp_path):
    config = oracle.huggingface_config(num_experts=8)
    theirs = oracle.huggingface_model(config).to(torch.bfloat16)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype(jnp.bfloat16)}
    assert ours.config.dtype == "bfloat16" and ours.config.cast_router_probs
    tokens = 0.01 * torch.randn(4, 64, config.d_model)  # small, so that experts are almost equally probable
    with torch.no_grad():
        expected, _, logits = theirs.encoder.block[1].layer[1].mlp.router(tokens.to(torch.bfloat16))
    assert (expected.argmax(-1) != logits.argmax(-1)).sum() > 10  # rounding ties probabilities that float32 tells apart
    layer = ours.params["encoder"]["layers_1"]["mlp"]
    states = jnp.asarray(tokens.to(torch.bfloat16).float().numpy(), jnp.bfloat16)
    mlp = jax.jit(lambda x: SparseMLP(ours.config).apply({"params": layer}, x, padding_mask=None, deterministic=True))
    _, output = mlp(states)
    np.testing.assert_array_equal(jax.nn.one_hot(output.expert_index, 8).sum(-2), expected.numpy())
