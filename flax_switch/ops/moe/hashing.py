"""Hash routing (Hash Layers, 2106.04426): a token's id alone says which expert takes it, in every layer; nothing is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NEVER = -1e9  # a logit whose probability is exactly 0 in float32


def hash_logits(token_ids: Int[Array, "G S"], *, vocab_size: int, num_experts: int, seed: int) -> Float[Array, "G S E"]:
    """Returns logits whose softmax is 1 for the expert of each token's id and 0 for all others."""
    expert = jnp.asarray(expert_of_id(vocab_size, num_experts, seed))[token_ids]
    return jnp.where(jax.nn.one_hot(expert, num_experts, dtype=bool), 0.0, NEVER)


@functools.cache
def expert_of_id(vocab_size: int, num_experts: int, seed: int) -> np.ndarray:
    """Returns the expert of every id [V]: ids are shuffled by the seed and dealt out, so no expert has two more than another.

    The order is that of murmur3's 32-bit finaliser, a bijection, because NumPy may change what its generators draw from a seed.
    """
    word = np.arange(vocab_size, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        word = (word ^ (word >> np.uint32(shift))) * np.uint32(factor)
    expert = np.empty(vocab_size, np.int32)
    expert[np.argsort(word)] = np.arange(vocab_size) % num_experts
    return expert
