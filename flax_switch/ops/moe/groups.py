"""Routing groups: which tokens compete with each other for an expert's capacity.

A group is a sequence, or a fixed number of tokens: a matter of the config, never of the device count, so that the same batch
is routed the same way on any number of devices. flaxformer's rule, which does depend on devices, is a compatibility mode.
"""

import dataclasses
import math
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.ops import Size


@flax.struct.dataclass
class Grouping:
    """The way `[B, L, ...]` is cut into `[G, S, ...]`: padded to a larger batch and length, flattened, padded at its end, split."""

    batch: Size = flax.struct.field(pytree_node=False)
    length: Size = flax.struct.field(pytree_node=False)
    padded_batch: Size = flax.struct.field(pytree_node=False)  # flaxformer pads whole rows or columns
    padded_length: Size = flax.struct.field(pytree_node=False)
    num_groups: Size = flax.struct.field(pytree_node=False)  # G
    group_size: Size = flax.struct.field(pytree_node=False)  # S

    def group(self, x: Shaped[Array, "B L *rest"]) -> Shaped[Array, "G S *rest"]:
        """Cuts into groups; added places are zero (False)."""
        rest = x.shape[2:]
        none = [(0, 0)] * len(rest)
        if (self.padded_batch, self.padded_length) != (self.batch, self.length):
            x = jnp.pad(x, [(0, self.padded_batch - self.batch), (0, self.padded_length - self.length), *none])
        missing = self.num_groups * self.group_size - self.padded_batch * self.padded_length
        if missing:
            x = jnp.pad(x.reshape(-1, *rest), [(0, missing), *none])
        return x.reshape(self.num_groups, self.group_size, *rest)

    def ungroup(self, x: Shaped[Array, "G S *rest"]) -> Shaped[Array, "B L *rest"]:
        """Returns the inverse of `group`; added places are cut off."""
        rest = x.shape[2:]
        x = x.reshape(-1, *rest)[: self.padded_batch * self.padded_length]
        return x.reshape(self.padded_batch, self.padded_length, *rest)[: self.batch, : self.length]

    def splits(self, ways: int) -> bool:
        """Returns whether a batch cut into `ways` equal parts has whole groups in each of them, none of them padded."""
        full = self.num_groups * self.group_size == self.padded_batch * self.padded_length
        return full and self.padded_batch == self.batch and self.batch % ways == 0 and self.num_groups % ways == 0

    def part(self, ways: int) -> Self:
        """Returns the grouping of one of `ways` equal parts of the batch; only where it `splits`."""
        batch = self.batch // ways
        return dataclasses.replace(self, batch=batch, padded_batch=batch, num_groups=self.num_groups // ways)

    def counted(self) -> Bool[Array, "G S"] | None:
        """Returns which places take part in routing and losses; None if all do.

        Places added by flaxformer's rule count, as they do in flaxformer, where they are zero rows like any padding.
        """
        tokens = self.padded_batch * self.padded_length
        if self.num_groups * self.group_size == tokens:
            return None
        return (jnp.arange(self.num_groups * self.group_size) < tokens).reshape(self.num_groups, self.group_size)


def make_grouping(config: SwitchConfig, batch: Size, length: Size, *, replicas: int = 1) -> Grouping:
    """Returns the grouping of a batch of `batch` x `length` tokens.

    "sequence": each sequence is a group. "tokens": the flattened batch is cut into the fewest groups of at most
    `config.group_size` tokens and of equal size, the last one padded. "flaxformer": see `flaxformer_num_groups`; `replicas`
    counts the copies of each expert and matters for this rule only.
    """
    if config.routing_group == "sequence" or batch * length == 0:
        return Grouping(batch, length, batch, length, batch, length)
    known = isinstance(batch, int) and isinstance(length, int)
    check(known, f"routing_group={config.routing_group!r} needs to know how many tokens there are; use 'sequence'.")
    if config.routing_group == "tokens":
        num_groups = math.ceil(batch * length / config.group_size)
        return Grouping(batch, length, batch, length, num_groups, math.ceil(batch * length / num_groups))
    padded_batch, padded_length = flaxformer_padding(batch, length, config.num_experts, replicas)
    tokens = padded_batch * padded_length
    num_groups = flaxformer_num_groups(tokens, config.group_size, config.num_experts, replicas)
    return Grouping(batch, length, padded_batch, padded_length, num_groups, tokens // num_groups)


def rows_of_whole_groups(config: SwitchConfig, batch: int, parts: int, *lengths: int) -> int:
    """Returns how many neighbouring sequences to keep together when a batch is dealt out to `parts`, so that groups stay whole.

    lengths: of the sequences of each stack. Where no number suits them all and the batch, it is the first stack's that counts,
    then the next one's; 1 where groups are no matter of rows, or cannot stay whole.
    """
    if config.routing_group != "tokens":
        return 1
    sizes = [make_grouping(config, batch, length).group_size for length in lengths]
    rows = [size // math.gcd(size, length) for size, length in zip(sizes, lengths, strict=True)]
    return next((block for block in (math.lcm(*rows), *rows) if batch % (parts * block) == 0), 1)


def flaxformer_padding(batch: int, length: int, num_experts: int, replicas: int) -> tuple[int, int]:
    """Returns the batch and length that flaxformer pads to, so that all copies of all experts divide the number of tokens.

    It adds rows to the batch or columns to the length, whichever adds fewer tokens (columns if equal).
    """
    total = num_experts * replicas
    if batch * length % total == 0:
        return batch, length
    more_batch = -batch % (total // math.gcd(total, length))
    more_length = -length % (total // math.gcd(total, batch))
    if more_length * batch > more_batch * length:
        return batch + more_batch, length
    return batch, length + more_length


def flaxformer_num_groups(num_tokens: int, max_group_size: int, num_experts: int, replicas: int) -> int:
    """Returns the number of groups flaxformer makes: at least one for each copy of each expert, whatever the group size asked for.

    The smallest G >= max(num_tokens // max_group_size, copies) that divides the tokens and is a multiple of the copies. With 64
    experts on one device, 4096 tokens thus fall into 64 groups of 64.
    """
    copies = num_experts * replicas
    first = max(num_tokens // max_group_size, copies)
    fits = (g for g in range(first, num_tokens + 1) if num_tokens % g == 0 and g % copies == 0)
    num_groups = next(fits, None)
    if num_groups is not None:
        return num_groups
    raise ConfigError(
        f"routing_group='flaxformer' needs the {copies} copies of all experts to divide the {num_tokens} tokens of a batch; "
        "enlarge the batch or the length, or use routing_group='tokens' or 'sequence'."
    )


def flaxformer_replicas(num_experts: int) -> int:
    """Returns how many copies of each expert flaxformer would hold on the devices at hand, without model parallelism."""
    devices = jax.device_count()
    return devices // max(n for n in range(1, min(devices, num_experts) + 1) if devices % n == 0)
