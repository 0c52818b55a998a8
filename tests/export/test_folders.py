"""What lies in an exported folder, what is refused, and what the command says."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from models import Model

import flax_switch as fs
from flax_switch.cli import main
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.export import load
from flax_switch.export.folder import export
from flax_switch.export.programs import programs
from flax_switch.nn.heads import build_model

TINY = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=1, num_decoder_layers=1, num_experts=2,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0,
)  # fmt: skip
HEAD = dict(head="classification", labels=("no", "yes"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return Model("dense (T5)", tmp_path_factory.mktemp("dense"))


def test_the_loader_is_short_and_imports_jax_and_numpy_alone():
    tree = ast.parse(Path(load.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"jax", "numpy"}
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and not isinstance(n, ast.Import | ast.ImportFrom)]
    assert len(statements) - 4 <= 20, "four docstrings apart"


def test_programs_are_for_every_platform_and_the_folder_is_a_model_of_ours(dense, tmp_path):
    pytest.importorskip("flatbuffers")
    out = tmp_path / "out"
    command = ["export", str(dense.folder), str(out), "--to", "stablehlo", "--no-progress"]
    assert main(command) == 0
    for name in ("encoder", "start", "prefill", "decode_step", "generate"):
        program = jax.export.deserialize(bytearray((out / f"{name}.stablehlo").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu") and not program.disabled_safety_checks
    assert fs.load_pretrained(out).config == dense.config
    assert main([*command, "--overwrite", "--platform", "tpu"]) == 0
    assert jax.export.deserialize(bytearray((out / "encoder.stablehlo").read_bytes())).platforms == ("tpu",)


def test_llama_cpp_knows_every_tensor_and_setting(dense, tmp_path):
    folder = export(dense.folder, tmp_path / "out", to="gguf-ready")
    values = json.loads((folder / "config.json").read_text())
    numbers = ("d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "d_kv", "layer_norm_epsilon", "vocab_size")
    assert values["architectures"] == ["T5ForConditionalGeneration"]
    assert all(values[name] for name in (*numbers, "relative_attention_num_buckets")) and values["decoder_start_token_id"] == 0
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added == {f"<extra_id_{i}>": dense.vocabulary.sentinel_id(i) for i in range(8)}
    tensors = read_safetensors(folder / "model.safetensors")
    assert tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].shape == (16, 16)
    assert tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"].shape == (16, 32)
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 2)
    unknown = [name for name in tensors if names.get_name(name, try_suffixes=(".weight",)) is None]
    assert unknown == []


@pytest.mark.parametrize(
    ("changes", "to", "said"),
    [
        (dict(mlp_activations=("tanh",)), "ctranslate2", "mlp_activations=.*CTranslate2"),
        (dict(mlp_activations=("silu",)), "gguf-ready", "mlp_activations=.*llama.cpp"),
        (dict(relative_attention_max_distance=64), "gguf-ready", "relative_attention_max_distance=64"),
        (dict(num_sparse_encoder_layers=1), "gguf-ready", "1 of this model's layers.*Distil"),
        (dict(num_sparse_decoder_layers=1), "onnx", "sort.*Distil"),
        (dict(architecture="decoder_only"), "stablehlo", "architecture='decoder_only'.*flax-switch generate"),
        (dict(architecture="decoder_only"), "onnx", "architecture='decoder_only'.*flax-switch generate"),
        (dict(architecture="decoder_only"), "ctranslate2", "architecture='decoder_only'.*flax-switch generate"),
        (dict(HEAD), "stablehlo", "head for classification.*checkpoint that the model was made of.*flax-switch predict"),
        (dict(HEAD), "gguf-ready", "head for classification.*checkpoint that the model was made of"),
        (
            dict(num_sparse_encoder_layers=1, capacity_mode="fixed", expert_capacity=2, routing_group="tokens"), "stablehlo",
            "capacity_mode='fixed' with routing_group='tokens'",
        ),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_by_name(changes, to, said, tmp_path):
    config = TINY.replace(**changes)
    params = fs.init_params(build_model(config, "full"), jax.random.key(0))
    fs.save_pretrained(tmp_path / "model", config, params, format="flax_switch")
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        export(tmp_path / "model", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_controls_of_another_search_are_refused():
    shapes = jax.eval_shape(lambda: fs.init_params(TINY, jax.random.key(0)))
    for control in (dict(num_beams=2), dict(do_sample=True), dict(forced_eos_token_id=1)):
        with pytest.raises(ConfigError, match=next(iter(control))):
            programs(TINY, shapes, **control)


def test_a_format_that_is_none_is_one_sentence(dense, tmp_path):
    command = [sys.executable, "-m", "flax_switch", "export", str(dense.folder), str(tmp_path / "x"), "--to", "onyx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "onnx" in done.stderr and "Traceback" not in done.stderr
