"""Experts on disk beside experts in memory and beside accelerate's disk_offload: tokens per second from the same file.

    python benchmarks/offload.py                              # base-8's shape, random weights
    python benchmarks/offload.py --shape tiny                 # seconds
    python benchmarks/offload.py --shape base-128 --no-resident --folder FOLDER   # 7.4 G parameters in bfloat16: 30 GB of disk
    python benchmarks/offload.py --shape base-128 --no-resident --folder FOLDER --convert int8   # 37 GB: ours from a copy in int8
    python benchmarks/offload.py --model runs/exported        # a model of one's own, with its vocabulary, on held-out sentences

All open the same safetensors folder and decode greedily, a row at a time; ours take turns in one process. base-128 is written in
bfloat16, held in it by all, and computed in float32 by ours and in bfloat16 by transformers, so that what they say may differ. With
--weights int8 ours round what they read of the same file, for which a cold round waits; with --convert int8 they read a copy that
was converted before, which has half of the bytes.
"Cold" means that the system had to drop the file's pages before every round (posix_fadvise), and that the model's memory was empty;
"warm" that the round before was the same. Experts on disk have a memory for --share of all experts (a quarter). The bytes that the
system read from the disk (/proc/self/io) are compared with the experts that were missed times their size. accelerate is left out
where it is not installed. Quiet machines only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import run_record

SHAPES = {
    "tiny": dict(
        vocab_size=512, d_model=64, d_ff=256, d_kv=16, num_heads=4, num_layers=4, num_decoder_layers=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=8,
    ),
    "base-8": dict(
        vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=8,
    ),
}  # fmt: skip
SHAPES["base-128"] = SHAPES["base-8"] | {"num_experts": 128}
DTYPES = {"base-128": "bfloat16"}  # of files; other shapes are in float32
SHARD = 2 * 10**9  # bytes


def drop_pages(folder: Path, pattern: str = "*.safetensors") -> None:
    """Has the system forget what it keeps of a folder's files in memory."""
    for path in folder.glob(pattern):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """Returns the bytes that this process has had read from disks so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def ours(
    folder: Path, ids: list[list[int]], tokens: int, repeats: int, memory: int, weights: str | None, resident: bool
) -> dict[str, Any]:
    """Returns what our two models say and how long they take, by turns; of the one on disk also cold, and what it read."""
    import flax_switch as fs
    from flax_switch.ops.kernels.on_disk import first_on_disk

    changes = {} if weights is None else dict(weights=weights)
    models = {name: fs.load_pretrained(folder, **changes, **options) for name, options in _places(memory, resident).items()}
    runs = {
        name: lambda row, model=model: model.generate([row], max_new_tokens=tokens, min_new_tokens=tokens)
        for name, model in models.items()
    }
    # The first call compiles.
    found: dict[str, Any] = {
        name: {"said": [run(row).sequences[0].tolist() for row in ids], "warm": []} for name, run in runs.items()
    }
    held = first_on_disk(models["disk"].params)
    assert held is not None
    before = held.cache.reads
    for _ in range(repeats):
        for name, run in runs.items():
            found[name]["warm"].append(_seconds(run, ids))
    found["disk"] |= {"warm_reads": _told(held.cache.reads - before), "cold": [], "cold_bytes_over_misses": []}
    for _ in range(repeats):
        held.cache.clear()
        drop_pages(folder)
        read, reads = disk_bytes(), held.cache.reads
        found["disk"]["cold"].append(_seconds(runs["disk"], ids))
        reads = held.cache.reads - reads
        missed = reads.misses * held.cache.expert_bytes(held.layer)
        found["disk"]["cold_bytes_over_misses"].append((disk_bytes() - read) / missed)
        found["disk"]["cold_reads"] = _told(reads)
    return found


def _places(memory: int, resident: bool) -> dict[str, dict[str, Any]]:
    return {**({"memory": {}} if resident else {}), "disk": dict(experts="disk", expert_memory=memory)}


def accelerates(folder: Path, ids: list[list[int]], tokens: int, repeats: int) -> dict[str, Any]:
    """Returns what transformers' model says under accelerate.disk_offload, and how long it takes."""
    import accelerate
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto").eval()
    controls = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    with tempfile.TemporaryDirectory(dir=folder.parent) as offloaded, torch.inference_mode():
        accelerate.disk_offload(model, offloaded, execution_device=torch.device("cpu"))
        run = lambda row: model.generate(torch.tensor([row]), **controls)  # noqa: E731
        said = [run(row)[0].tolist() for row in ids]
        warm = [_seconds(run, ids) for _ in range(repeats)]
        cold = []
        for _ in range(repeats):
            drop_pages(Path(offloaded), "*.dat")
            cold.append(_seconds(run, ids))
    return {"said": said, "warm": warm, "cold": cold}


def _seconds(run: Callable[[list[int]], Any], ids: list[list[int]]) -> float:
    started = time.perf_counter()
    for row in ids:
        run(row)
    return time.perf_counter() - started


def _told(reads: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(reads), "hit_rate": reads.hit_rate}


