"""`plan`: what a run would need and do on a machine that need not exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from flax_switch.config import ExperimentConfig, MeshConfig, check, one_of
from flax_switch.config.flops import train_flops
from flax_switch.ops.kernels.platforms import compiled_for
from flax_switch.ops.moe.groups import Grouping, make_grouping
from flax_switch.ops.moe.routing import expert_capacity
from flax_switch.parallel.mesh import MESH_AXES, create_mesh, mesh_shape
from flax_switch.plan.advice import advise
from flax_switch.plan.bounds import activation_bound, exchange_bound, parameter_bound
from flax_switch.plan.memory import Memory, abstract_mesh, batch_structs, train_memory
from flax_switch.plan.program import EFFORTS, Program, compile_decode, compile_train, compiler_effort
from flax_switch.plan.topology import CannotCompile, Topology, compile_devices, parse_topology
from flax_switch.training.state import build_run


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found. Bytes and FLOPs of programs are those of one device; `render` of `flax_switch.plan.text` prints it."""

    topology: Topology
    mesh: dict[str, int]
    fsdp: bool
    parameters: int
    active_parameters: int  # that take part in computing one token
    memory: Memory
    tokens: int  # of a batch, sources and targets
    model_flops: float  # of a train step, over all devices, by the config alone
    exchange_bound: float  # bytes that a device must send for the experts in a train step
    parameter_bound: dict[str, float]  # and for parameters that lie in parts, and gradients, by kind of collective
    activation_bound: float  # and for activations that the model axis cuts
    slots_per_token: dict[str, float]  # of each sparse stack: the capacity factor after rounding
    train: Program | None
    decode: Program | None
    not_compiled: str | None  # why there is no program
    fits: bool | None  # None where the memory is not known
    advice: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def useful_share(self) -> float | None:
        """The model's own FLOPs over those of the compiled train step."""
        if self.train is None or not self.train.flops:
            return None
        return self.model_flops / (self.train.flops * self.topology.num_devices)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        return {**dataclasses.asdict(self), "useful_share": self.useful_share}


def plan(
    config: ExperimentConfig,
    topology: str,
    mesh: MeshConfig | None = None,
    *,
    compile: bool = True,
    decode: bool = True,
    effort: str | None = None,
    save_program: epath.PathLike | None = None,
) -> Plan:
    """Plans a run of `config` on `topology`.

    Args:
      topology: see `parse_topology`.
      mesh: in place of the config's.
      compile: compile the train step, and with `decode` a step of generation. Without, or where the compiler is missing, the
        plan holds what shapes and shardings tell.
      effort: of the compiler, see `compiler_effort`; None: "full" for GPUs, where it takes seconds and "quick" can end the
        process (JAX 0.10.2), and for a program that is saved, else "quick".
      save_program: a folder in which the compiled train step is kept for a run (`training.saved_program`); it wants full effort.

    Raises:
      ConfigError: for a topology that does not exist, a mesh or batch that does not fit it, and a program that cannot be kept.
    """
    machine = parse_topology(topology)
    effort = _effort(effort, machine, compile, save_program)
    config = config if mesh is None else config.replace(mesh=mesh)
    check(config.mesh.mode == "jit", "The planner compiles the step that runs under jit; plan with --config.mesh.mode=jit.")
    shape = mesh_shape(config.mesh, machine.num_devices)
    run = build_run(config, abstract_mesh(shape))
    batch = batch_structs(config, run.mesh)
    with compiled_for(machine.chip.platform, machine.chip.gpu):
        memory = train_memory(run, batch)
    train = generation = why = None
    if compile:
        try:
            devices = create_mesh(config.mesh, compile_devices(machine))
            with compiler_effort(effort), compiled_for(machine.chip.platform, machine.chip.gpu):
                train = compile_train(config, devices, save_program)
                generation = compile_decode(config, devices) if decode else None
        except CannotCompile as reason:
            check(save_program is None, f"There is no program to save: {reason}")
            why = str(reason)
    else:
        why = "compilation was not asked for."
    sizes = jax.tree.map(lambda leaf: leaf.size, run.abstract_state.params)
    fits = _fits(machine, memory, [p for p in (train, generation) if p is not None])
    advice = []
    if fits is False:
        weights = memory.parameters + memory.optimizer + memory.batch + memory.gradients
        compiled = 0 if train is None or train.required is None else train.required
        temporaries = max(compiled - weights, 0) or memory.activations
        advice = advise(config, shape, machine, memory, temporaries)
    slots = slots_per_token(config)
    return Plan(
        topology=machine,
        mesh=dict(zip(MESH_AXES, shape, strict=True)),
        fsdp=config.mesh.fsdp,
        parameters=sum(jax.tree.leaves(sizes)),
        active_parameters=active_parameters(config, sizes),
        memory=memory,
        tokens=config.data.batch_size * (config.data.inputs_length + config.data.targets_length),
        model_flops=train_flops(config.model, config.data.batch_size, config.data.inputs_length, config.data.targets_length),
        exchange_bound=exchange_bound(config, shape, slots),
        parameter_bound=parameter_bound(run),
        activation_bound=activation_bound(config, shape),
        slots_per_token=slots,
        train=train,
        decode=generation,
        not_compiled=why,
        fits=fits,
        advice=tuple(advice),
        warnings=tuple(straddling_groups(config, shape)),
    )


