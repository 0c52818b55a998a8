"""The planner against what it speaks of: initialised parameters, compiled programs, and its own formulas by hand."""

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch import cli
from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.config.flops import forward_flops
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels import grouped_choice
from flax_switch.plan import plan, planner, program, topology
from flax_switch.plan.flops import program_flops
from flax_switch.plan.text import render

MODEL = SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, capacity_factor=1.0, eval_capacity_factor=1.0,
    min_expert_capacity=1, dropout_rate=0.0, moe_executor="gather",
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL,
    data=DataConfig(batch_size=16, inputs_length=16, targets_length=8),
    optimizer=OptimizerConfig(min_dim_size_to_factor=8),
    mesh=MeshConfig(data=2, expert=4),
    train=TrainConfig(steps=10),
)


@pytest.fixture(scope="module")
def compiled():
    return plan(CONFIG, "cpu:8")


def sizes(model):
    tree = jax.eval_shape(lambda rng: init_params(SwitchTransformer(model), rng), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_parameters_are_those_of_initialisation_and_active_ones_those_of_one_expert():
    found = plan(CONFIG, "cpu:8", compile=False)
    assert found.parameters == sizes(MODEL)
    routers = 2 * 16 * (4 - 1)  # a model of one expert has narrower routers
    assert found.active_parameters == sizes(MODEL.replace(num_experts=1)) + routers


@pytest.mark.parametrize("changes", [{}, {"num_sparse_encoder_layers": 0, "mlp_activations": ("gelu_new", "linear")}], ids=str)
def test_the_formula_counts_the_products_that_xla_compiles(changes):
    config = MODEL.replace(**changes)
    ids = [jax.ShapeDtypeStruct((4, length), jnp.int32) for length in (16, 8)]
    params = jax.eval_shape(lambda rng: init_params(SwitchTransformer(config), rng), jax.random.key(0))
    forward = jax.jit(lambda params, *ids: SwitchTransformer(config).apply({"params": params}, *ids).logits)
    found = forward.lower(params, *ids).compile()
    counted, complete = program_flops(found.as_text())
    assert complete
    assert counted == forward_flops(config, 4, 16, 8)
    # XLA's own analysis counts elementwise operations too, which weigh much at these sizes.
    assert counted < found.cost_analysis()["flops"] < 2 * counted


def test_scanned_layers_count_as_often_as_they_run():
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    scanned = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0])
    assert program_flops(scanned.lower(x, w).compile().as_text()) == (5 * 2 * 8 * 16 * 16, True)


