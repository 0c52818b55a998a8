"""The sparse MLP against the dense MLP of the same FLOPs: executors x experts x tokens x sizes, forward and backward.

    python benchmarks/moe_layer.py                      # the table below, on the backend at hand
    python benchmarks/moe_layer.py --experts 8 64 --tokens 4096 --sizes 768x3072 --write
    python benchmarks/moe_layer.py --topology v5e:2x2   # or h100:1; nothing runs: FLOPs and bytes of programs for one chip

Rows are compared with the dense MLP of the tokens that a row processes: capacity_factor times the tokens for einsum, gather and
flaxformer, as many as there are for ragged and loop. Times and ratios are medians of several interleaved runs. `flaxformer` appears
where that package can be imported, `loop` (every expert on every token, masked) up to 8 experts.

Gradients of many experts are gigabytes that are allocated anew in every step, and clearing fresh pages costs as much time as the
products: malloc is told to keep its memory (`flax_switch.host.memory`), as in training, for all contestants.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time

import run_record

from flax_switch.host.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # before JAX starts

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from flax_switch.config import SwitchConfig  # noqa: E402
from flax_switch.nn.moe import SparseMLP  # noqa: E402
from flax_switch.ops.kernels.platforms import compiled_for  # noqa: E402
from flax_switch.plan.flops import program_flops  # noqa: E402
from flax_switch.plan.topology import compile_devices, parse_topology  # noqa: E402

CAPACITY_FACTOR = 1.25


def sequences(T, D, dtype):
    """T tokens in sequences of 512, or in one where they are fewer."""
    length = min(T, 512)
    return jax.ShapeDtypeStruct((T // length, length, D), dtype)


def sparse(executor, E, T, D, F, dtype):
    """Ours: (function of variables and x, shapes of the variables, rows processed)."""
    dropless = executor == "ragged"
    config = SwitchConfig(
        d_model=D, d_ff=F, num_experts=E, dropout_rate=0.0, routing_group="tokens", group_size=4096, dtype=dtype,
        param_dtype=dtype, moe_executor=executor, capacity_factor=CAPACITY_FACTOR, min_expert_capacity=1,
        capacity_mode="dropless" if dropless else "factor",
    )  # fmt: skip
    module = SparseMLP(config)
    x = sequences(T, D, dtype)
    shapes = jax.eval_shape(lambda x: nn.unbox(module.init(jax.random.key(0), x, padding_mask=None, deterministic=True)), x)
    apply = lambda variables, x: module.apply(variables, x, padding_mask=None, deterministic=False)[0]  # noqa: E731
    return apply, shapes, T if dropless else round(CAPACITY_FACTOR * T)


def dense(rows, D, F, dtype):
    """The dense relu MLP of `rows` rows."""
    kernel = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    return lambda kernels, x: jax.nn.relu(x @ kernels[0]) @ kernels[1], (kernel(D, F), kernel(F, D)), rows


def loop(E, T, D, F, dtype):
    """Every expert on every token, and a mask: what comes to mind first."""
    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((D, E), (E, D, F), (E, F, D)))

    def apply(variables, x):
        router, wi, wo = variables
        probs = jax.nn.softmax((x @ router).astype(jnp.float32))
        best, y = probs.argmax(-1), jnp.zeros_like(x)
        for e in range(E):
            weight = jnp.where(best == e, probs[..., e], 0.0)[..., None].astype(x.dtype)
            y = y + weight * (jax.nn.relu(x @ wi[e]) @ wo[e])
        return y

    return apply, shapes, T


def flaxformers(E, T, D, F, dtype, least):
    """flaxformer's MoeLayer with its masked router, or None where it cannot be imported.

    least: its min_expert_capacity, 4 by default. It makes as many groups as experts or a multiple, so that groups are small,
    their one-hot masks cheap, and an expert has round(1.25 * group / E) places in each, or `least`.
    """
    try:
        from flaxformer.architectures.moe import moe_layers, routing
        from flaxformer.components import dense as dense_layers
    except ImportError:
        return None
    router = routing.TokensChooseMaskedRouter(
        router_weights=routing.RouterWeights(use_bias=False, dtype=jnp.float32), jitter_noise=0.0, dtype=dtype,
        ignore_padding_tokens=False, num_selected_experts=1, batch_prioritized_routing=False,
    )  # fmt: skip
    module = moe_layers.MoeLayer(
        num_experts=E, max_group_size=4096, train_capacity_factor=CAPACITY_FACTOR, eval_capacity_factor=2.0, dtype=dtype,
        expert=dense_layers.MlpBlock(
            use_bias=False, intermediate_dim=F, activations=("relu",), intermediate_dropout_rate=0.0, dtype=dtype
        ),
        router=router, num_expert_partitions=1, num_model_partitions=1, dropout_rate=0.0, min_expert_capacity=least,
    )  # fmt: skip
    x = sequences(T, D, dtype)
    init = lambda x: {"params": module.init(jax.random.key(0), x, enable_dropout=False)["params"]}  # noqa: E731
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), nn.unbox(jax.eval_shape(init, x)))
    rngs = {"dropout": jax.random.key(0), "jitter": jax.random.key(0)}
    apply = lambda variables, x: module.apply(variables, x, enable_dropout=True, rngs=rngs)  # noqa: E731
    groups = math.lcm(E, max(1, T // 4096))
    return apply, shapes, groups * E * max(least, round(CAPACITY_FACTOR * (T // groups) / E))


def forward_backward(apply):
    """Loss and gradients of everything; the loss needs the output, so that nothing is optimised away."""
    return jax.value_and_grad(lambda variables, x: (apply(variables, x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))


def fill(shapes):
    """Random arrays of `shapes`, drawn leaf by leaf."""
    draw = jax.jit(lambda key, like: 0.05 * jax.random.normal(key, like.shape, like.dtype), static_argnums=1)
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([draw(jax.random.key(i), leaf) for i, leaf in enumerate(leaves)])


def rows_of(executors, E, T, D, F, dtype):
    """{name: (function, shapes, rows)} of one table."""
    rows = {f"dense {T}": dense(T, D, F, dtype)}
    rows[f"dense {round(CAPACITY_FACTOR * T)}"] = dense(round(CAPACITY_FACTOR * T), D, F, dtype)
    rows |= {name: sparse(name, E, T, D, F, dtype) for name in executors}
    if E <= 8:
        rows["loop"] = loop(E, T, D, F, dtype)
    for name, least in (("flaxformer", 4), ("flaxformer, no minimum", 1)):
        if reference := flaxformers(E, T, D, F, dtype, least):
            rows[name] = reference
            rows.setdefault(f"dense {reference[2]}", dense(reference[2], D, F, dtype))
    return rows


def x_shape(name, rows, T, D, dtype):
    """Dense rows get all their rows at once; layers get sequences."""
    return jax.ShapeDtypeStruct((rows, D), dtype) if name.startswith("dense") else sequences(T, D, dtype)


def count(function, *shapes, device=None, chip=None):
    """XLA's FLOPs and bytes of the compiled function; for a GPU, where it counts neither, the FLOPs of the products alone."""
    if device is not None:
        put = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.sharding.SingleDeviceSharding(device))  # noqa: E731
        shapes = jax.tree.map(put, shapes)
    with contextlib.nullcontext() if chip is None else compiled_for(chip.platform, chip.gpu):
        compiled = jax.jit(function).lower(*shapes).compile()
    cost = compiled.cost_analysis()
    if cost is None:
        return program_flops(compiled.as_text())[0], None
    return cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)


