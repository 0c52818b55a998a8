"""How the train step's own work falls as devices are added: FLOPs of each device, counted in the compiled program, not timed.

    python benchmarks/scaling.py [--output benchmarks/results/scaling.json]

The same batch and model on 1, 2, 4 and 8 virtual CPU devices, for meshes of data, expert and model parallelism. FLOPs are those of
matrix products, loops multiplied by their trip counts; `all` is XLA's own analysis, elementwise operations included. A share of
1.00 means that n devices each do an n-th of what one device does alone; what is missing is repeated work.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import run_record

os.environ.setdefault("NPROC", "32")  # collectives of virtual devices need their threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, SwitchConfig, TrainConfig  # noqa: E402
from flax_switch.parallel.mesh import create_mesh  # noqa: E402
from flax_switch.plan.program import compile_train  # noqa: E402

MODEL = SwitchConfig(
    vocab_size=1024, d_model=128, num_heads=8, d_kv=16, d_ff=512, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8, capacity_factor=1.0, min_expert_capacity=1,
    dropout_rate=0.0,
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(batch_size=32, inputs_length=128, targets_length=64), train=TrainConfig(steps=10)
)
MESHES = [  # (data, expert, model)
    (1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 1, 2), (1, 4, 2), (2, 4, 1), (2, 2, 2),
]  # fmt: skip


def measure(sizes: tuple[int, int, int]) -> dict:
    """What one device does in a step on a mesh of these sizes."""
    data, expert, model = sizes
    mesh = MeshConfig(data=data, expert=expert, model=model)
    devices = data * expert * model
    program = compile_train(CONFIG.replace(mesh=mesh), create_mesh(mesh, jax.devices()[:devices]))
    sent = {t.kind: t.wire_bytes for t in program.traffic}
    return dict(data=data, expert=expert, model=model, devices=devices, flops=program.flops, all=program.xla_flops, sent=sent)


def main() -> None:
    """Compiles every mesh's step and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows: list[dict] = []
    print("| devices | data x expert x model | GFLOP a device | share of 1/n | all, share of 1/n | MB sent: all-to-all | other |")
    print("|---|---|---|---|---|---|---|")
    for sizes in MESHES:
        row = measure(sizes)
        rows.append(row)
        row["share"], row["all_share"] = (rows[0][key] / (row["devices"] * row[key]) for key in ("flops", "all"))
        exchanged = row["sent"].get("all-to-all", 0) / 1e6
        other = sum(row["sent"].values()) / 1e6 - exchanged
        print(
            f"| {row['devices']} | {' x '.join(map(str, sizes))} | {row['flops'] / 1e9:.3f} | {row['share']:.3f} | "
            f"{row['all_share']:.3f} | {exchanged:.2f} | {other:.2f} |",
            flush=True,
        )
    if args.output:
        run_record.write(args.output, {"config": CONFIG.to_dict(), "rows": rows}, device="virtual CPU (compiled, not timed)")


if __name__ == "__main__":
    main()
