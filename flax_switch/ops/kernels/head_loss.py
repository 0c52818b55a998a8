"""Cross-entropy of a language model's head, whose logits [B, L, V] need not be whole.

    whole     all logits at once: what small ones are fastest as
    chunks    some tokens at a time, each chunk's gradients computed while its logits are there; nothing of them is kept

A chunk takes the products that whole logits take, none twice. Over a mesh every device goes through its own tokens with its own
part of the vocabulary, and what the parts have to tell each other is four numbers a token.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from flax_switch.ops.kernels import platforms
from flax_switch.ops.kernels.floats import floats_of
from flax_switch.ops.kernels.projection import project, project_transposed
from flax_switch.ops.kernels.quantized import Kernel
from flax_switch.parallel.mesh import BATCH_AXES, batch_ways, partition_spec
from flax_switch.parallel.placement import OnMesh, Placement

# How many logits of one device are made at a time, in float32: on a CPU what its caches hold (4 MiB), elsewhere what keeps products
# large (64 MiB). WHOLE are no slower at once on either. docs/scaling.md has what was measured.
WHOLE = 2**20
CHUNKS = {"cpu": 2**20, "other": 2**24}


@flax.struct.dataclass
class Head:
    """What a language model's logits are made of: states, and the head's kernel."""

    states: Float[Array, "B L D"]
    kernel: Kernel  # [D, V]; of a head tied to the embeddings [V, D]
    vocab_size: int = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)  # what states are multiplied by
    tied: bool = flax.struct.field(pytree_node=False)
    devices: Placement = flax.struct.field(pytree_node=False)

    def logits(self) -> Float[Array, "B L V"]:
        """Returns logits in float32: bfloat16 logits make training unstable."""
        return self.multiplied(self.states, self.kernel.astype(jnp.float32))

    def multiplied(self, states: Float[Array, "*B D"], kernel: Any) -> Float[Array, "*B V"]:
        """Returns the logits of some states, by the kernel in float32 or some of its vocabulary."""
        states = states.astype(jnp.float32)
        states = states if self.scale == 1.0 else states * self.scale
        return project_transposed(states, kernel) if self.tied else project(states, kernel)

    def split(self) -> PartitionSpec:
        """Returns how the kernel lies on a mesh: an array's vocabulary is cut, other forms are whole."""
        if not isinstance(self.devices, OnMesh) or not isinstance(self.kernel, jax.Array):
            return PartitionSpec()
        axes = ("vocab", None) if self.tied else (None, "vocab")
        return partition_spec(axes, self.kernel.shape, self.devices.mesh)


@flax.struct.dataclass
class Known:
    """What is kept of a teacher: the probabilities of some ids of each token. What the others have, they have together."""

    ids: Int[Array, "B L k"]  # of a token no two alike
    probs: Float[Array, "B L k"]


class HeadLosses(NamedTuple):
    """What a head's predictions cost; of "chunks" `loss` alone has gradients."""

    loss: Float[Array, ""]  # the weighted sum over tokens
    cross_entropy: Float[Array, "B L"]  # of each token, against its target
    z_loss: Float[Array, "B L"]
    hits: Float[Array, "B L"] | None  # 1 where the target has the highest logit (of equal ones the first); None: not asked for


class Terms(NamedTuple):
    """What a token's loss is made of."""

    z_loss: float = 0.0  # times logsumexp(logits)**2
    label_smoothing: float = 0.0
    teacher_weight: float = 0.0  # the share of cross-entropy that is taken against a teacher's probabilities
    with_hits: bool = False


def head_loss(
    head: Head,
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    terms: Terms,
    *,
    teacher: Head | Known | None = None,
    implementation: str | None = None,
) -> HeadLosses:
    """Returns the weighted sum of tokens' losses, and the losses themselves; all in float32.

    teacher: of the same vocabulary, or what is known of one, with a share of `terms.teacher_weight`; no gradient reaches it.
    implementation: one of IMPLEMENTATIONS; by default "chunks" where a device's logits are more than WHOLE.
    """
    tokens, vocabulary = _local_sizes(head, targets.shape)
    default = "whole" if tokens * vocabulary <= WHOLE else "chunks"
    teacher = None if terms.teacher_weight == 0.0 else teacher
    bound = {name: functools.partial(compute, terms) for name, compute in IMPLEMENTATIONS.items()}
    return platforms.run(bound, {"other": default}, implementation, head, teacher, targets, weights)


