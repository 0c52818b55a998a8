"""Small models of every architecture with parameters of some size, and what decoding them without a cache says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from flax_switch.config import SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer

BASE = SwitchConfig(
    vocab_size=64, d_model=16, num_heads=2, d_kv=8, d_ff=32, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, eval_capacity_factor=0.25, min_expert_capacity=1,
)  # fmt: skip

GATED = ("gelu_new", "linear")

# Every way in which architectures differ, and its alternatives as changes of BASE.
AXES = {
    "choices": [dict(num_selected_experts=2), dict(), dict(num_selected_experts=3, normalize_router_weights=True)],
    "activations": [dict(mlp_activations=GATED), dict(), dict(mlp_activations=("silu", "tanh")), dict(mlp_activations=("gelu",))],
    "extra MLP": [dict(extra_mlp=True), dict(), dict(use_bias=True)],
    "shared expert": [dict(shared_expert=True), dict()],
    "experts": [dict(expert_d_ff=24), dict(), dict(num_experts=13), dict(expert_masking_rate=0.3)],
    "router": [dict(router_bias=True), dict(), dict(cast_router_probs=True), dict(router_dtype="bfloat16")],
    "biases": [
        dict(relative_attention_per_layer=True), dict(), dict(relative_attention_num_buckets=4, relative_attention_max_distance=5),
        dict(positions="sinusoidal", scale_attention_logits=True),
    ],
    "who chooses": [
        dict(), dict(router_type="experts_choose"), dict(batch_prioritized_routing=True), dict(router_type="hash", hash_seed=3),
    ],
    "head": [
        dict(tie_word_embeddings=False), dict(), dict(tie_word_embeddings=False, separate_embeddings=True),
        dict(embedding_scale="inputs"),
    ],
    "layers": [
        dict(scan_layers=True, num_decoder_layers=4, decoder_sparse_layers=(1, 3)),
        dict(),
        dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
        dict(
            sparse_layout="top", encoder_sparse_layers=(0,), num_encoder_layers=1, num_decoder_layers=3, num_sparse_decoder_layers=2
        ),
    ],
    "sizes": [dict(num_heads=3, d_kv=6), dict(), dict(d_model=20, d_ff=12, vocab_size=80)],
    "dtype": [dict(), dict(dtype="bfloat16"), dict(expert_dtype="bfloat16"), dict(param_dtype="bfloat16")],
    "norms": [dict(zero_padding_activations=False), dict(), dict(layer_norm_epsilon=0.05), dict(norm="layer")],
    "special tokens": [dict(pad_token_id=3, eos_token_id=5, decoder_start_token_id=7, extra_eos_token_ids=(6,)), dict()],
    "groups": [
        dict(routing_group="tokens", group_size=8, padding_semantics="scatter", ignore_padding_tokens=True),
        dict(),
        dict(routing_group="flaxformer", group_size=16),
    ],
    # "hit" reads experts as an accelerator does, "auto" one by one.
    "executor": [
        dict(), dict(moe_executor="hit"), dict(moe_executor="einsum"), dict(moe_executor="gather"), dict(moe_executor="ragged"),
    ],
}  # fmt: skip

# What must not change a token: losses, training, and capacities where nothing is dropped.
TRAINING_ONLY = dict(
    capacity_factor=0.5, router_jitter_noise=0.1, expert_parallel_buffer_factor=1.0, load_balancing_loss_coef=0.5,
    router_z_loss_coef=0.5, router_loss_reduction="huggingface", z_loss_coef=0.5, label_smoothing=0.1,
    loss_normalizer="total_target_tokens", dropout_rate=0.5, expert_dropout_rate=0.4, attention_dropout_rate=0.3,
    activation_dropout_rate=0.2, init_scale=3.0, remat_policy="full",
    router_init_std=0.3,
    copying_heads=1,
)  # fmt: skip
# With tokens that choose, neither may any capacity.
CAPACITIES = [
    dict(capacity_mode="dropless"),
    dict(eval_capacity_factor=7.0, min_expert_capacity=9),
]


# Decoders without an encoder, as changes of ALONE_BASE: what each of their fields changes.
ALONE_BASE = BASE.replace(architecture="decoder_only")
FUSED = dict(layer_form="fused")
ALONE = {
    "sequential": dict(),
    "sequential, inputs both ways": dict(
        bidirectional_inputs=True, num_selected_experts=2, extra_mlp=True, relative_attention_num_buckets=4,
        relative_attention_max_distance=5,
    ),
    "sequential, rotary, shared expert": dict(positions="rotary", scale_attention_logits=True, shared_expert=True, expert_d_ff=24),
    "sequential, scanned, untied": dict(
        scan_layers=True, num_decoder_layers=4, num_sparse_decoder_layers=2, tie_word_embeddings=False,
        relative_attention_per_layer=True,
    ),
    "sequential, hash": dict(router_type="hash", hash_seed=3, bidirectional_inputs=True),
    "parallel, gated": dict(layer_form="parallel", mlp_activations=GATED, router_bias=True, extra_mlp=True),
    "parallel, dense, inputs both ways": dict(layer_form="parallel", num_sparse_decoder_layers=0, bidirectional_inputs=True),
    "fused": dict(FUSED, num_heads=4, d_kv=6),
    "fused, gated, rotary, all three sparse": dict(
        FUSED, mlp_activations=("swish", "linear"), positions="rotary", scale_attention_logits=True, num_selected_experts=2,
        fused_sparse=("q_wi", "kv", "o_wo"), bidirectional_inputs=True, router_bias=True,
    ),
    "fused, dense, untied": dict(FUSED, num_sparse_decoder_layers=0, tie_word_embeddings=False, positions="rotary"),
    "fused, scanned": dict(
        FUSED, scan_layers=True, num_decoder_layers=4, num_sparse_decoder_layers=2, relative_attention_per_layer=True,
        fused_sparse=("kv",),
    ),
    "fused, by hash, gathered": dict(FUSED, router_type="hash", moe_executor="hit", num_experts=13, bidirectional_inputs=True),
    "special tokens": dict(pad_token_id=3, eos_token_id=5, decoder_start_token_id=7, zero_padding_activations=False),
}  # fmt: skip


def combined(**alternatives):
    """BASE with an alternative of some axes, given by number; raises ConfigError where they cannot go together."""
    changes = [AXES[name][number] for name, number in alternatives.items()]
    return BASE.replace(**{field: value for change in changes for field, value in change.items()})


# Alternatives that no config can have together: a router without parameters has none of a router's settings.
IMPOSSIBLE = {frozenset([("who chooses", 3), other]) for other in [("choices", 0), ("choices", 2), ("router", 0)]}


def possible(row):
    """Whether a config may have these alternatives together."""
    return not any(pair <= row.items() for pair in IMPOSSIBLE)


def pairwise():
    """Choices of an alternative for every axis, in which any two alternatives of two axes that may meet do so at least once."""
    names = list(AXES)
    places = [(name, number) for name in names for number in range(len(AXES[name]))]
    missing = {frozenset(pair) for pair in itertools.combinations(places, 2) if pair[0][0] != pair[1][0]} - IMPOSSIBLE
    rng, rows = np.random.default_rng(0), []

    def met(row, missing):
        return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)} & missing

    def grown(row, missing):
        """The row with every other axis's alternative that makes most pairs meet."""
        for name in rng.permutation([name for name in names if name not in row]):
            longer = [row | {str(name): number} for number in range(len(AXES[name]))]
            gains = np.array([len(met(row, missing)) if possible(row) else -1 for row in longer])
            row = row | {str(name): int(rng.choice(np.flatnonzero(gains == gains.max())))}
        return row

    while missing:
        first = dict(sorted(min(missing, key=sorted)))
        rows.append(max((grown(first, missing) for _ in range(20)), key=lambda row: len(met(row, missing))))
        missing -= met(rows[-1], missing)
    return rows


