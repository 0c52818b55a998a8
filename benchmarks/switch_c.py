"""Switch-C's shape, 1.57 T parameters, generates on one small machine: experts stay on disk, of which a few are filled.

    python benchmarks/switch_c.py FOLDER                     # all 15 + 15 layers of 2,048 experts
    python benchmarks/switch_c.py FOLDER --layers 2          # the same experts in fewer layers: seconds

Makes a checkpoint of sparse files in FOLDER: every tensor of the full shape, of which only the non-experts and two experts a layer
hold numbers; the rest are holes that take no disk. A router's columns for the two are each other's opposite and large, those of all
others zero, so that one of the two is always chosen, with probability 1. Then two processes generate greedily from the same ids:
one from FOLDER with `experts="disk"` and --expert-memory, one with a model in memory that has the two experts alone. The tokens
must be the same. Prints what each process's memory reached (VmHWM), beside what it may take: the non-experts, the experts' memory,
and 1 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import run_record

BF16 = np.dtype(ml_dtypes.bfloat16)
FILLED = (5, 1500)  # experts of each layer that hold numbers
STEEP = 1e6  # of the routers' logits: a probability other than 0 or 1 is then one in ten thousand
# The model in memory would hold every kernel in float32 beside bfloat16; without these passes it does not, at the same bits.
FRUGAL = "--xla_disable_hlo_passes=while-loop-invariant-code-motion --xla_cpu_enable_concurrency_optimized_scheduler=false"
ROOM = 10**9  # bytes that a process may take beside its parameters


def config_of(layers: int, num_experts: int) -> Any:
    """Returns Switch-C's config with so many layers in each stack."""
    from flax_switch.config.presets import PRESETS

    return PRESETS["switch-c-2048"].replace(
        num_experts=num_experts, param_dtype="bfloat16", capacity_mode="dropless",
        num_encoder_layers=layers, num_decoder_layers=layers, num_sparse_encoder_layers=layers, num_sparse_decoder_layers=layers,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def numbers(path: str, shape: tuple[int, ...], expert: int | None = None) -> np.ndarray:
    """Returns the numbers of a tensor, or of one of its experts: the same whoever asks."""
    key = [*path.encode(), 0 if expert is None else 1 + expert]
    rng = np.random.default_rng(key)
    if path.endswith("scale"):
        return np.ones(shape, BF16)
    deviation = 1.0 if "embedding" in path else shape[-2] ** -0.5
    values = (rng.standard_normal(256) * deviation).astype(BF16)  # of which each number is one: to draw all would take minutes
    return values[np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8)].reshape(shape)


def router(path: str, width: int, filled: tuple[int, ...], num_experts: int) -> np.ndarray:
    """Returns a router's kernel that chooses one of the two filled experts."""
    column = np.random.default_rng([*path.encode()]).standard_normal(width) * STEEP
    kernel = np.zeros((width, num_experts), BF16)
    kernel[:, filled[0]], kernel[:, filled[1]] = column.astype(BF16), (-column).astype(BF16)
    return kernel


