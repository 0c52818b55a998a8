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
    "torch": ("torch", "read and write .bin checkpoints"),
    "gin": ("gin", "recipes in gin files"),
    "hub": ("huggingface_hub", "models by their names on the hub"),
    "serve": ("uvicorn", "flax-switch serve"),
    "plots": ("matplotlib", "inspect --plot as .png, .pdf or .svg"),
    "tokenizers": ("tokenizers", "vocabularies that are only in tokenizer.json"),
    "tensorboard": ("tensorboardX", "TensorBoard's events of a run"),
    "parquet": ("pyarrow", "parquet files and folders that datasets saved"),
    "arrayrecord": ("array_record", "ArrayRecord files"),
    "eval": ("sacrebleu", "BLEU, chrF and ROUGE"),
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
    from flax_switch.ops.kernels.checks import TOLERANCES, check_grouped
    from flax_switch.training.sessions import surroundings

    checks = [{**check._asdict(), "fine": check.fine, "tolerance": TOLERANCES[check.dtype]} for check in check_grouped()]
    devices = [{"kind": d.device_kind, "memory": (d.memory_stats() or {}).get("bytes_limit")} for d in jax.local_devices()]
    return {
        **surroundings(),
        "devices": devices,
        "memory": memory(),
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
    lines += ["Devices", f"  {len(devices)} x {devices[0]['kind']}{each}", f"  host: {found['host']}"]
    lines += [f"  memory: {found['memory'] / 2**30:.1f} GiB"] if found["memory"] else []
    lines += ["Kernels: how far the experts' matrix products are from numpy's, relative"]
    for check in found["kernels"]:
        verdict = "fine" if check["fine"] else f"WRONG for expert {check['expert']}: more than {check['tolerance']:.0e}"
        name = f"{check['implementation']}, {check['dtype']}, {check['product']}"
        lines.append(f"  {name:42} {check['error']:.1e}  {verdict}")
    lines += ["Extras"]
    for name, here in found["extras"].items():
        added = EXTRAS[name][1]
        lines.append(f"  {name:12} {'installed: ' if here else f'not here. pip install flax_switch[{name}] adds: '}{added}")
    lines += [
        "Caches",
        f"  {caches['folder']}: {caches['bytes'] / 2**20:,.0f} MiB, {caches['free'] / 2**30:,.0f} GiB free on its disk",
        f"  compiled programs in {caches['compiled']}:",
        f"  {caches['compiled_bytes'] / 2**20:,.1f} MiB of at most {caches['compiled_limit'] / 2**30:.0f} GiB",
    ]
    return "\n".join(lines)
