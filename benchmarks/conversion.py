"""Time and peak memory of converting a model of Switch-Base-8's real shape, beside a plain copy of its files.

    python benchmarks/conversion.py [--preset switch-base-8] [--shards 500MB 5GB] [--folder /tmp] [--repeats 2] [--json FILE]
    python benchmarks/conversion.py --preset switch-xxl-128 --dense --encoder --dtype bfloat16      # T5-XXL's encoder

Makes a Hugging Face folder of that shape with random weights (2.5 GB for switch-base-8, 9.5 GB for T5-XXL's encoder; four times
that is needed on the disk), and runs each step in a process of its own: copying the files, Hugging Face to ours, ours to Hugging
Face; after each size of shards every tensor that came back is compared, bit by bit, with the one that went in. Copies are made
between conversions, so that both see the same machine. `growth` is the peak resident memory of the process above what it had after
its imports; `bound` is that of the largest tensor and 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import run_record

from flax_switch import PRESETS, SwitchConfig
from flax_switch.config.huggingface import with_huggingface_semantics
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from flax_switch.convert.folder import parse_size, read_folder
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.tensors import DTYPES, LazyTensor, same_bits

STEP = """
import json, os, re, sys, time
from flax_switch.convert import convert
from flax_switch.convert.checkpoint import open_checkpoint
kind, source, target, shard = sys.argv[1:]
os.sync()
# Not getrusage: its maximum is inherited from the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
base, start = peak(), time.perf_counter()
if kind == "copy":
    for name in sorted(os.listdir(source)):
        with open(os.path.join(source, name), "rb") as a, open(os.path.join(target, name), "wb") as b:
            while block := a.read(2**24):
                b.write(block)
            b.flush()
            os.fsync(b.fileno())
else:
    convert(source, target, to=kind, max_shard_size=shard)
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak(), "growth": peak() - base}))
"""


def random_checkpoint(config: SwitchConfig, architecture: str, folder: Path, shard: str) -> None:
    """Writes a Hugging Face folder of this shape; every tensor has random bits of its own."""
    dtype = DTYPES[config.param_dtype]

    def tensor(path: str, shape: tuple[int, ...]) -> LazyTensor:
        def read(index):
            rng = np.random.default_rng([zlib.crc32(path.encode()), *(s.start for s in index)])
            return rng.standard_normal([s.stop - s.start for s in index], np.float32).astype(dtype)

        return LazyTensor(shape, dtype, read)

    tensors = {path: tensor(path, shape) for path, shape in canonical_shapes(config, architecture).items()}
    checkpoint = Checkpoint("flax_switch", folder, config, architecture, tensors)
    write_checkpoint(checkpoint, folder, to="huggingface", files={}, max_shard_size=shard)


def step(kind: str, source: Path, target: Path, shard: str) -> dict[str, float]:
    """Runs one step in a fresh process and measures it."""
    shutil.rmtree(target, ignore_errors=True)
    if kind == "copy":
        target.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STEP, kind, str(source), str(target), shard]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def assert_same_bits(first: Path, second: Path) -> int:
    """Compares every tensor of two Hugging Face folders; returns how many there are."""
    a, b = (read_folder(folder, "model", read_safetensors, "safetensors") for folder in (first, second))
    different = [name for name in a.keys() | b.keys() if name not in a or name not in b or not same_bits(a[name], b[name])]
    if different:
        raise SystemExit(f"not the same bits: {', '.join(sorted(different)[:5])}")
    return len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="switch-base-8", help="a name in PRESETS that Hugging Face can hold")
    parser.add_argument("--dense", action="store_true", help="without sparse layers")
    parser.add_argument("--encoder", action="store_true", help="the encoder alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shards", nargs="+", default=["500MB", "5GB"], help="largest output files")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where there is room")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="where to write the results")
    arguments = parser.parse_args()
    dense = dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0) if arguments.dense else {}
    config = PRESETS[arguments.preset].replace(dtype="float32", param_dtype=arguments.dtype, **dense)
    config, _ = with_huggingface_semantics(config)
    architecture = "encoder" if arguments.encoder else "full"
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        theirs, ours, back, copied = (Path(folder) / name for name in ("theirs", "ours", "back", "copied"))
        random_checkpoint(config, architecture, theirs, "5GB")
        tensors = open_checkpoint(theirs).tensors.values()
        size, largest = sum(tensor.nbytes for tensor in tensors), max(tensor.nbytes for tensor in tensors)
        count = size // DTYPES[arguments.dtype].itemsize
        print(
            f"{arguments.preset}, {architecture}: {count:,} parameters, {size / 1e9:.2f} GB; largest tensor {largest / 1e6:.0f} MB"
        )
        print(f"{'step':28}{'shards':>8}{'MB/s':>8}{'copy MB/s':>11}{'growth MB':>11}{'bound MB':>10}{'peak MB':>9}")
        for shard in arguments.shards:
            for _ in range(arguments.repeats):
                for kind, source, target in (("flax_switch", theirs, ours), ("huggingface", ours, back)):
                    copy = step("copy", source, copied, shard)
                    row = step(kind, source, target, shard)
                    file = max(path.stat().st_size for path in target.glob("*.safetensors"))
                    name = "Hugging Face to ours" if kind == "flax_switch" else "ours to Hugging Face"
                    row |= {"step": name, "shard": shard, "bytes": size, "copy_seconds": copy["seconds"]}
                    row |= {"largest_file": file, "largest_tensor": largest, "bound": largest + 300e6}
                    results.append(row)
                    print(
                        f"{name:28}{shard:>8}{size / row['seconds'] / 1e6:8.0f}{size / copy['seconds'] / 1e6:11.0f}"
                        f"{row['growth'] / 1e6:11.0f}{row['bound'] / 1e6:10.0f}{row['peak'] / 1e6:9.0f}",
                        flush=True,
                    )
                    if row["growth"] > row["bound"]:
                        raise SystemExit(f"{name} took {row['growth'] / 1e6:.0f} MB")
                count = assert_same_bits(theirs, back)
            print(f"    {count} tensors of files up to {parse_size(shard) / 1e6:.0f} MB came back with the same bits")
    if arguments.json:
        run_record.write(
            arguments.json, {"preset": arguments.preset, "architecture": architecture, "dtype": arguments.dtype, "results": results}
        )


if __name__ == "__main__":
    main()
