"""Quantised kernels held as integers and as floats beside float32: how many times as fast, by width and by number of rows.

    python benchmarks/quantised_kernels.py products                # what `ops.kernels.quantized.faster_as_floats` goes by
    python benchmarks/quantised_kernels.py models --weights int8   # whole greedy generation with what it picks

Products are those of four layers with kernels of their own, in a loop as in decoding: attention's D x D, a dense and a gated MLP,
and 8 experts with the rows each. Models have random weights. Contenders take turns in one process; a ratio is the median over
turns of float32's seconds by the contender's. Ratios count where others work on the machine, too; seconds do not.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import run_record

import flax_switch as fs
from flax_switch.ops.kernels.grouped import batched_matmul
from flax_switch.ops.kernels.projection import project
from flax_switch.ops.kernels.quantized import Quantized, faster_as_floats
from flax_switch.ops.mlp import mlp

LAYERS, STEPS = 4, 8
KINDS = ("attention", "dense", "gated", "8 experts")
SHAPE = dict(vocab_size=8192, num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0, capacity_mode="dropless")
DENSE = dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
MODELS = {
    "dense": DENSE,
    "gated": dict(DENSE, mlp_activations=("gelu_new", "linear")),
    "8 experts": dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8),
}


def kernels(kind: str, D: int, form: str, rng: np.random.Generator) -> dict[str, jax.Array | Quantized]:
    """Draws the kernels of one layer, as float32 or as int8."""
    shapes = {"wo": (D, D)} if kind == "attention" else {"wi": (D, 4 * D), "wo": (4 * D, D)}
    if kind == "gated":
        shapes = {"wi_0": (D, 4 * D), "wi_1": (D, 4 * D), "wo": (4 * D, D)}
    lead = (8,) if kind == "8 experts" else ()

    def draw(inputs: int, outputs: int) -> jax.Array | Quantized:
        if form == "float32":
            return jnp.asarray(rng.normal(size=(*lead, inputs, outputs)) * inputs**-0.5, jnp.float32)
        values = rng.integers(-127, 128, (*lead, outputs, inputs)).astype(np.int8)
        return Quantized(jnp.asarray(values), jnp.full((*lead, outputs, 1), inputs**-0.5 / 73, jnp.float32))

    return {name: draw(*shape) for name, shape in shapes.items()}


def layer(kind: str, x: jax.Array, weights: dict) -> jax.Array:
    """Returns what a layer of a kind makes of rows, as large as these."""
    if kind == "attention":
        y = project(x, weights["wo"])
    else:
        activations = ("gelu_new", "linear") if kind == "gated" else ("relu",)
        y = mlp(x, weights, activations, batched_matmul if kind == "8 experts" else project)
    x = x + y
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def run_layers(kind: str, x: jax.Array, layers: Sequence[dict], steps: int) -> jax.Array:
    """Runs all layers some times over."""
    return jax.lax.fori_loop(0, steps, lambda _, x: functools.reduce(functools.partial(layer, kind), layers, x), x)


def race(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict]:
    """Runs contenders by turns, the first is float32: each one's median seconds and ratio."""

    def timed(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(contenders[name]())
        return time.perf_counter() - start

    for name in contenders:
        timed(name)  # compiles
    once = sum(timed(name) for name in contenders)
    turns = [{name: timed(name) for name in contenders} for _ in range(int(min(60, max(7, seconds / once))))]
    first = next(iter(contenders))
    return {
        name: dict(
            seconds=statistics.median(turn[name] for turn in turns),
            ratio=statistics.median(turn[first] / turn[name] for turn in turns),
        )
        for name in contenders
    }


def products(args: argparse.Namespace) -> Iterator[dict]:
    """Prints and yields a row for each kind of layer, width and number of rows."""
    rng = np.random.default_rng(0)
    print("layer          D  weights of a kernel  held as   rows  integers, times float32")
    for kind in args.kinds:
        for D in args.widths:
            held = {form: [kernels(kind, D, form, rng) for _ in range(LAYERS)] for form in ("float32", "integers")}
            for rows in args.rows:
                x = jnp.asarray(rng.normal(size=(1, 8, rows, D) if kind == "8 experts" else (rows, D)), jnp.float32)
                runs = {form: functools.partial(run_layers, kind, x, layers, STEPS) for form, layers in held.items()}
                measured = race(runs, args.seconds)
                size = held["float32"][0]["wo"].shape[-2:]
                picked = "float32" if faster_as_floats(size) else "integers"
                ratio = measured["integers"]["ratio"]
                print(f"{kind:9} {D:6} {size[0] * size[1]:20,}  {picked:8} {rows:5} {ratio:24.2f}", flush=True)
                yield dict(layer=kind, width=D, weights=size[0] * size[1], rows=rows, picked=picked, **measured)


def models(args: argparse.Namespace) -> Iterator[dict]:
    """Prints and yields a row for each model and batch."""
    print("model        D  batch  integers  as picked, times float32")
    for kind in args.kinds:
        for D in args.widths:
            sizes = dict(d_model=D, d_ff=4 * D, d_kv=min(64, D // 4), num_heads=max(4, D // 64))
            config = fs.SwitchConfig(**{**SHAPE, **MODELS[kind], **sizes})
            plain = fs.Pretrained(config, fs.SwitchTransformer(config), fs.init_params(config, jax.random.key(0)))
            held = {"float32": plain, **{how: fs.quantize(plain, args.weights, kernels=how) for how in ("integers", "auto")}}
            for batch in args.batches:
                ids = np.random.default_rng(0).integers(2, 8192, (batch, args.source))
                say = lambda model, ids=ids: model.generate(ids, max_new_tokens=args.new, min_new_tokens=args.new).sequences  # noqa: E731
                measured = race({name: functools.partial(say, model) for name, model in held.items()}, args.seconds)
                ratios = [measured[how]["ratio"] for how in ("integers", "auto")]
                print(f"{kind:9} {D:4} {batch:6} {ratios[0]:9.2f} {ratios[1]:10.2f}", flush=True)
                yield dict(model=kind, width=D, batch=batch, **measured)


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("products", "models"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 768])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="of products")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of models")
    parser.add_argument("--weights", default="int8", choices=("int8", "int4"), help="of models")
    parser.add_argument("--source", type=int, default=64)
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, for a row of the table")
    parser.add_argument("--output", help="default: a file under results/")
    args = parser.parse_args()
    args.kinds = args.kinds or (KINDS if args.what == "products" else tuple(MODELS))
    weights = "int8" if args.what == "products" else args.weights
    output = args.output or run_record.RESULTS / f"quantised_{args.what}_{weights}_jax_{jax.__version__}.json"
    rows = []
    for row in {"products": products, "models": models}[args.what](args):
        rows.append(row)
        run_record.write(output, dict(weights=weights, rows=rows), quiet=True)


if __name__ == "__main__":
    main()
