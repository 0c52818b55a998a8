"""Pure functions on arrays: the mathematics, free of Flax.

One letter is one axis, here and in every einsum and type annotation of the package:

    B batch        L length (Q queries, T keys)   D d_model      H heads          K head dimension
    F MLP width    V vocabulary                   G groups       S tokens per group
    E experts      C capacity of an expert        N experts chosen per token
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import export

AnyArray = jax.Array | np.ndarray  # what public functions take; inside, all arrays are JAX's

# The size of an axis: a number, or in programs that are exported for any size a symbol.
if TYPE_CHECKING:
    Size = int
else:
    Size = int | type(export.symbolic_shape("n")[0])