def made(shape: str, folder: Path) -> Path:
    """Writes transformers' model of a shape with random weights, a shard at a time, and returns its folder."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.SwitchTransformersConfig(**SHAPES[shape], decoder_start_token_id=0)
    config.architectures = ["SwitchTransformersForConditionalGeneration"]
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    dtype = getattr(torch, DTYPES.get(shape, "float32"))
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    folder = folder / "model"
    folder.mkdir(exist_ok=True)
    rng, shard, weight_map = np.random.default_rng(0), {}, {}
    for name, size in shapes.items():
        shard[name] = numbers(rng, name, size, dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def numbers(rng: np.random.Generator, name: str, size: tuple[int, ...], dtype: Any) -> Any:
    """Returns a tensor of random numbers, of 256 that are drawn once for each: to draw all would take minutes."""
    import torch

    if len(size) == 1:  # a norm's scale
        return torch.ones(size, dtype=dtype)
    deviation = 1.0 if name == "shared.weight" else size[1] ** -0.5
    few = torch.from_numpy(rng.standard_normal(256) * deviation).to(dtype)
    return few[torch.from_numpy(np.frombuffer(rng.bytes(size[0] * size[1]), np.uint8).astype(np.int32))].reshape(size)


def converted(folder: Path, temporary: Path, weights: str) -> Path:
    """Writes a model anew with kernels in another form, in a process of its own, and returns the folder."""
    target = temporary / "converted"
    arguments = ["convert", folder, target, "--to", "flax_switch", "--weights", weights]
    subprocess.run([sys.executable, "-m", "flax_switch.cli", *map(str, arguments)], check=True)
    return target


def sources(folder: Path, rows: int, length: int) -> list[list[int]]:
    """Returns sentences as ids, cut or dropped to one length; of a model without a vocabulary ids at random."""
    from flax_switch.convert.checkpoint import open_checkpoint
    from flax_switch.convert.tokenizer import load_vocabulary
    from flax_switch.data.corpus import default_corpus
    from flax_switch.host.files import cache_folder

    vocabulary, config = load_vocabulary(folder), open_checkpoint(folder).config
    if vocabulary is None:
        return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)).tolist()
    texts = default_corpus(cache_folder(None))
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    every = ([*vocabulary.encode(text)][: length - 1] + [config.eos_token_id] for text in texts)
    return list(itertools.islice((ids for ids in every if len(ids) == length), rows))


def expert_share(folder: Path, share: float, weights: str | None) -> int:
    """Returns the bytes of a share of all experts."""
    from flax_switch.convert.canonical import is_expert
    from flax_switch.convert.checkpoint import open_checkpoint

    tensors = open_checkpoint(folder, changes={} if weights is None else {"weights": weights}).tensors
    return int(share * sum(tensor.nbytes for path, tensor in tensors.items() if is_expert(path)))


def alone(*arguments: object) -> dict[str, Any]:
    """Runs one contender in a process of its own, and returns what it prints last."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="base-8")
    parser.add_argument("--model", type=Path, help="a folder, in place of a shape's random weights")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, that the memory holds")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--weights", help="ours hold kernels in this form")
    form.add_argument("--convert", help="ours read a copy whose kernels were converted to this form before")
    parser.add_argument("--resident", action=argparse.BooleanOptionalAction, default=True, help="also with experts in memory")
    parser.add_argument("--folder", type=Path, help="where a shape's files are written, and what accelerate makes of them")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="of sources, in tokens")
    parser.add_argument("--tokens", type=int, default=16, help="new ones for each row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=run_record.RESULTS / "offload.json")
    parser.add_argument("--alone", choices=("ours", "accelerate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = args.model or made(args.shape, Path(temporary))
        measured = args.tokens, args.repeats
        if args.alone:
            ids = sources(folder, args.rows, args.length)
            if args.alone == "accelerate":
                found = {"accelerate": accelerates(folder, ids, *measured)}
            else:
                memory = expert_share(folder, args.share, args.weights)
                found = ours(folder, ids, *measured, memory, args.weights, args.resident)
            print(json.dumps(found))
            return
        names = ["ours", *(["accelerate"] if importlib.util.find_spec("accelerate") else [])]
        options = [
            o for name in ("share", "weights", "rows", "length", "tokens", "repeats") for o in _option(name, getattr(args, name))
        ] + [f"--{'' if args.resident else 'no-'}resident"]
        folders = {"ours": converted(folder, Path(temporary), args.convert) if args.convert else folder}
        found = (alone("--model", folders.get(name, folder), *options, "--alone", name) for name in names)
        results = {key: value for one in found for key, value in one.items()}
    report(results, args.rows * args.tokens)
    kept = ("shape", "weights", "convert", "share", "rows", "length", "tokens", "repeats")
    settings = {name: getattr(args, name) for name in kept}
    run_record.write(args.output, {**settings, "model": str(args.model or args.shape), "contenders": results})


def _option(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"--{name}", str(value)]


def report(results: dict[str, Any], tokens: int) -> None:
    """Prints a table, and what was read."""
    wanted = next(iter(results.values()))["said"]
    for name, found in results.items():
        speeds = {kind: tokens / statistics.median(found[kind]) for kind in ("warm", "cold") if found.get(kind)}
        share = np.mean(np.equal(found["said"], wanted))
        same = "the same tokens" if share == 1 else f"{share:.0%} same tokens"
        print(f"{name:<12}{same:<18}" + "  ".join(f"{kind} {speed:,.2f} tokens/s" for kind, speed in speeds.items()))
    disk = results["disk"]
    print(f"warm {disk['warm_reads']}\ncold {disk['cold_reads']}")
    print(f"bytes read from the disk over those of the experts missed, cold: {max(disk['cold_bytes_over_misses']):.3f} at most")


if __name__ == "__main__":
    main()
