"""A model as a repository of the Hugging Face hub: a folder that transformers opens, with a model card, and its upload."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from flax_switch.config import SwitchConfig, check, one_line
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.convert.checkpoint import convert, open_checkpoint
from flax_switch.convert.tensors import CheckpointError
from flax_switch.generation.defaults import read_prefixes
from flax_switch.host.files import write_bytes, write_text
from flax_switch.training.metrics import METRICS_FILE
from flax_switch.workflows.model_card import CURVES, model_card
from flax_switch.workflows.record import RunRecord
from flax_switch.workflows.result import curves_figure, png

CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Repository:
    """What is pushed: a folder, and whose model it is on the hub."""

    name: str
    folder: Path

    @property
    def files(self) -> dict[str, int]:
        """Their names and bytes."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}

    @property
    def card(self) -> str:
        """The model card."""
        return (self.folder / CARD).read_text(encoding="utf-8")


def check_name(name: str) -> None:
    """Raises `ConfigError` for what is no name of a repository."""
    check(_NAME.fullmatch(name), f"A repository of the hub is OWNER/MODEL, such as ada/switch-tiny; {name!r} is none.")


def make_repository(
    source: str | Path,
    name: str,
    folder: Path,
    *,
    licence: str,
    languages: Sequence[str] = (),
    dtype: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
    on_open: Callable[[int], None] = lambda n: None,
) -> Repository:
    """Converts a model for transformers and puts a card beside it; `source` is what `open_checkpoint` takes.

    Raises:
      ConfigError: for a model that transformers has no place for, or a `folder` that holds another one (without overwrite).
      CheckpointError: naming what is wrong with the source.
    """
    check_name(name)
    opened = open_checkpoint(source, verify=verify)
    check(
        opened.config.head in (LANGUAGE_MODEL, "embedding"),
        f"{source} has a head for {opened.config.head}, of which no card is written; convert it (flax-switch convert) and upload "
        "the folder with a card of your own.",
    )
    convert(
        source, folder, to="huggingface", dtype=dtype, verify=verify, overwrite=overwrite, on_bytes=on_bytes, on_open=on_open
    )  # fmt: skip
    record = _record_of(source)
    drawn = record is not None and importlib.util.find_spec("matplotlib") is not None
    if record is not None and drawn:
        write_bytes(folder / CURVES, png(curves_figure(record.train, record.evals, name.rpartition("/")[2])))
    config: SwitchConfig = opened.config
    card = model_card(
        name, config, licence=licence, languages=tuple(languages), record=record, prefixes=read_prefixes(opened.path),
        encoder_only=opened.architecture in ("encoder", "embedding"), curves=drawn,
    )  # fmt: skip
    write_text(folder / CARD, card)
    return Repository(name, folder)


def _record_of(source: str | Path) -> RunRecord | None:
    """Returns the run that a source is of: itself, or of one of its checkpoints or its best model; None for other folders."""
    path = epath.Path(source)
    for place in (path, path.parent if path.name == "best" else path.parent.parent):
        if (place / METRICS_FILE).exists():
            return RunRecord.read(place)
    return None


def log_in() -> Any:
    """Returns the hub's API, as the user whose token is stored here. Raises where there is none, or the hub is not reached."""
    hub = _huggingface_hub()
    api = hub.HfApi()
    with_advice = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write; --dry-run needs none."
    try:
        api.whoami()
    except Exception as error:  # of several HTTP libraries
        raise CheckpointError(f"The Hugging Face hub does not know you: {one_line(error)}. {with_advice}") from error
    return api


def upload(
    api: Any,
    repository: Repository,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload with flax_switch",
) -> str:
    """Creates the repository where there is none and uploads all files in one commit; returns the commit's address.

    Raises `CheckpointError` with the hub's reason. What was there before stays as it was until the commit is whole.
    """
    try:
        api.create_repo(repository.name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository.name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.name, folder_path=str(repository.folder), revision=revision, commit_message=message
        )
    except Exception as error:  # of several HTTP libraries
        reason = one_line(error) if error.__cause__ is None else f"{one_line(error)} ({one_line(error.__cause__)})"
        raise CheckpointError(f"{repository.name} was not pushed: {reason}. Run the command again to try again.") from error
    return str(commit.commit_url)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("Pushing to the Hugging Face hub needs pip install 'flax_switch[hub]'.") from error
    return huggingface_hub
