"""Programs of dense models as ONNX, by jax2onnx, for onnxruntime: any batch and length, the weights inside.

    encoder.onnx       input_ids [b, s], mask to encoded [b, s, D]
    start.onnx         encoded and places [t] to what a cache of t places knows of the source and of positions; its past is zeros
    decode_step.onnx   token [b], mask and the cache to logits [b, V], and what is new in the cache

The loop over tokens is the caller's: jax2onnx has no lowering of the program that is a loop (its state holds keys of a generator),
nor of routing (a sort along an axis of unknown length, and scatters).
"""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from flax_switch.config import SwitchConfig, check
from flax_switch.convert.tensors import LazyTensor
from flax_switch.export.programs import Program, programs

_LARGEST = 2**31 - 2**20  # bytes of a file, with room for the graph
# Names of arguments, but for the cache, whose arrays have their own.
_ARGUMENTS = {"encoder": ("input_ids", "mask"), "start": ("encoded", "places"), "decode_step": ("token", "mask", "")}
# What is in the names of results: what a program computes, for jax2onnx gives no second name to an array.
_KEPT = {"encoder": ("encoded",), "start": ("biases", "source"), "decode_step": ("logits", "index", "past")}


def onnx_files(config: SwitchConfig, tensors: Mapping[str, LazyTensor], *, architecture: str = "full") -> dict[str, bytes]:
    """Returns the files of a dense model's programs by their names.

    Raises:
      ConfigError: for experts, naming the way out, or weights that one file cannot hold.
      ImportError: without jax2onnx (extra `onnx`).
    """
    check(
        not config.is_sparse,
        "ONNX holds no routing: jax2onnx cannot lower a sort along an axis of unknown length, which queues tokens for experts. "
        "Distil the model into a dense one (flax-switch distill), or use --to stablehlo.",
    )
    size = sum(tensor.nbytes for tensor in tensors.values())
    check(size < _LARGEST, f"An ONNX file holds 2 GB and this model's weights have {size:,} bytes; use --to stablehlo.")
    params = {name: jax.numpy.asarray(tensor.numpy()) for name, tensor in tensors.items()}
    found = programs(config, {name: jax.typeof(leaf) for name, leaf in params.items()}, architecture=architecture)
    return {f"{name}.onnx": _lowered(name, found[name], params) for name in _ARGUMENTS if name in found}


def _lowered(name: str, program: Program, params: Mapping[str, jax.Array]) -> bytes:
    try:
        jax2onnx: Any = importlib.import_module("jax2onnx")
    except ImportError as error:
        raise ImportError("Writing ONNX needs pip install 'flax_switch[onnx]'.") from error
    leaves, tree = jax.tree.flatten(program.arguments)
    inputs = [one for argument, shape in zip(_ARGUMENTS[name], program.arguments, strict=True) for one in _named(argument, shape)]
    outputs: list[str] = []

    def flat(*leaves: Any) -> list[jax.Array]:
        result = program.function(dict(params), *jax.tree.unflatten(tree, leaves))
        parts = zip(("logits", ""), result, strict=True) if isinstance(result, tuple) else [("encoded", result)]
        named = {
            one: leaf for part, leaf in parts for one, leaf in _named(part, leaf).items() if any(k in one for k in _KEPT[name])
        }
        outputs.extend(f"new_{one}" if one in inputs else one for one in named)
        return list(named.values())

    # jax2onnx would trace it with jax.numpy changed, and then knows no symbols; of what is traced it changes nothing.
    traced = jax.make_jaxpr(flat)(*leaves)
    made = jax2onnx.to_onnx(jaxpr_as_fun(traced), leaves, model_name=name, input_names=inputs, output_names=outputs)
    return made.SerializeToString()


def _named(name: str, value: Any) -> dict[str, Any]:
    return dict(sorted(value.items())) if isinstance(value, Mapping) else {name: value}
