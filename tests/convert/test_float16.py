"""float16 checkpoints compute finite values, close to float32's, and go through conversion unchanged."""

import json
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import flax_switch as fs
from flax_switch.convert import convert, open_checkpoint
from flax_switch.pretrained.outputs import Seq2SeqLMOutput
from tests.convert import oracle

IDS, LABELS = np.array([[5, 9, 33, 1]]), np.array([[11, 12, 1]])
SIZES = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0)
SPARSE = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4)
KINDS = {"T5": {}, "SwitchTransformers": SPARSE}


def overflowing(kind: str, path):
    """A float16 model whose residual stream exceeds 65,504."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind], dropout_rate=0.0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        scale = 6000.0 if name.endswith("wo.weight") else 0.3
        parameter.data = torch.randn_like(parameter) * scale if parameter.dim() > 1 else parameter.data
    return oracle.save(model.half(), path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["huggingface", "flax_switch"])
def test_a_float16_checkpoint_computes_float32s_loss_and_says_so(tmp_path, kind, form, caplog):
    source = overflowing(kind, tmp_path / "half")
    if form == "flax_switch":
        source = convert(source, tmp_path / "ours", to=form)
        values = json.loads((source / "flax_switch.json").read_text())
        values["config"]["dtype"] = "float16"  # as it was written before
        (source / "flax_switch.json").write_text(json.dumps(values))
    with caplog.at_level(logging.INFO):
        ours = fs.load_pretrained(source)
    assert caplog.text.count("it computes in float32") == 1
    assert ours.config.dtype == "float32" and ours.config.param_dtype == "float16"
    assert ours.params["token_embedder"]["embedding"].dtype == np.float16
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    theirs = model_class.from_pretrained(tmp_path / "half", dtype=torch.float32)
    expected = theirs(input_ids=torch.tensor(IDS), labels=torch.tensor(LABELS)).loss.item()
    output = ours(IDS, labels=LABELS)
    assert isinstance(output, Seq2SeqLMOutput) and output.loss is not None
    np.testing.assert_allclose(float(output.loss), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_goes_through_conversion_bit_for_bit(tmp_path, kind):
    source = overflowing(kind, tmp_path / "half")
    back = convert(convert(source, tmp_path / "ours", to="flax_switch"), tmp_path / "back", to="huggingface")
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (source, back))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], before[name]) for name in before)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_float16_activations_can_be_asked_for(tmp_path):
    source = overflowing("T5", tmp_path / "half")
    assert open_checkpoint(source, changes={"dtype": "float16"}).config.dtype == "float16"
    assert open_checkpoint(source, changes={"dtype": "bfloat16"}).config.dtype == "bfloat16"
