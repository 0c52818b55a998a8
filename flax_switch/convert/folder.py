"""Writing a checkpoint folder so that it is there whole or not at all.

Everything is written to `<destination>.partial`, shard by shard, and the folder takes its name when the last file is in it. A
conversion that was interrupted finds its finished shards there when it runs again with the same source and settings.

Where the destination is a folder with something in it, the two exchange their names. The new model holds `conversion.json` until
what is not the old model's has been moved over and the old model is gone: so the next run knows what a killed one had left to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.convert import t5x, training_run
from flax_switch.convert.doors import check_folder
from flax_switch.convert.safetensors_file import write_safetensors
from flax_switch.convert.tensors import CheckpointError, LazyTensor, concatenate, narrow
from flax_switch.host.files import in_store
from flax_switch.host.json_text import field, read_json
from flax_switch.host.locks import locked
from flax_switch.host.swap import exchange, settle

DEFAULT_SHARD_SIZE = "5GB"
MARKERS = ("config.json", "flax_switch.json", "adapter_config.json", training_run.ADAPTER_FILE)  # of a model or an adapter
_WEIGHTS = (
    "adapter*.safetensors",
    "model*.safetensors*",
    "params*.safetensors*",
    "pytorch_model*.bin*",
    "flax_model*.msgpack*",
    "tf_model*.h5*",
)
# Files that travel with a model, whichever way it goes.
COMPANIONS = (
    "spiece.model",
    "vocabulary.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_PLAN = "conversion.json"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PART = re.compile(r"(.+)\[(\d{1,15}):(\d{1,15})\]")

Shard = dict[str, LazyTensor]


def parse_size(size: str | int) -> int:
    """Returns bytes of a size such as "5GB", "300MiB" or 1000000."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"a size is a positive number and a unit, as in 5GB or 300MiB; it is {shown(size)}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def split_into_shards(tensors: Mapping[str, LazyTensor], max_bytes: int, *, split_stacks: bool = False) -> list[Shard]:
    """Returns tensors in order, divided into shards of at most `max_bytes`, or of one tensor that is larger.

    With `split_stacks` a stack larger than that is divided along its experts, into tensors named `name[start:stop]`.
    """
    shards: list[Shard] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        for part_name, part in _parts(name, tensor, max_bytes) if split_stacks else [(name, tensor)]:
            if part.nbytes > room and shards[-1]:
                shards.append({})
                room = max_bytes
            shards[-1][part_name] = part
            room -= part.nbytes
    return shards


