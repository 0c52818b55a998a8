"""Kills commands in each of their phases and looks whether the same command ends as if nothing had happened.

    python scripts/kill_table.py                         # 20 kills in each phase; kills that are finished are not repeated
    python scripts/kill_table.py --kills 2 --phases best # some of them
    python scripts/kill_table.py --write                 # put the table of all that is finished into docs/hardening.md

A kill is SIGKILL, SIGTERM, SIGHUP or SIGINT in turn, which a process sends to itself at its n-th file operation of a phase, or
after so many seconds in it; n and the seconds are spread over what an undisturbed run has. The process first writes down that the
phase is going on. The same command then runs to its end, and everything it leaves must be that of the undisturbed run: losses,
parameters and statistics of the optimiser, caches, predictions, models and outputs to the bit, and no other file.

Commands run in forks of one process that has imported all, with a small model and small data. Results are in .kills/.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "hardening.md"
MARK = "<!-- written by scripts/kill_table.py -->"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
TIMING = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.scandir", "os.listdir"}  # audit events
CORPUS_DOCUMENTS = 900  # of the embedded corpus: enough for a corpus, and extracted at once
LIMIT = 300  # seconds for a command


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase: the command that has it, the function that is it ("module:name"), and one that ends it before its return."""

    command: str
    function: str
    ended_by: str | None = None
    fresh_caches: bool = False


PHASES = {
    "corpus": Phase("pretrain", "data.corpus:default_corpus", fresh_caches=True),
    "vocabulary": Phase("pretrain", "data.pipeline:_trained", fresh_caches=True),
    "cache": Phase("pretrain", "data.cache:tokenize", fresh_caches=True),
    "checkpoint save": Phase("pretrain", "training.checkpoint:Checkpoints.save", "training.checkpoint:Checkpoints._complete"),
    "checkpoint deletion": Phase("pretrain", "training.checkpoint:Checkpoints._delete"),
    "evaluation": Phase("pretrain", "training.evaluate:Evaluator.__call__"),
    "best": Phase("finetune", "workflows.predictions:TaskEvaluator._keep"),
    "report": Phase("pretrain", "workflows.finish:finish"),
    "conversion": Phase("convert", "convert.checkpoint:convert"),
    "generation": Phase("generate", "commands.generate:_to_file"),
}


# --- inside a command
class Window:
    """What happens while a phase goes on: its file operations and its seconds are counted, and at one of them comes the kill."""

    def __init__(self, kill: dict[str, Any] | None, landed: Path) -> None:
        self.active = self.operations = 0
        self.seconds, self.began = 0.0, 0.0
        self._kill, self._landed = kill, landed

    def enter(self) -> None:
        self.active += 1
        self.began = time.monotonic()
        if self._kill and self._kill["at"] == "time":
            left = self._kill["value"] - self.seconds
            threading.Timer(max(left, 0.0), self._fire, [self.began]).start()

    def leave(self) -> None:
        if self.active:
            self.active -= 1
            self.seconds += time.monotonic() - self.began

    def see(self, event: str, _: tuple) -> None:
        if self.active and event in OPERATIONS:
            self.operations += 1
            if self._kill and self._kill["at"] == "operation" and self.operations == self._kill["value"]:
                self._fire(self.began)

    def _fire(self, began: float) -> None:
        if self.active and self.began == began and not self._landed.exists():
            kill, self._kill = self._kill, None
            assert kill is not None
            self._landed.write_text(json.dumps({"seconds": self.seconds + time.monotonic() - began, "operations": self.operations}))
            os.kill(os.getpid(), signal.Signals[kill["signal"]])


