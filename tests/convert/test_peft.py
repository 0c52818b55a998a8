"""Adapters of PEFT are read and written: the same logits as PEFT's own, the same bits there and back, strangers refused by name."""

import json

import numpy as np
import pytest

import flax_switch as fs
from flax_switch import cli
from flax_switch.convert import CheckpointError
from flax_switch.convert.peft import module_names
from flax_switch.convert.safetensors_file import read_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SIZES = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0)
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_3.wi"
ADAPTERS = {  # kind of model, what PEFT is told
    "attention of switch": ("switch", dict(r=4, lora_alpha=8, target_modules=["q", "v"])),
    "dense MLPs and single experts": ("switch", dict(
        r=2, lora_alpha=3, target_modules=["0.layer.1.mlp.wi", "0.layer.2.mlp.wo", EXPERT],
    )),
    "everything, in ranks of its own": ("switch", dict(
        r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["lm_head"], rank_pattern={"v": 2, EXPERT: 3},
        alpha_pattern={"expert_1.wo": 5, "o": 1},
    )),
    "DoRA of single experts": ("switch", dict(r=3, lora_alpha=6, use_dora=True, target_modules=["k", "wo", EXPERT])),
    "routers, by the root of the rank": ("switch", dict(
        r=4, lora_alpha=2, use_rslora=True, target_modules=["router.classifier", "q"],
    )),
    "parameters by their own names": ("switch", dict(
        r=3, lora_alpha=6, target_modules=["q"], target_parameters=["expert_1.wi.weight", f"{EXPERT}.weight", "k.weight"],
    )),
    "T5": ("t5", dict(r=4, lora_alpha=8, target_modules=["q", "v", "wi_0", "wo", "lm_head"])),
    "T5 with DoRA": ("t5", dict(r=4, lora_alpha=8, use_dora=True, target_modules=["o", "wi_1"])),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small random models of transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    switch = transformers.SwitchTransformersConfig(
        **SIZES,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
        expert_capacity=64,
    )
    t5 = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    for name, model in (
        ("switch", transformers.SwitchTransformersForConditionalGeneration(switch)),
        ("t5", transformers.T5ForConditionalGeneration(t5)),
    ):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def torch_model(folder):
    kind = "SwitchTransformers" if "t5" not in folder.name else "T5"
    return getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder)


def torch_logits(model):
    rng = np.random.default_rng(0)
    ids, targets = (torch.tensor(rng.integers(2, 64, (3, 7))) for _ in range(2))
    with torch.no_grad():
        return model.eval()(input_ids=ids, decoder_input_ids=targets).logits.numpy()


def our_logits(model):
    rng = np.random.default_rng(0)
    ids, targets = (rng.integers(2, 64, (3, 7)) for _ in range(2))
    return np.asarray(model(input_ids=ids, decoder_input_ids=targets).logits)


