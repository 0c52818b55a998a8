"""`generate`: checks inputs and controls, runs the compiled program, and cuts what it found to length."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from flax_switch.config import SwitchConfig, check, expect
from flax_switch.config.generation import GenerationConfig, make_controls, split_numbers
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.config.ranges import shown
from flax_switch.convert.scan import unstack_layers
from flax_switch.generation.constraint import Constraint, PrefixFunction
from flax_switch.generation.program import run_program
from flax_switch.host.expert_cache import ExpertReads
from flax_switch.nn.fields import Fields
from flax_switch.nn.inputs import TokenIds, as_ids, as_mask, check_alive
from flax_switch.nn.transformer import SwitchEncoder, SwitchTransformer
from flax_switch.ops.kernels.few_rows import unstacked_experts
from flax_switch.ops.kernels.on_disk import run_reading
from flax_switch.parallel.arrays import on_host
from flax_switch.parallel.mesh import batch_sharding, batch_ways, replicated
from flax_switch.parallel.placement import ONE_DEVICE, LaidOutByCompiler, Placement


@flax.struct.dataclass
class GenerationOutput(Fields):
    """What `generate` returns, as numpy arrays. n is num_return_sequences; the n rows of a source are neighbours, best first.

    Fields that are not None can be had by name and by position, too: `output["sequences"]`, `output[0]`.

    sequences: ids, from the decoder's prefix on; of a decoder-only model from its inputs on, padded on the left. Finished rows are
      filled up with pad, beams with EOS, as Hugging Face does.
    scores: of beams, their summed log-probabilities over the length penalty; else None.
    step_scores: with output_scores, the processed scores of each step: logits, or with beams the log-probabilities of the
      running beams (R is B * num_beams then, not all of which need be ancestors of what is returned).
    texts: the sequences as text, a string for each, where there is a vocabulary (`Pretrained.generate`); sentinels are named.
    expert_reads: of a model whose experts are on disk, what was hit and read of them.
    """

    sequences: Int[np.ndarray, "Bn T"]
    scores: Float[np.ndarray, " Bn"] | None = None
    step_scores: Float[np.ndarray, "steps R V"] | None = None
    texts: tuple[str, ...] | None = flax.struct.field(pytree_node=False, default=None)
    expert_reads: ExpertReads | None = flax.struct.field(pytree_node=False, default=None)


def generate(
    model: SwitchEncoder,
    params: Mapping[str, Any],
    input_ids: TokenIds,
    attention_mask: TokenIds | None = None,
    *,
    decoder_input_ids: TokenIds | None = None,
    prefix_allowed_tokens_fn: PrefixFunction | None = None,
    seed: int | Sequence[int] = 0,
    **controls: Any,
) -> GenerationOutput:
    """Generates a continuation for every source, with Hugging Face's controls and their meaning.

    A program is compiled for each shape of the inputs and set of controls in use; the values of temperature, top_p, min_p,
    typical_p, the penalties and min_new_tokens do not matter to it, nor does which function constrains it.

    Args:
      params: may lie on a mesh; then rows are split over its data and expert axes and the parameters stay where they are. Where
        the mesh is of several processes all make the same call, and each has all that is found.
      input_ids: the sources' ids [B, S], or one source's [S]: lists, or an array of any library. A decoder-only model continues
        them; its start token is put before a row unless the row begins with it.
      attention_mask: 1 at tokens, 0 at padding, on any side; None: 0 where there is the pad token.
      decoder_input_ids: a prefix for every row; the start token is put before it unless a row begins with it.
      prefix_allowed_tokens_fn: returns the ids that may come next, given a source's number and the tokens of one of its rows so far
        (a numpy array, from the start token on). It is asked before each token of every row or beam that goes on.
      seed: of sampling; one for all rows, or one for each source, whose samples then do not depend on its place in the batch.
      **controls: see `GenerationConfig`.

    Raises:
      ConfigError: before anything is compiled, naming the control or the input that cannot be; later, where
        prefix_allowed_tokens_fn allows no token, or what is none. What it raises itself is raised.
    """
    call = prepared(model, params, input_ids, attention_mask, decoder_input_ids, prefix_allowed_tokens_fn, seed, controls)
    output, reads = run_reading(params, lambda: on_host(run_program(*call.arguments, devices=call.devices)))
    if call.constraint is not None:
        call.constraint.check_met()
    return GenerationOutput(
        sequences=output.tokens[:, : call.prefix.shape[1] + int(output.new_tokens)],
        scores=output.scores,
        step_scores=None if output.step_scores is None else output.step_scores[: int(output.steps)],
        expert_reads=reads,
    )


class Call(NamedTuple):
    """A call of `generate` that can be run: what `run_program` takes, in its order."""

    arguments: tuple[Any, ...]  # config, controls, variables, input_ids, mask, prefix, seeds, numbers
    devices: Placement
    prefix: Int[np.ndarray, "B P"]
    constraint: Constraint | None  # has to live as long as the program runs


def prepared(
    model: SwitchEncoder,
    params: Mapping[str, Any],
    input_ids: TokenIds,
    attention_mask: TokenIds | None,
    decoder_input_ids: TokenIds | None,
    prefix_allowed_tokens_fn: PrefixFunction | None,
    seed: int | Sequence[int],
    controls: Mapping[str, Any],
) -> Call:
    """Returns what runs a call of `generate`; raises `ConfigError` for what cannot be."""
    check_generates(model)
    config = model.config
    settings = make_controls(controls, config)
    ids = np.asarray(as_ids("input_ids", input_ids, config))
    B = ids.shape[0]
    if config.decoder_only:
        prefix, mask = prompts(attention_mask, ids, settings)
        ids = prefix
        check(decoder_input_ids is None, "decoder_input_ids: a decoder-only model continues input_ids; give all of the text there.")
    else:
        mask = check_mask(attention_mask, ids, settings)
        prefix = start_tokens(decoder_input_ids, B, settings, config)
    seeds = check_seeds(seed, B)
    check_alive("The parameters", params, "take those of the state that it returned")
    given = ", ".join(params) or "none"
    check("decoder" in params, f"params must be a model's parameters; these are {given}. Take what is inside 'params'.")
    constraint, program, numbers = None, *split_numbers(settings)
    if prefix_allowed_tokens_fn is not None:
        check(
            settings.search != "t5x",
            "prefix_allowed_tokens_fn is none of T5X's beam search; leave it out, or set search='huggingface'.",
        )
        check(
            jax.process_count() == 1,
            f"prefix_allowed_tokens_fn is asked in one process, and there are {jax.process_count()}. Generate with it in one.",
        )
        padding = (~mask).sum(axis=1) if config.decoder_only else np.zeros(B, np.int64)
        # Where too few can go on, beams that have ended stay among the running ones, and transformers asks for them.
        ends: Any = settings.eos_token_id if settings.num_beams > 1 else ()
        constraint = Constraint(prefix_allowed_tokens_fn, padding, config.vocab_size, ends)
        numbers["constraint"] = np.int32(constraint.number)
    if config.scan_layers:
        params, config = unstack_layers(params, config), config.replace(scan_layers=False)
    inputs, where = (ids, mask, prefix, seeds), getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = where.mesh if isinstance(where, NamedSharding) and where.mesh.size > 1 else None
    devices = ONE_DEVICE if mesh is None else LaidOutByCompiler()
    if mesh is not None:
        sharding = batch_sharding(mesh) if B % batch_ways(mesh) == 0 else replicated(mesh)
        inputs = tuple(jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in inputs)
    variables = {"params": params}
    if config.layer_form != "fused":
        unstacked = unstacked_experts(params, config.decoder.sparse_layers, config.num_experts)
        variables |= {} if unstacked is None else {"unstacked": unstacked}
    return Call((config, program, variables, *inputs, numbers), devices, prefix, constraint)


def check_generates(model: SwitchEncoder) -> None:
    """Raises `ConfigError` for a model that has no head of a language model."""
    expect("model", model, SwitchEncoder, "Call generate(model, params, input_ids), or the .generate(input_ids) of a loaded model.")
    config = model.config
    check(
        config.head == LANGUAGE_MODEL,
        f"This model has a head for {config.head}, not a language model's, so that it generates nothing. Load the checkpoint that "
        "it was made of.",
    )
    check(
        isinstance(model, SwitchTransformer) and model.head,
        f"generate needs a model with a decoder and a head; this is a {type(model).__name__} without one.",
    )


def check_mask(mask: Any, input_ids: Int[np.ndarray, "B S"], settings: GenerationConfig) -> Bool[np.ndarray, "B S"]:
    """Returns the mask of the sources, by default False at pad tokens; raises where a source has no token at all."""
    shape = input_ids.shape
    mask = input_ids != settings.pad_token_id if mask is None else np.asarray(as_mask("attention_mask", mask, shape))
    empty = np.flatnonzero(~mask.any(1))
    check(empty.size == 0, f"input_ids: row {empty[0] if empty.size else 0} is padding only; a source needs at least one token.")
    return mask


def prompts(
    mask: Any, input_ids: Int[np.ndarray, "B S"], settings: GenerationConfig
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Returns the start token and the real tokens of each row behind padding, so that all end together, and a mask of them."""
    real = input_ids != settings.pad_token_id if mask is None else np.asarray(as_mask("attention_mask", mask, input_ids.shape))
    start = settings.decoder_start_token_id
    assert start is not None and settings.pad_token_id is not None  # `for_model` has filled them in
    ids = np.full((len(input_ids), input_ids.shape[1] + 1), settings.pad_token_id, np.int32)
    found = np.zeros(ids.shape, bool)
    for row, tokens in enumerate(input_ids[i][real[i]] for i in range(len(input_ids))):
        tokens = tokens if len(tokens) and tokens[0] == start else np.concatenate([[start], tokens])
        ids[row, -len(tokens) :], found[row, -len(tokens) :] = tokens, True
    return ids, found


