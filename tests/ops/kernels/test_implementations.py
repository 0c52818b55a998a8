"""Every implementation of every operation says what its reference says, values and gradients, wherever it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import CASES, fused
from grouped_oracle import GROUPS, operands
from jax.sharding import PartitionSpec as P
from quantized_kernels import draw_int4, draw_int8, whole_rows

from flax_switch.config import ConfigError, MeshConfig
from flax_switch.host.expert_cache import ExpertCache
from flax_switch.ops.kernels import attention, exchange, few_rows, fused_attention, grouped, on_disk, projection, quantized, updates
from flax_switch.ops.kernels.grouped_choice import MOSAIC
from flax_switch.ops.mlp import mlp
from flax_switch.parallel.mesh import create_mesh

HIT = {  # which experts each row hits
    "one row, one choice": [[2]],
    "one row, two choices": [[3, 0]],
    "every row another expert": [[0], [1], [2], [3]],
    "all rows one expert, in several blocks": [[1]] * (2 * few_rows.BLOCK + 3),
    "a block and one more": [[2]] * (few_rows.BLOCK + 1) + [[0]],
    "top-2 of many": [[i % 4, (i + 1 + i // 4) % 4] for i in range(23)],
}


def with_gradients(function, *args):
    """What a function returns, and the gradients of its sum by seeded weights."""

    def weighted(*args):
        result = function(*args)
        return jnp.vdot(result, jnp.cos(jnp.arange(result.size)).reshape(result.shape)), result

    (_, result), gradients = jax.jit(jax.value_and_grad(weighted, argnums=tuple(range(len(args))), has_aux=True))(*args)
    return result, gradients


def exchanged(implementation, counts):
    mesh = create_mesh(MeshConfig(data=1, expert=4), jax.devices()[:4])
    peers, shipment = exchange.Peers("expert", 4), exchange.Shipment.of_all(jnp.asarray(counts, jnp.int32))
    send = lambda x: exchange.send_rows(x[0], shipment, 20, peers, implementation)[None]  # noqa: E731
    x = jnp.arange(4 * 9 * 3, dtype=jnp.float32).reshape(4, 9, 3)
    return with_gradients(jax.shard_map(send, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False), x)


def grouped_products(implementation, sizes):
    rows, gradient = grouped.IMPLEMENTATIONS[implementation]
    if implementation == "triton":
        rows = functools.partial(rows, interpret=True)
    if implementation in ("triton", "ragged_dot"):
        gradient = functools.partial(gradient, interpret=True)
    x, kernel, cotangent = operands(sizes, 24, 40, jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    products = (rows(x, kernel, sizes, transpose=False), rows(cotangent, kernel, sizes, transpose=True))
    return *products, gradient(x, cotangent, sizes)


def quantized_product(implementation, case):
    """Rows that 8 bits hold exactly: then whoever rounds them multiplies what the others do."""
    draw, rows, shape = case
    rng = np.random.default_rng(3)
    kernel = draw(rng, *shape)
    x = whole_rows(rng, *rows, kernel.shape[-2]) / 256
    return jax.jit(functools.partial(quantized.multiply_quantized, implementation=implementation))(x, kernel)


def quantized_groups(implementation, case):
    draw, sizes = case
    rng = np.random.default_rng(4)
    x = whole_rows(rng, sum(sizes) + 5, 64) / 256
    rows = functools.partial(grouped.grouped_matmul, implementation=implementation)
    if implementation == "triton":
        pytest.skip("it is interpreted in the test of floats, which it is given here, too")
    return jax.jit(rows)(x, draw(rng, len(sizes), 64, 40), jnp.asarray(sizes, jnp.int32))


def outputs_of_few(implementation, expert):
    rng = np.random.default_rng(1)
    stacked = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in (("wi_0", (4, 6, 10)), ("wi_1", (4, 6, 10)), ("wo", (4, 10, 6)))
    }
    unstacked = tuple({name: kernel[e] for name, kernel in stacked.items()} for e in range(4))
    experts = functools.partial(mlp, activations=("relu", "linear"))
    x = jnp.asarray(rng.normal(size=(len(expert), 6)), jnp.float32)
    run = functools.partial(few_rows.few_rows, mlp=experts, stacked=stacked, unstacked=unstacked, implementation=implementation)
    return jax.jit(run)(x, jnp.asarray(expert, jnp.int32))


def gradient_of_kernel(implementation, widths):
    x, gradient = (jnp.cos(jnp.arange(6 * n) + 1.0).reshape(2, 3, n) for n in widths)
    return jax.jit(functools.partial(projection.kernel_gradient, dtype=jnp.float32, implementation=implementation))(x, gradient)


def projected_transposed(implementation, rows):
    x, kernel = (jnp.cos(jnp.arange(n * 5) + 1.0).reshape(n, 5) for n in (rows, 7))
    return with_gradients(functools.partial(projection.project_transposed, implementation=implementation), x, kernel)


def attended(implementation, case):
    """Output and probabilities, both with a gradient. Some row has nothing to attend to."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, value, bias = draw(3, 2, 5, 4), draw(3, 2, 7, 4), draw(3, 2, 7, 4), draw(*case["bias"], 5, 7)
    mask = jnp.asarray(rng.random((3, 1, 5, 7)) < 0.6).at[1, :, 2].set(False) if case["mask"] else None
    keep = jnp.asarray((rng.random((3, 2, 1, 7)) < 0.5) * 2.0, jnp.float32) if case["dropout"] else None

    def both(query, key, value, bias):
        output, probs = attention.attend(query, key, value, bias, mask, keep, implementation=implementation)
        return jnp.concatenate([output.ravel(), probs.ravel() * case["probs"]])

    return with_gradients(both, query, key, value, bias)


