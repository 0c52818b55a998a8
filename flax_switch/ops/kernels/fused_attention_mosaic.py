"""Fused attention on TPUs: Pallas kernels, compiled by Mosaic, that hold a block of logits at a time and its biases by distance.

Everything is turned: features before positions, and a block of logits has keys in rows and queries in columns. What belongs to a
query, its maximum and sum, is then a row, positions fill the lanes whatever K is, and three of five products need no transposition.
A block's biases are one row, the bias by distance, rotated in row b by b; their gradient is rotated back, and added up.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from flax_switch.ops.kernels.attention import MASKED
from flax_switch.ops.kernels.fused_attention_blocks import Operands, Tiles, tiles

BLOCK, LANES, SUBLANES = 512, 128, 8
MEMORY = 64 * 2**20  # bytes of a core's own memory that a kernel may take

_ROWS = (((0,), (0,)), ((), ()))  # a contraction of rows with rows
_COLUMNS = (((1,), (1,)), ((), ()))


class _Cut:
    """How the operands are cut into blocks, and laid out for the kernels."""

    def __init__(self, operands: Operands, causal: bool, block: int | None):
        multiple = LANES if block is None else SUBLANES
        self.queries = tiles(operands.query.shape[2], block or BLOCK, multiple)
        self.keys = tiles(operands.key.shape[2], block or BLOCK, multiple)
        self.operands, self.causal = operands, causal
        self.unit = math.gcd(self.queries.size, self.keys.size)

    @property
    def width(self) -> int:
        """How many distances a block has, and one."""
        return self.queries.size + self.keys.size

    @property
    def windows(self) -> int:
        """How many different rows of distances blocks have."""
        last = (self.keys.count - 1) * self.keys.size + (self.queries.count - 1) * self.queries.size
        return last // self.unit + 1

    def window(self, i: Any, j: Any) -> Any:
        """Returns the number of a block's row of distances."""
        return j * (self.keys.size // self.unit) + (self.queries.count - 1 - i) * (self.queries.size // self.unit)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where among the biases by distance each number of every row is: rows begin with the last key and first query."""
        first = np.arange(self.windows)[:, None] * self.unit - (self.queries.count - 1) * self.queries.size
        distance = first + self.keys.size - 1 - np.arange(self.width)[None]
        return np.clip(distance + self.queries.length - 1, 0, self.queries.length + self.keys.length - 2)

    def turned(self, x: Array, cut: Tiles) -> Array:
        """Returns [B, H, L, K] as [B, H, K, L], filled up to whole blocks."""
        return jnp.pad(x.swapaxes(2, 3), [(0, 0), (0, 0), (0, 0), (0, cut.missing)])

    def row(self, x: Array, fill: float = 0) -> Array:
        """Returns numbers of queries, [B, H, Q], as rows."""
        return jnp.pad(x[:, :, None], [(0, 0), (0, 0), (0, 0), (0, self.queries.missing)], constant_values=fill)

    def inputs(self) -> dict[str, tuple[Array, tuple[int | None, ...], Any]]:
        """Returns what every kernel reads, by name: the array, a block's shape, and a function from b, h, i, j to its place."""
        given, queries, keys = self.operands, self.queries, self.keys
        K = given.query.shape[3]
        found: dict[str, tuple[Array, tuple[int | None, ...], Any]] = {
            "query": (self.turned(given.query, queries), (None, None, K, queries.size), lambda b, h, i, j: (b, h, 0, i)),
            "key": (self.turned(given.key, keys), (None, None, K, keys.size), lambda b, h, i, j: (b, h, 0, j)),
            "value": (self.turned(given.value, keys), (None, None, K, keys.size), lambda b, h, i, j: (b, h, 0, j)),
        }
        if given.diagonals is not None:
            rows = given.diagonals[:, self.places][:, :, None]
            found["distances"] = (rows, (None, None, 1, self.width), lambda b, h, i, j: (h, self.window(i, j), 0, 0))
        codes = {"code": (given.query_code, given.key_code), "prefix": (given.prefix, given.prefix)}
        for name, (of_queries, of_keys) in codes.items():
            if of_queries is None and of_keys is None:
                continue
            B = given.query.shape[0]
            one = jnp.zeros((B, queries.length), jnp.int32) if of_queries is None else of_queries.astype(jnp.int32)
            other = jnp.zeros((B, keys.length), jnp.int32) if of_keys is None else of_keys.astype(jnp.int32)
            one = jnp.pad(one, [(0, 0), (0, queries.missing)])[:, None]
            other = jnp.pad(other, [(0, 0), (0, keys.missing)])[:, :, None]
            found[f"query_{name}"] = (one, (None, 1, queries.size), lambda b, h, i, j: (b, 0, i))
            found[f"key_{name}"] = (other, (None, keys.size, 1), lambda b, h, i, j: (b, j, 0))
        return found

    def of_queries(self, x: Array) -> tuple[Array, tuple[int | None, ...], Any]:
        """Returns an input of numbers of queries, [B, H, 1, Q]."""
        return x, (None, None, 1, self.queries.size), lambda b, h, i, j: (b, h, 0, i)

    def logits(self, refs: dict[str, Any], i: Any, j: Any) -> Array:
        """Returns the logits of a block, [t, q]; minus infinity beyond the last key."""
        q, t = self.queries.size, self.keys.size
        logits = lax.dot_general(refs["key"][...], refs["query"][...], _ROWS, preferred_element_type=jnp.float32)
        if "distances" in refs:
            row = jnp.broadcast_to(refs["distances"][...], (t, self.width))
            logits += pltpu.roll(row, self.width - t + 1, 1, stride=1, stride_axis=0)[:, :q]
        key = j * t + lax.broadcasted_iota(jnp.int32, (t, q), 0)
        seen = None
        if self.causal:
            seen = key <= i * q + lax.broadcasted_iota(jnp.int32, (t, q), 1)
            if "query_prefix" in refs:
                seen |= (refs["key_prefix"][...] * refs["query_prefix"][...]) > 0
        if "query_code" in refs:
            same = refs["key_code"][...] == refs["query_code"][...]
            seen = same if seen is None else seen & same
        if seen is not None:
            logits += jnp.where(seen, 0.0, MASKED)
        if self.keys.missing:
            logits = jnp.where(key < self.keys.length, logits, -jnp.inf)
        return logits

    def needed(self, refs: dict[str, Any], i: Any, j: Any, peak: Any) -> Any:
        """Returns whether a block may have a pair that sees each other, or a query that sees nothing, whose mean is of all keys."""
        if not self.causal or "query_prefix" in refs:
            return jnp.bool_(True)
        return (j * self.keys.size < (i + 1) * self.queries.size) | (jnp.min(peak) <= MASKED / 2)


def _call(kernel: Any, cut: _Cut, inputs: dict[str, Any], outputs: Sequence[Any], scratch: Sequence[Any], **options: Any) -> Any:
    """Runs a kernel whose arguments are the references to its inputs by name, to its outputs and to what it keeps."""
    order, grid, semantics, name, interpret = (options[k] for k in ("order", "grid", "semantics", "name", "interpret"))

    def spec(shape, place):
        return pl.BlockSpec(shape, lambda *numbers: place(*order(*numbers)))

    def body(*refs):
        return kernel(cut, dict(zip(inputs, refs, strict=False)), *refs[len(inputs) :])

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec(*rest) for _, *rest in inputs.values()],
        out_specs=[spec(*rest) for _, *rest in outputs],
        out_shape=[shape for shape, *_ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=MEMORY),
        interpret=interpret,
        name=name,
    )(*(array for array, *_ in inputs.values()))


