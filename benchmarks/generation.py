"""Generation beside Hugging Face transformers and CTranslate2: tokens per second with the same weights, interleaved in one process.

    python benchmarks/generation.py                        # the whole table: minutes per shape
    python benchmarks/generation.py --shapes small --batches 1 --repeats 5

Every cell is a full `generate`: encode 256 tokens, then produce exactly 32 new ones for each row, in evaluation mode. Contenders
take turns, so that whatever else the machine does falls on all; medians are reported. Compilation is told apart. CTranslate2, which
has no mixtures of experts, runs dense shapes where it is installed. Quiet machines only.

The peak of memory is that of a process that loads one contender alone and generates once with the largest batch (Linux's VmHWM),
beyond what it had when all libraries were imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import run_record
import torch
import transformers

import flax_switch as fs

SETTLE = 0.3  # seconds: after a run, each library's idle threads spin for a while and would slow the others'
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
    "t5-small": dict(vocab_size=32128, d_model=512, d_ff=2048, d_kv=64, num_heads=8, num_layers=6),
    "t5-base": dict(vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12),
    "t5-tiny": dict(vocab_size=128, d_model=64, d_ff=64, d_kv=16, num_heads=4, num_layers=2),
}  # fmt: skip


OURS = {"float32": {}, **{weights: dict(weights=weights) for weights in ("bfloat16", "int8", "int4")}}
Run = Callable[[np.ndarray, dict], np.ndarray]  # source ids [B, S] and controls to sequences [B, T]


def write_model(shape: str, folder: str, ours: list[str]) -> list[str]:
    """Writes transformers' model of a shape with random weights, and CTranslate2's of it; returns the names of all that run it."""
    torch.manual_seed(0)
    dense = "num_experts" not in SHAPES[shape]
    kind = "T5" if dense else "SwitchTransformers"
    config = getattr(transformers, f"{kind}Config")(**SHAPES[shape], decoder_start_token_id=0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    names = ["transformers", *ours]
    if dense and importlib.util.find_spec("ctranslate2"):
        for name in ("float32", "int8"):
            _convert(folder, name)
            names.append(f"CTranslate2 {name}")
    return names


def contender(name: str, folder: str) -> Run:
    """Returns what generates, of the files that `write_model` made."""
    if name == "transformers":
        return _theirs(transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval())
    if name in OURS:
        return _ours(fs.load_pretrained(folder, **OURS[name]))
    return _ctranslate2(folder, name.split()[-1])


def _theirs(model) -> Run:
    def run(ids: np.ndarray, controls: dict) -> np.ndarray:
        with torch.inference_mode():
            return model.generate(torch.from_numpy(ids), do_sample=False, **controls).numpy()

    return run


def _ours(model: fs.Pretrained) -> Run:
    return lambda ids, controls: model.generate(ids, **controls).sequences


def _convert(folder: str, weights: str) -> None:
    """Converts the folder for CTranslate2. The model has no tokenizer: a token is its number."""
    from ctranslate2.converters import transformers as converters

    class Converter(converters.TransformersConverter):
        def load_tokenizer(self, *args, **options):
            return _Numbers(transformers.AutoConfig.from_pretrained(folder).vocab_size)

    Converter(folder).convert(f"{folder}/ctranslate2_{weights}", quantization=weights)


def _ctranslate2(folder: str, weights: str) -> Run:
    import ctranslate2

    output = f"{folder}/ctranslate2_{weights}"
    translator = ctranslate2.Translator(output, device="cpu", compute_type=weights, intra_threads=torch.get_num_threads())

    def run(ids: np.ndarray, controls: dict) -> np.ndarray:
        found = translator.translate_batch(
            [[_Numbers.token(token) for token in row] for row in ids],
            beam_size=controls["num_beams"],
            min_decoding_length=controls["min_new_tokens"],
            max_decoding_length=controls["max_new_tokens"],
        )
        return np.array([[0, *map(_Numbers.number, result.hypotheses[0])] for result in found])

    return run


class _Numbers:
    """What CTranslate2's converter asks of a tokenizer."""

    pad_token, eos_token, unk_token, bos_token = "0", "1", "2", None

    def __init__(self, size: int):
        self.size = size

    token = convert_ids_to_tokens = staticmethod(str)
    number = staticmethod(int)

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.size)}


