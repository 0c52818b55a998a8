"""flax-switch convert, upcycle and inspect, and what they print."""

import json
import logging
import math
import sys

import numpy as np
import pytest

from flax_switch import SwitchConfig, save_pretrained
from flax_switch.cli import main
from flax_switch.commands.checkpoints import explain_missing_extras
from flax_switch.convert import open_checkpoint
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.inspection.checkpoint import collapse_layers, describe
from tests.convert import oracle, t5x_files

CONFIG = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=4, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=4, num_selected_experts=2,
)  # fmt: skip


def zeros(config: SwitchConfig) -> dict[str, np.ndarray]:
    return {path: np.zeros(shape, np.float32) for path, shape in canonical_shapes(config).items()}


@pytest.fixture
def theirs(tmp_path):
    return oracle.save(oracle.huggingface_model(oracle.huggingface_config()), tmp_path / "theirs")


def test_convert_there_and_back_from_the_command_line(theirs, tmp_path, capsys):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(theirs), ours, "--to", "flax_switch", "--max-shard-size", "20KB", "--no-progress"]) == 0
    assert main(["convert", ours, back, "--to", "huggingface"]) == 0
    assert "Converted" in capsys.readouterr().out
    tensors = open_checkpoint(back).tensors
    for path, tensor in open_checkpoint(theirs).tensors.items():
        np.testing.assert_array_equal(tensors[path].numpy(), tensor.numpy())


def test_errors_a_user_can_mend_are_one_message_and_status_2(theirs, tmp_path, capsys):
    destination = str(tmp_path / "x")
    for arguments, words in (
        (["convert", str(tmp_path / "absent"), destination, "--to", "huggingface"], "does not exist"),
        (["convert", str(theirs), destination, "--to", "hugingface"], "Did you mean 'huggingface'"),
        (["convert", str(theirs), destination, "--to", "huggingface", "--dtype", "int8"], "dtype must be one of"),
        (["convert", str(theirs), destination, "--to", "huggingface", "--max-shard-size", "big"], "5GB"),
        (["convert", str(theirs), destination, "--to", "huggingface", "--set", "expert_capcity=3"], "expert_capacity"),
        (["convert", str(theirs), destination, "--to", "huggingface", "--set", "d_ff"], "FIELD=VALUE"),
        (["upcycle", str(theirs), destination, "--num-experts", "3"], "sparse already"),
        (["inspect", str(tmp_path)], "holds no checkpoint"),
    ):
        assert main([*arguments]) == 2, arguments
        assert words in capsys.readouterr().err, arguments
    assert not (tmp_path / "x").exists()


def test_an_export_says_which_behaviour_becomes_hugging_faces(tmp_path, capsys):
    config = CONFIG.replace(num_selected_experts=1)
    save_pretrained(tmp_path / "ours", config, zeros(config), format="flax_switch")
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "huggingface", "--expert-capacity", "9"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    computed, trained = said.split("Only training sees these:")
    assert (
        computed.startswith("transformers has no settings for these")
        and "  capacity_mode: 'factor' here, 'fixed' there\n" in computed
    )
    assert "z_loss_coef" in trained and "z_loss_coef" not in computed and "capacity_mode" not in trained
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["expert_capacity"] == 9


def test_commands_show_what_conversion_says_once_and_no_choice_of_executors(capsys, monkeypatch):
    @explain_missing_extras
    def run(args):
        logging.getLogger("flax_switch.convert.checkpoint").info("converted somehow")
        logging.getLogger("flax_switch.ops.kernels.choice").info("an executor was chosen")
        logging.getLogger("flax_switch.ops.kernels.choice").warning("careful")
        return 0

    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])  # as absl does it
    assert run(None) == 0
    assert capsys.readouterr().err == "converted somehow\ncareful\n"
    assert logging.getLogger("flax_switch").propagate and logging.getLogger("flax_switch.convert").level == logging.NOTSET


def test_settings_of_a_t5x_checkpoint_are_set_from_the_command_line(tmp_path):
    source = t5x_files.write(tmp_path, zeros(CONFIG))
    arguments = ["--set", "num_selected_experts=2", "--set", 'mlp_activations=["silu"]', "--set", "sparse_layout=mixed"]
    assert main(["convert", str(source), str(tmp_path / "ours"), "--to", "flax_switch", "--no-progress", *arguments]) == 0
    assert open_checkpoint(tmp_path / "ours").config == CONFIG.replace(mlp_activations=("silu",))


def test_upcycle_from_the_command_line(tmp_path):
    dense = CONFIG.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    save_pretrained(tmp_path / "dense", dense, zeros(dense), format="flax_switch")
    arguments = ["--num-experts", "3", "--layout", "top", "--num-sparse-encoder-layers", "1", "--noise", "0.1", "--no-progress"]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse"), *arguments]) == 0
    config = open_checkpoint(tmp_path / "sparse").config
    assert (config.num_experts, config.encoder.sparse_layers, config.decoder.sparse_layers) == (3, (3,), (1,))


def folder_in(form: str, tmp_path):
    if form == "t5x":
        return t5x_files.write(tmp_path, zeros(CONFIG)), {"num_selected_experts": 2}
    if form == "huggingface":
        config = CONFIG.replace(num_selected_experts=1, num_encoder_layers=4)
        save_pretrained(tmp_path / "x", config, zeros(config), format=form)
        return tmp_path / "x", {"num_selected_experts": 2}
    save_pretrained(tmp_path / "x", CONFIG, zeros(CONFIG), format=form, max_shard_size="1KB")
    return tmp_path / "x", {}


@pytest.mark.parametrize("form", ["huggingface", "flax_switch", "t5x"])
def test_inspect_counts_parameters_without_loading_them(form, tmp_path, monkeypatch):
    folder, changes = folder_in(form, tmp_path)
    monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: pytest.fail("a tensor was read"))
    described = describe(folder, changes=changes)
    sizes = {path: math.prod(shape) for path, shape in canonical_shapes(CONFIG).items()}
    experts = sum(size for path, size in sizes.items() if "/expert/" in path)
    assert described.format == form
    assert described.total == sum(sizes.values()) == sum(described.by_kind.values()) == sum(described.by_dtype.values())
    assert described.active == described.total - experts // 2
    assert described.by_kind["experts"] == experts and described.nbytes == 4 * described.total
    assert described.sparse_layers == {"encoder": (1, 3), "decoder": (1,)}


def test_inspect_prints_text_and_json(theirs, capsys):
    assert main(["inspect", str(theirs)]) == 0
    text = capsys.readouterr().out
    for words in (
        "huggingface, full",
        "active per token",
        "4 in each sparse layer",
        "encoder/layers_1/mlp/expert/wi/kernel",
        "[4, 24, 40]",
    ):
        assert words in text, text
    assert main(["inspect", str(theirs), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["num_experts"] == 4 and values["shapes"]["token_embedder/embedding"] == ["float32", [67, 24]]


def test_equal_layers_are_taken_together():
    shapes = {f"encoder/layers_{i}/norm/scale": ("float32", (4,)) for i in (0, 1, 2, 5)} | {"encoder/norm": ("float32", (4,))}
    assert list(collapse_layers(shapes)) == ["encoder/layers_{0,1,2,5}/norm/scale", "encoder/norm"]
    run = {f"encoder/layers_{i}/norm/scale": ("float32", (4,)) for i in range(5)}
    assert list(collapse_layers(run)) == ["encoder/layers_{0..4}/norm/scale"]