def measure(E, T, D, F, args, device):
    """One table: a list of dicts, one for each row."""
    rows = rows_of(args.executors, E, T, D, F, args.dtype)
    if args.only:
        rows = {name: row for name, row in rows.items() if name.startswith(("dense", *args.only))}
    results, compiled = {}, {}
    chip = parse_topology(args.topology).chip if args.topology else None
    for name, (apply, shapes, processed) in rows.items():
        x = x_shape(name, processed, T, D, args.dtype)
        record = results[name] = dict(name=name, E=E, tokens=T, D=D, F=F, dtype=args.dtype, rows=processed, repeats=args.repeats)
        for mode, function in (("forward", apply), ("backward", forward_backward(apply))):
            if device is not None or name != "ragged":  # on CPU, ragged is loops of unknown length
                record[f"{mode}_flops"], record[f"{mode}_bytes"] = count(function, shapes, x, device=device, chip=chip)
            compiled[name, mode] = jax.jit(function)
    if device is not None:
        return list(results.values())
    for name, (_, shapes, processed) in rows.items():  # one layer's parameters at a time, beside the dense ones
        arrays = {n: (fill(rows[n][1]), fill(x_shape(n, rows[n][2], T, D, args.dtype))) for n in rows if n.startswith("dense")}
        arrays[name] = fill(shapes), fill(x_shape(name, processed, T, D, args.dtype))
        peers = [f"dense {processed}", name][name.startswith("dense") :]
        for mode in ("forward", "backward"):
            times = {peer: [] for peer in peers}
            for repeat in range(-1, args.repeats):  # the first run compiles
                for peer in peers:
                    start = time.perf_counter()
                    jax.block_until_ready(compiled[peer, mode](*arrays[peer]))
                    if repeat >= 0:
                        times[peer].append(time.perf_counter() - start)
            results[name][f"{mode}_ms"] = 1e3 * statistics.median(times[name])
            pairs = zip(times[name], times[peers[0]], strict=True)
            results[name][f"{mode}_ratio"] = statistics.median(ours / dense for ours, dense in pairs)
    return list(results.values())