def summed(table):
    def run(implementation, shape):
        weights, rows = (jnp.cos(jnp.arange(np.prod(shape) * n) + 1.0).reshape(*shape, n) for n in (6, 3))
        return table[implementation](*((weights, rows) if table is attention.SUMS_OVER_QUERIES else (weights,)))

    return run


def updated(implementation, condition):
    step = lambda old, gradient: {"w": old["w"] - gradient, "count": old["count"] + 1}  # noqa: E731
    old = {"w": jnp.arange(5.0), "count": jnp.int32(3)}
    run = jax.jit(lambda condition, gradient: updates.update_if(condition, step, old, gradient, implementation=implementation))
    result = run(condition, jnp.full(5, 0.5 if condition else jnp.nan))
    assert int(result["count"]) == 3 + condition
    return result


def fetched(implementation, dtype):
    arrays = {"wi/kernel": np.arange(24).reshape(3, 2, 4).astype(dtype), "wi/kernel_scale": np.ones((3, 4, 1), np.float32)}
    parts = {"layer": {name: (array.shape, array.dtype) for name, array in arrays.items()}}
    cache = ExpertCache(parts, lambda layer, e: ({name: array[e] for name, array in arrays.items()}, 0), 1000)
    held = on_disk.OnDisk(cache, "layer", "wi/kernel")
    fetch = functools.partial(on_disk.fetch_arrays, held, rows=jnp.ones(3, jnp.int32), implementation=implementation)
    every = [jax.jit(fetch)(jnp.int32(e)) for e in range(3)]
    jax.tree.map(np.testing.assert_array_equal, every[2], {name: array[2] for name, array in arrays.items()})
    return every


ATTENTION = {
    "plain": dict(bias=(1, 2), mask=False, dropout=False, probs=0.0),
    "masked, a bias for each row": dict(bias=(3, 2), mask=True, dropout=False, probs=0.0),
    "dropout, a bias for all heads": dict(bias=(1, 1), mask=True, dropout=True, probs=0.0),
    "gradient through the probabilities": dict(bias=(1, 2), mask=True, dropout=True, probs=1.0),
}
PRODUCTS = {"one row": ((1,), (64, 24)), "rows": ((2, 7), (128, 8)), "experts": ((3, 5), (3, 64, 24))}
COUNTS = {
    "uneven": [[3, 0, 2, 4], [0, 0, 0, 0], [5, 1, 1, 0], [2, 2, 2, 3]],
    "nothing": [[0] * 4] * 4,
    "all to one": [[0, 5, 0, 0]] * 4,
}
# Those for Hopper and Blackwell take 16-bit floats and wide kernels: test_grouped_mosaic.py. tokamax: test_grouped_choice.py.
GROUPED = [name for name in grouped.IMPLEMENTATIONS if name not in MOSAIC and name != "tokamax"]
OPERATIONS = {  # its implementations, how to run one on a case, its cases
    "send_rows": (exchange.IMPLEMENTATIONS, exchanged, COUNTS),
    "grouped_matmul": (GROUPED, grouped_products, GROUPS),
    "int8 product": (quantized.INT8, quantized_product, {name: (draw_int8, *case) for name, case in PRODUCTS.items()}),
    "int4 product": (quantized.INT4, quantized_product, {name: (draw_int4, *case) for name, case in PRODUCTS.items()}),
    "int8 groups": (GROUPED, quantized_groups, {name: (draw_int8, case) for name, case in GROUPS.items()}),
    "int4 groups": (GROUPED, quantized_groups, {"uneven": (draw_int4, [0, 3, 70, 1])}),
    "few_rows": (few_rows.IMPLEMENTATIONS, outputs_of_few, HIT),
    "fetch_arrays": (on_disk.IMPLEMENTATIONS, fetched, {"floats": np.float32, "integers": np.int8}),
    "kernel_gradient": (projection.KERNEL_GRADIENTS, gradient_of_kernel, {"wide": (4, 9), "narrow": (9, 4)}),
    "attend": (attention.IMPLEMENTATIONS, attended, ATTENTION),
    "fused_attention": (fused_attention.IMPLEMENTATIONS, fused, {case: case for case in CASES}),
    "sum over queries": (attention.SUMS_OVER_QUERIES, summed(attention.SUMS_OVER_QUERIES), {"4 rows": (2, 3, 5)}),
    "sum over the batch": (attention.SUMS_OVER_BATCH, summed(attention.SUMS_OVER_BATCH), {"4 rows": (2, 3, 5)}),
    "update_if": (updates.IMPLEMENTATIONS, updated, {"made": True, "left out": False}),
    "project_transposed": (projection.TRANSPOSED_PROJECTIONS, projected_transposed, {"one row": 1, "rows": 9}),
}
RUNS = [
    pytest.param(operation, name, case, id=f"{operation}, {name}, {case}")
    for operation, (implementations, _, cases) in OPERATIONS.items()
    for name in implementations
    for case in cases
    if name != "reference"
]


@pytest.mark.parametrize(("operation", "name", "case"), RUNS)
def test_every_implementation_says_what_the_reference_says(operation, name, case):
    if name == "ragged_all_to_all" and jax.default_backend() == "cpu":
        pytest.skip("XLA has no ragged all-to-all on CPUs")
    _, run, cases = OPERATIONS[operation]
    got, want = run(name, cases[case]), run("reference", cases[case])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), got, want)


def test_an_implementation_that_is_not_there_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="transposed_first"):
        projection.kernel_gradient(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.float32, implementation="transpose_first")
