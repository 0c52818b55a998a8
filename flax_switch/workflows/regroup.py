"""A model with fewer experts, kept or merged by how text used them, or with more; and what it cost on text that decided nothing."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_switch.config import ConfigError, ExperimentConfig, SwitchConfig, check, one_of
from flax_switch.config.finetuning import FinetuneConfig, FinetuneDataConfig
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.convert.checkpoint import Checkpoint, companion_files, open_checkpoint, source_identity, write_checkpoint
from flax_switch.convert.folder import DEFAULT_SHARD_SIZE, claimed, local_destination
from flax_switch.convert.regroup import KEPT_BY, Groups, expert_layers, grouped, with_fewer, with_more
from flax_switch.data.batches import Batch
from flax_switch.data.pipeline import prepare
from flax_switch.data.tasks import prepare_tasks
from flax_switch.ops.kernels.head_loss import Terms, head_loss
from flax_switch.ops.losses import IGNORED_LABEL
from flax_switch.pretrained import Pretrained
from flax_switch.pretrained.loading import from_checkpoint
from flax_switch.training.checkpoint import CONFIG_FILE, read_config

FORMATS = ("flax_switch", "huggingface")  # that can be written
TOKENS = 8192  # of a layer, spread over the text, by which its experts are judged


@dataclasses.dataclass(frozen=True)
class Regrouped:
    """Where a model was written, and the cross-entropy in nats a token before and after; None where no text was looked at."""

    path: Path
    before: float | None = None
    after: float | None = None


def fewer(
    source: str | Path,
    destination: str | Path,
    *,
    num_experts: int,
    merge: bool,
    keep: str = "usage",
    examples: FinetuneDataConfig | None = None,
    batches: int = 32,
    seed: int = 0,
    to: str = "flax_switch",
    **writing: Any,
) -> Regrouped:
    """Writes a model with `num_experts` of its experts in every sparse layer, by how held-out text uses them.

    Args:
      merge: average the other experts into those that are kept; else leave them out.
      keep: "usage" keeps the experts with the largest share of the tokens' weights; "random" any, drawn by `seed`, to compare with.
      examples: texts with targets, as `validation`; None: the held-out examples of the run that the source is.
      batches: how many of those are read; every other one decides, and the rest says what it cost.
      writing: `changes`, `allow_missing`, `revision`, `verify`, `max_shard_size`, `overwrite`, `on_bytes` and `on_open`, as for
        `convert`.

    Raises:
      ConfigError: for a model whose experts cannot be made fewer, for text that is missing or too little.
    """
    one_of("keep", keep, KEPT_BY)
    one_of("to", to, FORMATS)
    with claimed(destination := local_destination(destination)):
        opened = _opened(source, writing)
        layers, config = expert_layers(opened), opened.config
        check(
            config.num_selected_experts <= num_experts < config.num_experts,
            f"num_experts must be at least the {config.num_selected_experts} that a token chooses and less than the "
            f"{config.num_experts} that there are; it is {num_experts}.",
        )
        model = from_checkpoint(dataclasses.replace(opened, config=_as_measured(config)))
        read = list(itertools.islice(_batches(source, model, examples), batches))
        check(len(read) >= 2, f"The held-out text fills {len(read)} batches; it takes two, one to decide by and one to judge by.")
        logits = router_logits(model, read[::2])
        rng = np.random.default_rng([seed, zlib.crc32(b"experts")])
        groups: dict[str, Groups] = {
            layer: grouped(found, config, num_experts, merge=merge, keep=keep, rng=rng)
            for layer, found in zip(layers, logits, strict=True)
        }
        made = with_fewer(opened, groups)
        before = cross_entropy(model, read[1::2])
        path = _written(made, destination, to, [source_identity(opened.path), merge, keep, seed, num_experts], writing)
        after = cross_entropy(
            from_checkpoint(dataclasses.replace(open_checkpoint(path), config=_as_measured(made.config))), read[1::2]
        )
    return Regrouped(path, before, after)


def more(
    source: str | Path,
    destination: str | Path,
    *,
    num_experts: int,
    router_noise: float = 1e-6,
    seed: int = 0,
    to: str = "flax_switch",
    **writing: Any,
) -> Regrouped:
    """Writes a model with more experts that computes what the source does; see `convert.regroup.with_more`, and `fewer`."""
    one_of("to", to, FORMATS)
    with claimed(destination := local_destination(destination)):
        opened = _opened(source, writing)
        made = with_more(opened, num_experts, router_noise=router_noise, seed=seed)
        identity = [source_identity(opened.path), num_experts, router_noise, seed]
        return Regrouped(_written(made, destination, to, identity, writing))


def _opened(source: str | Path, writing: dict[str, Any]) -> Checkpoint:
    reading = {name: writing.pop(name) for name in ("changes", "allow_missing", "revision", "verify") if name in writing}
    opened = open_checkpoint(source, **reading)
    check(
        opened.config.head == LANGUAGE_MODEL, f"{source} has a head for {opened.config.head}; change the model that it was made of."
    )
    return opened


def _written(made: Checkpoint, destination: Path, to: str, identity: list, writing: Mapping[str, Any]) -> Path:
    options = {"max_shard_size": DEFAULT_SHARD_SIZE, **writing}
    return write_checkpoint(made, destination, to=to, files=companion_files(made.path), source=identity, **options)


def _as_measured(config: SwitchConfig) -> SwitchConfig:
    """Returns a config by which every token has its experts, whether or not there is room."""
    return config if config.router_type == "experts_choose" else config.replace(capacity_mode="dropless")


# --- text


def _batches(source: str | Path, model: Pretrained, examples: FinetuneDataConfig | None) -> Iterator[Batch]:
    """Yields held-out batches: of examples, or of the run that a source is."""
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise ConfigError(f"{source} has no vocabulary to read text with; put its spiece.model into the folder.")
    if examples is not None:
        yield from prepare_tasks(examples, vocabulary, train=False).validation_batches()
        return
    check(
        (Path(source) / CONFIG_FILE).exists(),
        f"{source} is no run, so it has no held-out text of its own; name examples of what the model does with --examples.",
    )
    config = read_config(source)
    if isinstance(config, ExperimentConfig):
        yield from prepare(config.data, vocabulary=vocabulary, quiet=True).heldout_batches()
    else:
        check(isinstance(config, FinetuneConfig), f"{source} is a run of {config.kind}; name examples with --examples.")
        yield from prepare_tasks(config.data, vocabulary, train=False).validation_batches()


_FED = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "prefix_mask")


def _fed(config: SwitchConfig, batch: Batch) -> dict[str, np.ndarray]:
    fed = {name: np.asarray(batch[name]) for name in _FED if name in batch}
    if config.decoder_only:
        fed = {name: value for name, value in fed.items() if not name.startswith(("input", "attention"))}
    if not config.bidirectional_inputs:
        fed.pop("prefix_mask", None)
    return fed


def router_logits(model: Pretrained, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Returns the logits [M, E] of every router, in order, for at most `TOKENS` real tokens that are spread over the batches."""
    masks = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    found: list[list[np.ndarray]] = [[] for _ in model.config.routers]
    for batch in batches:
        fed = _fed(model.config, batch)
        for i, (name, logits) in enumerate(zip(model.config.routers, model.run(_logits, fed), strict=True)):
            found[i].append(np.asarray(logits)[fed[masks[name.split()[0]]].astype(bool)])
    every = [np.concatenate(parts) for parts in found]
    return [logits[np.linspace(0, len(logits) - 1, min(TOKENS, len(logits))).astype(int)].astype(np.float64) for logits in every]


def cross_entropy(model: Pretrained, batches: Sequence[Batch]) -> float:
    """Returns the mean over all targets, in nats."""
    total = count = 0.0
    for batch in batches:
        summed, number = model.run(_cross_entropy, _fed(model.config, batch), np.asarray(batch["labels"]))
        total, count = total + float(summed), count + float(number)
    return total / max(count, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, fed):
    output = model.apply({"params": params}, **fed, output_router_logits=True)
    return [router.logits for router in (*output.encoder_router, *output.decoder_router)]


@functools.partial(jax.jit, static_argnums=0)
def _cross_entropy(model, params, fed, labels):
    real = labels != IGNORED_LABEL
    head = model.apply({"params": params}, **fed, output_logits=False).head
    return head_loss(head, jnp.where(real, labels, 0), real.astype(jnp.float32), Terms()).loss, real.sum()
