"""One training step beside Hugging Face transformers: tokens per second with the same model, batch and optimiser.

    python benchmarks/train_step.py                                   # the whole table
    python benchmarks/train_step.py --shapes small --dropout 0.1 --repeats 5

A step is forward, backward and AdamW on float32 parameters: batch 4, source 256, target 64. Dropout is the same on both sides,
router jitter is off on both. Both models route as Hugging Face does, with a fixed capacity in each sequence. Steps of the two
alternate and medians are reported; after each step the machine rests, because idle threads of either library spin for a while.
Malloc keeps its memory (`flax_switch.host.memory`), as it does in our training; both models profit. Every row has a process of its
own, as the two models of base-8 fill 20 GB. Quiet machines only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

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


def their_step(shape: str, dropout: float, folder: str, batch: dict[str, np.ndarray], learning_rate: float):
    """A function that makes one step of transformers' model and returns its cross-entropy; the model is left in `folder`."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        **SHAPES[shape], decoder_start_token_id=0, dropout_rate=dropout, router_jitter_noise=0.0, use_cache=False
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    tensors = {name: torch.from_numpy(array).long() for name, array in batch.items()}

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def our_step(dropout: float, folder: str, batch: dict[str, np.ndarray], learning_rate: float):
    """The same with our train step, from the weights in `folder`."""
    pretrained = load_pretrained(folder)
    experiment = ExperimentConfig(
        model=pretrained.config.replace(dropout_rate=dropout),
        optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=learning_rate, warmup_steps=0),
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


def measure(shape: str, dropout: float, args) -> dict:
    """Seconds of both, by turns, and the cross-entropies of their first steps."""
    batch = batch_of(SHAPES[shape]["vocab_size"], args.batch, args.source, args.target)
    with tempfile.TemporaryDirectory() as folder:
        theirs = their_step(shape, dropout, folder, batch, args.learning_rate)
        ours = our_step(dropout, folder, batch, args.learning_rate)

    def timed(step):
        time.sleep(SETTLE)
        start = time.perf_counter()
        loss = step()
        return time.perf_counter() - start, loss

    compile_seconds, our_loss = timed(ours)
    _, their_loss = timed(theirs)
    pairs = [(timed(theirs)[0], timed(ours)[0]) for _ in range(args.warm_up + args.repeats)][args.warm_up :]
    tokens = args.batch * (args.source + args.target)
    their_seconds, our_seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
    return dict(
        shape=shape,
        dropout=dropout,
        our_tokens_per_second=tokens / our_seconds,
        their_tokens_per_second=tokens / their_seconds,
        ratio=statistics.median(theirs / ours for theirs, ours in pairs),
        compile_seconds=compile_seconds - our_seconds,
        our_first_loss=our_loss,
        their_first_loss=their_loss,
        our_seconds=[ours for _, ours in pairs],
        their_seconds=[theirs for theirs, _ in pairs],
    )


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "base-8"], choices=SHAPES)
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1, 0.0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warm-up", type=int, default=2, help="pairs before those that count")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/train_step_jax_VERSION.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    print("shape    dropout   ours tok/s  transformers tok/s   ratio  compile s  first losses")
    for shape in args.shapes:
        for dropout in args.dropout:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                row = alone.submit(measure, shape, dropout, args).result()
            rows.append(row)
            print(
                f"{shape:8} {dropout:7} {row['our_tokens_per_second']:12.0f} {row['their_tokens_per_second']:19.0f} "
                f"{row['ratio']:7.2f} {row['compile_seconds']:10.1f}  {row['our_first_loss']:.4f} {row['their_first_loss']:.4f}",
                flush=True,
            )
    settings = dict(batch=args.batch, source=args.source, target=args.target, optimizer="AdamW, float32")
    results = dict(torch_threads=torch.get_num_threads(), settings=settings, rows=rows)
    run_record.write(args.output or run_record.RESULTS / f"train_step_jax_{jax.__version__}.json", results)


if __name__ == "__main__":
    main()