def forward(operands: Operands, *, causal: bool, block: int | None = None, interpret: bool = False) -> tuple[Array, Array, Array]:
    """Does what `fused_attention_blocks.forward` does."""
    cut = _Cut(operands, causal, block)
    (B, H, Q, K), q, count = operands.query.shape, cut.queries.size, cut.queries.count
    row = jax.ShapeDtypeStruct((B, H, 1, q * count), jnp.float32)
    rows = (row, (None, None, 1, q), lambda b, h, i, j: (b, h, 0, i))
    turned = jax.ShapeDtypeStruct((B, H, K, q * count), operands.value.dtype)
    output, peak, total = _call(
        _forward_kernel,
        cut,
        cut.inputs(),
        [(turned, (None, None, K, q), lambda b, h, i, j: (b, h, 0, i)), rows, rows],
        [(1, q), (1, q), (K, q)],
        order=lambda b, h, i, j: (b, h, i, j),
        grid=(B, H, count, cut.keys.count),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        name="fused_attention",
        interpret=interpret,
    )
    return output.swapaxes(2, 3)[:, :, :Q], peak[:, :, 0, :Q], total[:, :, 0, :Q]


def _forward_kernel(cut, refs, output_ref, peak_ref, total_ref, highest, summed, weighted):
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        highest[...] = jnp.full_like(highest, -jnp.inf)
        summed[...] = jnp.zeros_like(summed)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(cut.needed(refs, i, j, highest[...]))
    def _():
        logits = cut.logits(refs, i, j)
        before = highest[...]
        peak = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
        weights, shrunk = jnp.exp(logits - peak), jnp.exp(before - peak)
        value = refs["value"][...]
        highest[...] = peak
        summed[...] = summed[...] * shrunk + jnp.sum(weights, axis=0, keepdims=True)
        weighted[...] = weighted[...] * shrunk + jnp.dot(value, weights.astype(value.dtype), preferred_element_type=jnp.float32)

    @pl.when(j == cut.keys.count - 1)
    def _():
        output_ref[...] = (weighted[...] / summed[...]).astype(output_ref.dtype)
        peak_ref[...] = highest[...]
        total_ref[...] = summed[...]


