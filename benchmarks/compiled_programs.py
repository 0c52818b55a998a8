"""Memory of train steps with plain and with fused attention, logits whole and in chunks, compiled for a chip; nothing runs.

    python benchmarks/compiled_programs.py --chip v5e --model t5-large
    python benchmarks/compiled_programs.py --chip h100 --model base-128

One run is one model on one chip: it writes benchmarks/results/compiled_programs_CHIP_MODEL.json and prints a table.

Lengths equal no other of a program's sizes, so that its text tells whether an array has the axes of queries and keys together, or
the vocabulary beside more tokens than a chunk of the loss has. On a GPU without one at hand fused attention is loops in plain JAX:
cuDNN lowers only where it can run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from typing import Any

import jax
import run_record

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, SwitchConfig
from flax_switch.config.presets import PRESETS
from flax_switch.ops.kernels import fused_attention_blocks, head_loss
from flax_switch.ops.kernels.platforms import compiled_for
from flax_switch.parallel.mesh import create_mesh
from flax_switch.plan.memory import batch_structs
from flax_switch.plan.program import compiler_effort
from flax_switch.plan.topology import compile_devices, parse_topology
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

BASE = PRESETS["switch-base-128"].replace(routing_group="sequence")
LARGE = PRESETS["switch-large-128"].replace(routing_group="sequence")
T5_LARGE = SwitchConfig(
    d_model=1024, num_heads=16, d_kv=64, d_ff=4096, num_encoder_layers=24, num_decoder_layers=24, num_sparse_encoder_layers=0,
    num_sparse_decoder_layers=0, dtype="bfloat16",
)  # fmt: skip
MODELS = {"base-128": BASE, "large-128": LARGE, "t5-large": T5_LARGE}
TARGETS = 510
CASES = {  # model, topology, ways of experts, rows of a device, length of the inputs, remat policy
    "v5e": (
        ("base-128", "v5e:4x4", 16, 2, 2048, "none"),
        ("t5-large", "v5e:4x4", 1, 1, 2048, "none"),
        ("t5-large", "v5e:4x4", 1, 1, 2048, "full"),
        ("t5-large", "v5e:4x4", 1, 1, 8192, "full"),
        ("large-128", "v5e:8x8", 64, 1, 2048, "full"),
    ),
    "h100": (
        ("base-128", "h100:8", 8, 4, 2048, "none"),
        ("t5-large", "h100:8", 1, 4, 2048, "none"),
        ("large-128", "h100:8", 8, 1, 2048, "none"),
        ("large-128", "h100:8", 8, 4, 2048, "none"),
        ("t5-large", "h100:8", 1, 1, 8192, "none"),
    ),
}
FORMS = {"before": ("plain", 2**62), "after": ("fused", head_loss.WHOLE)}  # attention, and how many logits may be whole


def shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Returns the element type and the sizes of all arrays in a program's text."""
    found = set(re.findall(r"\b(pred|[a-z]+\d+)\[(\d[\d,]*)\]", text))
    return {(dtype, tuple(map(int, sizes.split(",")))) for dtype, sizes in found}


def paired(text: str, lengths: tuple[int, ...]) -> list[str]:
    """Returns the arrays that have the axes of queries and keys together, filled up to lanes or not, beyond a block."""
    axes = {size for length in lengths for size in (length, -(-length // 128) * 128)}
    largest = fused_attention_blocks.BLOCK**2

    def has_both(sizes: tuple[int, ...]) -> bool:
        return any(a * b > largest for a, b in itertools.combinations([size for size in sizes if size in axes], 2))

    return sorted(f"{dtype}{list(sizes)}" for dtype, sizes in shapes(text) if has_both(sizes))


def with_vocabulary(text: str, vocabulary: int, tokens: int) -> list[str]:
    """Returns the arrays that have the vocabulary for more than so many tokens."""
    found = {s for s in shapes(text) if vocabulary in s[1] and math.prod(s[1]) // vocabulary > tokens}
    return sorted(f"{dtype}{list(sizes)}" for dtype, sizes in found)


def step(form: str, name: str, topology: str, expert: int, rows: int, length: int, remat: str) -> dict[str, Any]:
    """Compiles a train step and returns what a device holds."""
    attention, head_loss.WHOLE = FORMS[form]
    machine, model = parse_topology(topology), MODELS[name]
    config = ExperimentConfig(
        model=model.replace(attention_implementation=attention, remat_policy=remat, scan_layers=True),
        data=DataConfig(batch_size=rows * machine.num_devices, inputs_length=length, targets_length=TARGETS),
        mesh=MeshConfig(expert=expert, fsdp=True),
    )
    mesh = create_mesh(config.mesh, compile_devices(machine))
    run, start = build_run(config, mesh), time.perf_counter()
    row: dict[str, Any] = {"form": form, "model": name, "topology": topology, "expert": expert, "rows_of_a_device": rows}
    row |= {"inputs_length": length, "remat_policy": remat}
    try:
        # XLA for GPUs as of JAX 0.10.2 aborts on T5-large's fused step at O1
        with (
            compiler_effort("quick" if machine.chip.platform == "tpu" else "full"),
            compiled_for(machine.chip.platform, machine.chip.gpu),
        ):
            compiled = compile_train_step(run).lower(run.abstract_state, batch_structs(config, mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"refusal": str(error).split("\n\n")[0].strip()}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    largest_chunk = max(model.d_model, 8 * math.ceil(head_loss.CHUNKS["other"] / model.vocab_size / 8))  # the table has D
    return row | {
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes if machine.chip.platform == "tpu" else held,  # others lay out temporaries alone
        "argument_bytes": memory.argument_size_in_bytes,
        "with_query_and_key_axes": paired(text, (length, TARGETS)),
        "with_tokens_and_vocabulary": with_vocabulary(text, model.vocab_size, largest_chunk),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Returns a row of Markdown for each case: GB of temporaries, and of the peak with arguments."""
    lines = ["| program | before | after | after over before |", "|---|---|---|---|"]
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results:
        rows = "a row" if row["rows_of_a_device"] == 1 else f"{row['rows_of_a_device']} rows"
        title = f"{row['model']}, {row['topology']}, {rows} of {row['inputs_length']:,}, remat {row['remat_policy']}"
        cases.setdefault(title, {})[row["form"]] = row
    for title, forms in cases.items():
        both = [forms.get(form, {}) for form in FORMS]
        cells = [" and ".join(f"{row[key] / 1e9:.2f}" for key in ("temporary_bytes", "peak_bytes") if key in row) for row in both]
        cells = [cell or ("does not fit" if row else "") for cell, row in zip(cells, both, strict=True)]
        ratio = ""
        if all("peak_bytes" in row for row in both):
            ratio = " and ".join(f"{both[1][key] / both[0][key]:.2f}" for key in ("temporary_bytes", "peak_bytes"))
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles both forms of each case of a chip; what is known is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=tuple(CASES), default="v5e")
    parser.add_argument("--model", choices=tuple(MODELS), default="t5-large")
    args = parser.parse_args()
    results, path = [], run_record.RESULTS / f"compiled_programs_{args.chip}_{args.model}.json"
    for case in CASES[args.chip]:
        for form in FORMS if case[0] == args.model else ():
            results.append(step(form, *case))
            print(results[-1], flush=True)
            run_record.write(path, {"results": results}, device=results[-1]["topology"])
    print(table(results))


if __name__ == "__main__":
    main()