TPU_LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (a: bf16[4,512,12,64], b: bf16[4,512,12,64]) -> f32[4,12,512,512] {
  %a = bf16[4,512,12,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[4,512,12,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = f32[4,12,512,512]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=4x12 stride=3x11 lhs_dilate=4x12}, dim_labels=0b1f_0o1i->01bf
}

%body (s: (s32[], f32[4,12,512,512])) -> (s32[], f32[4,12,512,512]) {
  %s = (s32[]{:T(128)}, f32[4,12,512,512]{2,3,1,0:T(8,128)}) parameter(0)
  %x = bf16[4,512,12,64]{3,1,2,0:T(8,128)(2,1)S(1)} constant({...})
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %p = f32[4,12,512,512]{2,3,1,0:T(8,128)} fusion(%x, %x), kind=kOutput, calls=%fused
  ROOT %t = (s32[]{:T(128)}, f32[4,12,512,512]{2,3,1,0:T(8,128)}) tuple(%i, %p)
}

%condition (s: (s32[], f32[4,12,512,512])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %s.1 = (s32[]{:T(128)}, f32[4,12,512,512]{2,3,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (z: (s32[], f32[4,12,512,512])) -> (s32[], f32[4,12,512,512]) {
  %z = (s32[]{:T(128)}, f32[4,12,512,512]{2,3,1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[4,12,512,512]{2,3,1,0:T(8,128)}) while(%z), condition=%condition, body=%body
}
"""  # noqa: E501 - the lines are as long as XLA prints them


def test_products_that_a_tpu_program_writes_as_convolutions_count_the_same():
    assert program_flops(TPU_LOOP) == (6 * 2 * 4 * 12 * 512 * 512 * 64, True)


ATTENTION = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,4,64,384], k: bf16[2,4,64,768]) -> f32[2,4,64,384] {
  %q = bf16[2,4,64,384]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,4,64,768]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %o = (bf16[2,4,64,384]{3,2,1,0:T(8,128)(2,1)}, f32[2,4,1,384]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp(fused_attention)/pallas_call"}
  ROOT %d = (f32[2,4,64,384]{3,2,1,0:T(8,128)}, f32[2,4,64,768]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(fused_attention_gradient))/pallas_call"}
}
"""  # noqa: E501 - the lines are as long as XLA prints them


def test_products_inside_kernels_of_attention_count_two_forward_and_five_backward():
    assert program_flops(ATTENTION) == ((2 + 5) * 2 * 2 * 4 * 64 * 384 * 768, True)


def test_state_and_batch_are_the_arguments_of_the_compiled_step(compiled):
    memory = compiled.memory
    assert memory.parameters + memory.optimizer + memory.batch == compiled.train.arguments
    assert memory.gradients == memory.parameters
    split = plan(CONFIG.replace(train=TrainConfig(microbatches=2)), "cpu:8", compile=False).memory
    assert split.gradients == 2 * memory.gradients
    assert split.activations < memory.activations


def test_further_rounds_need_a_layers_gradients_and_the_rows_that_there_is_room_for():
    def rounds(**changes):
        dropless = CONFIG.replace(model=MODEL.replace(capacity_mode="dropless", **changes))
        found = plan(dropless, "cpu:8", compile=False)
        assert ("further rounds" in render(found)) == (found.memory.rounds > 0)
        return found.memory.rounds

    expert, row = 2 * 16 * 32, 4 * 16 + 2 * 32  # numbers of an expert, of which a device has one, and of a row on its way
    room = 2 * 16 * 16 // 8  # twice a device's share of the encoder's tokens
    assert rounds() == 4 * (expert + 2 * room * row)
    assert rounds(expert_parallel_buffer_factor=4.0) == 0  # room for all
    assert plan(CONFIG, "cpu:8", compile=False).memory.rounds == 0


def test_recomputation_keeps_fewer_activations(compiled):
    full = plan(CONFIG.replace(model=MODEL.replace(remat_policy="full")), "cpu:8", compile=False)
    assert 0 < full.memory.activations < 0.5 * compiled.memory.activations


def test_useful_flops_are_nearly_all_of_a_small_steps_products(compiled):
    assert 0.8 < compiled.useful_share <= 1.0
    assert compiled.model_flops == 3 * forward_flops(MODEL, 16, 16, 8)


def test_the_exchange_is_bounded_by_the_tokens_that_travel_and_all_to_alls_stay_close(compiled):
    tokens = 16 * (16 + 8) / 8  # of a device, in one encoder and one decoder layer
    assert compiled.exchange_bound == 2 * 2 * 1.0 * tokens * 16 * 4 * (1 - 1 / 4)
    assert compiled.slots_per_token == {"encoder": 1.0, "decoder": 1.0}
    sent = sum(t.wire_bytes for t in compiled.train.traffic if t.kind == "all-to-all")
    assert compiled.exchange_bound <= sent <= 1.05 * compiled.exchange_bound


def test_the_decode_step_is_compiled_for_its_rows_and_cache(compiled):
    decode = compiled.decode
    assert decode.name == "decode step" and decode.flops > 0
    assert decode.required > 0


def test_the_text_says_all_of_it(compiled):
    text = render(compiled, "small")
    for part in ("small on cpu:8", f"{compiled.parameters:,}", "all-to-all", "useful", "decode step", "is not known"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 160


def test_groups_that_straddle_devices_are_pointed_out(compiled):
    assert compiled.warnings == ()
    config = CONFIG.replace(model=MODEL.replace(routing_group="tokens", group_size=100))
    (encoder, decoder) = plan(config, "cpu:8", compile=False).warnings
    assert "encoder's 3 routing groups of 86 tokens" in encoder and "8 parts" in decoder


LARGE = ["--config", "configs/tiny.py", "--config.model.d_ff=65536", "--config.model.num_experts=4096"]


def test_the_command_says_what_does_not_fit_and_which_knob_to_turn(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert cli.main(["plan", *LARGE, "--topology", "h100:8", "--json", str(file), "--no-compile"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT, by shapes and shardings" in text
    assert "--mesh data=1,expert=8,model=1" in text and "--config.mesh.fsdp=true" in text and "larger topology" in text
    values = json.loads(file.read_text())
    assert values["fits"] is False and values["topology"]["num_devices"] == 8 and values["train"] is None
    assert values["memory"]["parameters"] == plan_bytes(values["parameters"])
    assert values["about"]["versions"]["jax"] == jax.__version__ and "host" in values["about"]


def plan_bytes(parameters):
    return 4 * parameters  # float32, whole on each device with the recipe's mesh


def test_activations_that_do_not_fit_call_for_pieces_and_recomputation(capsys):
    argv = ["plan", "--config", "configs/tiny.py", "--topology", "a100:8", "--no-compile", "--config.data.batch_size=262144"]
    assert cli.main([*argv, "--config.data.inputs_length=512"]) == 1
    text = capsys.readouterr().out
    assert "Activations and temporaries dominate" in text
    assert "--config.train.microbatches=" in text and "remat_policy=minimal" in text
    assert cli.main([*argv, "--config.data.batch_size=256"]) == 0
    assert "fits, by shapes and shardings" in capsys.readouterr().out


def test_without_libtpu_the_plan_says_what_to_install_and_the_rest(monkeypatch):
    monkeypatch.setattr(topology, "can_compile_for", lambda platform: False)
    found = plan(CONFIG, "v5p:2x2x2")
    assert found.train is None and "pip install 'flax_switch[tpu]'" in found.not_compiled
    assert found.fits and found.memory.parameters > 0
    assert "pip install" in render(found)


def test_without_the_gpus_compiler_the_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "can_compile_for", lambda platform: False)
    found = plan(CONFIG, "h100:8")
    assert "pip install 'flax_switch[cuda]'" in found.not_compiled and found.fits


@pytest.mark.hardware("cuda")
@pytest.mark.parametrize("mode", ["factor", "dropless"])
def test_a_step_compiles_for_gpus_without_them(mode, caplog):
    """The widths are those of JAX's kernels for Hopper."""
    model = MODEL.replace(capacity_mode=mode, moe_executor="auto", dtype="bfloat16", d_model=64, d_ff=128)
    grouped_choice._told.cache_clear()
    with caplog.at_level(logging.INFO):
        found = plan(CONFIG.replace(model=model), "h100:8")
    assert "'mosaic_hopper'" in caplog.text  # with a capacity, too: generation is dropless
    assert found.fits and found.train.flops_complete
    (exchange,) = (t for t in found.train.traffic if t.kind.endswith("all-to-all"))
    assert exchange.kind == ("ragged-all-to-all" if mode == "dropless" else "all-to-all")


HLO_OF_A_GPU = """HloModule jit_step

ENTRY %main (t: s32[20,3], r: s32[8,2], x: bf16[1024,256], w: bf16[8,256,512]) -> bf16[8,256,512] {
  %t = s32[20,3]{1,0} parameter(0)
  %r = s32[8,2]{1,0} parameter(1)
  %x = bf16[1024,256]{1,0} parameter(2)
  %w = bf16[8,256,512]{2,1,0} parameter(3)
  %p = bf16[1024,512]{1,0} custom-call(%t, %x, %w), metadata={op_name="jit(step)/mlp/grouped_rows/pallas_call"}
  %k = bf16[8,256,512]{2,1,0} custom-call(%r, %x, %p), metadata={op_name="jit(step)/mlp/grouped_gradients/pallas_call"}
  %m = bf16[1024,512]{1,0} custom-call(%r, %x, %w), metadata={op_name="jit(step)/mlp/grouped_rows/body/mpmd_map"}
  ROOT %n = bf16[8,256,512]{2,1,0} custom-call(%r, %r, %x, %m), metadata={op_name="jit(step)/mlp/grouped_gradients/body/mpmd_map"}
}
"""


def test_products_in_kernels_count_ours_and_those_of_jax():
    assert program_flops(HLO_OF_A_GPU) == (4 * 2 * 1024 * 256 * 512, True)


def test_the_decode_steps_arrangement_may_be_refused_too(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.38G) exceeds "
            "available HBM (15.75G)."
        )

    monkeypatch.setattr(program, "start_cache", refuse)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "expert", "model"))
    refused = program.compile_decode(CONFIG, mesh)
    assert refused.name == "decode step" and refused.required == round(28.38 * 2**30) and "28.38G" in refused.refusal


def test_a_refusal_of_the_compiler_is_an_answer(monkeypatch):
    def refuse():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
        )

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "expert", "model"))
    refused = program._compiled("train step", mesh, refuse)
    assert refused.required == round(24.5 * 2**30) and "Exceeded by" in refused.refusal
    monkeypatch.setattr(planner, "compile_devices", lambda machine: jax.devices()[: machine.num_devices])
    monkeypatch.setattr(planner, "compile_train", lambda *_: refused)
    found = plan(CONFIG, "v5e:2x4", decode=False)
    assert found.fits is False
    text = render(found)
    assert "DOES NOT FIT, as compiled" in text and "Activations and temporaries dominate: 24.5 GiB" in text


def test_a_refusal_in_other_words_is_quoted_and_its_memory_is_not_known(monkeypatch):
    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: The arena lacks nine gibibytes.")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "expert", "model"))
    refused = program._compiled("train step", mesh, refuse)
    assert refused.required is None and "lacks nine gibibytes" in refused.unknown[0]
    monkeypatch.setattr(planner, "compile_devices", lambda machine: jax.devices()[: machine.num_devices])
    monkeypatch.setattr(planner, "compile_train", lambda *_: refused)
    found = plan(CONFIG, "v5e:2x4", decode=False)
    assert found.fits is False
    assert "NOT KNOWN     memory: The compiler writes" in render(found) and "parameters" in render(found)


def test_a_plan_says_which_figure_is_not_known_and_prints_the_others(compiled):
    sent = tuple(
        dataclasses.replace(t, bytes=None, wire_bytes=None) if t.kind == "all-to-all" else t for t in compiled.train.traffic
    )
    train = dataclasses.replace(compiled.train, traffic=sent, flops=None, unknown=("bytes of all-to-all: web[8]", "FLOPs: dot3"))
    text = render(dataclasses.replace(compiled, train=train))
    assert "all-to-all          not known" in text and "NOT KNOWN     bytes of all-to-all: web[8]" in text
    assert "FLOPs         not known" in text and "all-to-alls send an unknown amount" in text
    assert f"{compiled.parameters:,}" in text and "all-reduce" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9z:4x4", "no chip known here. Write one like v5e:4x4"),
        ("v5e", "written like v5e:4x4"),
        ("v5e:4", "with 2 size"),
        ("v5p:4x4", "with 3 size"),
        ("h100:2x2", "with 1 size"),
        ("h100:12", "'h100:12' must have up to 8 of them or a multiple"),
        ("v5e:fourxfour", "written like v5e:4x4"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        topology.parse_topology(name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology", "v5e:2x2", "--mesh", "expert=3"], "do not fit 4 devices"),
        (["--topology", "v5e:2x2", "--mesh", "expert"], "written like data=2,expert=4"),
        (["--topology", "v5e:2x2", "--mesh", "experts=2"], "Did you mean 'expert'"),
        (["--topology", "v5e:2x2", "--config.data.batch_size=30"], "must be a multiple of 4"),
        (["--topology", "v5e"], "written like"),
        (["--topology", "v5e:2x2", "--effort", "quik"], "Did you mean 'quick'"),
        (["--topology", "v5e:2x2", "--config.mesh.mode=pmap"], "mesh.mode=jit"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(argv, message, capsys):
    assert cli.main(["plan", "--config", "configs/tiny.py", "--no-compile", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.hardware("tpu")
def test_a_small_model_is_compiled_for_a_tpu():
    config = CONFIG.replace(model=MODEL.replace(dtype="bfloat16", scan_layers=True))
    found = plan(config, "v5e:2x2", MeshConfig(expert=4))
    assert found.fits and found.train.flops_complete
    assert found.memory.parameters <= found.train.arguments
    assert 0.5 < found.useful_share <= 1.0
    sent = sum(t.wire_bytes for t in found.train.traffic if t.kind == "all-to-all")
    assert found.exchange_bound <= sent
    assert found.decode.flops > 0
    with pytest.raises(ConfigError, match="libtpu knows no slice"):
        topology.compile_devices(topology.parse_topology("v5e:3x3"))