def _effort(asked: str | None, topology: Topology, compile: bool, save_program: epath.PathLike | None) -> str:
    effort = asked or ("full" if save_program is not None or topology.chip.platform == "gpu" else "quick")
    one_of("effort", effort, EFFORTS)
    _check_can_be_saved(save_program, topology, compile, effort)
    return effort


def _check_can_be_saved(folder: epath.PathLike | None, topology: Topology, compile: bool, effort: str) -> None:
    if folder is None:
        return
    check(compile, "A program that is saved has to be compiled: leave --no-compile out, or --save-program.")
    check(
        effort == "full",
        f"A program that is saved is compiled as training compiles it: give --effort full, and not {effort}, with --save-program.",
    )
    check(
        topology.chip.platform != "gpu",
        f"A program for {topology.name} that is compiled without the GPU is not tuned on it, nor the one that a run would have: "
        "leave --save-program out. Runs keep what they compile themselves.",
    )


def _fits(topology: Topology, memory: Memory, programs: list[Program]) -> bool | None:
    if any(p.refusal for p in programs):
        return False
    if topology.chip.memory is None:
        return None
    if topology.chip.platform == "tpu" and programs:
        return True  # the compiler refuses what does not fit
    required = [p.required for p in programs if p.required is not None]
    return max(required or [memory.total]) <= topology.chip.memory


def active_parameters(config: ExperimentConfig, sizes: Any) -> int:
    """Returns how many of a tree of parameter counts take part in computing one token: all but the experts it is not sent to."""
    model = config.model
    experts = sum(
        size for path, size in jax.tree_util.tree_leaves_with_path(sizes) if any(getattr(k, "key", "") == "expert" for k in path)
    )
    return sum(jax.tree.leaves(sizes)) - experts + experts * model.num_selected_experts // model.num_experts


def slots_per_token(config: ExperimentConfig) -> dict[str, float]:
    """Returns the slots of all experts over the tokens of a group, by sparse stack: the capacity factor after rounding."""
    model, slots = config.model, {}
    for stack, grouping in _groupings(config).items():
        size = grouping.group_size
        capacity = expert_capacity(model, size, deterministic=False)
        slots[stack] = float(model.num_selected_experts) if capacity is None else min(capacity, size) * model.num_experts / size
    return slots


def straddling_groups(config: ExperimentConfig, mesh: tuple[int, int, int]) -> list[str]:
    """Returns a warning for each stack whose routing groups are cut by devices: its experts' exchange is left to GSPMD."""
    ways = mesh[0] * mesh[1]
    return [
        f"The {stack}'s {grouping.num_groups} routing groups of {grouping.group_size} tokens do not lie whole on the {ways} parts "
        f"of a batch ({grouping.batch} x {grouping.length} tokens): its tokens are not exchanged by all-to-alls, but as GSPMD sees "
        "fit. Let model.group_size divide the tokens of a part, or set --config.model.routing_group=sequence."
        for stack, grouping in _groupings(config).items()
        if mesh != (1, 1, 1) and not grouping.splits(ways)
    ]


def _groupings(config: ExperimentConfig) -> dict[str, Grouping]:
    """Returns the routing groups of one micro-batch, by sparse stack."""
    rows, lengths = config.data.batch_size // config.train.microbatches, config.data.stack_lengths(config.model)
    return {
        stack.name: make_grouping(config.model, rows, lengths[stack.name]) for stack in config.model.stacks if stack.sparse_layers
    }