def contents(path: str, shape: tuple[int, ...], filled: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields what a tensor holds, in arrays with the places of their first bytes; experts are numbered as in this model."""
    from flax_switch.convert.canonical import is_expert, is_router

    if is_router(path):
        yield 0, router(path, shape[0], filled, shape[1])
    elif is_expert(path):
        for i, expert in enumerate(filled):
            array = numbers(path, shape[1:], i)
            yield expert * array.nbytes, array
    else:
        yield 0, numbers(path, shape)


def write(folders: dict[Path, tuple[Any, tuple[int, ...]]]) -> list[int]:
    """Writes folders of ours, each with its config and its filled experts, whose files have holes where no numbers are.

    Returns the bytes that each folder's files seem to have.
    """
    from flax_switch.convert import native
    from flax_switch.convert.canonical import canonical_shapes
    from flax_switch.convert.folder import shard_names

    shapes = {folder: canonical_shapes(config) for folder, (config, _) in folders.items()}
    paths = list(next(iter(shapes.values())))
    names = dict(zip(paths, shard_names(native.STEM, len(paths)), strict=True))
    totals = dict.fromkeys(folders, 0)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path, name in names.items():
        for folder, (_, filled) in folders.items():
            totals[folder] += write_file(folder / name, path, shapes[folder][path], filled)
    for folder, (config, _) in folders.items():
        index = {"metadata": {"total_size": totals[folder]}, "weight_map": names}
        (folder / f"{native.STEM}.safetensors.index.json").write_text(json.dumps(index))
        (folder / native.CONFIG_FILE).write_bytes(native.config_file(config, "full", None))
    return list(totals.values())


def write_file(file: Path, path: str, shape: tuple[int, ...], filled: tuple[int, ...]) -> int:
    """Writes a safetensors file of one tensor, and returns the tensor's bytes."""
    size = int(np.prod(shape)) * BF16.itemsize
    header = json.dumps({path: {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    begin = 8 + len(header)
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        for place, array in contents(path, shape, filled):
            opened.seek(begin + place)
            opened.write(array.view(np.uint8).data)
        opened.truncate(begin + size)
    return size


def generate(folder: Path, tokens: int, **options: Any) -> None:
    """Generates in this process, and prints tokens and figures as a line of JSON."""
    import jax

    import flax_switch as fs

    started = time.perf_counter()
    model = fs.load_pretrained(folder, **options)
    loaded = time.perf_counter()
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 16))
    output = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens)
    ended = time.perf_counter()
    reads = output.expert_reads
    figures = {
        "tokens": output.sequences[0].tolist(),
        "peak_bytes": run_record.peak_bytes(),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "load_seconds": round(loaded - started, 1),
        "generate_seconds": round(ended - loaded, 1),
        "reads": None if reads is None else {**dataclasses.asdict(reads), "hit_rate": reads.hit_rate},
    }
    print(json.dumps(figures))


def process(*arguments: object, flags: str = "") -> dict[str, Any]:
    """Runs this script with some arguments and XLA flags in a process of its own, and returns what it prints last."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=15, help="of each stack (15)")
    parser.add_argument("--tokens", type=int, default=8, help="to generate (8)")
    parser.add_argument("--expert-memory", default="1GB")
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "switch_c.json")
    parser.add_argument("--alone", choices=("disk", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        generate(
            args.folder, args.tokens, **(dict(experts="disk", expert_memory=args.expert_memory) if args.alone == "disk" else {})
        )
        return
    from flax_switch.convert.folder import parse_size

    config = config_of(args.layers, 2048)
    shape, oracle = args.folder / "switch_c", args.folder / "two_experts"
    total, _ = write({shape: (config, FILLED), oracle: (config.replace(num_experts=2), (0, 1))})
    taken = sum(path.stat().st_blocks for path in shape.iterdir()) * 512
    print(f"{total / 2e9:,.1f} G parameters, {total / 1e9:,.1f} GB, of which {taken / 1e9:.1f} GB are on disk")
    options = ["--tokens", args.tokens, "--expert-memory", args.expert_memory]
    found = process(shape, "--alone", "disk", *options)
    wanted = process(oracle, "--alone", "memory", *options, flags=FRUGAL)
    most = found["parameter_bytes"] + parse_size(args.expert_memory) + ROOM
    same = "equal" if found["tokens"] == wanted["tokens"] else "DIFFER from"
    print(f"tokens {same} those of the two experts alone: {found['tokens']}")
    print(f"peak memory {found['peak_bytes'] / 1e9:.2f} GB; it may be {most / 1e9:.2f} GB")
    print(f"loaded in {found['load_seconds']} s, {args.tokens} tokens in {found['generate_seconds']} s, compiling included")
    print(found["reads"])
    record = dict(layers=args.layers, parameters=total // 2, file_bytes=total, disk=found, memory=wanted, may_be_bytes=most)
    run_record.write(args.output, record)
    assert found["tokens"] == wanted["tokens"] and found["peak_bytes"] <= most


if __name__ == "__main__":
    main()
