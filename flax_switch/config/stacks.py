"""The stacks of a model as its config describes them: how many layers each has, and which of them are sparse."""

from __future__ import annotations

import dataclasses

from flax_switch.config.base import check

LAYOUTS = ("bottom", "middle", "mixed", "top", "huggingface")


def sparse_layers(layout: str, num_layers: int, num_sparse: int) -> tuple[int, ...]:
    """Indices of the sparse layers of a stack of `num_layers` with `num_sparse` of them sparse.

    `bottom`, `middle`, `mixed` and `top` are flaxformer's layouts. `huggingface` is transformers' rule
    (step = num_layers // num_sparse, sparse if i % step == 1 or step == 1), odd cases included: it may build another number
    of sparse layers than was asked for.
    """
    n, m = num_layers, num_sparse
    if layout == "huggingface":
        step = n // m if m > 0 else n
        return tuple(i for i in range(n) if step > 0 and (i % step == 1 or step == 1))
    check(0 <= m <= n, f"{m} sparse layers do not fit a stack of {n} layers; lower the number of sparse layers.")
    if m == 0:
        return ()
    if layout == "bottom":
        return tuple(range(m))
    if layout == "top":
        return tuple(range(n - m, n))
    if layout == "middle":
        return tuple(i for i in range(n) if n - m <= 2 * i < n + m)
    check(
        n % m == 0,
        f"sparse_layout='mixed' spreads sparse layers evenly, so their number must divide the number of layers; {m} does not "
        f"divide {n}. Change either number, or take another sparse_layout.",
    )
    return tuple(i for i in range(n) if i % (n // m) == n // m - 1)


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A view of one stack of a model: how many layers it has, and which of them are sparse."""

    name: str  # "encoder" or "decoder"
    num_layers: int
    sparse_layers: tuple[int, ...]  # their indices
    attends_to_source: bool = False  # whether its layers have cross-attention
    projections: tuple[str, ...] = ()  # that a fused sparse layer has experts in, each with a router; else the MLP has them

    @property
    def causal(self) -> bool:
        """Whether attention is causal."""
        return self.name == "decoder"

    @property
    def num_sparse(self) -> int:
        """How many layers are sparse."""
        return len(self.sparse_layers)

    @property
    def routers(self) -> tuple[str, ...]:
        """What the routers are called in the order of a model's outputs: "decoder 1", or of fused layers "decoder 1 q_wi"."""
        return tuple(f"{self.name} {i} {part}".rstrip() for i in self.sparse_layers for part in self.projections or ("",))

    @property
    def block_size(self) -> int | None:
        """The number of layers in the repeating block, whose last layer is sparse if any is; None if no block repeats."""
        if not self.sparse_layers:
            return 1
        size, rest = divmod(self.num_layers, self.num_sparse)
        return size if rest == 0 and self.sparse_layers == tuple(range(size - 1, self.num_layers, size)) else None

    @property
    def num_blocks(self) -> int | None:
        """How often the block repeats; None if none does."""
        return None if self.block_size is None else self.num_layers // self.block_size

    @property
    def why_not_blocks(self) -> str:
        """The reason that errors give when a stack has no repeating block."""
        return f"the {self.name}'s sparse layers {self.sparse_layers} of {self.num_layers} do not repeat"