def _local_sizes(head: Head, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns how many tokens and how much of the vocabulary a device has."""
    tokens, vocabulary, devices = math.prod(shape), head.vocab_size, head.devices
    if isinstance(devices, OnMesh):
        tokens //= batch_ways(devices.mesh) if shape[0] % batch_ways(devices.mesh) == 0 else 1
        vocabulary //= devices.mesh.shape["model"] if "model" in head.split() else 1
    return tokens, vocabulary


def token_cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns cross-entropy of each token, and its z-loss (z_loss * logsumexp(logits)**2); both in float32.

    With label smoothing the entropy of the smoothed target is subtracted, so that a perfect prediction costs 0. Source: T5X.
    """
    logits = logits.astype(jnp.float32)  # sums over V lose too much in bfloat16
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_z - target_logit
    if label_smoothing:
        on, off, entropy = _smoothed(label_smoothing, logits.shape[-1])
        cross_entropy = log_z - (on - off) * target_logit - off * logits.sum(-1) - entropy
    return cross_entropy, z_loss * jnp.square(log_z)


def soft_cross_entropy(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T k"], probs: Float[Array, "B T k"]
) -> Float[Array, "B T"]:
    """Returns the cross-entropy against probabilities of some ids and, as one more class, of all the others together.

    With every id it is that against the whole distribution. With fewer the student learns how much the others have together, and
    not which of them has how much.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    total = -(probs * jnp.take_along_axis(log_probs, ids, -1)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return total
    others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
    return total - jnp.maximum(1 - probs.sum(-1), 0) * jax.nn.logsumexp(others, axis=-1)


def _smoothed(label_smoothing: float, vocabulary: int) -> tuple[float, float, float]:
    """Returns the probabilities of a smoothed target and of each other token, and the distribution's entropy."""
    on, off = 1.0 - label_smoothing, label_smoothing / (vocabulary - 1)
    return on, off, -(on * math.log(on) + (vocabulary - 1) * off * math.log(off + 1e-20))


def _whole(terms: Terms, head: Head, teacher: Head | Known | None, targets: Array, weights: Array) -> HeadLosses:
    logits = head.logits()
    cross_entropy, z_loss = token_cross_entropy(logits, targets, z_loss=terms.z_loss, label_smoothing=terms.label_smoothing)
    wanted = cross_entropy
    if teacher is not None:
        if isinstance(teacher, Known):
            soft = soft_cross_entropy(logits, teacher.ids, teacher.probs)
        else:
            probs = jax.nn.softmax(lax.stop_gradient(teacher.logits()))
            soft = -(probs * jax.nn.log_softmax(logits)).sum(-1)
        wanted = cross_entropy + terms.teacher_weight * (soft - cross_entropy)
    hits = (logits.argmax(-1) == targets).astype(jnp.float32) if terms.with_hits else None
    return HeadLosses((wanted * weights).sum() + (z_loss * weights).sum(), cross_entropy, z_loss, hits)


class _Found(NamedTuple):
    """What going through tokens finds: of each its losses, and of their weighted sum the gradients, where these are asked for."""

    loss: Array
    cross_entropy: Array
    z_loss: Array
    hits: Array | None
    states: Array | None
    kernel: list[Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(terms: Terms, head: Head, teacher: Head | Known | None, targets: Array, weights: Array) -> HeadLosses:
    return _of(_on_devices(terms, head, teacher, targets, weights, gradients=False), weights)


def _of(found: _Found, weights: Array) -> HeadLosses:
    return HeadLosses((found.loss * weights).sum(), found.cross_entropy, found.z_loss, found.hits)


def _chunks_forward(terms, head, teacher, targets, weights):
    found = _on_devices(terms, head, teacher, targets, weights, gradients=True)
    gradient = floats_of(head.kernel)[2](found.kernel)
    # The casts' gradients: sums over chunks and devices were made in float32.
    gradient = jax.tree.map(
        lambda g, k: None if g is None else g.astype(k.dtype), gradient, head.kernel, is_leaf=lambda x: x is None
    )
    return _of(found, weights), (dataclasses.replace(head, states=found.states, kernel=gradient), found.loss)


def _chunks_backward(terms, residuals, cotangent):
    head, losses = residuals
    scaled = jax.tree.map(lambda g: (g * cotangent.loss).astype(g.dtype), head)
    return scaled, None, None, losses * cotangent.loss


_chunks.defvjp(_chunks_forward, _chunks_backward)

IMPLEMENTATIONS = {"whole": _whole, "chunks": _chunks}


class _Axes(NamedTuple):
    """Which axes of a mesh, if any, tokens and the vocabulary are cut over."""

    batch: tuple[str, ...] = ()
    vocabulary: str | None = None

    def sum(self, x: Array) -> Array:
        """Adds up what parts of the vocabulary have."""
        return x if self.vocabulary is None else lax.psum(x, self.vocabulary)

    def max(self, x: Array) -> Array:
        """Returns the largest of all parts."""
        return x if self.vocabulary is None else lax.pmax(x, self.vocabulary)


def _on_devices(
    terms: Terms, head: Head, teacher: Head | Known | None, targets: Array, weights: Array, *, gradients: bool
) -> _Found:
    """Goes through the tokens where they lie: over a mesh each device through its own."""
    if not isinstance(head.devices, OnMesh):
        return _in_turn(terms, _Axes(), gradients, head, teacher, targets, weights)
    mesh = head.devices.mesh
    axes = BATCH_AXES if targets.shape[0] % batch_ways(mesh) == 0 else ()
    batch, kernel = PartitionSpec(axes or None), head.split()
    if isinstance(teacher, Head) and ("model" in kernel) != ("model" in teacher.split()):
        kernel = PartitionSpec()
    of_teacher: Any = None if teacher is None else batch
    if isinstance(teacher, Head):
        of_teacher = dataclasses.replace(teacher, states=batch, kernel=teacher.split() if "model" in kernel else PartitionSpec())
    body = functools.partial(_in_turn, terms, _Axes(axes, "model" if "model" in kernel else None), gradients)
    # check_vma would ask the scan to state over which axes its carry varies; nothing here is differentiated.
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(dataclasses.replace(head, states=batch, kernel=kernel), of_teacher, batch, batch),
        out_specs=_Found._make([batch] * 5 + [kernel]),
        check_vma=False,
    )(head, teacher, targets, weights)


def _in_turn(terms: Terms, axes: _Axes, gradients: bool, *arrays: Any) -> _Found:
    """Goes through a device's tokens, in chunks of the platform's size."""
    head = arrays[0]
    vocabulary = head.vocab_size if axes.vocabulary is None else head.vocab_size // lax.axis_size(axes.vocabulary)
    sized = {name: functools.partial(_scan, terms, axes, gradients, size // vocabulary) for name, size in CHUNKS.items()}
    return platforms.run(sized, {name: name for name in sized}, None, *arrays)


def _scan(
    terms: Terms, axes: _Axes, gradients: bool, rows: int, head: Head, teacher: Head | Known | None, targets: Array, weights: Array
) -> _Found:
    """Goes through tokens, some rows at a time, and sums the kernel's gradient in float32."""
    floats, with_floats, _ = floats_of(head.kernel.astype(jnp.float32))
    of_teacher = teacher.kernel.astype(jnp.float32) if isinstance(teacher, Head) else None

    def chunk(total: list[Array], piece: tuple[Array, Any, Array, Array]):
        states, said, targets, weights = piece
        multiply = lambda states, floats: head.multiplied(states, with_floats(floats))  # noqa: E731
        logits, pull = jax.vjp(multiply, states.astype(jnp.float32), floats)
        if isinstance(teacher, Head):
            said = teacher.multiplied(said, of_teacher)
        losses, slope = _chunk_losses(terms, axes, head.vocab_size, logits, said, targets, weights)
        if not gradients:
            return total, _Found(*losses, None, [])
        of_states, of_floats = pull(slope)
        if axes.vocabulary is None:
            of_states = of_states.astype(states.dtype)
        return jax.tree.map(jnp.add, total, of_floats), _Found(*losses, of_states, [])

    pieces, join = _cut(rows, (head.states, teacher.states if isinstance(teacher, Head) else teacher, targets, weights))
    total, found = lax.scan(chunk, [jnp.zeros_like(x) for x in floats] if gradients else [], pieces)
    found = jax.tree.map(join, found)
    if not gradients:
        return found
    total = lax.psum(total, axes.batch) if axes.batch else total
    states = axes.sum(found.states).astype(head.states.dtype)
    return found._replace(states=states, kernel=total)


def _cut(rows: int, arrays: Any) -> tuple[Any, Any]:
    """Returns arrays [B, L, ...] as [chunks, tokens, ...], with zeros behind the last, and a function that joins one again."""
    B, L = arrays[0].shape[:2]
    chunks = max(1, math.ceil(B * L / max(1, rows)))
    tokens = 8 * math.ceil(B * L / (8 * chunks))  # whole tiles

    def cut(x: Array) -> Array:
        x = x.reshape(B * L, *x.shape[2:])
        x = jnp.pad(x, [(0, chunks * tokens - B * L), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(chunks, tokens, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(chunks * tokens, *x.shape[2:])[: B * L].reshape(B, L, *x.shape[2:])

    return jax.tree.map(cut, arrays), join


def _chunk_losses(
    terms: Terms, axes: _Axes, vocab_size: int, logits: Array, teacher: Array | Known | None, targets: Array, weights: Array
) -> tuple[tuple[Array, Array, Array, Array | None], Array]:
    """Returns losses of tokens from their logits, by a part of the vocabulary, and the logits' gradient of their weighted sum.

    teacher: its logits, by the same part, or what is known of it.
    """
    first = 0 if axes.vocabulary is None else lax.axis_index(axes.vocabulary) * logits.shape[1]
    is_target = targets[:, None] == first + jnp.arange(logits.shape[1], dtype=targets.dtype)[None]
    largest = axes.max(logits.max(-1))
    odds = jnp.exp(logits - largest[:, None])
    sums = [odds.sum(-1), jnp.where(is_target, logits, 0).sum(-1), logits.sum(-1)]
    taught = left = None  # what the teacher gives each id, and the odds of those of which it is not known
    if isinstance(teacher, Known):
        taught, left = _known(teacher, odds, first)
        sums += [taught.sum(-1), (taught * logits).sum(-1), left.sum(-1)]
    elif teacher is not None:
        taught = jnp.exp(teacher - axes.max(teacher.max(-1))[:, None])
        sums += [taught.sum(-1), (taught * logits).sum(-1)]
    odds_sum, target_logit, logit_sum, *others = axes.sum(jnp.stack(sums))
    log_z = largest + jnp.log(odds_sum)
    on, off, entropy = _smoothed(terms.label_smoothing, vocab_size) if terms.label_smoothing else (1.0, 0.0, 0.0)
    cross_entropy = log_z - (on - off) * target_logit - off * logit_sum - entropy
    z_loss = terms.z_loss * jnp.square(log_z)
    own, wanted, target = 1.0, cross_entropy, jnp.where(is_target, on, off)
    if taught is not None:
        if isinstance(teacher, Known) and left is not None:  # what is known and the rest sum to 1
            rest = jnp.maximum(1 - others[0], 0) if teacher.ids.shape[-1] < vocab_size else jnp.zeros_like(others[0])
            left_sum = jnp.where(rest > 0, jnp.maximum(others[2], jnp.finfo(jnp.float32).tiny), 1.0)
            soft = log_z - others[1] - rest * (largest + jnp.log(left_sum))
            taught += left * (rest / left_sum)[:, None]
        else:
            soft, taught = log_z - others[1] / others[0], taught / others[0][:, None]
        own = 1.0 - terms.teacher_weight
        wanted = own * cross_entropy + terms.teacher_weight * soft
        target = own * target + terms.teacher_weight * taught
    pull = (1.0 + 2.0 * terms.z_loss * log_z) / odds_sum
    slope = (odds * pull[:, None] - target) * weights[:, None]
    hits = _hits(axes, first, largest, logits, targets) if terms.with_hits else None
    return (wanted + z_loss, cross_entropy, z_loss, hits), slope


def _known(teacher: Known, odds: Array, first: Any) -> tuple[Array, Array]:
    """Returns the known probabilities [tokens, V], and the odds of the other ids; V: a part of the vocabulary, from `first` on."""
    tokens, vocabulary = odds.shape
    place = teacher.ids - first
    place = jnp.where((place >= 0) & (place < vocabulary), place, vocabulary)
    put = (jnp.arange(tokens)[:, None], place)
    return jnp.zeros_like(odds).at[put].set(teacher.probs, mode="drop"), odds.at[put].set(0, mode="drop")


def _hits(axes: _Axes, first: Any, largest: Array, logits: Array, targets: Array) -> Array:
    best = first + logits.argmax(-1).astype(targets.dtype)
    if axes.vocabulary is not None:
        none = jnp.iinfo(targets.dtype).max
        best = lax.pmin(jnp.where(logits.max(-1) == largest, best, none), axes.vocabulary)
    return (best == targets).astype(jnp.float32)
