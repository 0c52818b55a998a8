"""Generation's loop keeps its operations apart, for all threads of a CPU (`ops/kernels/loops.py`)."""

import jax
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.generation.generate import prepared
from flax_switch.generation.program import run_program
from flax_switch.generation.slots import GenerationConfig, SlotDecoder

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs' programs")
CONFIG = fs.SwitchConfig(
    vocab_size=512, d_model=256, num_heads=2, d_kv=128, d_ff=256, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, tie_word_embeddings=False,
)  # fmt: skip


def test_decoding_one_row_of_int8_is_no_single_function_for_one_thread():
    params = fs.init_params(CONFIG, jax.random.key(0))
    model = fs.quantize(fs.Pretrained(CONFIG, fs.SwitchTransformer(CONFIG), params), "int8")
    call = prepared(model.model, model.params, np.full((1, 8), 7), None, None, None, 0, dict(max_new_tokens=4))
    compiled = run_program.lower(*call.arguments, devices=call.devices).compile().as_text()
    assert "s8[256,256]" in compiled, "products are of integers"
    assert "small_call" not in compiled


def test_nor_is_the_loop_of_a_servers_slots_which_sorts_anyway():
    params = fs.init_params(CONFIG, jax.random.key(0))
    model = fs.quantize(fs.Pretrained(CONFIG, fs.SwitchTransformer(CONFIG), params), "int8")
    controls = GenerationConfig(eos_token_id=1, decoder_start_token_id=0, pad_token_id=0)
    decoder = SlotDecoder(model.config, model.params, controls, 4)
    settings = np.ones(1, bool), np.int32(1), np.int32(0), np.bool_(False), np.bool_(False)
    compiled = decoder._run.lower(decoder.variables, decoder.empty(1, 8), *settings).compile().as_text()
    assert "s8[256,256]" in compiled, "products are of integers"
    loop = [line for line in compiled.splitlines() if 'op_name="jit(_run)/while"' in line]
    assert any(" while(" in line for line in loop) and not any("small_call" in line for line in loop)
