"""Tokens and text as they are made: the steps of `generate`, one program run each, instead of one program for all of them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from flax_switch.config import SwitchConfig, check
from flax_switch.config.generation import GenerationConfig
from flax_switch.generation.constraint import PrefixFunction
from flax_switch.generation.defaults import with_defaults
from flax_switch.generation.generate import Call, prepared
from flax_switch.generation.pieces import Output
from flax_switch.generation.program import Search, State, decoder_config, in_compute_dtype
from flax_switch.generation.text import Line, line_inputs
from flax_switch.nn.inputs import TokenIds
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.kernels.on_disk import run_reading
from flax_switch.parallel.placement import ONE_DEVICE, Placement


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some more of what is generated for one source: the pieces' tokens joined are `generate`'s sequence, their texts its text.

    tokens: ids. The first piece holds what the sequence begins with, after it each has one.
    text: what is certain by now; a character that takes several tokens comes with the last of them. None without a vocabulary.
    """

    tokens: tuple[int, ...]
    text: str | None = None


def stream(
    model: SwitchEncoder,
    params: Mapping[str, Any],
    input_ids: TokenIds,
    attention_mask: TokenIds | None = None,
    *,
    decoder_input_ids: TokenIds | None = None,
    prefix_allowed_tokens_fn: PrefixFunction | None = None,
    seed: int | Sequence[int] = 0,
    **controls: Any,
) -> Iterator[Int[np.ndarray, "Bn k"]]:
    """Returns an iterator over what `generate` finds with the same arguments, while it is found.

    First come the tokens that all sequences begin with [B * num_return_sequences, P], then each time one token of every row; joined
    along the second axis they are `generate`'s sequences. Two programs are compiled, one of which takes each step.

    Raises:
      ConfigError: at once, as `generate`; and for beams, of which the best is known at the end only.
    """
    call = prepared(model, params, input_ids, attention_mask, decoder_input_ids, prefix_allowed_tokens_fn, seed, controls)
    check_streamed(call.arguments[1])
    return (tokens for tokens, _ in _steps(params, call))


def stream_pieces(
    model: SwitchEncoder,
    params: Mapping[str, Any],
    input_ids: TokenIds,
    attention_mask: TokenIds | None,
    vocabulary: Any,
    *,
    decoder_input_ids: TokenIds | None = None,
    prefix_allowed_tokens_fn: PrefixFunction | None = None,
    seed: int | Sequence[int] = 0,
    **controls: Any,
) -> Iterator[Piece]:
    """Returns an iterator over the pieces of a single row; arguments and errors are `stream`'s, beside a vocabulary or None."""
    call = prepared(model, params, input_ids, attention_mask, decoder_input_ids, prefix_allowed_tokens_fn, seed, controls)
    settings = call.arguments[1]
    check_streamed(settings)
    rows = len(call.prefix) * settings.num_return_sequences
    check(rows == 1, f"Pieces are of one sequence, and these would be of {rows}: give one source, and no num_return_sequences.")
    return _pieces(_steps(params, call), None if vocabulary is None else Output(vocabulary, model.config))


def _pieces(coming: Iterator[tuple[Int[np.ndarray, "1 k"], bool]], output: Output | None) -> Iterator[Piece]:
    so_far: list[int] = []
    for tokens, done in coming:
        (new,) = tokens.tolist()
        so_far += new
        yield Piece(tuple(new), None if output is None else output.add(so_far, finished=done))


def stream_line(
    pretrained: Any, line: Line, *, max_source_length: int = 512, prefix: str = "", seed: int = 0, **controls: Any
) -> Iterator[str]:
    """Returns an iterator over the text that `text.generate_lines` makes of a line, while it is made.

    Raises `ConfigError`, at once, for a line that cannot be used, and where `stream` does.
    """
    ids, mask, seeds = line_inputs(pretrained, line, max_source_length=max_source_length, prefix=prefix, seed=seed)
    controls = with_defaults(pretrained.generation_defaults, controls)
    found = stream_pieces(pretrained.model, pretrained.params, ids, mask, pretrained.vocabulary, seed=seeds, **controls)
    return (piece.text or "" for piece in found)


def check_streamed(controls: GenerationConfig) -> None:
    """Raises `ConfigError` for controls with which tokens cannot be told one by one."""
    check(
        controls.num_beams == 1,
        f"num_beams={controls.num_beams} is not streamed: which beam is best shows at the end. Set num_beams=1, or call generate.",
    )
    check(not controls.output_scores, "output_scores=True is not streamed: an iterator gives tokens alone. Call generate for them.")


def _steps(params: Mapping[str, Any], call: Call) -> Iterator[tuple[Int[np.ndarray, "Bn k"], bool]]:
    config, controls, variables, input_ids, mask, prefix, seeds, numbers = call.arguments
    rows = len(prefix) * controls.rows_per_source if call.devices == ONE_DEVICE else None
    ready = in_compute_dtype(variables, decoder_config(config, controls.routing), rows)  # once for all steps

    def run(program: Any, *inputs: Any) -> tuple[Any, np.ndarray, bool]:
        (carry, newest, done), _ = run_reading(params, lambda: program(config, controls, *inputs, devices=call.devices))
        newest, done = jax.device_get((newest, done))
        if call.constraint is not None:
            call.constraint.check_met()
        return carry, newest[:, None], bool(done)

    carry, newest, done = run(start_program, variables, input_ids, mask, prefix, seeds, numbers)
    yield np.repeat(call.prefix, controls.num_return_sequences, axis=0), False
    if call.prefix.shape[1] > 1 and controls.penalty_alpha is None:  # a longer prefix is followed by its first token already
        yield newest, done
    while not done:
        carry, newest, done = run(step_program, ready, input_ids, mask, prefix, numbers, carry)
        yield newest, done


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="devices")
def start_program(
    config: SwitchConfig, controls: GenerationConfig, variables, input_ids, mask, prefix, seeds, numbers, *, devices: Placement
):
    """Encodes and takes the prefix in; returns what `step_program` goes on with, the last token of each row, and if all ended."""
    carry = Search(config, controls, variables, input_ids, mask, prefix, numbers, devices).started(seeds)
    return carry, last_tokens(carry[0]), carry[0].done


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="devices", donate_argnums=7)
def step_program(
    config: SwitchConfig, controls: GenerationConfig, variables, input_ids, mask, prefix, numbers, carry, *, devices: Placement
):
    """Takes one step; returns what `start_program` does."""
    carry = Search(config, controls, variables, input_ids, mask, prefix, numbers, devices).step(carry)
    return carry, last_tokens(carry[0]), carry[0].done


def last_tokens(state: State) -> Int[Array, " Bn"]:
    """Returns the last token that each row holds."""
    return jax.lax.dynamic_index_in_dim(state.tokens, state.length - 1, axis=1, keepdims=False)
