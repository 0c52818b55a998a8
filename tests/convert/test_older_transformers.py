"""transformers 4.57 as an oracle: what 5 no longer has, the slow tokenizer and Flax's files, and dense T5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="compares with transformers 4.57, which is not installed")
torch = pytest.importorskip("torch")

from flax_switch.convert import tokenizer  # noqa: E402 - after the skips
from flax_switch.data.vocabulary import Vocabulary  # noqa: E402
from flax_switch.pretrained import load_pretrained, save_pretrained  # noqa: E402
from tests.convert import nllb, oracle  # noqa: E402

pytestmark = pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="is for transformers 4.57")

IDS = np.array([[5, 9, 11, 3, 1], [7, 4, 1, 0, 0]])
TARGETS = np.array([[0, 6, 8], [0, 4, 2]])
SIZES = dict(vocab_size=31, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=2, num_decoder_layers=2, dropout_rate=0.0)


def t5(**changes):
    torch.manual_seed(0)
    config = transformers.T5Config(**{**SIZES, "decoder_start_token_id": 0, **changes})
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model):
    with torch.no_grad():
        mask = torch.tensor(IDS != 0).long()
        return model(torch.tensor(IDS), attention_mask=mask, decoder_input_ids=torch.tensor(TARGETS)).logits.numpy()


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["1.0", "1.1"])
def test_a_dense_t5_that_it_saved_gives_its_logits_here(changes, tmp_path):
    theirs = t5(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    output = ours.model.apply({"params": ours.params}, IDS, TARGETS, IDS != 0)
    np.testing.assert_allclose(output.logits, logits(theirs), atol=1e-4)


def test_what_we_save_it_loads_with_the_same_logits(tmp_path):
    t5().save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", ours.config, ours.params, format="huggingface")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits(again), logits(t5()))


@pytest.mark.parametrize("seed", range(len(nllb.DRAWS)))
def test_its_nllb_moe_whose_experts_are_right_says_what_ours_does(seed, tmp_path):
    theirs = nllb.model_of(seed)
    ours = load_pretrained(oracle.save(theirs, tmp_path))
    batch = nllb.batch_of(theirs.config, seed)
    with torch.no_grad():
        expected = theirs(**batch.torch())
    output, real = ours(**batch.numpy()), batch.decoder_attention_mask == 1
    wanted = expected.logits.numpy()
    np.testing.assert_allclose(np.asarray(output.logits)[real], wanted[real], atol=2e-4 * float(np.abs(wanted).max()))
    for beams in (1, 3):
        controls = dict(max_new_tokens=7, min_new_tokens=5, num_beams=beams, do_sample=False, forced_bos_token_id=9)
        said = theirs.generate(**batch.torch("input_ids", "attention_mask"), **controls).numpy()
        np.testing.assert_array_equal(ours.generate(batch.input_ids, batch.attention_mask, **controls).sequences, said)


PLAIN = ("", "Some words are long.", "  two  spaces ", "ñandú 北京 37", "Unknown ☃ sign")
WITH_SENTINELS = ("of <extra_id_0> and <extra_id_11>", "of<extra_id_0>and <extra_id_11>.", "are </s> long")


@pytest.mark.parametrize("legacy", [True, False])  # by default True; False cuts no "▁" after a sentinel
def test_the_slow_tokenizer_cuts_as_ours_does(tmp_path, legacy):
    text = [f"Sentence {i} of words: some are long, ñandú or 北京, and number {i * 37}." for i in range(400)]
    ours = Vocabulary.train(text, 200, num_sentinels=12)
    for name, contents in tokenizer.vocabulary_files(ours).items():
        if name not in ("vocabulary.json", "tokenizer.json"):
            (tmp_path / name).write_bytes(contents)
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, legacy=legacy)
    assert not theirs.is_fast
    for text in PLAIN + (WITH_SENTINELS if legacy else ()):
        assert [*ours.encode(text), ours.eos_id] == theirs(text).input_ids, text


def test_a_folder_of_flaxs_weights_alone_gives_its_logits_here(tmp_path, monkeypatch):
    flax_t5 = getattr(transformers, "FlaxT5ForConditionalGeneration", None)
    if flax_t5 is None or not transformers.utils.is_flax_available():
        pytest.skip("this transformers finds no Flax that it knows")
    clip = jnp.clip
    monkeypatch.setattr(jnp, "clip", lambda x, a_min=None, a_max=None: clip(x, a_min, a_max))  # as it was for its last Flax models
    with jax.numpy_rank_promotion("allow"):  # which its own code needs
        theirs = flax_t5(transformers.T5Config(**SIZES, decoder_start_token_id=0))
        expected = theirs(IDS, attention_mask=IDS != 0, decoder_input_ids=TARGETS).logits
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "flax_model.msgpack").is_file() and not list(tmp_path.glob("*.safetensors"))
    ours = load_pretrained(tmp_path)
    output = ours.model.apply({"params": ours.params}, IDS, TARGETS, IDS != 0)
    np.testing.assert_allclose(output.logits, expected, atol=1e-4)
