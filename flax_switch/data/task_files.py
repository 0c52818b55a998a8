"""Files of tasks as records: JSON lines, tables, parquet, folders that `datasets` saved, and plain parallel text."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from flax_switch.config import ConfigError, check
from flax_switch.config.finetuning import TaskConfig
from flax_switch.data import formats, packed, sources
from flax_switch.data.formats import Records
from flax_switch.host.files import expanded
from flax_switch.host.json_text import field, read_json


def task_records(source: str | tuple[str, ...], task: TaskConfig, split: str, setting: str) -> Records:
    """Yields (record, where it stands) of everything that `source` names, in order.

    Args:
      split: of a folder that `datasets` saved with several: "train" or "validation".
      setting: the name of the setting `source` is from, for messages.

    Raises:
      ConfigError: for what is missing or cannot be read, naming file and line.
    """
    for pattern in (source,) if isinstance(source, str) else source:
        path = expanded(pattern)
        if is_saved_dataset(path):
            yield from _saved_dataset(path, split, setting)
        elif beside := _endings_beside(path):
            yield from _parallel(path, task, beside, setting)
        else:
            for file in sources.find_files(pattern, formats.WITH_FIELDS, setting):
                if formats.kind_of(file) in formats.TABLES:
                    yield from formats.table_rows(file, header=isinstance(task.inputs, str) and isinstance(task.targets, str))
                else:
                    yield from sources.records([file])


# --- plain parallel text
def _endings_beside(stem: Path) -> list[str]:
    """Returns what follows a stem in the names of files: ["de", "en"] for train, beside train.de and train.en.gz."""
    if stem.exists():
        return []
    files = Path(stem.parent).glob(f"{glob.escape(stem.name)}.*") if stem.parent.is_dir() else []
    names = {file.name.removesuffix(packed.ending_of(file)) for file in files if file.is_file()}
    return sorted(name.removeprefix(f"{stem.name}.") for name in names)


def _parallel(stem: Path, task: TaskConfig, beside: list[str], setting: str) -> Records:
    paths = []
    for ending in (task.inputs, task.targets):
        found = [path for end in ("", *packed.COMPRESSIONS) if (path := Path(f"{stem}.{ending}{end}")).is_file()]
        check(
            bool(found),
            f"{setting}: there is no {stem}.{ending}. Beside it there are: {', '.join(f'{stem.name}.{e}' for e in beside)}. Of "
            f"parallel text, data.inputs and data.targets (now {task.inputs!r} and {task.targets!r}) are the endings; else name a "
            "file of records.",
        )
        paths.append(found[0])
    inputs, targets = (list(packed.lines(path)) for path in paths)
    check(
        len(inputs) == len(targets),
        f"{setting}: parallel files need a line of one for every line of the other, but {paths[0]} has {len(inputs):,} lines and "
        f"{paths[1]} has {len(targets):,}.",
    )
    for number, texts in enumerate(zip(inputs, targets, strict=True), start=1):
        yield dict(zip((task.inputs, task.targets), texts, strict=True)), f"{paths[0]} and {paths[1].name}, line {number}"


# --- what datasets' save_to_disk writes
def is_saved_dataset(folder: Path) -> bool:
    """Returns whether `datasets` saved a data set, or several splits of one, in a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_dataset(folder: Path, split: str, setting: str) -> Records:
    """Yields rows of the Arrow files that the folder's own list names, in order."""
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise ConfigError(f"Reading the data set {folder} needs pyarrow: pip install 'flax_switch[datasets]'.") from error
    if (folder / "dataset_dict.json").is_file():
        splits = field(read_json(folder / "dataset_dict.json"), "splits", list, str(folder))
        check(
            split in splits,
            f"{setting}: {folder} has the splits {', '.join(map(str, splits)) or 'none'}, and no {split!r}; name the folder of one "
            "of them.",
        )
        folder = folder / split
    row = 0
    for file in field(read_json(folder / "state.json"), "_data_files", list, str(folder / "state.json")):
        name = field(file if isinstance(file, dict) else {}, "filename", str, str(folder / "state.json"))
        check(
            Path(name).name == name and os.path.isfile(folder / name),  # also of a name that is too long
            f"{folder / 'state.json'} names the file {name!r}, and there is no such file in the data set's folder.",
        )
        with packed.explained(f"the data set {folder}"), open(folder / name, "rb") as stream:
            for batch in ipc.open_stream(stream):
                batch.validate(full=True)  # lengths and offsets of a damaged file lead out of it
                for record in batch.to_pylist():
                    row += 1
                    yield record, f"{folder}, row {row}"
