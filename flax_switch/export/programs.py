"""What is exported of a model: functions of its parameters and of arrays whose batch and lengths are symbols.

    encoder       ids and mask to the encoder's output
    prefill       the encoder's output and the first tokens to logits of the next one, and the cache
    decode_step   one more token of each row and the cache to logits, and the cache
    generate      ids and mask to tokens: greedy search as a whole, a loop until every row is finished

Parameters are a flat dict by their canonical names, as safetensors hold them, and the first argument. A cache is a dict, too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from flax_switch.config import SwitchConfig, check
from flax_switch.config.generation import GenerationConfig, make_controls, split_numbers
from flax_switch.convert.canonical import unflatten
from flax_switch.generation.program import decode, decoder_config, encode, in_compute_dtype, run_program, start_cache
from flax_switch.nn.cache import DecoderCache
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops import Size
from flax_switch.parallel.placement import ONE_DEVICE

Arrays = Mapping[str, Any]
_GREEDY = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False, "forced_eos_token_id": None, "output_scores": False}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the shapes of its arguments after the parameters."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of what programs are given: symbols, or numbers where a format wants them."""

    batch: Size
    source: Size
    prefix: Size
    room: Size  # for tokens that follow the prefix
    places: Size  # of each row in a cache: prefix and room

    @classmethod
    def symbols(cls) -> "Sizes":
        """Returns symbols that may be any number of at least 1."""
        # The constraint always holds: JAX does not find out by itself, and relative positions ask.
        return cls(*export.symbolic_shape("b, s, p, r, t", constraints=["2*s*s >= s"]))


def check_exportable(config: SwitchConfig) -> None:
    """Raises `ConfigError` for a model whose shapes follow from how many tokens it is given, naming the field."""
    check(not config.decoder_only, "Only models with an encoder are exported yet; this one has architecture='decoder_only'.")
    if not config.is_sparse:
        return
    check(
        config.router_type != "experts_choose",
        "router_type='experts_choose': how many tokens an expert takes depends on the length, which an exported program must not "
        "know. Distil the model (flax-switch distill), or export one whose tokens choose.",
    )
    check(
        config.capacity_mode != "fixed" or config.routing_group == "sequence",
        f"capacity_mode='fixed' with routing_group={config.routing_group!r}: groups of tokens are rounded to the length, which an "
        "exported program must not know. Set routing_group='sequence', or capacity_mode='dropless'.",
    )


def programs(
    config: SwitchConfig, params: Mapping[str, jax.ShapeDtypeStruct], sizes: Sizes, *, architecture: str = "full", **controls: Any
) -> dict[str, Program]:
    """Returns the programs of a model by their names; of an encoder alone, that one.

    params: by their canonical names. controls: of greedy search, as `generate` has them; `max_new_tokens` is no control here but a size.
    """
    check_exportable(config)
    config = config.replace(scan_layers=False, moe_executor="blocks")
    settings = _greedy(config, controls)
    ids, mask = _ints(sizes.batch, sizes.source), jax.ShapeDtypeStruct((sizes.batch, sizes.source), jnp.bool_)
    encoded = jax.ShapeDtypeStruct((sizes.batch, sizes.source, config.d_model), jnp.dtype(config.dtype))
    room = _ints(sizes.room)

    def encoder(params: Arrays, input_ids: Any, mask: Any) -> jax.Array:
        return encode(config, settings, {"params": unflatten(dict(params))}, input_ids, mask, ONE_DEVICE)

    found = {"encoder": Program(encoder, (ids, mask))}
    if architecture == "encoder":
        return found
    check(architecture == "full", "This model has no head, so that it has no tokens to say. Export its encoder's checkpoint alone.")
    model = SwitchTransformer(decoder_config(config, settings.routing))

    def ready(params: Arrays) -> dict[str, Any]:
        return in_compute_dtype({"params": unflatten(dict(params))}, model.config)

    def prefill(params: Arrays, encoded: Any, mask: Any, prefix: Any, room: Any) -> tuple[jax.Array, Arrays]:
        variables = ready(params)
        empty = start_cache(model, variables, encoded, prefix.shape[1] + room.shape[0])
        logits, cache = decode(model, variables, prefix, mask, empty)
        return logits, as_dict(cache)

    like = jax.eval_shape(lambda params, x: start_cache(model, ready(params), x, sizes.places), params, encoded)

    def decode_step(params: Arrays, token: Any, mask: Any, cache: Arrays) -> tuple[jax.Array, Arrays]:
        given = jax.tree_util.tree_map_with_path(lambda path, _: cache[_name(path)], like)
        logits, after = decode(model, ready(params), token[:, None], mask, given)
        return logits, as_dict(after)

    def generate(params: Arrays, input_ids: Any, mask: Any, room: Any) -> tuple[jax.Array, jax.Array]:
        program, numbers = split_numbers(settings)
        batch = input_ids.shape[0]
        start = jnp.full((batch, 1), settings.decoder_start_token_id, jnp.int32)
        seeds, given = jnp.zeros((batch, 2), jnp.uint32), {"params": unflatten(dict(params))}
        found = run_program(config, program, given, input_ids, mask, start, seeds, numbers, max_length=1 + room.shape[0])
        return found.tokens, found.new_tokens

    return found | {
        "prefill": Program(prefill, (encoded, mask, _ints(sizes.batch, sizes.prefix), room)),
        "decode_step": Program(decode_step, (_ints(sizes.batch), mask, as_dict(like))),
        "generate": Program(generate, (ids, mask, room)),
    }


def _greedy(config: SwitchConfig, controls: Mapping[str, Any]) -> GenerationConfig:
    """Returns the controls of greedy search. Raises `ConfigError` for one of another search."""
    settings = make_controls(controls, config)
    for name, value in _GREEDY.items():
        check(
            getattr(settings, name) == value,
            f"{name}={getattr(settings, name)!r}: what is exported is greedy search, which has {name}={value!r}. Leave it out.",
        )
    check(
        config.capacity_mode == "fixed" or settings.routing != "as_trained" or not config.is_sparse,
        "routing='as_trained': a capacity that is a share of the tokens needs to know how many there are. Use 'dropless'.",
    )
    return settings


def _ints(*shape: Size) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def as_dict(cache: DecoderCache) -> dict[str, Any]:
    """Returns a cache's arrays by names such as layers_0_past_key; index is how many places are filled."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(cache)[0]}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="_")
