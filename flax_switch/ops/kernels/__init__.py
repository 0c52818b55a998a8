"""Operations with several implementations, and the only code that asks which platform a program is compiled for.

An operation is a function with one contract, in its docstring, a reference in plain jnp, implementations by name, and an argument
`implementation` that picks one; without it the default for the platform runs. One test, tests/ops/kernels/test_implementations.py,
runs them all.
"""

from typing import TYPE_CHECKING

from jax import export

# The size of an axis: a number, or in programs that are exported for any size a symbol.
if TYPE_CHECKING:
    Size = int
else:
    Size = int | type(export.symbolic_shape("n")[0])
