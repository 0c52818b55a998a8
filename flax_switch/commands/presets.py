"""flax-switch presets [--json]"""

from __future__ import annotations

import argparse
import json

from flax_switch.config import SwitchConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.sizes import count_parameters, shorten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print JSON, with every field of every config")
    parser.epilog = "In Python: fs.PRESETS[NAME]. Fine-tuning starts from fresh weights of one with --init random:NAME."


def run(args: argparse.Namespace) -> int:
    """Prints the published shapes with their sizes."""
    sizes = {name: count_parameters(config) for name, config in PRESETS.items()}
    if args.json:
        counts = {name: {"parameters": size.total, "active_parameters": size.active} for name, size in sizes.items()}
        print(json.dumps({name: counts[name] | {"config": config.to_dict()} for name, config in PRESETS.items()}, indent=1))
        return 0
    print(f"{'preset':20} {'parameters':>10} {'active':>7} {'layers (sparse)':15} {'width':>5} {'MLP':>5} experts")
    for name, config in PRESETS.items():
        total, active = shorten(sizes[name].total), shorten(sizes[name].active)
        print(f"{name:20} {total:>10} {active:>7} {_layers(config):15} {config.d_model:5} {config.d_ff:5} {_experts(config)}")
    return 0


def _layers(config: SwitchConfig) -> str:
    """Writes '12+12 (6+6)': encoder and decoder, and how many of each are sparse."""
    layers, sparse = ("+".join(str(getattr(s, name)) for s in config.stacks) for name in ("num_layers", "num_sparse"))
    return f"{layers} ({sparse})"


def _experts(config: SwitchConfig) -> str:
    if not config.is_sparse:
        return "dense"
    if config.router_type == "experts_choose":
        return f"{config.num_experts}, choosing"
    return f"{config.num_experts}, top {config.num_selected_experts}"
