"""Generation beside Hugging Face transformers: tokens per second with the same weights, interleaved in one process.

    python benchmarks/generation.py                        # the whole table: minutes per shape
    python benchmarks/generation.py --shapes small --batches 1 --repeats 5

Every cell is a full `generate`: encode 256 tokens, then produce exactly 32 new ones for each row, in evaluation mode. Runs of
the two alternate, so that whatever else the machine does falls on both; medians are reported. Compilation is told apart.
Quiet machines only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import run_record
import torch
import transformers

from flax_switch.generation.generate import generate
from flax_switch.pretrained import load_pretrained

SETTLE = 0.3  # seconds: after a run, each library's idle threads spin for a while and would slow the other's
SHAPES = {
    "small": dict(
        vocab_size=8192, d_model=256, d_ff=1024, d_kv=64, num_heads=4, num_layers=4, num_decoder_layers=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=8,
    ),
    "base-8": dict(
        vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=8,
    ),
    "tiny": dict(
        vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
    ),
}  # fmt: skip


def models(shape: str):
    """A transformers model with random weights, and the same weights as ours."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(**SHAPES[shape], decoder_start_token_id=0)
    theirs = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
    return theirs, ours


def measure(theirs, ours, batch: int, beams: int, source: int, new_tokens: int, repeats: int) -> dict:
    """Seconds of both, by turns."""
    ids = np.random.default_rng(0).integers(2, ours.config.vocab_size, (batch, source))
    tensor = torch.from_numpy(ids)
    controls = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, num_beams=beams)

    def run_theirs():
        with torch.inference_mode():
            return theirs.generate(tensor, do_sample=False, **controls).numpy()

    def run_ours():
        return generate(ours.model, ours.params, ids, **controls).sequences

    def timed(run):
        time.sleep(SETTLE)
        start = time.perf_counter()
        sequences = run()
        return time.perf_counter() - start, sequences

    first, sequences = timed(run_ours)
    _, expected = timed(run_theirs)
    pairs = [(timed(run_theirs)[0], timed(run_ours)[0]) for _ in range(repeats)]
    tokens = batch * new_tokens
    their_seconds, our_seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
    return dict(
        batch=batch,
        beams=beams,
        same_tokens=bool(np.array_equal(sequences, expected)),
        compile_seconds=first - our_seconds,
        our_tokens_per_second=tokens / our_seconds,
        their_tokens_per_second=tokens / their_seconds,
        ratio=statistics.median(theirs / ours for theirs, ours in pairs),
        our_seconds=[ours for _, ours in pairs],
        their_seconds=[theirs for theirs, _ in pairs],
    )


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "base-8"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.json"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    print("shape    batch  beams   ours tok/s  transformers tok/s   ratio  compile s  same tokens")
    for shape in args.shapes:
        theirs, ours = models(shape)
        for batch in args.batches:
            for beams in args.beams:
                row = measure(theirs, ours, batch, beams, args.source, args.new_tokens, args.repeats)
                rows.append(dict(shape=shape, **row))
                print(
                    f"{shape:8} {batch:5} {beams:6} {row['our_tokens_per_second']:12.1f} "
                    f"{row['their_tokens_per_second']:19.1f} {row['ratio']:7.2f} {row['compile_seconds']:10.1f}  "
                    f"{row['same_tokens']}",
                    flush=True,
                )
        del theirs, ours
    settings = dict(torch_threads=torch.get_num_threads(), source=args.source, new_tokens=args.new_tokens)
    run_record.write(args.output, dict(**settings, rows=rows), device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
