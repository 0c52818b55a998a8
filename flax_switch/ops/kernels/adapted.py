"""Multiplies rows by a kernel with an adapter: its product and that of two narrow matrices, whatever form the kernel has."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_switch.ops.kernels.narrow import Narrow


@flax.struct.dataclass
class Adapted:
    """A kernel, or a stack of them, with an adapter: used where an array [..., D, F] would be.

    It stands for `(base + a b) * gain`, which is never computed: `base` may be integers, or in bfloat16, which a small addition
    would not change.
    """

    base: Any  # an array, `Quantized` or `Narrow`; the first leaf, as its shape is the parameter's
    a: Float[Array, "..."]  # [..., D, r]
    b: Float[Array, "..."]  # [..., r, F], scaled already
    gain: Float[Array, "..."] | None = None  # [..., 1, F]: what DoRA multiplies columns by

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The kernel's dtype."""
        return self.base.dtype

    def astype(self, dtype: DTypeLike) -> Self:
        """Returns it with all parts in a dtype."""
        cast = lambda part: None if part is None else part.astype(dtype)  # noqa: E731
        return dataclasses.replace(self, base=cast(self.base), a=cast(self.a), b=cast(self.b), gain=cast(self.gain))

    def __getitem__(self, index: Any) -> Self:
        """Returns some kernels of a stack."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def multiplied(self, x: Array, product: Callable[[Array, Any], Array]) -> Array:
        """Returns `product(x, kernel)`, of a product of rows and kernels that is linear in both."""
        y = product(x, self.base) + product(product(x, self.a), self.b)
        # A kernel of one row gives every row the gains of its expert, however the product sorts rows by experts.
        return y if self.gain is None else y * product(jnp.ones_like(x[..., :1]), self.gain)


def whole(kernel: Any) -> Any:
    """Returns a kernel as one array; it is for small ones, and those with several axes of inputs or outputs."""
    if not isinstance(kernel, Adapted):
        return kernel
    base = kernel.base.values if isinstance(kernel.base, Narrow) else kernel.base
    added = kernel.a @ kernel.b
    total = base.reshape(added.shape) + added
    return (total if kernel.gain is None else total * kernel.gain).reshape(base.shape)
