"""Grouped products as one float64 product for each group, for every implementation of them."""

import jax.numpy as jnp
import numpy as np

GROUPS = {
    "around block sizes": [0, 1, 63, 64, 65, 255],
    "all to one": [0, 0, 300, 0],
    "none": [0, 0, 0],
    "one expert": [17],
    "one row": [0, 1, 0, 0],
    "many blocks": [700, 3, 0, 650],
}


def operands(sizes, inputs, outputs, dtype, spare=5):
    """Rows [R, D], kernels [E, D, F] and a cotangent [R, F]; `spare` rows belong to no group."""
    rng = np.random.default_rng(0)
    num_rows = sum(sizes) + spare
    shapes = (num_rows, inputs), (len(sizes), inputs, outputs), (num_rows, outputs)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def relative_error(got, want):
    return np.linalg.norm(np.float64(got) - want) / max(np.linalg.norm(want), 1e-30)


def assert_products(sizes, x, kernel, cotangent, product, dx, dkernel):
    """The product and the gradients of rows and kernels, group by group by relative error; spare rows are zero."""
    tolerance = 1e-5 if x.dtype == jnp.float32 else 1e-2
    assert product.dtype == dx.dtype == dkernel.dtype == x.dtype
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows, matrix, gradient = np.float64(x[start:end]), np.float64(kernel[e]), np.float64(cotangent[start:end])
        assert relative_error(product[start:end], rows @ matrix) < tolerance, e
        assert relative_error(dx[start:end], gradient @ matrix.T) < tolerance, e
        assert relative_error(dkernel[e], rows.T @ gradient) < tolerance, e
    np.testing.assert_array_equal(product[ends[-1] :], 0)
    np.testing.assert_array_equal(dx[ends[-1] :], 0)
