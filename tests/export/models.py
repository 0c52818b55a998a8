"""Small models of every kind with a vocabulary, as folders; sources of mixed lengths; and what `generate` makes of them."""

import jax
import numpy as np

import flax_switch as fs
from flax_switch.config import SwitchConfig
from flax_switch.data.vocabulary import Vocabulary
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer

NEW = 12  # tokens at most
LENGTHS = (7, 19)  # of batches, in which sources are of any length up to it

_GATED = dict(mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False)
_DENSE = dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
MODELS = {
    "experts": dict(),
    "experts, gated, two for each token": dict(_GATED, num_selected_experts=2, relative_attention_per_layer=True),
    "experts with Hugging Face's fixed capacity": dict(capacity_mode="fixed", expert_capacity=2, routing_group="sequence"),
    "experts, all kernels in int8": dict(weights="int8"),
    "experts that choose": dict(router_type="experts_choose"),
    "experts in NLLB-MoE's layers": dict(
        norm="layer",
        use_bias=True,
        positions="sinusoidal",
        scale_attention_logits=True,
        embedding_scale="inputs",
        num_selected_experts=2,
        normalize_router_weights=True,
        expert_masking_rate=0.2,
        capacity_mode="dropless",
    ),
    "dense (T5)": _DENSE,
    "dense, gated, untied (T5 1.1)": {**_DENSE, **_GATED},
    "dense, a table for each layer (UMT5)": {**_DENSE, **_GATED, "relative_attention_per_layer": True},
}


def vocabulary():
    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bkl" for b in "aei" for c in "mns"]
    return Vocabulary.train([" ".join(rng.choice(words, 12)) for _ in range(200)], 40, num_sentinels=8)


def config_of(name, size):
    base = SwitchConfig(
        vocab_size=size, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
    )  # fmt: skip
    return base.replace(**MODELS[name])


def lively_params(config, seed=0):
    """Parameters with which attention is sharp, routers are decided and outputs change from token to token."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(SwitchTransformer(config), jax.random.key(0)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        deviation = 0.3 if "scale" in name or "token_embedder" in name else 3.5 if "rel_embedding" in name else 0.7
        return np.asarray(rng.normal(1.0 if "scale" in name else 0.0, deviation, leaf.shape), np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


class Model:
    """A model in a folder, and its tokens for sources."""

    def __init__(self, name, folder):
        self.vocabulary = vocabulary()
        config = config_of(name, self.vocabulary.size)
        floats = config.replace(weights="float")
        model = fs.Pretrained(floats, SwitchTransformer(floats), lively_params(floats), self.vocabulary)
        if config.weights != "float":
            model = fs.quantize(model, config.weights, kernels="integers")  # as programs compute
        self.config, self.params = model.config, model.params
        self.folder = folder / "model"
        model.save_pretrained(self.folder, format="flax_switch")

    def sources(self, count=100):
        """Batches of ids and masks, `count` rows in all."""
        rng = np.random.default_rng(1)
        for length in LENGTHS:
            rows = count // len(LENGTHS)
            ids = rng.integers(3, self.vocabulary.num_pieces, (rows, length)).astype(np.int32)
            mask = np.arange(length)[None] < rng.integers(1, length + 1, rows)[:, None]
            yield np.where(mask, ids, 0).astype(np.int32), mask

    def tokens(self, ids, mask):
        """What `generate` says, filled up with padding to all places."""
        model = SwitchTransformer(self.config)
        return padded(fs.generate(model, self.params, ids, mask, max_new_tokens=NEW).sequences)


def padded(tokens):
    return np.pad(tokens, ((0, 0), (0, 1 + NEW - tokens.shape[1])))