def watched(function: Callable, window: Window, ends_here: bool) -> Callable:
    """Returns the function with the window open while it runs; for background work, from its call on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        window.enter()
        try:
            return function(*args, **kwargs)
        finally:
            if ends_here:
                window.leave()

    return call


def patched(place: str, make: Callable[[Callable], Callable]) -> None:
    """Puts `make` of a function, "module:name" or "module:Class.name", in its place."""
    module, _, name = place.partition(":")
    holder: Any = importlib.import_module(f"flax_switch.{module}")
    *classes, name = name.split(".")
    for one in classes:
        holder = getattr(holder, one)
    setattr(holder, name, make(getattr(holder, name)))


def watch(phase: Phase, window: Window) -> None:
    """Opens the window in the functions of a phase."""
    patched(phase.function, lambda function: watched(function, window, phase.ended_by is None))
    if phase.ended_by:

        def closing(function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    return function(*args, **kwargs)
                finally:
                    window.leave()

            return call

        patched(phase.ended_by, closing)


def command(arguments: list[str], phases: list[str], kill: dict[str, Any] | None, notes: Path) -> int:
    """Runs a command with its phases watched; writes down at its end what they had."""
    from flax_switch.cli import main

    corpus = importlib.import_module("flax_switch.data.corpus")
    texts = corpus._texts
    corpus._texts = lambda: (text for _, text in zip(range(CORPUS_DOCUMENTS), texts(), strict=False))
    notes.mkdir(parents=True, exist_ok=True)
    if "report" not in phases:  # it is the same afterwards, and takes the longest
        importlib.import_module("flax_switch.workflows.finish").finish = lambda *_: None
    windows = {name: Window(kill, notes / "landed.json") for name in phases}
    for name, window in windows.items():
        watch(PHASES[name], window)
        sys.addaudithook(window.see)
    status = main(arguments)
    found = {name: {"operations": window.operations, "seconds": window.seconds} for name, window in windows.items()}
    (notes / "phases.json").write_text(json.dumps(found))
    return status


# --- outside
def run(arguments: list[str], phases: list[str], kill: dict[str, Any] | None, notes: Path) -> int:
    """Runs a command in a fork; returns its exit status, or minus the signal that ended it."""
    notes.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        log = os.open(notes / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name in SIGNALS[1:]:  # whoever runs this in the background may have them ignored, which children inherit
            signal.signal(signal.Signals[name], signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
        end_here(lambda: command(arguments, phases, kill, notes))
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"{' '.join(arguments)} took more than {LIMIT} s")


def end_here(work: Callable[[], int]) -> NoReturn:
    """Does the work and ends this process as Python does at its end, but without leaving the frames that it was forked in."""
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


class Case:
    """A folder in which one command runs, with the arguments for it."""

    def __init__(self, folder: Path, base: Path | None) -> None:
        """base: the folder of the undisturbed runs, whose caches and models are used; None in that folder itself."""
        self.folder, self.base = folder, base or folder

    def arguments(self, name: str) -> list[str]:
        """The command line of a command."""
        work = ["--workdir", str(self.folder / name)]
        if name == "pretrain":
            settings = {
                **MODEL, **TRAIN, "data.batch_size": 4, "data.vocabulary_size": 300, "data.num_sentinels": 20, "data.seed": 0,
                "data.cache_dir": self.folder / "cache",
            }  # fmt: skip
            return ["pretrain", "--config", "tiny_language_model", *work, *overrides({**settings, **SHAPE})]
        if name == "finetune":
            settings = {
                **TRAIN, "data.train": self.base / "train.jsonl", "data.validation": self.base / "validation.jsonl",
                "data.inputs": "list", "data.targets": "first", "data.batch_tokens": 64, "data.packing": False,
                "evaluation.metrics": "('exact_match',)", "evaluation.best": "cross_entropy", "evaluation.num_beams": 1,
            }  # fmt: skip
            init = ["--init", str(self.base / "pretrain")]
            return ["finetune", "--config", "finetune_summarization", *init, *work, *overrides({**settings, **SHAPE})]
        if name == "convert":
            source = [str(self.base / "pretrain"), str(self.folder / "convert")]
            return ["convert", *source, "--to", "flax_switch", "--max-shard-size", "4KB", "--no-progress"]
        texts = ["--input", str(self.base / "texts.txt"), "--output", str(self.folder / "generate" / "out.jsonl"), "--resume"]
        return ["generate", "--checkpoint", str(self.base / "pretrain"), *texts, "--batch-size", "2", "--max-new-tokens", "4"]

    def prepare(self, name: str, fresh_caches: bool) -> None:
        """Makes the folder, for a pre-training with the caches that are not to be made in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if name == "generate":
            (self.folder / "generate").mkdir()
        if name == "pretrain" and not fresh_caches:
            shutil.copytree(self.base / "cache", self.folder / "cache")


