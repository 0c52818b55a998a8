"""Diverse beam search (Vijayakumar et al., 1610.02424): groups of beams, each of which is kept from what those before it say.

In every step the groups choose one after the other. A token costs the diversity penalty for each beam of the former groups that has
just chosen it (the paper's Hamming diversity), and the cost stays part of a beam's score, as in Hugging Face's search. Otherwise a
group is a beam search of its own; the best of all groups are returned.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.beam_search import Beams, extend_beams, start_beams, take
from flax_switch.generation.logits import History
from flax_switch.ops import Size


@flax.struct.dataclass
class Groups:
    """The state of a diverse search: that of each group. A source's rows are the beams of its first group, its second and so on."""

    groups: tuple[Beams, ...]
    prefix_length: Size = flax.struct.field(pytree_node=False)
    done: Bool[Array, ""]

    @property
    def tokens(self) -> Int[Array, "B J T"]:
        """All beams' tokens."""
        return jnp.concatenate([group.tokens for group in self.groups], axis=1)

    @property
    def length(self) -> Int[Array, ""]:
        """The places that are filled."""
        return self.groups[0].length

    @property
    def newest(self) -> Int[Array, " R"]:
        """The tokens that the decoder has not seen yet."""
        return jax.lax.dynamic_index_in_dim(self.tokens, self.length - 1, axis=2, keepdims=False).reshape(-1)

    @property
    def ancestors(self) -> Int[Array, "B J T"]:
        """The row of a source whose cache holds a beam's past, place by place."""
        _, size, T = self.groups[0].ancestors.shape
        own = jnp.arange(T)[None, None] >= (0 if self.prefix_length == 1 else self.prefix_length)  # a longer prefix lies at row 0
        return jnp.concatenate([group.ancestors + own * size * number for number, group in enumerate(self.groups)], axis=1)

    def alive(self, controls: GenerationConfig) -> Bool[Array, " R"]:
        """Returns which beams are possible and may still change what is found for their group."""
        B = self.groups[0].scores.shape[0]
        return jnp.concatenate([group.alive(controls).reshape(B, -1) for group in self.groups], axis=1).reshape(-1)


def start_groups(prefix: Int[Array, "B P"], keys: Key[Array, " B"], controls: GenerationConfig, vocab_size: int) -> Groups:
    """Returns groups of beams that hold the decoder's prefix."""
    group = start_beams(prefix, keys, controls, vocab_size)
    return Groups((group,) * controls.num_beam_groups, prefix.shape[1], jnp.bool_(False))


def extend_groups(
    state: Groups, logits: Float[Array, "R V"], history: History, controls: GenerationConfig, numbers: Mapping[str, Array]
) -> Groups:
    """Takes one step of each group, which knows what those before it choose in this step."""
    B, V = state.groups[0].scores.shape[0], logits.shape[-1]

    def part(x: Float[Array, "R V"], number: int) -> Float[Array, "r V"]:
        return x.reshape(B, len(state.groups), -1, V)[:, number].reshape(-1, V)

    assert controls.pad_token_id is not None  # `for_model` has filled it in
    said, extended = jnp.zeros((B, V)), []
    for number, group in enumerate(state.groups):
        size = group.scores.shape[1]
        own = dataclasses.replace(
            history,
            tokens=group.tokens.reshape(B * size, -1),
            allowed=None if history.allowed is None else part(history.allowed, number),
            said=jnp.repeat(said, size, axis=0),
        )
        after = extend_beams(group, part(logits, number), own, controls, numbers)
        # A group that is over says padding, as in Hugging Face's search.
        newest = jnp.where(group.going(controls)[:, None], after.newest.reshape(B, size), controls.pad_token_id)
        said = said.at[jnp.arange(B)[:, None], newest].add(1.0)
        extended.append(after)
    done = jnp.stack([group.done for group in extended]).all()
    return Groups(tuple(extended), state.prefix_length, done)


def best_of_groups(state: Groups) -> Beams:
    """Returns the finished beams of all groups as one's, best first; of beams with equal scores, the later group's first."""
    names = ("finished_tokens", "finished_scores", "finished_lengths")
    found = {name: jnp.concatenate([getattr(group, name) for group in reversed(state.groups)], axis=1) for name in names}
    _, best = jax.lax.top_k(found["finished_scores"], found["finished_scores"].shape[1])
    step_scores = state.groups[0].step_scores
    if step_scores is not None:
        (steps, _, V), B = step_scores.shape, best.shape[0]
        each = [group.step_scores.reshape(steps, B, -1, V) for group in state.groups if group.step_scores is not None]
        step_scores = jnp.concatenate(each, axis=2).reshape(steps, -1, V)
    return dataclasses.replace(state.groups[0], step_scores=step_scores, **{name: take(x, best) for name, x in found.items()})
