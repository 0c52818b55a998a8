"""Fused attention in plain JAX: loops over blocks of queries and of keys, whose logits are forgotten as soon as they were used.

The forward pass keeps of every row of logits its maximum and the sum of its exponentials; the backward pass makes the weights again
of these. Blocks that no query of theirs sees are passed over.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flax_switch.ops.kernels.attention import MASKED, sum_over_batch

BLOCK = 512
BLOCK_BYTES = 2**26  # of a block's logits, over batch and heads; blocks are not made smaller than 128 for that


class Operands(NamedTuple):
    """What all passes read. Codes are equal where a query may see a key, and None where all are 0."""

    query: Float[Array, "B H Q K"]
    key: Float[Array, "B H T K"]
    value: Float[Array, "B H T K"]
    diagonals: Float[Array, "H distances"] | None  # the bias by distance, key minus query, from 1 - Q to T - 1
    query_code: Int[Array, "B Q"] | None
    key_code: Int[Array, "B T"] | None
    prefix: Bool[Array, "B T"] | None


class Tiles(NamedTuple):
    """How an axis is cut: into `count` blocks of `size` places, the last of which may lie beyond its `length`."""

    length: int
    size: int
    count: int

    @property
    def missing(self) -> int:
        """Places beyond the axis."""
        return self.size * self.count - self.length

    def place(self, i: Array) -> Int[Array, " size"]:
        """Returns the places of block i."""
        return i * self.size + jnp.arange(self.size)


def tiles(length: int, most: int, multiple: int = 8) -> Tiles:
    """Cuts an axis into as few equal blocks as blocks of `most` would be."""
    size = math.ceil(math.ceil(length / math.ceil(length / most)) / multiple) * multiple
    return Tiles(length, size, math.ceil(length / size))


def block_size(operands: Operands) -> int:
    """Returns how large blocks may be."""
    B, H = operands.query.shape[:2]
    return next((size for size in (BLOCK, 256) if B * H * size * size * 4 <= BLOCK_BYTES), 128)


class _Blocks:
    """The operands cut into blocks, each read by its number."""

    def __init__(self, operands: Operands, causal: bool, block: int | None):
        most = block or block_size(operands)
        self.queries, self.keys = tiles(operands.query.shape[2], most), tiles(operands.key.shape[2], most)
        self.operands, self.causal = operands, causal
        self.query = self.padded(operands.query, self.queries, 2)
        self.key, self.value = (self.padded(x, self.keys, 2) for x in (operands.key, operands.value))
        self.query_code = self.padded(operands.query_code, self.queries, 1)
        self.key_code = self.padded(operands.key_code, self.keys, 1)
        self.query_prefix = self.padded(operands.prefix, self.queries, 1)
        self.key_prefix = self.padded(operands.prefix, self.keys, 1)
        # A block's distances begin at first key - last query; counted from those of the last queries and first keys.
        self.diagonals = self.padded(operands.diagonals, self.keys, 1, before=self.queries.missing)

    @staticmethod
    def padded(x: Any, cut: Tiles, axis: int, fill: float = 0, before: int = 0) -> Any:
        """Fills an axis up to whole blocks."""
        if x is None or not (before or cut.missing):
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, cut.missing)
        return jnp.pad(x, widths, constant_values=fill)

    @staticmethod
    def read(x: Array, cut: Tiles, i: Array, axis: int) -> Array:
        """Returns block i."""
        return lax.dynamic_slice_in_dim(x, i * cut.size, cut.size, axis)

    def visible(self, i: Array, j: Array) -> Bool[Array, "#B 1 #q #t"] | None:
        """Returns which keys of block j the queries of block i may attend to."""
        seen = None
        if self.causal:
            query, key = self.queries.place(i), self.keys.place(j)
            seen = (key[None] <= query[:, None])[None]
            if self.query_prefix is not None:
                query, key = self.read(self.query_prefix, self.queries, i, 1), self.read(self.key_prefix, self.keys, j, 1)
                seen = seen | (query[:, :, None] & key[:, None, :])
        if self.query_code is not None or self.key_code is not None:
            query = 0 if self.query_code is None else self.read(self.query_code, self.queries, i, 1)[:, :, None]
            key = 0 if self.key_code is None else self.read(self.key_code, self.keys, j, 1)[:, None, :]
            same = jnp.equal(query, key)
            seen = same if seen is None else seen & same
        return None if seen is None else seen[:, None]

    def window_start(self, i: Array, j: Array) -> Array:
        """Returns where the distances of a block begin among all."""
        return j * self.keys.size - i * self.queries.size + (self.queries.count - 1) * self.queries.size

    @property
    def window(self) -> int:
        """How many distances a block has."""
        return self.queries.size + self.keys.size - 1

    def logits(self, i: Array, j: Array, query: Array, key: Array, visible: Array | None) -> Float[Array, "B H q t"]:
        """Returns the logits of a block; minus infinity beyond the last key."""
        logits = jnp.einsum("BHQK,BHTK->BHQT", query, key, preferred_element_type=jnp.float32)
        if self.diagonals is not None:
            values = lax.dynamic_slice_in_dim(self.diagonals, self.window_start(i, j), self.window, 1)
            logits += along_diagonals(values, self.queries.size, self.keys.size)[None]
        if visible is not None:
            logits += jnp.where(visible, 0.0, MASKED)
        if self.keys.missing:
            logits = jnp.where(self.keys.place(j)[None, None, None] < self.keys.length, logits, -jnp.inf)
        return logits

    def where_seen(self, visible: Array | None, peak: Array, step: Any, carry: Any) -> Any:
        """Makes a step for a block in which a pair sees each other, or a query may see nothing: its mean is of all keys."""
        if visible is None:
            return step(carry)
        return lax.cond(visible.any() | (peak <= MASKED / 2).any(), step, lambda carry: carry, carry)


def along_diagonals(values: Float[Array, "H distances"], rows: int, columns: int) -> Float[Array, "H q t"]:
    """Lays values by distance, from 1 - rows to columns - 1, out as an array whose diagonals are equal."""
    heads, width = values.shape[0], rows + columns
    # Row a begins at distance -a. Rows of `width`, read again with one place less: each starts one further to the left.
    turned = jnp.roll(jnp.pad(values, [(0, 0), (0, 1)]), 1 - rows, axis=1)
    laid = jnp.broadcast_to(turned[:, None], (heads, rows, width)).reshape(heads, -1)
    return laid[:, : rows * (width - 1)].reshape(heads, rows, width - 1)[..., :columns]


def sum_diagonals(x: Float[Array, "H q t"]) -> Float[Array, "H distances"]:
    """Returns the sum of every diagonal: the transpose of `along_diagonals`."""
    heads, rows, columns = x.shape
    width = rows + columns
    laid = jnp.pad(x, [(0, 0), (0, 0), (0, rows - 1)]).reshape(heads, -1)
    summed = jnp.pad(laid, [(0, 0), (0, rows)]).reshape(heads, rows, width).sum(1)
    return jnp.roll(summed, rows - 1, axis=1)[:, : width - 1]


def forward(operands: Operands, *, causal: bool, block: int | None = None) -> tuple[Array, Array, Array]:
    """Returns the output [B, H, Q, K], and of every row of logits the maximum and the sum of its exponentials, [B, H, Q]."""
    cut = _Blocks(operands, causal, block)
    B, H, Q, K = operands.query.shape
    size, dtype = cut.queries.size, operands.value.dtype

    def of_queries(i):
        query = cut.read(cut.query, cut.queries, i, 2)

        def of_keys(carry, j):
            visible = cut.visible(i, j)

            def step(carry):
                peak, total, output = carry
                logits = cut.logits(i, j, query, cut.read(cut.key, cut.keys, j, 2), visible)
                highest = jnp.maximum(peak, logits.max(-1))
                weights, shrunk = jnp.exp(logits - highest[..., None]), jnp.exp(peak - highest)
                value = cut.read(cut.value, cut.keys, j, 2)
                new = jnp.einsum("BHQT,BHTK->BHQK", weights.astype(dtype), value, preferred_element_type=jnp.float32)
                return highest, total * shrunk + weights.sum(-1), output * shrunk[..., None] + new

            return cut.where_seen(visible, carry[0], step, carry), None

        start = (jnp.full((B, H, size), -jnp.inf), jnp.zeros((B, H, size)), jnp.zeros((B, H, size, K)))
        (peak, total, output), _ = lax.scan(of_keys, start, jnp.arange(cut.keys.count))
        return (output / total[..., None]).astype(dtype), peak, total

    def joined(x):
        return jnp.moveaxis(x, 0, 2).reshape(B, H, -1, *x.shape[4:])[:, :, :Q]

    return jax.tree.map(joined, lax.map(of_queries, jnp.arange(cut.queries.count)))


def backward(
    operands: Operands, peak: Array, total: Array, delta: Array, d_output: Array, *, causal: bool, block: int | None = None
) -> tuple[Array, Array, Array, Array | None]:
    """Returns gradients of query, key, value and diagonals in float32.

    delta: for every row the sum of its weights times their gradients, which is output times its gradient.
    """
    cut, dtype = _Blocks(operands, causal, block), operands.query.dtype
    B, H, _, K = operands.query.shape
    d_output, delta = (cut.padded(x, cut.queries, 2) for x in (d_output, delta))
    peak, scale = cut.padded(peak, cut.queries, 2, fill=1e30), cut.padded(1 / total, cut.queries, 2)
    # A CPU's fast products take no transposed left factor (ops/kernels/projection), and the rows are the smaller to transpose.
    turned_query, turned_output = (lax.optimization_barrier(x.swapaxes(2, 3)) for x in (cut.query, d_output))
    d_query = jnp.zeros(cut.query.shape, jnp.float32)
    d_diagonals = None if cut.diagonals is None else jnp.zeros(cut.diagonals.shape, jnp.float32)

    def of_keys(carry, j):
        key, value = (cut.read(x, cut.keys, j, 2) for x in (cut.key, cut.value))

        def of_queries(carry, i):
            visible, row_peak = cut.visible(i, j), cut.read(peak, cut.queries, i, 2)
            part = lambda x, axis=2: cut.read(x, cut.queries, i, axis)  # noqa: E731

            def step(carry):
                d_query, d_diagonals, d_key, d_value = carry
                logits = cut.logits(i, j, part(cut.query), key, visible)
                weights = jnp.exp(logits - row_peak[..., None]) * part(scale)[..., None]
                d_weights = jnp.einsum("BHQK,BHTK->BHQT", part(d_output), value, preferred_element_type=jnp.float32)
                d_logits = weights * (d_weights - part(delta)[..., None])
                products = d_logits.astype(dtype)
                d_value += _turned_product(part(turned_output, 3), weights.astype(value.dtype))
                d_key += _turned_product(part(turned_query, 3), products)
                new = jnp.einsum("BHQT,BHTK->BHQK", products, key, preferred_element_type=jnp.float32)
                d_query = _add_at(d_query, new, i * cut.queries.size, 2)
                if d_diagonals is not None:
                    d_diagonals = _add_at(d_diagonals, sum_diagonals(sum_over_batch(d_logits)), cut.window_start(i, j), 1)
                return d_query, d_diagonals, d_key, d_value

            return cut.where_seen(visible, row_peak, step, carry), None

        zeros = jnp.zeros((B, H, K, cut.keys.size), jnp.float32)
        (d_query, d_diagonals, d_key, d_value), _ = lax.scan(
            of_queries, (*carry, zeros, zeros), jnp.arange(cut.queries.count)
        )  # fmt: skip
        return (d_query, d_diagonals), (d_key, d_value)

    (d_query, d_diagonals), turned = lax.scan(of_keys, (d_query, d_diagonals), jnp.arange(cut.keys.count))
    d_key, d_value = (jnp.moveaxis(x, 0, 3).reshape(B, H, K, -1).swapaxes(2, 3)[:, :, : cut.keys.length] for x in turned)
    if d_diagonals is not None:
        d_diagonals = d_diagonals[:, cut.queries.missing : d_diagonals.shape[1] - cut.keys.missing]
    return d_query[:, :, : cut.queries.length], d_key, d_value, d_diagonals


def _turned_product(rows: Float[Array, "B H K q"], weights: Float[Array, "B H q t"]) -> Float[Array, "B H K t"]:
    return jnp.einsum("BHKQ,BHQT->BHKT", rows, weights, preferred_element_type=jnp.float32)


def _add_at(x: Array, new: Array, start: Array, axis: int) -> Array:
    """Adds `new` to the places of an axis from `start` on."""
    old = lax.dynamic_slice_in_dim(x, start, new.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + new, start, axis)
