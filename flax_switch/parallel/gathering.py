"""Parameters that lie in parts on the devices of a batch (`mesh.fsdp`): put together where they are used.

A parameter in parts is boxed before the model sees it, and the Flax module that declares it unboxes it: in its own layer, within a
scan and within what is computed again, so that a device holds one layer's parameters at a time. What is gathered has the dtype that
it is used in; gradients are added up, and each device keeps its part.
"""

from typing import Any, Self

import flax.struct
import jax
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flax_switch.parallel.mesh import BATCH_AXES, AnyMesh

_GATHERED = "gathered_parameter"  # the name of what was gathered
Shardings = tuple[NamedSharding, ...]
_PARTS = ("data", BATCH_AXES)  # what a dimension of a parameter in parts is split over


@flax.struct.dataclass
class InParts(meta.AxisMetadata[jax.Array]):
    """A parameter with the partition in which it lies."""

    value: Any
    spec: PartitionSpec = flax.struct.field(pytree_node=False)
    mesh: AnyMesh = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """Returns the whole parameter in its own dtype; its gradient, as that of a table's rows, is cut at once as they are."""
        return self._whole(self.value.dtype, _stages(self.spec)[:1])

    def whole(self, dtype: DTypeLike) -> jax.Array:
        """Returns a product's whole kernel in this dtype; its gradient, a sum over devices, is cut in the stages it came in."""
        return self._whole(dtype, _stages(self.spec)[-2::-1])

    def _whole(self, dtype: DTypeLike, back: tuple[PartitionSpec, ...]) -> jax.Array:
        shardings = (tuple(NamedSharding(self.mesh, spec) for spec in specs) for specs in (_stages(self.spec), back))
        return checkpoint_name(_gathered(self.value, jax.numpy.dtype(dtype), self.value.dtype, *shardings), _GATHERED)

    def replace_boxed(self, val: Any) -> Any:
        """Returns another value in the same parts."""
        return self.replace(value=val)  # pyright: ignore[reportAttributeAccessIssue] - flax.struct's

    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Returns the box of a stack of such parameters."""
        return self._with_spec((*self._padded(index)[:index], None, *self._padded(index)[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Returns the box of one parameter of a stack."""
        entries = self._padded(index + 1)
        return self._with_spec((*entries[:index], *entries[index + 1 :]))

    def _padded(self, length: int) -> tuple[Any, ...]:
        return (*self.spec, *(None,) * (length - len(self.spec)))

    def _with_spec(self, entries: tuple[Any, ...]) -> Self:
        return self.replace(spec=PartitionSpec(*entries))  # pyright: ignore[reportAttributeAccessIssue] - flax.struct's


def without_parts(spec: PartitionSpec) -> PartitionSpec:
    """Returns a partition without what fsdp adds to it."""
    return PartitionSpec(*(None if entry in _PARTS else entry for entry in spec))


def _stages(spec: PartitionSpec) -> tuple[PartitionSpec, ...]:
    """Returns the partitions on the way to the whole: one axis of the mesh less in each, the minor ones first.

    What is sent is the same as in one stage; but among all devices of a torus of three dimensions XLA for TPUs knows no all-gather
    and no reduce-scatter, and takes all-reduces, which send twice as much. A slice among several sends the others its small part.
    """
    fewer = PartitionSpec(*(BATCH_AXES[:1] if entry == BATCH_AXES else entry for entry in spec))
    return (spec, fewer, without_parts(spec)) if fewer != spec else (spec, without_parts(spec))


def keep_all_but_gathered(primitive: Any, *_: Any, **options: Any) -> bool:
    """Says what a remat policy keeps: everything that is not a parameter put together, which would be all layers' at once."""
    return primitive.name not in ("sharding_constraint", "all_gather") and options.get("name") != _GATHERED


def boxed(params: Any, shardings: Any) -> Any:
    """Boxes the parameters that lie in parts; those of experts, which have a device of their own, are left to `ops.moe`."""

    def box(x: Any, sharding: NamedSharding) -> Any:
        spec = sharding.spec
        return x if "expert" in spec or without_parts(spec) == spec else InParts(x, spec, sharding.mesh)

    return jax.tree.map(box, params, shardings)


def gathered(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Puts a device's part of a parameter together inside an SPMD body; its gradient, added up, is handed back in parts."""
    for dimension, entry in enumerate(spec):
        if entry in _PARTS:
            x = checkpoint_name(jax.lax.all_gather(x, entry, axis=dimension, tiled=True), _GATHERED)
    return x


def _put_together(x: jax.Array, dtype: Any, own: Any, there: Shardings, back: Shardings) -> jax.Array:
    return _through(x.astype(dtype), there)


def _through(x: jax.Array, shardings: Shardings) -> jax.Array:
    for sharding in shardings:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


def _forward(x: jax.Array, *statics: Any) -> tuple[jax.Array, None]:
    return _put_together(x, *statics), None  # a call of _gathered would hide from a remat policy what it may not keep


def _backward(dtype: Any, own: Any, there: Shardings, back: Shardings, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_through(gradient, back).astype(own),)


_gathered = jax.custom_vjp(_put_together, nondiff_argnums=(1, 2, 3, 4))
_gathered.defvjp(_forward, _backward)
