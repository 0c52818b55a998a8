"""What one chip reaches, in order of value, within the minutes that one has it.

    python benchmarks/accelerator.py --minutes 9            # any one GPU or TPU; leaves JSON, a table and a picture
    python benchmarks/accelerator.py --minutes 1 --toy      # the same code with sizes for a CPU

    grouped GEMM      E experts' products beside one dense product of equal rows, forward and backward
    attention         fused beside the plain form, forward and backward
    T5 v1.1 base      a train step's sequences/s and share of the chip's peak, at 512 and 114 tokens; beside transformers under
                      torch.compile, where a torch with CUDA is there
    sparse over dense base-8, -64 and -128: a train step's time over that of the dense model with equal FLOPs a token
    generation        greedy tokens/s at batch 1, 8 and 64

A case begins only while there is time for the longest one so far; results are written after every case, so that whatever ends the
run loses the case at work alone. Two sides of a ratio run by turns; times are medians. Compilation is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run_record

import flax_switch as fs
from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig
from flax_switch.config.flops import train_flops
from flax_switch.config.presets import PRESETS
from flax_switch.host.peaks import peak_flops
from flax_switch.nn.heads import build_model
from flax_switch.nn.init import init_params
from flax_switch.ops.kernels.checks import implementations_here
from flax_switch.ops.kernels.fused_attention import fused_attention
from flax_switch.ops.kernels.grouped import chosen, grouped_matmul
from flax_switch.ops.kernels.relative import RelativeBias
from flax_switch.ops.kernels.visible import Visible
from flax_switch.parallel.mesh import create_mesh, shard_batch
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_train_step

T5_V1_1_BASE = PRESETS["t5-base"].replace(
    d_ff=2048, mlp_activations=("gelu_new", "linear"), tie_word_embeddings=False, dropout_rate=0.1
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    experts: tuple[int, ...] = (8, 64, 128)
    rows: tuple[int, ...] = (4096, 32768)
    widths: tuple[int, int] = (768, 3072)
    attention: tuple[tuple[int, int], ...] = ((16, 512), (4, 2048), (1, 8192))  # rows and length
    heads: tuple[int, int] = (12, 64)
    model: SwitchConfig = T5_V1_1_BASE
    lengths: tuple[int, int] = (512, 114)
    batches: tuple[int, ...] = (128, 64, 32, 16)  # of a train step; the first that fits
    sparse: tuple[int, ...] = (8, 64, 128)
    generated: tuple[int, int] = (128, 64)  # tokens of the source, and new ones
    rows_generated: tuple[int, ...] = (1, 8, 64)


_SMALL = dict(vocab_size=512, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_encoder_layers=2, num_decoder_layers=2)
TOY = Sizes(
    experts=(2, 4), rows=(64,), widths=(32, 64), attention=((2, 48),), heads=(2, 16), model=T5_V1_1_BASE.replace(**_SMALL),
    lengths=(32, 16), batches=(4,), sparse=(2,), generated=(16, 4), rows_generated=(1, 2),
)  # fmt: skip

Case = tuple[str, str, Callable[[], dict[str, Any]]]  # section, name, and what measures it


def timed(*sides: Callable[[], Any], repeats: int = 7) -> list[float]:
    """Returns each side's median seconds; they run by turns, after one run that compiles."""
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats + 1):
        for side, seconds in zip(sides, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(side())
            if repeat:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def cases(sizes: Sizes) -> Iterator[Case]:
    """Yields all cases, those that tell most first."""
    for rows in sizes.rows:
        for experts in sizes.experts:
            yield "grouped GEMM", f"{experts} experts, {rows} rows", lambda e=experts, r=rows: grouped(e, r, sizes.widths)
    for rows, length in sizes.attention:
        yield "attention", f"{rows} x {length}", lambda r=rows, n=length: attention(r, n, sizes.heads)
    yield "T5 v1.1 base", "flax_switch", lambda: dense_step(sizes)
    yield "T5 v1.1 base", "transformers, torch.compile", lambda: torch_step(sizes)
    for experts in sizes.sparse:
        yield "sparse over dense", f"{experts} experts", lambda e=experts: sparse_step(e, sizes)
    for rows in sizes.rows_generated:
        yield "generation", f"batch {rows}", lambda r=rows: generation(r, sizes)


# --- kernels


def grouped(num_experts: int, rows: int, widths: tuple[int, int]) -> dict[str, Any]:
    """Measures rows of experts of uneven sizes against one dense product of the same rows, and what else can multiply them."""
    D, F = widths
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(num_experts, 8.0))), jnp.int32)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
    x, gradient, kernels, dense = draw(0, rows, D), draw(1, rows, F), draw(2, num_experts, D, F), draw(3, D, F)

    def ours(implementation: str | None) -> Callable[[], Any]:
        both = jax.jit(lambda x, k, g: jax.vjp(lambda x, k: grouped_matmul(x, k, sizes, implementation), x, k)[1](g))
        return lambda: both(x, kernels, gradient)

    theirs = jax.jit(lambda x, k, g: jax.vjp(jnp.matmul, x, k)[1](g))
    seconds, alone = timed(ours(None), lambda: theirs(x, dense, gradient))
    name, others = chosen(x, kernels), {}
    for other in implementations_here():
        if other != name:
            try:
                others[f"{other}_ms"] = 1e3 * timed(ours(other), repeats=5)[0]
            except Exception as error:  # it is not the one that runs
                others[f"{other}_failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    both = {"ms": 1e3 * seconds, "dense_ms": 1e3 * alone, "rate_of_dense": alone / seconds, **share(4 * rows * D * F, seconds)}
    return {"implementation": name, **both, **others}


def attention(rows: int, length: int, heads: tuple[int, int]) -> dict[str, Any]:
    """Measures a self-attention with its bias table, forward and backward, fused and plain."""
    H, K = heads
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
    query, key, value, gradient = (draw(seed, rows, H, length, K) for seed in range(4))
    table = jax.random.normal(jax.random.key(4), (H, 32))

    def form(implementation: str | None) -> Callable[[], Any]:
        def attend(query: Any, key: Any, value: Any, table: Any) -> Any:
            bias = RelativeBias(table, bidirectional=True, max_distance=128)
            return fused_attention(query, key, value, bias, Visible(), None, implementation=implementation)

        both = jax.jit(lambda q, k, v, t, g: jax.vjp(attend, q, k, v, t)[1](g))
        return lambda: both(query, key, value, table, gradient)

    flops = 3 * 2 * 2 * rows * H * length**2 * K
    try:
        seconds, plain = timed(form(None), form("reference"))
    except jax.errors.JaxRuntimeError as error:  # the plain form may not fit
        (seconds,), plain = timed(form(None)), None
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    ratio = None if plain is None else plain / seconds
    return {"ms": 1e3 * seconds, "plain_ms": None if plain is None else 1e3 * plain, "times_plain": ratio, **share(flops, seconds)}


def share(flops: float, seconds: float) -> dict[str, float | None]:
    """Returns TFLOP/s, and the share of the chip's peak where that is known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return {"tflops": flops / seconds / 1e12, "mfu": flops / seconds / peak if peak else None}


# --- train steps


def step_of(model: SwitchConfig, batch: int, lengths: tuple[int, int]) -> Callable[[], Any]:
    """Makes a function that makes a train step with Adafactor."""
    config = ExperimentConfig(model=model, data=DataConfig(batch_size=batch), optimizer=OptimizerConfig(), mesh=MeshConfig())
    run = build_run(config, create_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, model.vocab_size, (batch, length), dtype=np.int32) for length in lengths]
    inputs = dict(
        input_ids=ids[0], attention_mask=np.ones_like(ids[0]), decoder_input_ids=np.pad(ids[1][:, :-1], ((0, 0), (1, 0))),
        decoder_attention_mask=np.ones_like(ids[1]), labels=ids[1],
    )  # fmt: skip
    state, step, arrays = [init_state(run)], compile_train_step(run), shard_batch(inputs, run.mesh)

    def once() -> Any:
        state[0], metrics = step(state[0], arrays)
        return metrics["loss"]

    return once


def first_that_fits(sizes: Sizes, run: Callable[[int], float]) -> tuple[int, float]:
    """Returns the largest batch that fits, and what `run` returns for it."""
    for batch in sizes.batches[:-1]:
        try:
            return batch, run(batch)
        except Exception as error:  # JAX's and torch's
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
                raise
    return sizes.batches[-1], run(sizes.batches[-1])


def dense_step(sizes: Sizes) -> dict[str, Any]:
    """Measures T5 v1.1 base."""
    batch, seconds = first_that_fits(sizes, lambda batch: timed(step_of(sizes.model, batch, sizes.lengths))[0])
    flops = train_flops(sizes.model, batch, *sizes.lengths)
    return {"batch": batch, "ms": 1e3 * seconds, "sequences_per_second": batch / seconds, **share(flops, seconds)}


def torch_step(sizes: Sizes) -> dict[str, Any]:
    """Measures the same model of transformers, compiled, under bfloat16 autocast with fused AdamW."""
    try:
        import torch
        import transformers
    except ImportError as missing:
        return {"left_out": str(missing)}
    if not torch.cuda.is_available():
        return {"left_out": "this torch has no CUDA device"}
    model = sizes.model
    config = transformers.T5Config(
        vocab_size=model.vocab_size, d_model=model.d_model, d_kv=model.d_kv, d_ff=model.d_ff, num_heads=model.num_heads,
        num_layers=model.num_encoder_layers, num_decoder_layers=model.num_decoder_layers, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    theirs = torch.compile(transformers.T5ForConditionalGeneration(config).cuda().train())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def run(batch: int) -> float:
        source, target = (torch.randint(2, model.vocab_size, (batch, length), device="cuda") for length in sizes.lengths)

        def once() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = theirs(input_ids=source, labels=target).loss
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()

        once()  # compiled twice: optimiser states appear after the first step
        return timed(once)[0]

    batch, seconds = first_that_fits(sizes, run)
    flops = train_flops(model, batch, *sizes.lengths)
    return {"batch": batch, "ms": 1e3 * seconds, "sequences_per_second": batch / seconds, **share(flops, seconds)}


def sparse_step(num_experts: int, sizes: Sizes) -> dict[str, Any]:
    """Measures a sparse model's step over the dense one's."""
    batch = sizes.batches[-1]
    changes = _SMALL if sizes is TOY else {}
    layers = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1) if sizes is TOY else {}
    dense = PRESETS["t5-base"].replace(**changes)
    sparse = PRESETS["switch-base-8"].replace(**changes, **layers, num_experts=num_experts, group_size=batch * sizes.lengths[1])
    alone, seconds = timed(*(step_of(model, batch, sizes.lengths) for model in (dense, sparse)))
    return {"batch": batch, "ms": 1e3 * seconds, "dense_ms": 1e3 * alone, "over_dense": seconds / alone}


def generation(rows: int, sizes: Sizes) -> dict[str, Any]:
    """Measures greedy generation of a base-8 in bfloat16."""
    layers = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1) if sizes is TOY else {}
    config = PRESETS["switch-base-8"].replace(**(_SMALL if sizes is TOY else {}), **layers, param_dtype="bfloat16")
    model, (source, new) = build_model(config), sizes.generated
    params = init_params(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (rows, source), dtype=np.int32)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1)
    (seconds,) = timed(lambda: fs.generate(model, params, ids, **options).sequences, repeats=5)
    return {"ms": 1e3 * seconds, "tokens_per_second": rows * new / seconds}


# --- the run


def main() -> None:
    """Runs the cases that there is time for, and writes what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--output", type=Path, help="by default results/accelerator_DEVICE.json; a picture lies beside it")
    args = parser.parse_args()
    began, longest = time.perf_counter(), 0.0
    device = jax.devices()[0].device_kind
    output = args.output or run_record.RESULTS / f"accelerator_{device.lower().replace(' ', '_')}.json"
    rows: list[dict[str, Any]] = []
    results = {"minutes": args.minutes, "toy": args.toy, "rows": rows, "not_begun": []}
    for section, name, measure in cases(TOY if args.toy else Sizes()):
        start = time.perf_counter()
        if start - began + longest > 60 * args.minutes:
            results["not_begun"].append(f"{section}: {name}")
            continue
        try:
            row = measure()
        except Exception as error:  # a case that fails must not cost the others
            row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        longest = max(longest, time.perf_counter() - start)
        rows.append({"section": section, "case": name, "seconds": round(time.perf_counter() - start, 1), **row})
        print(line_of(rows[-1]), flush=True)
        run_record.write(output, results, device=device, quiet=True)
    draw(rows, output.with_suffix(".png"), device)
    run_record.write(output, results, device=device)
    if failed := [row for row in rows if "failed" in row]:
        raise SystemExit(f"{len(failed)} case(s) failed.")


def line_of(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if value is not None}
    section, name = shown.pop("section"), shown.pop("case")
    return f"| {section} | {name} | {', '.join(f'{key} {value}' for key, value in shown.items())} |"


SHOWN = {
    "grouped GEMM": ("rate_of_dense", "rate over one dense product's"),
    "attention": ("times_plain", "times as fast as the plain form"),
    "T5 v1.1 base": ("sequences_per_second", "sequences a second"),
    "sparse over dense": ("over_dense", "step's time over the dense one's"),
    "generation": ("tokens_per_second", "tokens a second"),
}


def draw(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Draws a panel of bars for each section, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: pip install 'flax_switch[plots]'.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(SHOWN), 1, figsize=(8, 2 * len(SHOWN)), layout="constrained")
    for panel, (section, (field, title)) in zip(panels, SHOWN.items(), strict=True):
        found = [(row["case"], row[field]) for row in rows if row["section"] == section and row.get(field)]
        bars = panel.barh([name for name, _ in found], [value for _, value in found], color="tab:blue")
        panel.bar_label(bars, fmt="%.3g", padding=3)
        panel.invert_yaxis()
        panel.set_title(f"{section}: {title}", fontsize=10, loc="left")
        panel.margins(x=0.12)
    figure.suptitle(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
