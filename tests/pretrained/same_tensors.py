"""Trees of parameters, compared to the bit."""

import numpy as np

from flax_switch.convert.canonical import flatten


def assert_same(one, other):
    """Asserts equal paths, dtypes and bits."""
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other[path]), err_msg=path)
