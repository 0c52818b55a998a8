"""The sweep of dense and sparse models: what it compares is alike, and what it says of curves is right."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sparse_pays  # noqa: E402 - benchmarks are no package

ARGS = argparse.Namespace(
    task="recall", pairs=2000, batch_size=256, steps=4, optimizer="adamw", schedule="constant", every=2, cells=["dense", "4"],
    rates=[0.001, 0.003], seeds=2,
)  # fmt: skip


def run(losses, cell="dense", seed=0):
    """A run whose steps take 10 s and 20 s of CPU time each hundred."""
    curve = [[100 * i, 10.0 * i, 20.0 * i, loss] for i, loss in enumerate(losses, 1)]
    routers = {name: [] for name in ("dropped", "confidence", "entropy", "token_bits")}
    return dict(cell=cell, rate=0.1, seed=seed, parameters=7, curve=curve, **routers)


def test_time_to_the_dense_models_final_loss_is_told_seed_by_seed():
    dense = [run([3.0, 2.0, 1.5, 1.0]), run([3.0, 2.0, 1.6, 0.4])]
    sparse = [run([2.0, 1.0, 0.5, 0.2], "4"), run([2.0, 1.0, 0.8, 0.5], "4")]
    tuned = [dict(cell="dense", rate=0.1, rates={}, runs=dense), dict(cell="4", rate=0.1, rates={}, runs=sparse)]
    rows = {row["cell"]: row for row in sparse_pays.summary(tuned)}
    assert rows["dense"]["steps_of_dense"] == [1.0, 1.0]
    assert rows["4"]["steps_of_dense"] == [0.5, None] and rows["4"]["cpu_of_dense"] == [0.5, None]
    assert rows["4"]["losses"] == [0.2, 0.5]


def test_cells_are_held_against_the_best_dense_one():
    cells = {"dense": run([3.0, 2.0, 1.5, 1.0]), "dense-tenth-init": run([3.0, 1.5, 1.0, 0.8]), "4": run([2.0, 1.0, 0.9, 0.7], "4")}
    rows = sparse_pays.summary([dict(cell=name, rate=0.1, rates={}, runs=[of]) for name, of in cells.items()])
    assert [row["steps_of_dense"] for row in rows] == [[None], [1.0], [1.0]]


def test_every_seed_learns_the_same_pairs_in_another_order_each_once_an_epoch():
    task = sparse_pays.recall(ARGS)
    pairs = {
        (*i, *t) for batch in task.measured() for i, t in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    }
    assert len(pairs) == 2000 == len({pair[:4] for pair in pairs})
    firsts = []
    for seed in (0, 1):
        batches = [next(made) for made in [task.train(seed)] for _ in range(8)]
        seen = [(*i, *t) for batch in batches for i, t in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]
        assert set(seen) <= pairs and len(set(seen[:1792])) == 1792
        firsts.append(seen[0])
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("variant", [*sparse_pays.VARIANTS, "", "hash+capacity-1"])
def test_cells_cost_as_much_a_token_as_the_dense_model(variant):
    config = sparse_pays.recall(ARGS).config
    dense, sparse = (sparse_pays.cell_config(config, cell, 0.1, 3) for cell in ("dense", f"8-{variant}"))
    width = sparse.model.expert_d_ff or sparse.model.d_ff
    assert width * sparse.model.num_selected_experts == dense.model.d_ff
    assert not dense.model.is_sparse and sparse.model.num_experts == 8 and sparse.train.seed == 3
    assert len(sparse.model.encoder.sparse_layers) == len(sparse.model.decoder.sparse_layers) == 2


def test_a_sweep_trains_each_rate_once_goes_on_and_takes_the_best_rate(tmp_path, monkeypatch):
    trained = []

    def train(task, cell, rate, seed, every):
        trained.append((cell, rate, seed))
        return run([rate if cell == "dense" else np.nan if rate < 0.002 else 0.5], cell, seed)

    monkeypatch.setattr(sparse_pays, "train", train)
    args = argparse.Namespace(**{**vars(ARGS), "workdir": tmp_path})
    first = sparse_pays.sweep(None, args)
    assert trained == [
        ("dense", 0.001, 0),
        ("dense", 0.003, 0),
        ("dense", 0.001, 1),
        ("4", 0.001, 0),
        ("4", 0.003, 0),
        ("4", 0.003, 1),
    ]
    assert [cell["rate"] for cell in first] == [0.001, 0.003]  # a loss that is no number is no best one
    assert json.dumps(sparse_pays.sweep(None, args)) == json.dumps(first) and len(trained) == 6
