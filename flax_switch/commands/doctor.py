"""flax-switch doctor [--json]"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from flax_switch.commands.options import add_compile_cache_argument, start_jax

# Extra -> the module that it brings, and what one can do with it.
EXTRAS = {
    "torch": ("torch", "checkpoints in .bin files"),
    "gin": ("gin", "recipes in gin files"),
    "hub": ("huggingface_hub", "models of the Hugging Face hub by name, such as google/switch-base-8"),
    "serve": ("uvicorn", "flax-switch serve"),
    "export": ("flatbuffers", "flax-switch export --to stablehlo"),
    "onnx": ("jax2onnx", "flax-switch export --to onnx"),
    "ctranslate2": ("ctranslate2", "flax-switch export --to ctranslate2"),
    "plots": ("matplotlib", "inspect --plot as .png, .pdf or .svg"),
    "tokenizers": ("tokenizers", "vocabularies in a tokenizer.json without a spiece.model"),
    "tensorboard": ("tensorboardX", "curves of a run in TensorBoard"),
    "parquet": ("pyarrow", "data in parquet files, and in folders of the package datasets"),
    "arrayrecord": ("array_record", "data in ArrayRecord files"),
    "eval": ("sacrebleu", "BLEU, chrF and ROUGE"),
    "tokamax": ("tokamax", "one more grouped GEMM, to compare with"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_compile_cache_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what is here; exit status 1 where a kernel is wrong."""
    start_jax(args)
    found = examine()
    print(json.dumps(found, indent=1) if args.json else render(found))
    return 0 if all(check["fine"] for check in found["kernels"]) else 1


def examine() -> dict[str, Any]:
    """Returns everything that is printed, as one dict."""
    import jax

    from flax_switch.host.compile_cache import LIMIT, compile_cache_folder
    from flax_switch.host.files import cache_folder
    from flax_switch.ops.kernels.checks import check_grouped, chosen
    from flax_switch.ops.kernels.exact_products import TOLERANCES
    from flax_switch.training.sessions import surroundings

    checks = [
        {**check._asdict(), "fine": check.fine, "verdict": check.verdict, "tolerance": TOLERANCES[check.dtype]}
        for check in check_grouped()
    ]
    devices = [{"kind": d.device_kind, "memory": (d.memory_stats() or {}).get("bytes_limit")} for d in jax.local_devices()]
    return {
        **surroundings(),
        "devices": devices,
        "memory": memory(),
        "grouped_gemm": {dtype: pick._asdict() for dtype, pick in chosen().items()},
        "kernels": checks,
        "extras": {name: importlib.util.find_spec(module) is not None for name, (module, _) in EXTRAS.items()},
        "caches": {
            "folder": str(cache_folder(None)),
            "bytes": size_of(cache_folder(None)),
            "free": shutil.disk_usage(nearest(cache_folder(None))).free,
            "compiled": str(compile_cache_folder()),
            "compiled_bytes": size_of(compile_cache_folder()),
            "compiled_limit": LIMIT,
        },
    }


def memory() -> int | None:
    """Returns bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def size_of(folder: Path) -> int:
    """Returns bytes of the files in a folder, which need not be there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def nearest(folder: Path) -> Path:
    """Returns the folder, or the first above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def render(found: dict[str, Any]) -> str:
    """Returns what was found, in lines of at most 80 columns where names allow it."""
    devices, caches = found["devices"], found["caches"]
    limit = devices[0]["memory"]
    each = f", {limit / 2**30:.1f} GiB each" if limit else ""
    lines = ["Versions", f"  Python {found['python']}", *(f"  {name} {version}" for name, version in found["versions"].items())]
    all_cores = " (JAX counts all cores as one)" if devices[0]["kind"] == "cpu" and len(devices) == 1 else ""
    lines += ["Devices", f"  {len(devices)} x {devices[0]['kind']}{each}{all_cores}", f"  host: {found['host']}"]
    lines += [f"  memory: {found['memory'] / 2**30:.1f} GiB"] if found["memory"] else []
    lines += ["Self-test: relative errors, beside numpy, of each way to multiply by experts' kernels"]
    for check in found["kernels"]:
        name = f"{check['implementation']}, {check['dtype']}, {check['product']}"
        lines.append(f"  {name:42} {check['error']:.1e}  {check['verdict']} (at most {check['tolerance']:.0e})")
    lines += [f"  {dtype} runs {pick['implementation']}: {pick['why']}" for dtype, pick in found["grouped_gemm"].items()]
    lines += ["Extras, which are optional: pip install 'flax_switch[NAME]' adds what is missing"]
    lines += [f"  {name:12} {'installed' if here else '-':10} {EXTRAS[name][1]}" for name, here in found["extras"].items()]
    lines += [
        f"Cache: {caches['folder']} ({caches['free'] / 2**30:,.0f} GiB free on its disk)",
        f"  compiled programs: {caches['compiled_bytes'] / 2**20:,.1f} MiB of at most {caches['compiled_limit'] / 2**30:.0f} GiB",
        f"  data and all else: {(caches['bytes'] - caches['compiled_bytes']) / 2**20:,.1f} MiB",
    ]
    wrong = sum(not check["fine"] for check in found["kernels"])
    lines += ["All is well." if not wrong else f"{wrong} of the self-tests failed: results on this machine cannot be trusted."]
    return "\n".join(lines)
