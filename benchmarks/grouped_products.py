"""Grouped products beside one dense product of the same FLOPs: the share of its rate that they keep.

    python benchmarks/grouped_products.py --dtype bfloat16            # on whatever device JAX has
    python benchmarks/grouped_products.py --experts 8 --sizes 768x3072 --tokens 4096 --repeats 5

For each table: rows times kernels, rows times transposed kernels, and kernel gradients, of `flax_switch.ops.kernels.grouped`, for
groups of equal size and for groups as uneven as a Dirichlet draw makes them (the largest has a few times the
mean). First the implementation that is picked here, then every other one that can run here (tokamax, too, where it is installed),
and `lax.ragged_dot` where it does not take minutes, which is not on a CPU. Runs of the rows alternate and medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import run_record
from jax import lax

from flax_switch.ops.kernels.checks import implementations_here
from flax_switch.ops.kernels.grouped import chosen, grouped_matmul

ACCELERATOR = jax.default_backend() != "cpu"
CALLS = 10 if ACCELERATOR else 1  # of a product in one timing, so that starting it does not count


def groups(kind: str, E: int, T: int) -> jax.Array:
    """Sizes of E groups of T rows in all."""
    rng = np.random.default_rng(0)
    sizes = np.full(E, T // E) if kind == "equal" else rng.multinomial(T, rng.dirichlet(np.ones(E)))
    sizes[0] += T - sizes.sum()
    return jnp.asarray(sizes, jnp.int32)


def products(E: int, T: int, D: int, F: int, dtype: str) -> dict[str, tuple]:
    """{name: (function, arguments)}; a name is a product's, a colon and its groups, or alone that of the one dense product.

    All take 2 T D F FLOPs.
    """
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, dtype)  # noqa: E731
    x, gradient, kernel, dense = draw(0, T, D), draw(1, T, F), draw(2, E, D, F), draw(3, D, F)

    def forward(name):
        return lambda x, kernel, sizes: grouped_matmul(x, kernel, sizes, name)

    def back(name, which):
        return lambda x, kernel, sizes, g: jax.vjp(lambda x, kernel: forward(name)(x, kernel, sizes), x, kernel)[1](g)[which]

    picked = chosen(x, kernel)
    rows = {
        "rows": (jnp.matmul, (x, dense)),
        "rows, transposed kernels": (lambda g, w: g @ w.T, (gradient, dense)),
        "kernel gradients": (lambda x, g: x.T @ g, (x, gradient)),
    }
    for kind in ("equal", "uneven"):
        sizes = groups(kind, E, T)
        for name in (picked, *(other for other in implementations_here() if other != picked)):
            rows |= {
                f"rows: {kind} groups, {name}": (forward(name), (x, kernel, sizes)),
                f"rows, transposed kernels: {kind} groups, {name}": (back(name, 0), (x, kernel, sizes, gradient)),
                f"kernel gradients: {kind} groups, {name}": (back(name, 1), (x, kernel, sizes, gradient)),
            }
        if ACCELERATOR:
            rows[f"rows: {kind} groups, lax.ragged_dot"] = lax.ragged_dot, (x, kernel, sizes)
    return rows


def measure(rows: dict[str, tuple], repeats: int) -> dict[str, float]:
    """Median seconds of one call."""
    compiled = {name: jax.jit(function) for name, (function, _) in rows.items()}
    times = {name: [] for name in rows}
    for repeat in range(-1, repeats):  # the first run compiles
        for name, (_, args) in rows.items():
            start = time.perf_counter()
            for _ in range(CALLS if repeat >= 0 else 1):
                result = compiled[name](*args)
            jax.block_until_ready(result)
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Prints the tables and with --write keeps the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--sizes", nargs="+", default=["512x2048", "768x3072"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"write a JSON file under {run_record.RESULTS.name}/")
    args = parser.parse_args()
    records = []
    print("| product | groups | E | tokens | D/F | ms | TFLOP/s | share of dense |", "|---|---|---|---|---|---|---|---|", sep="\n")
    for size in args.sizes:
        D, F = map(int, size.split("x"))
        for T in args.tokens:
            for E in args.experts:
                seconds = measure(products(E, T, D, F, args.dtype), args.repeats)
                for name, taken in seconds.items():
                    product, _, kind = name.partition(": ")
                    share = seconds[product] / taken
                    records.append(dict(product=product, groups=kind, E=E, tokens=T, D=D, F=F, ms=1e3 * taken, share=share))
                    cells = (
                        product,
                        kind or "one, dense",
                        E,
                        T,
                        f"{D}/{F}",
                        f"{1e3 * taken:.2f}",
                        f"{2e-12 * T * D * F / taken:.2f}",
                    )
                    print("|", " | ".join(map(str, (*cells, f"{share:.2f}"))), "|", flush=True)
    if args.write:
        place = run_record.RESULTS / f"grouped_products_{jax.default_backend()}_{args.dtype}.json"
        run_record.write(place, dict(dtype=args.dtype, records=records), device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