def alone(name: str, folder: str, shape: str, batch: int, args) -> int:
    """Returns by how many bytes one contender raises the peak of a process of its own."""
    command = [sys.executable, __file__, "--alone", name, folder, "--shapes", shape, "--batches", str(batch), "--beams", "1"]
    sizes = ["--source", str(args.source), "--new-tokens", str(args.new_tokens)]
    return json.loads(subprocess.run([*command, *sizes], check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run_alone(name: str, folder: str, args) -> None:
    """What such a process does; prints the bytes."""
    before = run_record.peak_bytes()
    ids, controls = problem(SHAPES[args.shapes[0]]["vocab_size"], args.batches[0], args.beams[0], args.source, args.new_tokens)
    contender(name, folder)(ids, controls)
    print(json.dumps(run_record.peak_bytes() - before))


def problem(vocab_size: int, batch: int, beams: int, source: int, new_tokens: int) -> tuple[np.ndarray, dict]:
    """Returns source ids and controls."""
    ids = np.random.default_rng(0).integers(2, vocab_size, (batch, source))
    return ids, dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, num_beams=beams)


def measure(runs: dict[str, Run], vocab_size: int, batch: int, beams: int, source: int, new_tokens: int, repeats: int) -> dict:
    """Seconds of all contenders, by turns, and how many of each one's tokens are transformers'."""
    ids, controls = problem(vocab_size, batch, beams, source, new_tokens)

    def timed(run: Run) -> tuple[float, np.ndarray]:
        time.sleep(SETTLE)
        start = time.perf_counter()
        sequences = run(ids, controls)
        return time.perf_counter() - start, sequences

    first = {name: timed(run) for name, run in runs.items()}
    rounds = [{name: timed(run)[0] for name, run in runs.items()} for _ in range(repeats)]
    seconds = {name: [turn[name] for turn in rounds] for name in runs}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    expected = first["transformers"][1]
    return dict(
        batch=batch,
        beams=beams,
        same_tokens={name: float(np.mean(sequences == expected)) for name, (_, sequences) in first.items()},
        compile_seconds={name: first[name][0] - medians[name] for name in OURS if name in first},
        tokens_per_second={name: batch * new_tokens / value for name, value in medians.items()},
        ratio={
            name: statistics.median(turn["transformers"] / turn[name] for turn in rounds) for name in runs if name != "transformers"
        },
        seconds=seconds,
    )


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "base-8", "t5-small", "t5-base"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--weights", nargs="+", default=["float32", "int8"], choices=OURS, help="the forms that ours run in")
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/generation_jax_VERSION.json")
    parser.add_argument("--alone", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.alone:
        run_alone(*args.alone, args)
    else:
        race(args)


def race(args) -> None:
    """Measures all cells."""
    rows, memory = [], {}
    print("shape     batch  beams  contender              tok/s   ratio  same tokens  compile s")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            names = write_model(shape, folder, args.weights)
            memory[shape] = {name: alone(name, folder, shape, max(args.batches), args) for name in names}
            runs = {name: contender(name, folder) for name in names}
        for batch in args.batches:
            for beams in args.beams:
                size = SHAPES[shape]["vocab_size"]
                row = measure(runs, size, batch, beams, args.source, args.new_tokens, args.repeats)
                rows.append(dict(shape=shape, **row))
                show(rows[-1])
        peaks = (f"{name} {size / 1e6:.0f}" for name, size in memory[shape].items())
        print(f"{shape:9} peak of memory, MB: {', '.join(peaks)}", flush=True)
        del runs
    settings = dict(torch_threads=torch.get_num_threads(), source=args.source, new_tokens=args.new_tokens)
    output = args.output or run_record.RESULTS / f"generation_jax_{jax.__version__}.json"
    run_record.write(output, dict(**settings, rows=rows, peak_bytes=memory, peak_batch=max(args.batches)))


def show(row: dict) -> None:
    """Prints a line for each contender."""
    for name, speed in row["tokens_per_second"].items():
        compiled = row["compile_seconds"].get(name)
        print(
            f"{row['shape']:9} {row['batch']:5} {row['beams']:6}  {name:20} {speed:7.1f} {row['ratio'].get(name, 1.0):7.2f} "
            f"{row['same_tokens'][name]:12.2f} {'' if compiled is None else f'{compiled:10.1f}'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