def lively_params(config, seed=0):
    """Parameters with which attention is sharp, routers are decided and outputs change from token to token."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(SwitchTransformer(config), jax.random.key(0)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        mean, deviation = (1.0, 0.3) if "scale" in name else (0.0, 1.0 if "embedding" in name else 0.5 if "bias" in name else 0.35)
        return np.asarray(rng.normal(mean, deviation, leaf.shape), np.float32).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return jax.device_put(params)


def sources(config, count=4, length=9, seed=1):
    """Ids and mask of sources of different lengths, padded on the right to one."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(8, config.vocab_size, (count, length)).astype(np.int32)
    lengths = [length, *rng.integers(2, length, count - 1)]
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    return np.where(mask, ids, config.pad_token_id).astype(np.int32), mask


class Uncached:
    """A model under the routing of generation, run over the whole prefix each time: no cache, no single steps.

    Experts have room for every token here and one-hot masks bring tokens to them, which is nothing of what generation runs.
    """

    def __init__(self, config, params, ids, mask, max_length, rows=3):
        plain = config.replace(
            ignore_padding_tokens=True, padding_semantics="masked", routing_group="sequence", moe_executor="einsum"
        )  # fmt: skip
        roomy = plain.replace(
            capacity_mode="factor", eval_capacity_factor=float(config.num_experts), batch_prioritized_routing=False
        )  # fmt: skip
        experts_choose = config.router_type == "experts_choose"
        encoder = SwitchTransformer(plain if experts_choose else roomy)
        decoder = SwitchTransformer(roomy.replace(router_type="tokens_choose") if experts_choose else roomy)
        self.config, self.params, self.mask, self.rows, self.max_length = config, params, mask, rows, max_length
        encode = jax.jit(lambda p: encoder.apply({"params": p}, ids, mask, method="encode").last_hidden_state)
        self.encoded = encode(params)

        @jax.jit
        def decode(params, tokens, encoded, mask):
            encoded, mask = (jnp.repeat(x[None], rows, axis=0) for x in (encoded, mask))
            output = decoder.apply({"params": params}, tokens, encoded, mask, method="decode")
            return output.logits, output.last_hidden_state

        self.decode = decode

    def logits(self, source, prefixes):
        """[len(prefixes), max_length, V]: place t holds the logits after t + 1 tokens of a prefix, whatever follows there."""
        return self._decoded(source, prefixes)[0]

    def _decoded(self, source, prefixes):
        filled = np.full((self.rows, self.max_length), self.config.pad_token_id, np.int32)
        for row, ids in enumerate(prefixes):
            filled[row, : len(ids)] = ids
        found = self.decode(self.params, filled, self.encoded[source], self.mask[source])
        return [np.asarray(x)[: len(prefixes)] for x in found]

    def log_probs(self, source):
        """What `textbook` asks for."""

        def next_log_probs(prefixes):
            logits = self.logits(source, prefixes)
            last = np.stack([logits[row, len(prefix) - 1] for row, prefix in enumerate(prefixes)]).astype(np.float64)
            return last - np.logaddexp.reduce(last, axis=-1, keepdims=True)

        return next_log_probs

    def run(self, source):
        """What `textbook.contrastive_search` asks for."""

        def log_probs_and_states(tokens):
            (logits,), (states,) = self._decoded(source, [tokens])
            last = logits[len(tokens) - 1].astype(np.float64)
            return last - np.logaddexp.reduce(last), states[: len(tokens)].astype(np.float64)

        return log_probs_and_states
