"""What a run would do, before it does it: --print-config, --dry-run; and --profile, what its steps do."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_switch.config import check

if TYPE_CHECKING:
    from flax_switch.config import DataConfig
    from flax_switch.config.kinds import RunConfig

ROWS = 2  # of the first batch that are shown


def add_look_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --print-config, --dry-run and --profile."""
    group = parser.add_argument_group("looking first")
    group.add_argument("--print-config", action="store_true", help="print the effective config and end")
    group.add_argument(
        "--dry-run", action="store_true",
        help="print shapes, parameters, memory and the first batch as text, and end: nothing is trained, nothing is written",
    )  # fmt: skip
    group.add_argument(
        "--profile", type=int, default=0, metavar="N", help="trace N steps with jax.profiler, into WORKDIR/profile (for xprof)"
    )


def check_look(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for a number of steps that cannot be."""
    check(args.profile >= 0, f"--profile takes a number of steps, such as 5; it is {args.profile}.")


def print_config(config: Any) -> int:
    """Prints every field as `section.field = value`, as overrides are written; what is not the library's default is marked."""
    from flax_switch.config.base import _Section

    values, defaults = config.to_dict(), type(config)().to_dict()
    for section, fields in values.items():
        if not isinstance(getattr(config, section, None), (_Section, dict)):
            print(f"{section} = {fields!r}")
            continue
        print(f"\n# {section}")
        for name, value in fields.items():
            default = (defaults.get(section) or {}).get(name)
            print(f"{section}.{name} = {value!r}{'' if value == default else f'  # not {default!r}'}")
    return 0


@contextlib.contextmanager
def caches_that_go(data: DataConfig) -> Iterator[DataConfig]:
    """Yields the settings with a folder for caches that lasts as long as the block; those that are there already are in it, too."""
    from flax_switch.host.files import cache_folder

    kept = cache_folder(data.cache_dir)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for entry in kept.glob("[!.]*"):
            with contextlib.suppress(OSError):  # where there are no links, what is needed is made anew
                (Path(folder) / entry.name).symlink_to(entry.absolute())
        yield data.replace(cache_dir=folder)


def dry_run(config: RunConfig, prepared: Any) -> int:
    """Prints what a run of this config on this data is made of. Nothing is allocated on devices, and nothing compiled."""
    import jax

    from flax_switch.config.flops import train_flops
    from flax_switch.config.sizes import count_parameters, shorten
    from flax_switch.parallel.mesh import check_batch_size, create_mesh
    from flax_switch.plan.memory import batch_structs, train_memory
    from flax_switch.training.progress import console
    from flax_switch.training.state import build_run

    mesh = create_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh)
    run = build_run(config, mesh)
    size = count_parameters(config.model)
    print(f"\nModel: {shorten(size.total)} parameters, {shorten(size.active)} of them used for a token")
    leaves = jax.tree_util.tree_leaves_with_path(run.abstract_state.params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    rows = grouped([(path, f"{str(leaf.dtype):9} {list(leaf.shape)}") for path, (_, leaf) in zip(paths, leaves, strict=True)])
    for path, told in rows:
        print(f"  {path:{max(len(path) for path, _ in rows)}} {told}")
    batch = batch_structs(config, mesh)  # pyright: ignore[reportArgumentType] - fine-tuning's has the fields, too
    axes = ", ".join(f"{axis} {ways}" for axis, ways in mesh.shape.items())
    print(f"\nBatch, on {mesh.size} x {jax.devices()[0].device_kind} (device mesh: {axes}):")
    for name, struct in batch.items():
        print(f"  {name:24} {list(struct.shape)}")
    memory = train_memory(run, batch)
    print("\nMemory that a step needs on each device, estimated from shapes (activations: at most):")
    for name in ("parameters", "optimizer", "gradients", "activations", *(("rounds",) if memory.rounds else ()), "batch", "total"):
        print(f"  {name:14} {getattr(memory, name) / 2**20:12,.1f} MiB")
    data = config.data
    flops = train_flops(config.model, data.batch_size, data.inputs_length, data.targets_length)
    print(f"\nThe run: {config.train.steps:,} steps of {flops / 1e9:,.3g} GFLOP each.\n")
    for line in first_batch(prepared):
        console.print(line)
    print("\nDry run: nothing was trained, and nothing is kept. The same command without --dry-run does it.")
    return 0


def grouped(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns (path, what is told of it) with the layers in which both agree in one row: "decoder/layers_0,2/mlp/wi/kernel"."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path, told in rows:
        before, layers, rest = path.partition("/layers_")
        number, _, after = rest.partition("/")
        found.setdefault((f"{before}{layers}", after, told), []).append(number)
    return [
        (before + (f"{','.join(numbers)}/{after}" if before.endswith("/layers_") else ""), told)
        for (before, after, told), numbers in found.items()
    ]


def first_batch(prepared: Any) -> Iterator[str]:
    """Returns the first rows of the first batch, as text, each of its texts by itself; before them what is asked of a model."""
    from flax_switch.data.objectives import OBJECTIVES, marks

    batches = prepared.train_iterator()
    try:
        batch = next(batches)
    finally:
        batches.close()
    rates = prepared.mixture.rates if hasattr(prepared, "mixture") else {}
    yield from ["Of the examples are"] if rates else []
    for name, rate in rates.items():
        marked = marks(prepared.mixture.config, OBJECTIVES[name])
        begun = ", asked for by a token of its own at the beginning" if marked else ""
        yield f"  {rate / sum(rates.values()):.0%} {name.replace('_', ' ')}: {OBJECTIVES[name].told}{begun}"
    yield "The first batch begins with"
    decode = lambda ids: prepared.vocabulary.decode([int(i) for i in ids if i > 0], skip_special_tokens=False)  # noqa: E731
    alone = "input_ids" not in batch  # a decoder-only model's inputs and targets are one sequence
    given = batch["decoder_input_ids"] * batch["prefix_mask"] if alone else batch["input_ids"]
    targets_of = batch.get("decoder_segment_ids")
    inputs_of = targets_of if alone else batch.get("input_segment_ids")
    for row in range(min(ROWS, len(batch["labels"]))):
        texts = 1 if inputs_of is None else int(inputs_of[row].max())
        yield f"row {row + 1}" if texts == 1 else f"row {row + 1}, which {texts} texts share"
        for text in range(1, texts + 1):
            inputs = given[row] if inputs_of is None else given[row][inputs_of[row] == text]
            targets = batch["labels"][row] if targets_of is None else batch["labels"][row][targets_of[row] == text]
            yield f"  inputs:  {decode(inputs)}"
            yield f"  targets: {decode(targets)}"
