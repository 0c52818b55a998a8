"""One training step beside Hugging Face transformers: tokens per second with the same model, batch and optimiser.

    python benchmarks/train_step.py                                   # the whole table
    python benchmarks/train_step.py --shapes small --dropout 0.1 --repeats 5
    python benchmarks/train_step.py --shapes base-8 --dropout 0 --apart
    python benchmarks/train_step.py --shapes small --dtype bfloat16   # for CPUs that multiply in it

A step is forward, backward and AdamW on float32 parameters, with activations in --dtype: batch 4, source 256, target 64. Dropout
is the same on both sides, router jitter is off on both. Both models route as Hugging Face does, with a fixed capacity in each
sequence. Steps of the two alternate and medians are reported; after each step the machine rests, because idle threads of either
library spin for a while. Malloc keeps its memory (`flax_switch.host.memory`), as in our training; both models profit. Every
row has a process of its own, as the two models of base-8 fill 20 GB; with --apart each side of a row has, and fills half
of that. Quiet machines only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import run_record

from flax_switch.host.memory import keep_freed_memory

if __name__ in ("__main__", "__mp_main__"):
    keep_freed_memory()  # before JAX starts

import jax
import numpy as np
import torch
import transformers

from flax_switch.config import ExperimentConfig, MeshConfig, OptimizerConfig, TrainConfig
from flax_switch.parallel.mesh import create_mesh, shard_batch
from flax_switch.pretrained import load_pretrained
from flax_switch.training.state import TrainState, build_run, init_state, state_shardings
from flax_switch.training.step import compile_train_step

SETTLE = 0.3  # seconds
SHAPES = {
    "small": dict(
        vocab_size=8192, d_model=256, d_ff=1024, d_kv=64, num_heads=4, num_layers=4, num_decoder_layers=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=8,
    ),
    "base-8": dict(
        vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=8,
    ),
}  # fmt: skip


def batch_of(vocab_size: int, batch: int, source: int, target: int) -> dict[str, np.ndarray]:
    """Random ids, and the decoder's inputs: labels moved right behind the start token."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, vocab_size, (batch, target), dtype=np.int32)
    return dict(
        input_ids=rng.integers(2, vocab_size, (batch, source), dtype=np.int32),
        attention_mask=np.ones((batch, source), np.int32),
        decoder_input_ids=np.pad(labels[:, :-1], ((0, 0), (1, 0))),
        decoder_attention_mask=np.ones((batch, target), np.int32),
        labels=labels,
    )


def their_step(shape: str, dropout: float, folder: str, batch: dict[str, np.ndarray], args):
    """A function that makes one step of transformers' model and returns its cross-entropy; the model is left in `folder`."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        **SHAPES[shape], decoder_start_token_id=0, dropout_rate=dropout, router_jitter_noise=0.0, use_cache=False
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    tensors = {name: torch.from_numpy(array).long() for name, array in batch.items()}

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def our_step(dropout: float, folder: str, batch: dict[str, np.ndarray], args):
    """The same with our train step, from the weights in `folder`."""
    pretrained = load_pretrained(folder)
    experiment = ExperimentConfig(
        model=pretrained.config.replace(dropout_rate=dropout, dtype=args.dtype),
        optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=args.learning_rate, warmup_steps=0),
        mesh=MeshConfig(),
        train=TrainConfig(),
    )
    run = build_run(experiment, create_mesh(experiment.mesh, jax.devices()[:1]))
    fresh = init_state(run)
    state = [TrainState(fresh.step, jax.device_put(pretrained.params, state_shardings(run).params), fresh.opt_state, fresh.rng)]
    batch = shard_batch(batch, run.mesh)
    compiled = compile_train_step(run)

    def step() -> float:
        state[0], metrics = compiled(state[0], batch)
        jax.block_until_ready(state[0])
        return float(metrics["cross_entropy"])

    return step


def together(shape: str, dropout: float, args) -> dict:
    """What a row says of both, timed by turns in this process."""
    batch = batch_of(SHAPES[shape]["vocab_size"], args.batch, args.source, args.target)
    with tempfile.TemporaryDirectory() as folder:
        theirs = their_step(shape, dropout, folder, batch, args)
        ours = our_step(dropout, folder, batch, args)
    first = [timed(step) for step in (ours, theirs)]
    pairs = [[timed(theirs)[0], timed(ours)[0]] for _ in range(args.warm_up + args.repeats)][args.warm_up :]
    their_seconds, our_seconds = map(list, zip(*pairs, strict=True))
    return row_of(shape, dropout, args, (*first[0], our_seconds), (*first[1], their_seconds))


def one_side(side: str, shape: str, dropout: float, args, folder: str) -> tuple[float, float, list[float]]:
    """Seconds and loss of one side's first step, and seconds of the others; theirs leaves the weights in `folder` for ours."""
    batch = batch_of(SHAPES[shape]["vocab_size"], args.batch, args.source, args.target)
    make = our_step if side == "ours" else functools.partial(their_step, shape)
    step = make(dropout, folder, batch, args)
    return *timed(step), [timed(step)[0] for _ in range(args.warm_up + args.repeats)][args.warm_up :]


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    time.sleep(SETTLE)
    start = time.perf_counter()
    loss = step()
    return time.perf_counter() - start, loss


