"""Which knob to turn where a run does not fit, from the kind of memory that dominates."""

from __future__ import annotations

import math

from flax_switch.config import ExperimentConfig
from flax_switch.plan.memory import Memory
from flax_switch.plan.topology import GIB, Topology


def advise(config: ExperimentConfig, mesh: tuple[int, int, int], topology: Topology, memory: Memory, temporaries: int) -> list[str]:
    """Returns what to change, the most telling first.

    mesh: sizes of (data, expert, model). temporaries: bytes beyond parameters, optimiser state, batch and gradients, as compiled
    or, where nothing was, the estimate of the activations.
    """
    limit = topology.chip.memory
    weights = memory.parameters + memory.optimizer + memory.gradients
    if limit is None:
        return []
    about_weights = _split_weights(config, mesh) + [_larger(weights, limit, topology)]
    if weights >= limit:
        lead = f"Parameters, gradients and optimiser state alone take {weights / GIB:.1f} GiB of a device's {limit / GIB:.1f}."
        return [lead, *about_weights, *_fewer_gradients(config)]
    more_gradients = memory.parameters if config.train.microbatches == 1 else 0  # their sum over micro-batches
    about_batch = _smaller_pieces(config, mesh, limit - weights - more_gradients, temporaries)
    if temporaries >= weights:
        return [f"Activations and temporaries dominate: {temporaries / GIB:.1f} GiB.", *about_batch, *about_weights]
    return [f"Parameters, gradients and optimiser state dominate: {weights / GIB:.1f} GiB.", *about_weights, *about_batch]


def _split_weights(config: ExperimentConfig, mesh: tuple[int, int, int]) -> list[str]:
    data, expert, model = mesh
    advice = []
    if config.model.is_sparse and expert < config.model.num_experts and data * model > 1:
        ways = max(w for w in range(1, data * expert + 1) if (data * expert) % w == 0 and config.model.num_experts % w == 0)
        if ways > expert:
            advice.append(f"Split the experts over more devices: --mesh data={data * expert // ways},expert={ways},model={model}.")
    if data > 1 and not config.mesh.fsdp:
        advice.append("Split parameters over the data axis, too: --config.mesh.fsdp=true.")
    if data > 1 or expert > 1:
        axis, sizes = ("data", (data // 2, expert)) if data % 2 == 0 else ("expert", (data, expert // 2))
        if min(sizes) >= 1 and (data % 2 == 0 or expert % 2 == 0):
            advice.append(
                f"Split every kernel over more devices, at the price of all-reduces: --mesh data={sizes[0]},expert={sizes[1]},"
                f"model={2 * model} (from the {axis} axis)."
            )
    if config.optimizer.name != "adafactor":
        advice.append("Adafactor keeps a thousandth of AdamW's state: --config.optimizer.name=adafactor.")
    return advice


def _larger(weights: int, limit: int, topology: Topology) -> str:
    # Half of the memory for what is not weights is what the recipes here need.
    devices = 2 ** math.ceil(math.log2(max(1.0, 1.5 * weights * topology.num_devices / limit)))
    devices = max(devices, 2 * topology.num_devices)
    return f"Take a larger topology: about {devices} {topology.chip.name}, if all of it is split over the devices added."


def _smaller_pieces(config: ExperimentConfig, mesh: tuple[int, int, int], left: int, temporaries: int) -> list[str]:
    advice, pieces = [], config.train.microbatches
    rows = config.data.batch_size // (mesh[0] * mesh[1])
    divisors = [m for m in range(pieces + 1, rows + 1) if rows % m == 0]
    if left > 0 and divisors:
        wanted = math.ceil(pieces * temporaries / left)
        enough = next((m for m in divisors if m >= wanted), divisors[-1])
        advice.append(f"Cut the batch into more pieces; the update stays the same: --config.train.microbatches={enough}.")
    if config.model.remat_policy != "full":
        policy = "minimal" if config.model.remat_policy == "none" else "full"
        advice.append(f"Recompute activations in the backward pass: --config.model.remat_policy={policy}.")
    if config.model.dtype == "float32":
        advice.append("Halve the activations: --config.model.dtype=bfloat16.")
    if not config.model.scan_layers:
        advice.append("Scan the layers, so that memory is reused from block to block: --config.model.scan_layers=true.")
    return advice


def _fewer_gradients(config: ExperimentConfig) -> list[str]:
    if config.train.microbatches == 1:
        return []
    return ["Micro-batches keep a sum of gradients beside the gradients: --config.train.microbatches=1 holds one copy."]
