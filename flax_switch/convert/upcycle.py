"""Sparse upcycling (2212.05055): a mixture of experts that starts as copies of a dense model's MLPs."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_switch.config import StackConfig, SwitchConfig, check
from flax_switch.convert.canonical import canonical_shapes, is_expert, is_router
from flax_switch.convert.checkpoint import (
    Checkpoint,
    as_floats,
    companion_files,
    open_checkpoint,
    source_identity,
    write_checkpoint,
)
from flax_switch.convert.folder import DEFAULT_SHARD_SIZE, claimed, local_destination
from flax_switch.convert.tensors import DTYPES, CheckpointError, Index, LazyTensor, from_array, repeat

ROUTER_STD = 0.02  # a fresh router is initialised as in training from scratch


def upcycle(
    source: str | Path,
    destination: str | Path,
    *,
    num_experts: int,
    sparse_layout: str = "mixed",
    num_sparse_encoder_layers: int | None = None,
    num_sparse_decoder_layers: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    to: str = "flax_switch",
    changes: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    revision: str | None = None,
    verify: bool = True,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
) -> Path:
    """Writes the upcycled model of a dense checkpoint (any format), one tensor at a time.

    Args:
      num_experts: experts in each sparse layer, each a copy of the layer's dense MLP.
      sparse_layout, num_sparse_encoder_layers, num_sparse_decoder_layers: which layers become sparse; by default half of each
        stack's, evenly spread.
      noise: standard deviation of normal noise added to every copy, relative to the standard deviation of the kernel.
      seed: of the routers and the noise.
      to: "flax_switch" or, where Hugging Face can represent it, "huggingface".
      allow_missing, revision, verify: as for `open_checkpoint`.
      changes: other fields of the config, such as capacity_factor or normalize_router_weights.

    Raises:
      CheckpointError, ConfigError: if the source is sparse already, or the fields do not fit together.
    """
    destination = local_destination(destination)
    with claimed(destination):
        dense = as_floats(open_checkpoint(source, allow_missing=allow_missing, revision=revision, verify=verify))
        fields = dict(
            changes or {},
            num_experts=num_experts,
            sparse_layout=sparse_layout,
            num_sparse_encoder_layers=_half(dense.config.encoder, num_sparse_encoder_layers),
            num_sparse_decoder_layers=_half(dense.config.decoder, num_sparse_decoder_layers),
        )
        sparse = upcycled(dense, dense.config.replace(**fields), noise=noise, seed=seed)
        identity = [source_identity(dense.path), noise, seed]
        return write_checkpoint(
            sparse, destination, to=to, files=companion_files(dense.path), max_shard_size=max_shard_size,
            source=identity, overwrite=overwrite, on_bytes=on_bytes, on_open=on_open,
        )  # fmt: skip


def upcycled(dense: Checkpoint, config: SwitchConfig, *, noise: float = 0.0, seed: int = 0) -> Checkpoint:
    """Returns the checkpoint of `config` whose experts are copies of `dense`'s MLPs; unread, like any other."""
    check(not dense.config.is_sparse, f"{dense.path} is sparse already; upcycling starts from a dense model.")
    check(config.is_sparse, "no layer would become sparse; raise the number of sparse layers.")
    check(
        config.expert_width == config.d_ff,
        f"expert_d_ff={config.expert_d_ff}: experts that are copies of the dense MLP have its width, d_ff={config.d_ff}.",
    )
    check(noise >= 0.0, f"noise must not be negative; it is {noise}.")
    tensors: dict[str, LazyTensor] = {}
    for path, shape in canonical_shapes(config, dense.architecture).items():
        if path in dense.tensors:
            tensors[path] = dense.tensors[path]
        elif is_expert(path):
            copy = repeat(dense.tensors[path.replace("/expert/", "/")], config.num_experts)
            tensors[path] = with_noise(copy, noise, seed, path) if noise else copy
        elif is_router(path):
            tensors[path] = from_array(_router(path, shape, seed))
        else:
            raise CheckpointError(f"a dense model has nothing to make {path} of; leave extra_mlp and shared_expert off")
    return dataclasses.replace(dense, config=config, tensors=tensors, huggingface=None)


def with_noise(experts: LazyTensor, noise: float, seed: int, path: str) -> LazyTensor:
    """Returns a stack of experts with noise of its own on each; the same whichever block is read."""

    def read(index: Index) -> np.ndarray:
        rows = []
        for expert in range(index[0].start, index[0].stop):
            kernel = experts.read((slice(expert, expert + 1), *(slice(0, n) for n in experts.shape[1:])))[0].astype(np.float32)
            kernel += noise * kernel.std() * _random(seed, path, expert).standard_normal(kernel.shape, np.float32)
            rows.append(kernel.astype(experts.dtype)[index[1:]])
        return np.stack(rows)

    return LazyTensor(experts.shape, experts.dtype, read)


def _router(path: str, shape: Sequence[int], seed: int) -> np.ndarray:
    if path.endswith("/bias"):
        return np.zeros(shape, np.float32)
    # float32 whatever the rest is in: routing is unstable below it (selective precision, 2101.03961)
    return (ROUTER_STD * _random(seed, path, 0).standard_normal(shape)).astype(DTYPES["float32"])


def _random(seed: int, path: str, member: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(path.encode()), member])


def _half(stack: StackConfig, asked: int | None) -> int:
    return stack.num_layers // 2 if asked is None else asked
