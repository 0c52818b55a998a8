"""Reads and runs the programs beside this file with numpy and JAX (whose jax.export needs flatbuffers), and nothing else."""

import functools
import json
import pathlib

import jax
import numpy as np
from jax import export

FOLDER = pathlib.Path(__file__).parent
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jax.numpy.bfloat16, "I8": "i1", "U8": "u1"}


def load_params():
    """Returns the weights by their names: the first argument of every program."""
    data = np.memmap(FOLDER / "params.safetensors", np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    entries = json.loads(bytes(data[8:start]))
    entries.pop("__metadata__", None)
    places = {name: slice(start + e["data_offsets"][0], start + e["data_offsets"][1]) for name, e in entries.items()}
    return {n: jax.numpy.asarray(data[places[n]].view(DTYPES[e["dtype"]]).reshape(e["shape"])) for n, e in entries.items()}


@functools.cache
def program(name):
    """Returns encoder, prefill, decode_step or generate, which compiles for each shape that it is given."""
    return jax.jit(export.deserialize(bytearray((FOLDER / f"{name}.stablehlo").read_bytes())).call)


def generate(params, ids, mask, max_new_tokens=20):
    """Returns the tokens of greedy search, the start token first: ids and mask are [rows, tokens], 0 in mask at padding."""
    given = np.asarray(ids, np.int32), np.asarray(mask, bool), np.zeros(max_new_tokens, np.int32)
    tokens, length = program("generate")(params, *given)
    return np.asarray(tokens)[:, : 1 + int(length)]
