"""Pure functions on arrays: the mathematics, free of Flax.

One letter is one axis, here and in every einsum and type annotation of the package:

    B batch        L length (Q queries, T keys)   D d_model      H heads          K head dimension
    F MLP width    V vocabulary                   G groups       S tokens per group
    E experts      C capacity of an expert        N experts chosen per token
"""

import jax
import numpy as np

from flax_switch.ops.kernels import Size as Size

AnyArray = jax.Array | np.ndarray  # what public functions take; inside, all arrays are JAX's