def table(records):
    """The records as lines of Markdown."""

    def number(record, key, scale=1.0, digits=1):
        return "-" if record.get(key) is None else f"{record[key] / scale:.{digits}f}"

    yield "| row | E | tokens | D/F | forward ms | x dense | fwd+bwd ms | x dense | fwd+bwd GFLOP | fwd+bwd GB |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in records:
        cells = [r["name"], r["E"], r["tokens"], f"{r['D']}/{r['F']}", number(r, "forward_ms"), number(r, "forward_ratio", 1, 2)]
        cells += [number(r, "backward_ms"), number(r, "backward_ratio", 1, 2)]
        cells += [number(r, "backward_flops", 1e9), number(r, "backward_bytes", 1e9, 2)]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main():
    """Measures, prints, and with --write keeps the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--sizes", nargs="+", default=["512x2048", "768x3072"])
    parser.add_argument("--only", nargs="+", help="measure only rows whose names begin so, and the dense ones")
    parser.add_argument("--executors", nargs="+", default=["gather", "ragged", "einsum"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--topology", help="compile for one chip of this topology and count, without running")
    parser.add_argument("--write", action="store_true", help=f"write a JSON file under {run_record.RESULTS.name}/")
    args = parser.parse_args()
    device, kind = None, jax.devices()[0].device_kind
    if args.topology:
        device = compile_devices(parse_topology(args.topology))[0]
        kind = f"{device.device_kind} (compiled, not run)"
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    records = []
    for D, F in sizes:
        for T in args.tokens:
            for E in args.experts:
                measured = measure(E, T, D, F, args, device)
                print(*table(measured), sep="\n", flush=True)
                records += measured
    if args.write:
        place = f"moe_layer_{(args.topology or jax.default_backend()).replace(':', '_')}_{args.dtype}.json"
        run_record.write(run_record.RESULTS / place, dict(repeats=args.repeats, records=records), device=kind)


if __name__ == "__main__":
    main()