def start_tokens(prefix: Any, batch: int, settings: GenerationConfig, config: SwitchConfig) -> Int[np.ndarray, "B P"]:
    """Returns the decoder's prefix: the start token, then what was given unless it begins with it."""
    start = np.full((batch, 1), settings.decoder_start_token_id, np.int32)
    if prefix is None:
        return start
    prefix = np.asarray(as_ids("decoder_input_ids", prefix, config))
    check(
        prefix.shape[0] == batch,
        f"decoder_input_ids has {prefix.shape[0]} rows and input_ids {batch}; every source needs a prefix.",
    )
    # As Hugging Face: a batch in which any row has the start token is taken as it is.
    return np.concatenate([start, prefix], axis=1) if (prefix[:, 0] != start[:, 0]).all() else prefix


def check_seeds(seed: int | Sequence[int], batch: int) -> np.ndarray:
    """Returns [B, 2]: the seed of each source's draws, and a number that tells apart sources with the same seed."""
    seeds = np.asarray(seed)
    check(
        np.issubdtype(seeds.dtype, np.integer) and seeds.shape in ((), (batch,)) and ((seeds >= 0) & (seeds < 2**32)).all(),
        f"seed must be an integer of at least 0 and below 2**32, or one for each of the {batch} sources; it is {shown(seed)}.",
    )
    number = np.arange(batch) if seeds.ndim == 0 else np.zeros(batch, np.int64)
    return np.stack([np.broadcast_to(seeds, batch), number], axis=1).astype(np.uint32)