def save_peft(folder, settings, path):
    """Makes an adapter with random numbers in all of its parts, saves it, and returns PEFT's logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_model(folder), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    model.save_pretrained(path)
    return torch_logits(model)


@pytest.mark.parametrize(("kind", "settings"), ADAPTERS.values(), ids=ADAPTERS)
def test_pefts_adapter_is_ours_and_ours_is_pefts_to_the_bit(kind, settings, models, tmp_path):
    expected = save_peft(models / kind, settings, tmp_path / "theirs")
    base = fs.load_pretrained(models / kind)
    model = base.with_adapter(tmp_path / "theirs")
    assert np.abs(our_logits(base) - expected).max() > 0.01
    np.testing.assert_allclose(our_logits(model), expected, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(our_logits(model.merge_adapter()), expected, atol=2e-4, rtol=2e-4)

    model.save_adapter(tmp_path / "ours")
    theirs, ours = (read_safetensors(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == {name for name in theirs if "base_layer" not in name}  # the head's copy, which PEFT saves beside it
    for name, tensor in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), tensor.numpy(), err_msg=name)
    again = torch_logits(peft.PeftModel.from_pretrained(torch_model(models / kind), tmp_path / "ours"))
    # Of a parameter named by itself PEFT adds the adapter's product first and multiplies then; ours names its module.
    tolerance = 2e-6 if "target_parameters" in settings else 0
    np.testing.assert_allclose(again, expected, atol=tolerance, rtol=0)

    model.save_adapter(tmp_path / "native", format="flax_switch")
    np.testing.assert_array_equal(our_logits(base.with_adapter(tmp_path / "native")), our_logits(model))


def test_modules_that_are_all_meant_are_named_by_the_end_of_their_names(models, tmp_path):
    save_peft(models / "switch", dict(r=2, target_modules=["q", EXPERT]), tmp_path / "theirs")
    fs.load_pretrained(models / "switch").with_adapter(tmp_path / "theirs").save_adapter(tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q", EXPERT]


def test_every_kernel_of_a_model_has_a_module_of_transformers(models):
    for kind in ("switch", "t5"):
        config = fs.load_pretrained(models / kind).config
        linear = {n for n, m in torch_model(models / kind).named_modules() if isinstance(m, torch.nn.Linear)}
        found = {name for names in module_names(config, "full").values() for name in names}
        assert found == linear - ({"lm_head"} if config.tie_word_embeddings else set())


@pytest.fixture
def adapter(models, tmp_path):
    save_peft(models / "switch", dict(r=2, target_modules=["q", EXPERT]), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_another_model_is_refused_by_name(models, adapter):
    with pytest.raises(CheckpointError, match=r"is an adapter of another model .*: 1 left over: encoder\.block\.1.*expert_3\.wi"):
        fs.load_adapter(adapter, fs.load_pretrained(models / "t5"))
    with pytest.raises(CheckpointError, match="holds no adapter that is known"):
        fs.load_adapter(models / "switch", fs.load_pretrained(models / "switch"))
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        fs.load_pretrained(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'; adapters that can be read are 'LORA'"),
        (dict(bias="all"), "bias='all' cannot be followed; it must be 'none'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save=['lm_head'] cannot be followed"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' cannot be followed"),
        (dict(r="four"), "field 'r' must be a whole number"),
        (dict(alpha_pattern={"(": 2}), "alpha_pattern must be numbers by regular expression"),
        (dict(use_dora=True), "has a, b where a, b, magnitude are wanted"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(change, message, models, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as error:
        fs.load_adapter(adapter, fs.load_pretrained(models / "switch"))
    assert message in str(error.value)


def test_commands_convert_merge_inspect_and_generate_with_it(models, adapter, tmp_path, capsys):
    base, expected = str(models / "switch"), fs.load_pretrained(models / "switch").with_adapter(adapter)
    run = lambda *arguments: cli.main([*map(str, arguments)])  # noqa: E731
    assert run("convert", adapter, tmp_path / "native", "--base", base, "--to", "flax_switch") == 0
    assert run("convert", tmp_path / "native", tmp_path / "back", "--base", base, "--to", "huggingface") == 0
    there, back = (read_safetensors(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "back"))
    assert there.keys() == back.keys() and all(np.array_equal(there[name].numpy(), back[name].numpy()) for name in there)
    merge = ("--base", base, "--merge", "--no-progress", "--to", "huggingface")
    assert run("convert", tmp_path / "native", tmp_path / "merged", *merge) == 0
    np.testing.assert_allclose(our_logits(fs.load_pretrained(tmp_path / "merged")), our_logits(expected), atol=1e-5)
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "merged")), our_logits(expected), atol=2e-4)
    capsys.readouterr()
    for folder in (adapter, tmp_path / "native"):
        assert run("inspect", folder, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["config"]["rank"] == 2 and told["total"] > 0
    assert run("convert", adapter, tmp_path / "lost", "--to", "flax_switch") == 2
    assert "holds an adapter, not a model" in capsys.readouterr().err
    assert run("generate", "--checkpoint", models / "t5", "--adapter", adapter, "--input", "none.txt") == 2
    assert "is an adapter of another model" in capsys.readouterr().err