def row_of(
    shape: str, dropout: float, args, ours: tuple[float, float, list[float]], theirs: tuple[float, float, list[float]]
) -> dict:
    """A row of the table: speeds, and the cross-entropies of the first steps."""
    tokens = args.batch * (args.source + args.target)
    our_seconds, their_seconds = statistics.median(ours[2]), statistics.median(theirs[2])
    return dict(
        shape=shape,
        dropout=dropout,
        our_tokens_per_second=tokens / our_seconds,
        their_tokens_per_second=tokens / their_seconds,
        ratio=statistics.median(t / o for t, o in zip(theirs[2], ours[2], strict=True)),
        compile_seconds=ours[0] - our_seconds,
        our_first_loss=ours[1],
        their_first_loss=theirs[1],
        our_seconds=ours[2],
        their_seconds=theirs[2],
    )


def measured(shape: str, dropout: float, args) -> dict:
    """A row, each of whose processes ends before the next begins."""

    def alone(function: Callable[..., Any], *arguments: Any) -> Any:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *arguments).result()

    if not args.apart:
        return alone(together, shape, dropout, args)
    with tempfile.TemporaryDirectory() as folder:
        theirs = alone(one_side, "theirs", shape, dropout, args, folder)
        return row_of(shape, dropout, args, alone(one_side, "ours", shape, dropout, args, folder), theirs)


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "base-8"], choices=SHAPES)
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1, 0.0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations; theirs by autocast")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warm-up", type=int, default=2, help="pairs before those that count")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--apart", action="store_true", help="each side has a process of its own: for machines of 24 GB")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/train_step_jax_VERSION.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    print("shape    dropout   ours tok/s  transformers tok/s   ratio  compile s  first losses")
    for shape in args.shapes:
        for dropout in args.dropout:
            row = measured(shape, dropout, args)
            rows.append(row)
            print(
                f"{shape:8} {dropout:7} {row['our_tokens_per_second']:12.0f} {row['their_tokens_per_second']:19.0f} "
                f"{row['ratio']:7.2f} {row['compile_seconds']:10.1f}  {row['our_first_loss']:.4f} {row['their_first_loss']:.4f}",
                flush=True,
            )
    settings = dict(
        batch=args.batch, source=args.source, target=args.target, optimizer="AdamW, float32", dtype=args.dtype, apart=args.apart
    )
    results = dict(torch_threads=torch.get_num_threads(), settings=settings, rows=rows)
    run_record.write(args.output or run_record.RESULTS / f"train_step_jax_{jax.__version__}.json", results)


if __name__ == "__main__":
    main()