def _parts(name: str, tensor: LazyTensor, max_bytes: int) -> Iterator[tuple[str, LazyTensor]]:
    if tensor.nbytes <= max_bytes or len(tensor.shape) < 3:
        yield name, tensor
        return
    count = tensor.shape[0]
    rows = max(1, max_bytes // (tensor.nbytes // count))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        yield f"{name}[{start}:{stop}]", narrow(tensor, start, stop)


def join_parts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns the inverse of `split_stacks`: parts `name[start:stop]` become one tensor again."""
    whole: dict[str, LazyTensor] = {}
    parts: dict[str, list[tuple[int, int, LazyTensor]]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            whole[name] = tensor
        else:
            parts.setdefault(match[1], []).append((int(match[2]), int(match[3]), tensor))
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[:2])
        position = 0
        for start, stop, tensor in pieces:
            if start != position or tensor.shape[0] != stop - start or name in whole:
                raise CheckpointError(f"the parts of {name!r} do not follow each other: {[p[:2] for p in pieces]}")
            position = stop
        whole[name] = concatenate([tensor for _, _, tensor in pieces])
    return whole


def shard_names(stem: str, count: int) -> list[str]:
    """Returns the file names of shards, counted as Hugging Face does: `stem.safetensors`, or `stem-00001-of-00003.safetensors`."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def named(shards: Sequence[Shard], stem: str) -> tuple[dict[str, Shard], dict[str, bytes]]:
    """Returns shards by the names of their files, and the index that several need."""
    by_name = dict(zip(shard_names(stem, len(shards)), shards, strict=True))
    if len(shards) < 2:
        return by_name, {}
    weight_map = {tensor: name for name, shard in by_name.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return by_name, {f"{stem}.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}


def write_folder(
    destination: Path,
    shards: Mapping[str, Shard],
    files: Mapping[str, bytes],
    *,
    source: object = None,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
    write: Callable[[Path, Shard, Callable[[int], None]], None] = write_safetensors,
) -> None:
    """Writes the shards and small files, then gives the folder its name.

    Args:
      shards: the tensors of each file, by its name; `named` makes them.
      files: contents of the small files, by name.
      source: anything JSON-able that identifies what the tensors are read from; finished shards of an earlier run with the
        same source and the same shards are kept. None: an earlier run's are thrown away.
      overwrite: replace a model that is there, its own files alone; otherwise it is an error.
      on_bytes: progress, as in `write_safetensors`; kept shards count at once.
      write: writes a shard to a path.
    """
    destination = Path(os.path.realpath(destination))
    partial = destination.with_name(f"{destination.name}.partial")
    with _explained(destination, partial):
        check_destination(destination, overwrite=overwrite)
        _fill(partial, shards, files, source, on_bytes, write)
        _publish(partial, destination)


def _fill(
    partial: Path,
    shards: Mapping[str, Shard],
    files: Mapping[str, bytes],
    source: object,
    on_bytes: Callable[[int], None],
    write: Callable[[Path, Shard, Callable[[int], None]], None],
) -> None:
    """Writes everything into the partial folder, but for the shards that an earlier run of the same plan has finished there."""
    plan = _fingerprint(shards, source)
    if source is None or _read_plan(partial) != plan:
        _remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write(partial / _PLAN, plan.encode())
    for name, shard in shards.items():
        if (partial / name).exists():
            on_bytes(sum(tensor.nbytes for tensor in shard.values()))
            continue
        (partial / name).parent.mkdir(exist_ok=True)
        write(partial / f"{name}.writing", shard, on_bytes)
        (partial / f"{name}.writing").rename(partial / name)
    for name, content in files.items():
        _write(partial / name, content)


def _publish(partial: Path, destination: Path) -> None:
    """Gives the finished folder its name; see above for one that is there already."""
    if destination.exists() and any(destination.iterdir()):
        with contextlib.suppress(OSError):
            shutil.copymode(destination, partial)
        exchange(partial, destination)
        _finish(old=partial, new=destination)
        return
    (partial / _PLAN).unlink()
    if destination.exists():
        destination.rmdir()  # Windows renames onto nothing that exists
    partial.rename(destination)


def recover(destination: Path) -> None:
    """Ends what a killed conversion had begun in a destination: the exchange of the folders, or what comes after it."""
    partial = destination.with_name(f"{destination.name}.partial")
    settle(partial, destination)
    if _read_plan(destination) is not None:
        _finish(old=partial, new=destination)


def _finish(old: Path, new: Path) -> None:
    """Moves what is not the old model's own to the new one, then removes the old one: the file that marks a model goes last, as it
    says which files are a model's.
    """
    if old.is_dir():
        own = _own_files(old)
        for path in sorted(old.iterdir()):
            if path.name not in own and not os.path.lexists(new / path.name):
                path.rename(new / path.name)
        for path in sorted(old.iterdir(), key=lambda path: (path.name in MARKERS, path.name)):
            _remove(path)
        old.rmdir()
    (new / _PLAN).unlink()


def _own_files(folder: Path) -> set[str]:
    """Returns the names of a model's files in a folder, of those that may be there; none where there is no model."""
    if not holds_model(folder):
        return set()
    return {path.name for pattern in (*MARKERS, *COMPANIONS, *_WEIGHTS) for path in folder.glob(pattern)}


def holds_model(folder: Path) -> bool:
    """Says whether a folder has one of the files that mark a model."""
    return any((folder / marker).exists() for marker in MARKERS)


def _read_plan(folder: Path) -> str | None:
    """Returns the fingerprint in a folder that a conversion is at work on; None in any other."""
    path = folder / _PLAN
    text = path.read_bytes()[:65].decode(errors="replace") if path.is_file() else ""
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder with what is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Writes a small file down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explained(destination: Path, partial: Path) -> Iterator[None]:
    """Says in one sentence what a full disk or a folder that cannot be written means for the conversion."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.EBUSY):
            raise
        advice = "Free some space" if full else "Choose a destination that can be written, its parent folder on the same disk"
        raise CheckpointError(
            f"{destination} cannot be written: {error.strerror or error} ({error.filename or partial}). {advice} and run it again; "
            "what was there before is as it was, and finished shards are kept."
        ) from error


def local_destination(path: str | Path) -> Path:
    """Returns the folder to write a model to. Raises `CheckpointError` for object storage, where none can be renamed."""
    if in_store(path):
        raise CheckpointError(
            f"{path}: converted models are written to disks, whole or not at all. Name a folder, then copy it there."
        )
    return Path(path)


@contextlib.contextmanager
def claimed(destination: Path) -> Iterator[None]:
    """Claims a destination for one conversion at a time, and ends what a killed one had begun there.

    Raises:
      ConfigError: to the second, saying who is at work there.
    """
    with locked(destination, what="conversion"):
        recover(Path(os.path.realpath(destination)))
        yield


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Raises if the destination is no folder, or holds what may not be overwritten."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; a checkpoint is a folder. Choose another destination.")
    check_folder(destination)
    if training_run.is_run(destination) or training_run.find_checkpoint(destination) or t5x.find_checkpoint(destination):
        raise CheckpointError(
            f"{destination} holds a training run or a T5X checkpoint, which a model must not take the place of. Choose another "
            "destination."
        )
    if holds_model(destination) and not overwrite:
        raise CheckpointError(
            f"{destination} holds a model already. Choose another destination, or ask for it to be replaced (--overwrite)."
        )


def _fingerprint(shards: Mapping[str, Shard], source: object) -> str:
    described = {name: {key: [str(t.dtype), *t.shape] for key, t in shard.items()} for name, shard in shards.items()}
    plan = {"source": source, "shards": described}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def read_folder(
    folder: Path,
    stem: str,
    read_file: Callable[[Path], dict[str, LazyTensor]],
    suffix: str,
    derived: Collection[str] = (),
    name_of: Callable[[str], str] = str,
) -> Shard:
    """All tensors of `stem.suffix`, or of the shards its index names.

    `derived` names tensors that are made of others where they are absent: index and shards may disagree about those.
    `name_of` turns the index's names of tensors into those that `read_file` gives them.

    Raises:
      CheckpointError: if the index names a file outside the folder or one that is not there, or disagrees with the files.
    """
    index_path = folder / f"{stem}.{suffix}.index.json"
    if not index_path.exists():
        return read_file(folder / f"{stem}.{suffix}")
    try:
        weight_map = field(read_json(index_path), "weight_map", dict, str(index_path))
        check(all(isinstance(name, str) for name in weight_map.values()), "a name of a file is no text")
        files = sorted(set(weight_map.values()))
    except ConfigError as error:
        raise CheckpointError(f"{index_path} is no index: it needs a JSON object with a 'weight_map' ({error})") from error
    absent = [name for name in files if not (folder / plain_name(name, index_path)).is_file()]
    if absent:
        raise CheckpointError(f"{index_path} names {', '.join(absent[:5])}: not in the folder. Fetch the missing shards.")
    tensors: Shard = {}
    for name in files:
        held = read_file(folder / name)
        listed = {name_of(tensor) for tensor, file in weight_map.items() if file == name}
        wrong = sorted((listed ^ held.keys()) - set(derived))[:5]
        if wrong:
            raise CheckpointError(f"{index_path} and {name} disagree on what the file holds: {', '.join(wrong)}")
        tensors |= held
    return tensors


def plain_name(name: object, where: Path) -> str:
    """Returns `name` if it is the name of a file in the same folder; an error if it could lead anywhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise CheckpointError(f"{where} names the file {name!r}: a checkpoint's files lie in its own folder.")
    return name