SHAPE = {"data.inputs_length": 16, "data.targets_length": 8}
MODEL = {
    "model.vocab_size": 384, "model.d_model": 8, "model.d_ff": 8, "model.num_heads": 2, "model.d_kv": 4, "model.num_experts": 2,
    "model.num_encoder_layers": 1, "model.num_decoder_layers": 1, "model.num_sparse_encoder_layers": 1,
    "model.num_sparse_decoder_layers": 0, "model.sparse_layout": "mixed", "model.dropout_rate": 0.1,
}  # fmt: skip
TRAIN = {
    "train.steps": 6, "train.log_every": 1, "train.eval_every": 3, "train.eval_batches": 1, "train.checkpoint_every": 2,
    "train.keep_last": 1, "train.sample_spans": 1, "optimizer.warmup_steps": 2,
}  # fmt: skip


def overrides(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def undisturbed(base: Path) -> dict[str, Any]:
    """Runs every command undisturbed, once; returns what the phases had."""
    done = base / "phases.json"
    if done.exists():
        return json.loads(done.read_text())
    case = Case(base, None)
    case.prepare("generate", fresh_caches=True)
    words = ["one", "two", "three", "four", "five"]
    for name, count in (("train", 40), ("validation", 4)):
        rows = [{"list": " ".join(words[(i + k) % 5] for k in range(3)), "first": words[i % 5]} for i in range(count)]
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "texts.txt").write_text("".join(f"Return the {word} <extra_id_0> list.\n" for word in words))
    found: dict[str, Any] = {}
    for name in ("pretrain", "finetune", "convert", "generate"):
        phases = [phase for phase, what in PHASES.items() if what.command == name]
        for place in ("compiled", name):  # the seconds are of programs that are compiled
            shutil.rmtree(base / name, ignore_errors=True)
            shutil.rmtree(base / "cache", ignore_errors=True) if name == "pretrain" else None
            (base / "generate").mkdir(exist_ok=True)
            notes = base / "notes" / place
            status = run(case.arguments(name), phases, None, notes)
            assert status == 0, (notes / "log.txt").read_text()
        found |= json.loads((notes / "phases.json").read_text())
    done.write_text(json.dumps(found, indent=1))
    return found


def moment(number: int, kills: int, had: dict[str, Any], shrink: float) -> dict[str, Any]:
    """Returns signal and moment of a kill: every other four of them by file operations, where a phase has some, else by seconds."""
    fraction = (7 * number % kills + 0.5) / kills * shrink  # early and late ones in turn
    how = "operation" if number // len(SIGNALS) % 2 == 0 and had["operations"] > 1 else "time"
    value = 1 + int(fraction * had["operations"]) if how == "operation" else fraction * had["seconds"]
    return {"signal": SIGNALS[number % len(SIGNALS)], "at": how, "value": value}


def kill_once(base: Path, folder: Path, name: str, number: int, kills: int, had: dict[str, Any]) -> dict[str, Any]:
    """Kills a command once in a phase, runs it again, and returns what came of it."""
    phase = PHASES[name]
    case = Case(folder, base)
    result: dict[str, Any] = {"phase": name, "number": number, "landed": False}
    for attempt in range(4):
        case.prepare(phase.command, phase.fresh_caches)
        kill = moment(number, kills, had, 0.7**attempt)
        notes = folder / "notes" / "killed"
        status = run(case.arguments(phase.command), [name], kill, notes)
        if (notes / "landed.json").exists():
            result |= {"landed": True, "signal": kill["signal"], "at": kill["at"], "value": kill["value"], "status": status}
            break
    log = folder / "notes" / "killed" / "log.txt"
    result["traceback"] = "Traceback" in log.read_text()
    status = run(case.arguments(phase.command), ["report"] if name == "report" else [], None, folder / "notes" / "again")
    result["differences"] = [f"the second run ended with status {status}"] if status else compared(base, folder, name)
    return result


# --- what must be the same
def compared(base: Path, folder: Path, phase: str) -> list[str]:
    """Returns `differences`, found in a fork: what reads the arrays has threads, and a process with threads cannot fork."""
    file = folder / "notes" / "differences.json"
    file.parent.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        end_here(lambda: file.write_text(json.dumps(differences(base, folder, phase))) * 0)
    os.waitpid(child, 0)
    return json.loads(file.read_text())