def backward(
    operands: Operands,
    peak: Array,
    total: Array,
    delta: Array,
    d_output: Array,
    *,
    causal: bool,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None]:
    """Does what `fused_attention_blocks.backward` does."""
    cut = _Cut(operands, causal, block)
    (B, H, Q, K), q, t = operands.query.shape, cut.queries.size, cut.keys.size
    inputs = cut.inputs() | {
        "d_output": (cut.turned(d_output, cut.queries), (None, None, K, q), lambda b, h, i, j: (b, h, 0, i)),
        "peak": cut.of_queries(cut.row(peak, 1e30)),
        "scale": cut.of_queries(cut.row(1 / total)),
        "delta": cut.of_queries(cut.row(delta)),
    }
    queries, keys = (jax.ShapeDtypeStruct((B, H, K, x.size * x.count), jnp.float32) for x in (cut.queries, cut.keys))
    of_keys = (keys, (None, None, K, t), lambda b, h, i, j: (b, h, 0, j))
    outputs = [(queries, (None, None, *queries.shape[2:]), lambda b, h, i, j: (b, h, 0, 0)), of_keys, of_keys]
    if operands.diagonals is not None:
        shape = (H, cut.windows, SUBLANES, cut.width)
        outputs.append((jax.ShapeDtypeStruct(shape, jnp.float32), (None, *shape[1:]), lambda b, h, i, j: (h, 0, 0, 0)))
    d_query, d_key, d_value, *d_rows = _call(
        _backward_kernel,
        cut,
        inputs,
        outputs,
        [],
        # One head after the other, and its whole batch: its gradients by distance stay in memory meanwhile.
        order=lambda h, b, j, i: (b, h, i, j),
        grid=(H, B, cut.keys.count, cut.queries.count),
        semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        name="fused_attention_gradient",
        interpret=interpret,
    )
    d_diagonals = None
    if operands.diagonals is not None:
        zeros = jnp.zeros(operands.diagonals.shape, jnp.float32)
        rows = sum(jnp.roll(d_rows[0][:, :, b], t - 1 - b, axis=2) for b in range(SUBLANES))
        d_diagonals = zeros.at[:, cut.places].add(rows)
    d_query, d_key, d_value = (x.swapaxes(2, 3) for x in (d_query, d_key, d_value))
    return d_query[:, :, :Q], d_key[:, :, : cut.keys.length], d_value[:, :, : cut.keys.length], d_diagonals


def _backward_kernel(cut, refs, d_query, d_key, d_value, d_rows=None):
    b, j, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    q, width = cut.queries.size, cut.width
    here = pl.ds(pl.multiple_of(i * q, q), q)

    @pl.when(i == 0)
    def _():
        d_key[...] = jnp.zeros_like(d_key)
        d_value[...] = jnp.zeros_like(d_value)

    @pl.when(j == 0)
    def _():
        d_query[:, here] = jnp.zeros((d_query.shape[0], q), jnp.float32)

    if d_rows is not None:

        @pl.when((b == 0) & (j == 0) & (i == 0))
        def _():
            d_rows[...] = jnp.zeros_like(d_rows)

    @pl.when(cut.needed(refs, i, j, refs["peak"][...]))
    def _():
        weights = jnp.exp(cut.logits(refs, i, j) - refs["peak"][...]) * refs["scale"][...]
        key, query, value, d_output = (refs[name][...] for name in ("key", "query", "value", "d_output"))
        d_weights = lax.dot_general(value, d_output, _ROWS, preferred_element_type=jnp.float32)
        d_logits = weights * (d_weights - refs["delta"][...])
        products = d_logits.astype(query.dtype)
        d_value[...] += lax.dot_general(d_output, weights.astype(value.dtype), _COLUMNS, preferred_element_type=jnp.float32)
        d_key[...] += lax.dot_general(query, products, _COLUMNS, preferred_element_type=jnp.float32)
        d_query[:, here] += jnp.dot(key, products, preferred_element_type=jnp.float32)
        if d_rows is not None:
            d_rows[cut.window(i, j)] += _rotated_back(d_logits, width)


def _rotated_back(x: Array, width: int) -> Array:
    """Returns for each sublane b the sum over g of rows 8 g + b, rotated to the left by 8 g among `width` places.

    What is left to do is a rotation by b, to be done once for all blocks.
    """
    rows, columns = x.shape
    total = jnp.zeros((SUBLANES, width), jnp.float32)
    for first in reversed(range(0, rows, SUBLANES)):
        part = jnp.concatenate([x[first : first + SUBLANES], jnp.zeros((SUBLANES, width - columns), jnp.float32)], axis=1)
        total = pltpu.roll(total, width - SUBLANES, 1) + part
    return total
