"""Keys and values, as they are projected and as the decoder's cache holds them: laid out for multiplication by few queries.

R rows decode in G groups of J (`beams`) whose past may be exchanged; without beams every row is a group. The T places of a group
hold a token of each of its rows: place t of row j is column t * J + j.
"""

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_switch.ops import Size
from flax_switch.ops.kernels import platforms
from flax_switch.ops.kernels.relative import relative_position_bias


@flax.struct.dataclass
class KeyValue:
    """Keys and values of one attention as they are projected."""

    key: Float[Array, "B T H K"]
    value: Float[Array, "B T H K"]


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of one attention, columns last: those of the source, [B, H, K, S], or of a group's past."""

    key: Float[Array, "G H K T"]
    value: Float[Array, "G H K T"]

    @classmethod
    def of(cls, new: KeyValue) -> Self:
        """Holds what was projected, each row as a group."""
        return cls(new.key.transpose(0, 2, 3, 1), new.value.transpose(0, 2, 3, 1))

    @classmethod
    def empty(cls, groups: Size, heads: int, width: int, columns: Size, dtype: DTypeLike) -> Self:
        """Returns a cache of zeros."""
        zeros = jnp.zeros((groups, heads, width, columns), dtype)
        return cls(zeros, zeros)

    def append(self, new: KeyValue, index: Int[Array, ""] | int) -> Self:
        """Writes the keys and values of L more tokens of each row from place `index` on."""
        beams = new.key.shape[0] // self.key.shape[0]

        def written(columns: Float[Array, "G H K T"], x: Float[Array, "R L H K"]) -> Float[Array, "G H K T"]:
            x = x.reshape(-1, beams, *x.shape[1:]).transpose(0, 3, 4, 2, 1)  # [G, H, K, L, J]
            x = x.reshape(*x.shape[:3], -1).astype(columns.dtype)
            return jax.lax.dynamic_update_slice_in_dim(columns, x, index * beams, axis=3)

        key, value = written(self.key, new.key), written(self.value, new.value)
        if platforms.target() == "cpu":
            # XLA would make two caches of a single group in every step, one that attention reads and one for the next step, and
            # copy all columns for both.
            key, value = jax.lax.optimization_barrier((key, value))
        return dataclasses.replace(self, key=key, value=value)

    def spread(self, groups: Size, beams: int, columns: Size) -> Self:
        """Copies the past of each row to its groups, at beam 0 of `beams`, with room for as many columns as `columns`."""

        def copied(x: Float[Array, "B H K P"]) -> Float[Array, "G H K T"]:
            x = jnp.repeat(x, groups // x.shape[0], axis=0)
            x = jnp.zeros((*x.shape, beams), x.dtype).at[..., 0].set(x).reshape(*x.shape[:3], -1)
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, columns - x.shape[-1])))

        return dataclasses.replace(self, key=copied(self.key), value=copied(self.value))


@flax.struct.dataclass
class LayerCache:
    """What one decoder layer keeps: its own past, and the source's keys and values, which are computed once."""

    past: KeyValueCache  # [G, H, K, T * J]
    source: KeyValueCache | None = None  # [B, H, K, S]; rows that share a source share them


