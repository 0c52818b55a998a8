"""flax-switch push RUN OWNER/MODEL --license apache-2.0 [--dry-run]"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flax_switch.commands.checkpoints import FORMATS, add_verify_argument, explain_missing_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the repository, and what its card says."""
    parser.add_argument("source", metavar="MODEL", help=FORMATS)
    parser.add_argument("repository", metavar="OWNER/MODEL", help="on the hub; it is made where there is none")
    parser.add_argument("--license", required=True, metavar="ID", help="of the weights, as the hub calls it: apache-2.0, mit, ...")
    parser.add_argument("--language", action="append", default=[], metavar="CODE", help="of the text, such as en; repeatable")
    parser.add_argument("--dtype", help="of the pushed tensors: float32, bfloat16 or float16; routers keep theirs")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument("--branch", help="push to this branch, which is made where there is none (default: main)")
    parser.add_argument("--message", default="Upload with flax_switch", help="of the commit")
    parser.add_argument("--folder", metavar="DIR", help="keep what is pushed in this new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files, and push nothing")
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    add_verify_argument(parser)


@explain_missing_extras
def run(args: argparse.Namespace) -> int:
    """Converts the model, writes its card, and uploads both or shows them."""
    from flax_switch.convert.progress import progress_bar
    from flax_switch.workflows import push

    push.check_name(args.repository)
    api = None if args.dry_run else push.log_in()  # before gigabytes are converted
    with _folder(args.folder) as folder, progress_bar("Converting", enabled=not args.no_progress) as callbacks:
        repository = push.make_repository(
            args.source, args.repository, folder, licence=args.license, languages=args.language, dtype=args.dtype,
            verify=not args.no_verify, overwrite=args.overwrite, **callbacks,
        )  # fmt: skip
        if api is None:
            print(repository.card)
            for name, size in repository.files.items():
                print(f"{size:>15,}  {name}")
            print(f"Nothing was pushed to {args.repository}.")
        else:
            address = push.upload(api, repository, private=args.private, revision=args.branch, message=args.message)
            print(f"Pushed {len(repository.files)} files: {address}")
    return 0


@contextlib.contextmanager
def _folder(named: str | None) -> Iterator[Path]:
    """Yields the folder to write to: the one that was named, or one that is removed at the end."""
    if named is not None:
        yield Path(named)
        return
    with tempfile.TemporaryDirectory(prefix="flax-switch-push-") as temporary:
        yield Path(temporary) / "model"