def differences(base: Path, folder: Path, phase: str) -> list[str]:
    """Names what a command left that an undisturbed one did not, or otherwise; what the report has, in its own phase alone."""
    one, other = (dict(contents(place, PHASES[phase].command)) for place in (folder, base))
    if phase != "report":
        other = {key: value for key, value in other.items() if not re.search(r"^pretrain/(report|samples|plots/)", key)}
    return [f"{key} is {'otherwise' if key in one and key in other else 'there' if key in one else 'missing'}"
            for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]  # fmt: skip


def contents(folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yields what is compared of a command's files: (what, its contents)."""
    places = [folder / name, *([folder / "cache"] if name == "pretrain" else [])]
    for path in sorted(path for place in places for path in place.rglob("*") if path.is_file()):
        key = path.relative_to(folder).as_posix()
        if re.search(r"/checkpoints/\d+/|/tensorboard/|\.tmp-", key):
            continue  # of the arrays below; events hold times; temporary files in caches may be of a living process for an hour
        if path.name in ("report.html", "config.json", "tasks.json", "sessions.jsonl") or path.suffix == ".png":
            yield key, path.stat().st_size > 100  # they hold times and names of folders
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            yield key, [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        else:
            yield key, path.read_bytes()
    import tensorstore as ts

    for step in sorted((folder / name / "checkpoints").glob("*")):
        yield f"step {step.name}", json.loads((step / "meta" / "metadata").read_text())
        for item in ("params", "opt_state"):
            store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{step / item}/"}).result()
            for key in store.list().result():
                yield f"{step.name}/{item}/{key.decode()}", store[key]


# --- the table
def table(results: list[dict[str, Any]]) -> str:
    """Returns a table: for every phase and signal how many kills ended as an undisturbed run, of those that landed."""
    lines = ["| phase | " + " | ".join(SIGNALS) + " | all |", "|---|" + "---|" * (len(SIGNALS) + 1)]
    for name in PHASES:
        here = [result for result in results if result["phase"] == name and result["landed"]]
        cells = []
        for wanted in (*SIGNALS, None):
            of = [result for result in here if wanted in (None, result["signal"])]
            cells.append(f"{sum(not result['differences'] for result in of)} of {len(of)}" if of else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Puts the table into the page."""
    before, mark, rest = PAGE.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    PAGE.write_text(f"{before}{mark}\n{text}\n{MARK}{after}")


def warm_up() -> None:
    """Imports what the commands need and starts no device, so that forks begin where an import ends."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "32")
    sys.path.insert(0, str(ROOT))
    names = (
        "cli", "commands.pretrain", "commands.finetune", "commands.convert", "commands.generate", "workflows.pretrain",
        "workflows.finetune", "workflows.finish", "workflows.report", "data.loader", "inspection.checkpoint", "convert.progress",
    )  # fmt: skip
    for name in names:
        importlib.import_module(f"flax_switch.{name}")
    with contextlib.suppress(ImportError):
        import matplotlib.pyplot  # noqa: F401


def main() -> int:
    """Returns 0 where every kill landed and every run ended as an undisturbed one."""
    parser = argparse.ArgumentParser(description="Kills commands in each of their phases.")
    parser.add_argument("--kills", type=int, default=20, help="in each phase")
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--folder", type=Path, default=ROOT / ".kills", help="for runs and results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no kill after so many seconds")
    parser.add_argument("--write", action="store_true", help="put the table of what is finished into docs/hardening.md")
    args = parser.parse_args()
    file = args.folder / f"results-{args.kills}.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if args.write:
        write(table(results))
        return 0
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(args.folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    warm_up()
    had = undisturbed(args.folder / "undisturbed")
    end = time.monotonic() + args.seconds
    finished = {(result["phase"], result["number"]) for result in results}
    for number in range(args.kills):
        for name in args.phases:
            if (name, number) in finished or time.monotonic() > end:
                continue
            result = kill_once(args.folder / "undisturbed", args.folder / "run", name, number, args.kills, had[name])
            results.append(result)
            with file.open("a") as opened:
                print(json.dumps(result), file=opened)
            print(json.dumps(result), flush=True)
            if not result["landed"] or result["differences"]:
                shutil.rmtree(args.folder / f"kept-{name.replace(' ', '-')}-{number}", ignore_errors=True)
                shutil.copytree(args.folder / "run", args.folder / f"kept-{name.replace(' ', '-')}-{number}")
    print(table(results))
    return 0 if all(result["landed"] and not result["differences"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