@flax.struct.dataclass
class DecoderCache:
    """The caches of all decoder layers, how far they are filled and, with beams, whose past each row reads.

    ancestors: with beams, the number within its group of the row whose column a row reads at each place. Where beams change places,
      these numbers change, and no key is moved.
    """

    layers: tuple[LayerCache, ...]
    biases: tuple[Float[Array, "H relative"], ...]  # of `bias_table`: one for every layer, or one for all; or none
    index: Int[Array, ""]  # places filled
    ancestors: Int[Array, "G J T"] | None = None
    beams: int = flax.struct.field(pytree_node=False, default=1)  # J

    @property
    def max_length(self) -> Size:
        """T, the places of each row."""
        return self.layers[0].past.key.shape[-1] // self.beams

    @property
    def tokens(self) -> Int[Array, "#R 1"] | Int[Array, ""]:
        """How many tokens rows have."""
        return self.index

    def advanced(self, layers: tuple[LayerCache, ...], length: Size) -> Self:
        """Returns the cache after `length` more tokens of each row, which `layers` hold."""
        return dataclasses.replace(self, layers=layers, index=self.index + length)

    def after(self, prefix: Self) -> Self:
        """Fills this empty cache with what one row of each source has decoded: beams find it at beam 0, samples get a copy each."""
        layers = tuple(
            dataclasses.replace(layer, past=before.past.spread(layer.past.key.shape[0], self.beams, layer.past.key.shape[-1]))
            for layer, before in zip(self.layers, prefix.layers, strict=True)
        )
        return dataclasses.replace(self, layers=layers, index=prefix.index)

    def bias(self, layer: int, length: Size) -> Float[Array, "1 H length TJ"] | None:
        """Returns the relative position biases of the next `length` tokens in a layer, for every column; None without a table."""
        if not self.biases:
            return None
        table, T = self.biases[layer if len(self.biases) > 1 else 0], self.max_length
        if length == 1:
            bias = jax.lax.dynamic_slice_in_dim(table, T - 1 - self.index, T, axis=1)[:, None]
        else:
            bias = table[:, T - 1 - self.index + jnp.arange(T)[None] - jnp.arange(length)[:, None]]
        return jnp.repeat(bias, self.beams, axis=2)[None]

    def visible(self, mask: Bool[Array, "R T"] | None, length: Size, *, causal: bool = True) -> Bool[Array, "#G 1 #queries TJ"]:
        """Returns which of the columns that `mask` allows the next `length` tokens of a group's rows see, themselves included.

        causal: False lets these tokens see each other, as those of a prompt may.
        """
        T, J = self.max_length, self.beams
        last = jnp.arange(length)[:, None] if causal else length - 1
        seen = jnp.broadcast_to(jnp.arange(T)[None] <= self.index + last, (length, T))[None, None]
        seen = seen if mask is None else seen & mask.reshape(-1, J, 1, T)  # [G, J, L, T]
        if self.ancestors is not None:
            seen = seen[..., None] & jax.nn.one_hot(self.ancestors, J, dtype=bool)[:, :, None]  # [G, J, L, T, J]
        return seen.reshape(seen.shape[0], 1, -1, T * J)


@flax.struct.dataclass
class RingCache(DecoderCache):
    """A cache whose rows begin at different times: places are filled in a circle, and a row sees those that it filled itself.

    Biases go by distance alone, so a row may begin at any place. `index` is the next place of all rows, `lengths` how many of the
    places before it are a row's. The next call decodes one token of each row.
    """

    lengths: Int[Array, " R"] = flax.struct.field(kw_only=True)

    @classmethod
    def of(cls, empty: DecoderCache) -> Self:
        """Returns an empty cache, with a place for each row, as a circle."""
        rows = empty.layers[0].past.key.shape[0]
        return cls(empty.layers, empty.biases, empty.index, lengths=jnp.zeros(rows, jnp.int32))

    @property
    def tokens(self) -> Int[Array, "R 1"]:
        """How many tokens each row has."""
        return self.lengths[:, None]

    @property
    def distances(self) -> Int[Array, " T"]:
        """How many places each one lies before the next."""
        return (self.index - jnp.arange(self.max_length)) % self.max_length

    def advanced(self, layers: tuple[LayerCache, ...], length: Size) -> Self:
        """Returns the cache after one more token of each row."""
        lengths = jnp.minimum(self.lengths + length, self.max_length)
        return dataclasses.replace(self, layers=layers, index=(self.index + length) % self.max_length, lengths=lengths)

    def bias(self, layer: int, length: Size) -> Float[Array, "1 H 1 T"] | None:
        """Returns the relative position biases of the next token in a layer, for every place; None without a table."""
        if not self.biases:
            return None
        table = self.biases[layer if len(self.biases) > 1 else 0]
        return table[:, self.max_length - 1 - self.distances][None, :, None]

    def visible(self, mask: Bool[Array, "R T"] | None, length: Size, *, causal: bool = True) -> Bool[Array, "R 1 1 T"]:
        """Returns which places the next token of each row sees: the row's, and the one that the token takes, causal or not."""
        seen = self.distances[None] <= self.lengths[:, None]
        return (seen if mask is None else seen & mask)[:, None, None]


def bias_table(table: Float[Array, "H buckets"], max_length: Size, max_distance: int) -> Float[Array, "H relative"]:
    """Returns biases by distance: column T - 1 - d is for the key d places before the query; later keys are on the right."""
    last = max_length - 1
    bias = relative_position_bias(table, 1, 2 * max_length, bidirectional=False, max_distance=max_distance, query_offset=last)
    return bias[0, :, 0]  # a causal table puts later keys at distance 0
