"""What is exported of a model: functions of its parameters and of arrays whose batch and lengths are symbols.

    encoder       ids [b, s] and mask to the encoder's output [b, s, D]
    start         that and places [t] to an empty cache of t places for a row of each source
    prefill       the encoder's output, the mask, the first tokens [b, p] and places to logits of the next one, and the cache
    decode_step   one more token of each row [b], the mask and the cache to logits, and the cache
    generate      ids, mask and room [r] to tokens [b, 1 + r] and how many of them are new: greedy search, a loop until all rows end

Parameters are a flat dict by their canonical names, as safetensors hold them, and the first argument. A cache is a dict, too. Only
the sizes of places and room matter.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct, export

from flax_switch.config import SwitchConfig, check
from flax_switch.config.generation import GenerationConfig, make_controls, split_numbers
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.config.weights import SCALE
from flax_switch.convert.canonical import HEAD, unflatten
from flax_switch.generation.program import decode, decoder_config, encode, in_compute_dtype, run_program, start_cache
from flax_switch.nn.cache import DecoderCache
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.ops.kernels.quantized import round_rows
from flax_switch.parallel.placement import ONE_DEVICE

Arrays = Mapping[str, Any]
Shapes = Mapping[str, ShapeDtypeStruct]
_GREEDY = {
    "num_beams": 1, "num_return_sequences": 1, "do_sample": False, "penalty_alpha": None, "forced_eos_token_id": None,
    "output_scores": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the shapes of its arguments after the parameters."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Model:
    """The functions of a model under the routing of generation, with an executor that runs on every platform."""

    config: SwitchConfig
    controls: GenerationConfig

    @property
    def decoder(self) -> SwitchTransformer:
        return SwitchTransformer(decoder_config(self.config, self.controls.routing))

    def encoder(self, params: Arrays, input_ids: Any, mask: Any) -> jax.Array:
        encoded = encode(self.config, self.controls, self._variables(params), input_ids, mask, ONE_DEVICE)
        assert isinstance(encoded, jax.Array)  # a decoder-only model has none
        return encoded

    def empty(self, params: Arrays, encoded: Any, places: Any) -> DecoderCache:
        return start_cache(self.decoder, self._ready(params), encoded, places.shape[0])

    def start(self, params: Arrays, encoded: Any, places: Any) -> Arrays:
        return _as_dict(self.empty(params, encoded, places))

    def prefill(self, params: Arrays, encoded: Any, mask: Any, prefix: Any, places: Any) -> tuple[jax.Array, Arrays]:
        logits, cache = decode(self.decoder, self._ready(params), prefix, mask, self.empty(params, encoded, places))
        return logits, _as_dict(cache)

    def decode_step(self, like: DecoderCache, params: Arrays, token: Any, mask: Any, cache: Arrays) -> tuple[jax.Array, Arrays]:
        before = jax.tree_util.tree_map_with_path(lambda path, _: cache[_name(path)], like)
        logits, after = decode(self.decoder, self._ready(params), token[:, None], mask, before)
        return logits, _as_dict(after)

    def generate(self, params: Arrays, input_ids: Any, mask: Any, room: Any) -> tuple[jax.Array, jax.Array]:
        controls, numbers = split_numbers(self.controls)
        batch = input_ids.shape[0]
        assert controls.decoder_start_token_id is not None  # `make_controls` has filled it in
        start = jnp.full((batch, 1), controls.decoder_start_token_id, jnp.int32)
        inputs = (self._variables(params), input_ids, mask, start, jnp.zeros((batch, 2), jnp.uint32), numbers)
        found = run_program(self.config, controls, *inputs, max_length=1 + room.shape[0])
        return found.tokens, found.new_tokens

    def _ready(self, params: Arrays) -> dict[str, Any]:
        return in_compute_dtype(self._variables(params), self.decoder.config)

    def _variables(self, params: Arrays) -> dict[str, Any]:
        """Returns what the model takes; a quantised one's tied head, which files do not hold, is made of the embeddings."""
        if self.config.copied_head:
            values, scale = round_rows(params[self.config.embedding_path])
            params = {**params, HEAD: values, HEAD + SCALE: scale}
        return {"params": unflatten(dict(params))}


def programs(config: SwitchConfig, params: Shapes, *, architecture: str = "full", **controls: Any) -> dict[str, Program]:
    """Returns the programs of a model by their names; of an encoder alone, that one.

    params: by their canonical names. controls: of greedy search, as `generate` has them, but for max_new_tokens.

    Raises `ConfigError` naming what of the config or the controls cannot be exported.
    """
    check_translates(config)
    check_exportable(config)
    check(architecture != "headless", "This checkpoint has no head, so that it has no tokens to say. Export the whole model.")
    model = _Model(
        config.replace(scan_layers=False, moe_executor="blocks", attention_implementation="plain"), _greedy(config, controls)
    )
    b, s = export.symbolic_shape("b, s")
    found = {"encoder": Program(model.encoder, (_ints(b, s), _mask(b, s)))}
    if architecture == "encoder":
        return found
    b, s, p, t = export.symbolic_shape("b, s, p, t", constraints=["t >= p"])
    found["prefill"] = Program(model.prefill, (_encoded(config, b, s), _mask(b, s), _ints(b, p), _ints(t)))
    b, s, t = export.symbolic_shape("b, s, t")
    found["start"] = Program(model.start, (_encoded(config, b, s), _ints(t)))
    cache = jax.eval_shape(model.empty, params, *found["start"].arguments)
    step = functools.partial(model.decode_step, cache)
    found["decode_step"] = Program(step, (_ints(b), _mask(b, s), _as_dict(cache)))
    b, s, r = export.symbolic_shape("b, s, r")
    found["generate"] = Program(model.generate, (_ints(b, s), _mask(b, s), _ints(r)))
    return found


def check_translates(config: SwitchConfig) -> None:
    """Raises `ConfigError` for a model that does not read a source and say tokens, which is what any runtime here is for."""
    check(
        not config.decoder_only,
        "Only models with an encoder are exported yet, and this one has architecture='decoder_only'. Run it with flax-switch "
        "generate, or train an encoder-decoder.",
    )
    check(
        config.head == LANGUAGE_MODEL,
        f"A head for {config.head} is not exported. Export the checkpoint that the model was made of, or its encoder; or run the "
        "model with flax-switch predict.",
    )


def check_exportable(config: SwitchConfig) -> None:
    """Raises `ConfigError` for a model whose shapes follow from how many tokens it is given, naming the field."""
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


def _ints(*shape: Any) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.int32)


def _mask(*shape: Any) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.bool_)


def _encoded(config: SwitchConfig, *shape: Any) -> ShapeDtypeStruct:
    return ShapeDtypeStruct((*shape, config.d_model), jnp.dtype(config.dtype))


def _as_dict(cache: DecoderCache) -> dict[str, Any]:
    """Returns a cache's arrays by names such as layers_0_past_key; index is how many places are filled."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(cache)[0]}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="_")
