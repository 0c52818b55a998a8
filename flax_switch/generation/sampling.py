"""Greedy search and sampling: one more token for each row."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.logits import History, process_scores
from flax_switch.ops import Size


@flax.struct.dataclass
class Rows:
    """The state of greedy search or sampling for R rows."""

    tokens: Int[Array, "R T"]  # filled up to `length`; pad beyond
    length: Int[Array, ""]
    finished: Bool[Array, " R"]
    keys: Key[Array, " R"]  # one for each row, so that its draws do not depend on the rows beside it
    scores: Float[Array, "steps R V"] | None  # processed, by step, where asked for
    done: Bool[Array, ""]

    @property
    def newest(self) -> Int[Array, " R"]:
        """The tokens that the decoder has not seen yet."""
        return jax.lax.dynamic_index_in_dim(self.tokens, self.length - 1, axis=1, keepdims=False)

    def alive(self, controls: GenerationConfig) -> Bool[Array, " R"]:
        """Returns which rows go on."""
        return ~self.finished

    @property
    def ancestors(self) -> None:
        """Rows keep their own past."""
        return None


def start_rows(
    prefix: Int[Array, "R P"], keys: Key[Array, " R"], controls: GenerationConfig, vocab_size: int, max_length: Size
) -> Rows:
    """Returns rows of `max_length` places that hold the decoder's prefix."""
    R, P = prefix.shape
    tokens = jnp.pad(prefix, ((0, 0), (0, max_length - P)), constant_values=controls.pad_token_id)
    scores = jnp.zeros((controls.max_new_tokens, R, vocab_size)) if controls.output_scores else None
    return Rows(tokens, jnp.int32(P), jnp.zeros(R, bool), keys, scores, jnp.bool_(False))


def extend_rows(
    rows: Rows, logits: Float[Array, "R V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Rows:
    """Chooses the next token: the best one, or one drawn from the softmax of the processed scores. Finished rows get pad."""
    scores = process_scores(logits, history, controls, numbers)
    if controls.do_sample:
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, rows.length)
        token = jax.vmap(jax.random.categorical)(keys, scores)
    else:
        token = jnp.argmax(scores, axis=-1)
    assert controls.pad_token_id is not None  # `for_model` has filled it in
    token = jnp.where(rows.finished, controls.pad_token_id, token).astype(jnp.int32)
    finished = rows.finished | jnp.isin(token, jnp.asarray(controls.eos_token_id))
    step, length = rows.length - history.prefix_length, rows.length + 1
    return Rows(
        tokens=jax.lax.dynamic_update_slice_in_dim(rows.tokens, token[:, None], rows.length, axis=1),
        length=length,
        finished=finished,
        keys=rows.keys,
        scores=None if rows.scores is None else jax.lax.dynamic_update_index_in_dim(rows.scores, scores, step, axis=0),
        done=finished.all() | (length >= rows.tokens.shape[1]),
    )
