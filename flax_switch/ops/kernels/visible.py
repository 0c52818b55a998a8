"""Which keys a query may attend to: as what masks are made of, [B, L] each, and as the array [B, 1, Q, T] that they mean."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flax_switch.ops.kernels import Size


@flax.struct.dataclass
class Visible:
    """A query may attend to real keys, of its own segment and, where `causal`, not to its right.

    prefix_mask: of causal attention, positions that see each other nevertheless.
    """

    query_mask: Bool[Array, "B Q"] | None = None
    key_mask: Bool[Array, "B T"] | None = None
    prefix_mask: Bool[Array, "B T"] | None = None
    query_segments: Int[Array, "B Q"] | None = None
    key_segments: Int[Array, "B T"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def array(self, query_length: Size, key_length: Size) -> Bool[Array, "#B 1 #Q T"] | None:
        """Returns the mask of all pairs; None where every query sees every key."""
        mask = None

        def both(extra):
            return extra if mask is None else mask & extra

        if self.causal:
            causal = jnp.tril(jnp.ones((query_length, key_length), bool))[None, None]
            if self.prefix_mask is not None:
                causal = causal | (self.prefix_mask[:, None, :, None] & self.prefix_mask[:, None, None, :])
            mask = both(causal)
        if self.key_mask is not None:
            mask = both(self.key_mask[:, None, None, :])
        if self.query_mask is not None:
            mask = both(self.query_mask[:, None, :, None])
        if self.query_segments is not None and self.key_segments is not None:
            mask = both((self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        return mask

    def codes(self) -> tuple[Int[Array, "B Q"] | None, Int[Array, "B T"] | None]:
        """Returns numbers for queries and keys that are equal where masks and segments let one see the other; None for 0 alone."""
        by_segment = self.query_segments is not None and self.key_segments is not None

        def coded(mask, segments, masked):
            code = 2 * segments.astype(jnp.int32) if by_segment else None
            if mask is None:
                return code
            return jnp.where(mask, 0 if code is None else code, masked).astype(jnp.int32)

        # Odd numbers are no segment's, and of the two none is the other's.
        return coded(self.query_mask, self.query_segments, 1), coded(self.key_mask, self.key_segments, 3)
