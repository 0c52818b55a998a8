"""A train step that was compiled beforehand: a plan keeps it in a folder, and a run loads it in place of compiling.

The folder holds the executable and a manifest, and no pickle: the run traces and lowers its step itself, which takes seconds and
gives trees, shapes and shardings. What it then asks the compiler for must be, letter for letter, what the kept program was compiled
from, by the same versions and for such devices; so results are those of compiling, to the bit. All else is refused.
"""

import contextlib
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flax_switch.config import ConfigError, ExperimentConfig, check
from flax_switch.config.base import one_line
from flax_switch.host.depends_on import depends_on
from flax_switch.host.files import absolute, read_bytes, write_bytes, write_text
from flax_switch.host.json_text import field, json_object, read_json
from flax_switch.parallel import processes
from flax_switch.parallel.mesh import shard_batch
from flax_switch.training.checkpoint import flat_fields
from flax_switch.training.state import Run
from flax_switch.training.step import abstract_batch, compile_train_step
from flax_switch.training.stepper import Stepper

PROGRAM_FILE, MANIFEST_FILE = "train_step.xla", "program.json"
LARGEST = 1 << 34  # bytes of an executable
_SOURCES = r"^.*/(?=flax_switch/|site-packages/)"  # folders that a kernel's text names, which differ from machine to machine
_AGAIN = "Save it again as this run is (flax-switch plan ... --save-program {}), or leave --program out: then the run compiles."


def lower_step(run: Run) -> jax.stages.Lowered:
    """Returns the run's train step, lowered for its mesh and not compiled; the text does not depend on where the package lies."""
    assert isinstance(run.config, ExperimentConfig)
    name: Any = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, _SOURCES)
    try:
        return compile_train_step(run).lower(run.abstract_state, abstract_batch(run.config, run.mesh))
    finally:
        jax.config.update(name, before)


def save_program(folder: epath.PathLike, run: Run, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """Writes a compiled train step into a folder: the executable, then the manifest, each complete or absent."""
    folder = absolute(folder)
    executable: Any = compiled.runtime_executable()
    content = executable.serialize()
    write_bytes(folder / PROGRAM_FILE, content)
    found = {"program": _digest(lowered.as_text().encode()), "bytes": len(content), "sha256": _digest(content)}
    write_text(folder / MANIFEST_FILE, json.dumps({**_described(run), **found}, indent=1) + "\n")


def program_stepper(run: Run, folder: epath.PathLike) -> Stepper:
    """Returns the stepper of a run whose train step a plan has kept in a folder; several processes read the same one.

    Raises `ConfigError`, in a sentence, for a folder that holds none, and for a program of other versions, for other devices or of
    another step.
    """
    check(
        run.config.mesh.mode == "jit" and isinstance(run.config, ExperimentConfig),
        "A saved program is the step of a pretraining under jit; set mesh.mode='jit', or leave --program out.",
    )
    path = absolute(folder)
    check((path / MANIFEST_FILE).exists(), f"--program {folder}: there is no {MANIFEST_FILE}. {_AGAIN.format(folder)}")
    manifest = read_json(path / MANIFEST_FILE)
    here = _described(run)
    for part, what in (("versions", "by"), ("devices", "for"), ("flags", "with")):
        _require(folder, what, field(manifest, part, dict, str(path / MANIFEST_FILE)), here[part])
    content = _content(path, manifest, folder)
    lowered = lower_step(run)
    if field(manifest, "program", str, str(path / MANIFEST_FILE)) != _digest(lowered.as_text().encode()):
        known = field(manifest, "config", dict, str(path / MANIFEST_FILE))
        _require(folder, "with", known, json_object(json.dumps(here["config"]), "this run's settings"))
        raise ConfigError(
            f"--program {folder} was compiled from another train step, though by the same settings and versions: the code has "
            f"changed, or one of JAX's own settings. {_AGAIN.format(folder)}"
        )
    processes.require_same({"program (by hash)": _digest(content)})
    compiled = _loaded(lowered, content, folder)
    return Stepper(lambda state, batch: compiled(state, shard_batch(batch, run.mesh)))


def _described(run: Run) -> dict[str, Any]:
    """Returns what a program of the run depends on besides the text that it is compiled from, as JSON has it."""
    assert isinstance(run.mesh, Mesh)
    found: dict[str, Any] = depends_on(list(run.mesh.devices.flat))
    found["devices"] |= {f"mesh axis {axis}": size for axis, size in run.mesh.shape.items()}
    return {**found, "config": flat_fields(run.config)}


def _require(folder: epath.PathLike, joined: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises `ConfigError` that says how this differs from what the program was saved with."""
    names = [name for name in dict.fromkeys((*saved, *here)) if saved.get(name) != here.get(name)]
    differing = "; ".join(f"{name} {_shown(saved.get(name))}, and here it is {_shown(here.get(name))}" for name in names)
    check(not names, f"--program {folder} was compiled {joined} {differing}. {_AGAIN.format(folder)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}... ({_digest(text.encode())[:8]})"


def _content(path: epath.Path, manifest: Mapping[str, Any], folder: epath.PathLike) -> bytes:
    content = read_bytes(path / PROGRAM_FILE, LARGEST, "a compiled program")
    expected = field(manifest, "bytes", int, str(path / MANIFEST_FILE))
    check(
        len(content) == expected,
        f"--program {folder}: {PROGRAM_FILE} has {len(content):,} bytes instead of {expected:,}. {_AGAIN.format(folder)}",
    )
    check(
        _digest(content) == field(manifest, "sha256", str, str(path / MANIFEST_FILE)),
        f"--program {folder}: the contents of {PROGRAM_FILE} have changed since it was saved. {_AGAIN.format(folder)}",
    )
    return content


def compile_anew(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without any cache: for CPUs, an executable that was read from one does not survive being written again."""

    def make(inner: Any, backend: Any, *asked: Any) -> Any:
        text, _, options, callbacks, devices, *_ = asked
        return inner.backend_compile_and_load(backend, text, devices, options, callbacks)

    with _in_place_of_the_compiler(make):
        return lowered.compile()


def _loaded(lowered: jax.stages.Lowered, content: bytes, folder: epath.PathLike) -> jax.stages.Compiled:
    """Returns the lowered step with an executable that was kept in place of one that the compiler makes."""

    def load(_: Any, backend: Any, *asked: Any) -> Any:
        _, _, options, _, devices, *_ = asked
        return backend.deserialize_executable(content, devices, options)

    try:
        with _in_place_of_the_compiler(load):
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = f"--program {folder} cannot be loaded by these devices ({one_line(error)})."
        raise ConfigError(f"{reason} {_AGAIN.format(folder)}") from error


@contextlib.contextmanager
def _in_place_of_the_compiler(make: Callable[..., Any]) -> Iterator[None]:
    """Has JAX call a function, its own module first, where it looks into its cache and compiles; that place has no public name."""
    inner: Any = importlib.import_module("jax._src.compiler")
    before = inner.compile_or_get_cached
    inner.compile_or_get_cached = functools.partial(make, inner)
    try:
        yield
    finally:
        inner.compile_or_get_cached = before


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
