"""One process of a run, for test_processes: python process_worker.py CONFIG.json WORKDIR DUMP.pickle pretrain|restore

It finds the others by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, trains or restores the last checkpoint, and
writes the pieces of the state that its devices hold.
"""

import json
import pickle
import sys
from pathlib import Path

import jax
import numpy as np

from flax_switch.config import ExperimentConfig
from flax_switch.parallel import processes
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.checkpoint import Checkpoints
from flax_switch.training.state import build_run
from flax_switch.workflows.pretrain import pretrain


def pieces(state):
    """[(path, global shape, bounds of the piece, the piece), ...] of what this process holds."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True))
            found.append((jax.tree_util.keystr(path), leaf.shape, bounds, np.asarray(shard.data)))
    return found


def main(config_file, workdir, dump, work):
    config = ExperimentConfig.from_dict(json.loads(Path(config_file).read_text()))
    with processes.session(processes.Connection.resolved(connect_timeout=120, heartbeat_timeout=300)):
        if work == "pretrain":
            state, position = pretrain(config, workdir).state, None
        else:
            run = build_run(config, create_mesh(config.mesh))
            checkpoints = Checkpoints(workdir)
            state, position = checkpoints.restore(run.abstract_state)
            checkpoints.close()
        Path(dump).write_bytes(pickle.dumps((pieces(state), position)))


if __name__ == "__main__":
    main(*sys.argv[1:])
