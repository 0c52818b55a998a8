"""Memory of a dense T5-base's train step with logits in chunks and whole, compiled for a topology; nothing runs.

    python benchmarks/head_loss.py --topology v5e:4x4 --rows 64 256

128 source and 114 target tokens a row, so that the head is most of what is not recomputed: layers are scanned, with full remat and
fused attention. `--rows` are those of a device.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import run_record

from flax_switch.config import DataConfig, ExperimentConfig
from flax_switch.config.presets import PRESETS
from flax_switch.ops.kernels import head_loss
from flax_switch.parallel.mesh import create_mesh
from flax_switch.plan.memory import batch_structs
from flax_switch.plan.program import compiler_effort
from flax_switch.plan.topology import compile_devices, parse_topology
from flax_switch.training.state import build_run
from flax_switch.training.step import compile_train_step

MODEL = PRESETS["t5-base"].replace(scan_layers=True, remat_policy="full", attention_implementation="fused", dropout_rate=0.0)
FORMS = {"whole": 2**62, "chunks": head_loss.WHOLE}  # how many logits may be whole


def step(form: str, rows: int, topology: str) -> dict[str, Any]:
    """Compiles a step and returns what a device holds."""
    head_loss.WHOLE = FORMS[form]
    machine = parse_topology(topology)
    data = DataConfig(batch_size=rows * machine.num_devices, inputs_length=128, targets_length=114)
    config = ExperimentConfig(model=MODEL, data=data)
    mesh = create_mesh(config.mesh, compile_devices(machine))
    run = build_run(config, mesh)
    with compiler_effort("quick"):
        compiled = compile_train_step(run).lower(run.abstract_state, batch_structs(config, mesh)).compile()
    memory = compiled.memory_analysis()
    return {
        "form": form,
        "rows_of_a_device": rows,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "shapes_of_the_vocabulary": sorted(set(re.findall(rf"\bf32\[[\d,]+,{MODEL.vocab_size}\]", compiled.as_text()))),
    }


def main() -> None:
    """Compiles both forms for each number of rows, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    args = parser.parse_args()
    results = []
    for rows in args.rows:
        for form in FORMS:
            results.append(step(form, rows, args.topology))
            print(results[-1], flush=True)
    run_record.write(run_record.RESULTS / "head_loss.json", {"results": results}, device=args.topology)


if __name__ == "__main__":
    main()
