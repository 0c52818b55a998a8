"""What each device must send in a train step, whatever the compiler does: for the experts' tokens, and for parameters."""

from __future__ import annotations

import math
from typing import Any

import jax

from flax_switch.config import ExperimentConfig, SwitchConfig
from flax_switch.parallel.gathering import without_parts
from flax_switch.parallel.mesh import AnyMesh
from flax_switch.training.state import Run, is_split
from flax_switch.training.step import trained_leaves


def exchange_bound(config: ExperimentConfig, mesh: tuple[int, int, int], slots: dict[str, float]) -> float:
    """Returns bytes that each device sends, at the least, to bring tokens to their experts and back in a train step.

    2 (forward and backward) x layers x slots per token x tokens of a device x (D there + D back) x bytes x (1 - 1 / EP).
    """
    data, expert, _ = mesh
    model = config.model
    width = jax.numpy.dtype(model.expert_dtype or model.dtype).itemsize
    total, lengths = 0.0, config.data.stack_lengths(model)
    for stack in model.stacks:
        tokens = config.data.batch_size * lengths[stack.name] / (data * expert)
        total += 2 * stack.num_sparse * slots.get(stack.name, 0.0) * tokens * sum(_sent(model)) * width
    return total * (1 - 1 / expert)


def _sent(model: SwitchConfig) -> list[int]:
    """Returns how many numbers of a token go to an expert and come back from it, in a sparse layer."""
    D, heads = model.d_model, model.num_heads * model.d_kv
    if model.layer_form != "fused":
        return [D, D]
    to_and_from = {
        "q_wi": D + heads + len(model.mlp_activations) * model.d_ff, "kv": D + 2 * model.d_kv, "o_wo": heads + model.d_ff + D,
    }  # fmt: skip
    return [to_and_from[name] for name in model.fused_sparse]


def parameter_bound(run: Run) -> dict[str, float]:
    """Returns bytes that each device sends, at the least, for parameters in parts and for gradients, by kind of collective.

    All in the activations' dtype. A parameter in p parts on n devices of the batch is gathered once forward and once backward (what
    is computed again shares it), and its gradient reduce-scattered, each times (1 - 1/p); what is left of the gradient, or the
    whole of one that is not in parts, is all-reduced over the n/p devices that hold the same.
    """
    mesh, pieces = run.mesh, run.config.train.microbatches
    width = jax.numpy.dtype(run.config.model.dtype).itemsize
    total: dict[str, float] = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    for leaf in jax.tree.leaves(trained_leaves(run)):
        ways = mesh.shape["data"] * (1 if is_split(leaf) else mesh.shape["expert"])
        spec = leaf.sharding.spec
        parts = _ways(spec, mesh) // _ways(without_parts(spec), mesh)
        size = leaf.size / _ways(without_parts(spec), mesh) * width * pieces
        total["all-gather"] += 2 * size * (1 - 1 / parts)
        total["reduce-scatter"] += size * (1 - 1 / parts)
        total["all-reduce"] += 2 * size / parts * (1 - parts / ways)
    return total


def activation_bound(config: ExperimentConfig, mesh: tuple[int, int, int]) -> float:
    """Returns bytes that each device sends, at the least, to add up what the devices along "model" have of its activations.

    Attention and MLP add up their outputs forward and their inputs' gradients backward, and attention its outputs once more where
    they are computed again; each time 2 x tokens of a device x D x bytes x (1 - 1 / ways).
    """
    data, expert, ways = mesh
    model = config.model
    total, lengths = 0.0, config.data.stack_lengths(model)
    for stack in model.stacks:
        attentions = 2 if stack.name == "decoder" and not model.decoder_only else 1
        sums = 2 * (attentions + 1) if model.layer_form == "sequential" else 2
        sums += attentions if model.remat_policy == "full" and model.layer_form == "sequential" else 0
        total += stack.num_layers * sums * config.data.batch_size * lengths[stack.name] / (data * expert)
    return 2 * total * model.d_model * jax.numpy.dtype(model.dtype).itemsize * (1 - 1 / ways)


def _ways(spec: Any, mesh: AnyMesh) -> int:
    """Returns into how many parts a partition cuts an array."""
    names = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[name] for name in names)
