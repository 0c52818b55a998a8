"""Runs several processes as one: connects them, checks that their settings agree, and ends them together.

JAX connects the processes, moves the arrays and notices the dead; here are the few things around it that a run needs:

    with distributed.session(Connection(...)):      # nothing where it is None
        require_same({"seed": 0, ...})              # the same settings everywhere, or an error everywhere
        first_process_first(prepare)                # process 0 writes the shared files, the others find them

Nothing hangs. A process that fails leaves a note with JAX's coordination service, which lives in process 0; every process waits
for that note in a thread and ends with it. A process that was killed leaves none: those that exchange data with it see the
connection break, and the service misses its heartbeats within `heartbeat_timeout` seconds and ends the rest. Where the service
itself is gone, or ends a process, JAX would abort it with a report of its own; `_ended_in_words` has it say a sentence instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed as _runtime  # JAX has no public name for the coordination service's client

from flax_switch.config import ConfigError, check
from flax_switch.host.json_text import json_object

T = TypeVar("T")

LOST_ANOTHER = 3  # exit status of a process that ends because another one did
_NOTE = "flax_switch/failed"
_LONG = 7 * 24 * 3600 * 1000  # milliseconds; waiting for a process that lives is no error, and JAX ends us when it does not
_PATIENCE = 10  # seconds in which a process that fails tells the others
_SHUTDOWN = 20  # seconds for all processes to leave after the last barrier
_RESUME = "Start every process again with the same command: the run continues from its last checkpoint."
_LOST_SIGNS = ("Gloo", "NCCL", "CoordinationService", "coordination service", "Connection reset by peer", "UNAVAILABLE: ")
_last_word = threading.Lock()  # the thread that has it says why the process ends, and ends it
_handlers: list[Any] = []  # what C++ may call, kept for it
_calls = itertools.count()  # agreements are numbered; all processes make the same ones in the same order


@dataclasses.dataclass(frozen=True)
class Connection:
    """How the processes of a run find each other. What is None comes from the environment or from JAX's cluster detection."""

    coordinator_address: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 60  # seconds after which a silent process counts as dead
    connect_timeout: int = 300  # seconds in which all processes must have started

    def __post_init__(self) -> None:
        for name in ("heartbeat_timeout", "connect_timeout"):
            check(getattr(self, name) >= 1, f"{name} must be at least one second; it is {getattr(self, name)}.")

    @classmethod
    def resolved(cls, **settings: Any) -> Connection:
        """Returns the given settings, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

        Raises `ConfigError` for values that cannot be.
        """
        found = {name: value for name, value in settings.items() if value is not None}
        for name in ("coordinator_address", "num_processes", "process_id"):
            text = os.environ.get(f"JAX_{name.upper()}")
            if name not in found and text:
                number = name != "coordinator_address"
                check(not number or text.isdecimal(), f"JAX_{name.upper()} must be a number; it is {text!r}.")
                found[name] = int(text) if number else text
        connection = cls(**found)
        address, count, process = connection.coordinator_address, connection.num_processes, connection.process_id
        check(
            address is None or address.rpartition(":")[2].isdecimal(),
            f"The coordinator's address must be HOST:PORT, such as 10.0.0.1:8476; it is {address!r}.",
        )
        check(count is None or count >= 1, f"The number of processes must be at least 1; it is {count}.")
        check(
            process is None or process >= 0 and (count is None or process < count),
            f"Processes are numbered from 0, so the id must be less than their number ({count}); it is {process}.",
        )
        return connection


@contextlib.contextmanager
def session(connection: Connection | None) -> Iterator[None]:
    """Runs the block as one of several processes (or, with None, as the only one) and ends with the others.

    At an error the process says what it is, tells the others, and exits without waiting for them: status 2 for a `ConfigError`,
    `LOST_ANOTHER` where it only follows another process, else 1.
    """
    if connection is None:
        yield
        return
    connect(connection)
    leaving = threading.Event()
    watcher = threading.Thread(target=_end_with_the_others, args=(leaving,), daemon=True)
    watcher.start()
    try:
        require_same({"number of processes": _runtime.global_state.num_processes})
        yield
        wait_for_all()
    except BaseException as error:
        leaving.set()
        _fail(error)
    leaving.set()
    if _process() == 0:
        _client().key_value_set(_NOTE, "")  # nobody failed; the watchers return
    watcher.join()
    jax.distributed.shutdown()


def connect(connection: Connection) -> None:
    """Calls `jax.distributed.initialize`, with errors that say what to change.

    Raises `ConfigError` where neither settings nor a cluster say where the others are. Processes that have not all met after
    `connect_timeout` seconds exit with status 2: JAX would abort them.
    """
    where = f"the coordinator (process 0) at {connection.coordinator_address or 'the address its cluster names'}"

    def give_up() -> None:
        _print_error(
            f"Not all processes met at {where} within {connection.connect_timeout} s. Either process 0 cannot be reached there (is "
            "it running, is the port free and open between the hosts, is no proxy in between?), or fewer processes were started "
            f"than the number of processes, {connection.num_processes or 'as the cluster gives it'}, says. Start all of them "
            "within --connect-timeout seconds, with the same address and number."
        )
        os._exit(2)

    timer = threading.Timer(connection.connect_timeout, give_up)
    timer.daemon = True
    if connection.process_id is not None:
        _print_error(
            f"Process {connection.process_id} of {connection.num_processes} is looking for {where}. If JAX aborts it right away, "
            "process 0 expects fewer processes: --num-processes differs."
        )
    timer.start()
    try:
        with _ended_in_words():
            jax.distributed.initialize(
                connection.coordinator_address,
                connection.num_processes,
                connection.process_id,
                initialization_timeout=connection.connect_timeout + 60,  # the timer comes first
                heartbeat_timeout_seconds=connection.heartbeat_timeout,
                shutdown_timeout_seconds=_SHUTDOWN,
            )
    except ValueError as error:
        missing = [
            f"--{name.replace('_', '-')}"
            for name in ("coordinator_address", "num_processes", "process_id")
            if getattr(connection, name) is None
        ]
        raise ConfigError(
            f"JAX detects no cluster here (Cloud TPU, SLURM, Open MPI, Kubernetes), so the processes must be told of each other: "
            f"give {', '.join(missing) or 'other values'}, or leave --distributed out to run alone. ({error})"
        ) from error
    finally:
        timer.cancel()


@contextlib.contextmanager
def _ended_in_words() -> Iterator[None]:
    """Has the client that is made in the block call `_service_is_gone` where it would abort the process.

    `jax.distributed.initialize` does not pass such a function on. What it tells the function, jaxlib 0.10 and 0.12 cannot turn into
    a Python value: they throw in a thread that nobody catches in, so that C++ calls what `std::set_terminate` was given.
    """
    inner: Any = _runtime
    make = inner._jax.get_distributed_runtime_client
    inner._jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=_service_is_gone)
    with contextlib.suppress(OSError, AttributeError):  # no such library: it is an abort, as without all this
        _terminate_in_words(ctypes.CDLL("libc++.1.dylib" if sys.platform == "darwin" else "libstdc++.so.6"))
    try:
        yield
    finally:
        inner._jax.get_distributed_runtime_client = make


def _terminate_in_words(library: Any) -> None:
    """Has C++ call `_service_is_gone` where it terminates for such a conversion, and for any other exception what it did before."""
    handler, thrown = ctypes.CFUNCTYPE(None), library.__cxa_current_exception_type
    library._ZSt13set_terminatePFvvE.restype = thrown.restype = ctypes.c_void_p

    def terminate() -> None:
        kind = thrown()  # a std::type_info: a pointer, then its name
        name = ctypes.c_char_p.from_address(kind + ctypes.sizeof(ctypes.c_void_p)).value if kind else None
        if name == b"St8bad_cast":
            _service_is_gone()
        handler(before)()

    _handlers.append(handler(terminate))
    before = library._ZSt13set_terminatePFvvE(_handlers[-1])


def _service_is_gone(*_: Any) -> NoReturn:
    _last_word.acquire()
    _print_error(
        f"Process {_process()} lost process 0, or process 0 another one: it died or hangs, or the network between them does. "
        f"{_RESUME}"
    )
    _exit(LOST_ANOTHER)


def require_same(values: Mapping[str, Any]) -> None:
    """Returns where all processes gave equal values; else raises `ConfigError` in every one of them.

    Values are compared by a hash; those that differ from process 0's are named where they differ. They must be JSON-able.
    """
    if _runtime.global_state.client is None:
        check(
            jax.process_count() == 1,
            f"JAX runs {jax.process_count()} processes, but they were not connected for a run: add --distributed (in Python: call "
            "jax.distributed.initialize first).",
        )
        return
    name, me, client = f"flax_switch/same/{next(_calls)}", _process(), _client()
    text = json.dumps(values, sort_keys=True)
    if me == 0:
        client.key_value_set(f"{name}/first", text)
    client.key_value_set(f"{name}/digests/{me}", hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    wait_for_all()
    digests = {int(key.rpartition("/")[2]): digest for key, digest in client.key_value_dir_get(f"{name}/digests/")}
    others = sorted(process for process, digest in digests.items() if digest != digests[0])
    if not others:
        return
    first = json_object(client.blocking_key_value_get(f"{name}/first", _LONG), "the settings of process 0")
    here = json_object(text, "the settings of this process")
    keys = dict.fromkeys((*first, *here))
    differing = [f"{k} is {here.get(k)!r}, in process 0 {first.get(k)!r}" for k in keys if here.get(k) != first.get(k)]
    listed = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
    raise ConfigError(
        f"Process {me} differs from process 0: {'; '.join(differing)}. Every process must be started the same way."
        if differing
        else f"Not all processes are started the same way: process {listed} differs from process 0, and says in what."
    )


def first_process_first(work: Callable[[], T]) -> T:
    """Returns `work()`, which process 0 runs first: it writes the files that the others then find."""
    if _runtime.global_state.client is None:
        return work()
    name = f"flax_switch/first/{next(_calls)}"
    if _process() == 0:
        result = work()
        _client().key_value_set(name, "done")
        return result
    _client().blocking_key_value_get(name, _LONG)
    return work()


def from_first(value: T) -> T:
    """Returns process 0's value, JSON-able, in every process: what all must decide alike is decided there."""
    if _runtime.global_state.client is None:
        return value
    name = f"flax_switch/from_first/{next(_calls)}"
    if _process() == 0:
        _client().key_value_set(name, json.dumps({"value": value}))
        return value
    return json_object(_client().blocking_key_value_get(name, _LONG), "a value of process 0")["value"]


def gather_at_first(name: str, text: str) -> list[str]:
    """Returns in process 0 every process's text, in order, elsewhere nothing. All give the same name, in any thread."""
    if _runtime.global_state.client is None:
        return [text]
    client, count = _client(), _runtime.global_state.num_processes
    client.key_value_set(f"flax_switch/{name}/{_process()}", text, allow_overwrite=True)
    if _process() > 0:
        return []
    keys = [f"flax_switch/{name}/{process}" for process in range(count)]
    texts = [client.blocking_key_value_get(key, _LONG) for key in keys]
    for key in keys:
        client.key_value_delete(key)
    return texts


def note(key: str, text: str) -> None:
    """Puts a text where all processes can read it, in place of what is there."""
    _client().key_value_set(key, text, allow_overwrite=True)


def noted(beginning: str) -> dict[str, str]:
    """Returns the texts of all keys that begin so, by what follows."""
    return {key.removeprefix(beginning): text for key, text in _client().key_value_dir_get(beginning)}


def wait_for_all() -> None:
    """Returns when every process is here."""
    if _runtime.global_state.client is not None:
        _client().wait_at_barrier(f"flax_switch/all/{next(_calls)}", _LONG)


def _client() -> Any:
    return _runtime.global_state.client


def _process() -> int:
    return _runtime.global_state.process_id


def _print_error(text: str) -> None:
    print(f"flax-switch: {text}", file=sys.stderr, flush=True)


def _end_with_the_others(leaving: threading.Event) -> None:
    """Waits for the note of a process that failed, and ends this one with it."""
    note = ""
    with contextlib.suppress(Exception):  # the service is gone, or ends this process: `_service_is_gone` says so
        note = _client().blocking_key_value_get(_NOTE, 52 * _LONG)
    if note and not leaving.wait(2):  # where all find the same error, each says its own
        _last_word.acquire()
        _print_error(f"{note} So process {_process()} ends too. {_RESUME}")
        _exit(LOST_ANOTHER)


def end_as_lost(reason: str) -> NoReturn:
    """Ends the process, from any thread, as one that lost another, and tells the others why."""
    _last_word.acquire()
    _print_error(f"{reason} {_RESUME}")
    with contextlib.suppress(Exception):
        _client().key_value_set(_NOTE, reason)
    _exit(LOST_ANOTHER)


def _fail(error: BaseException) -> NoReturn:
    """Says what went wrong, tells the other processes, and exits at once: a process that waits at its end makes the others hang."""
    _last_word.acquire()
    me = _process()
    exit_within(_PATIENCE, LOST_ANOTHER)
    if isinstance(error, ConfigError):
        status, reason = 2, str(error)
        _print_error(reason)
    elif isinstance(error, KeyboardInterrupt):
        status, reason = 130, "interrupted"
        _print_error(reason)
    elif isinstance(error, SystemExit):
        status, reason = error.code if isinstance(error.code, int) else 1, f"exit {error.code}"
    elif _is_lost_connection(error):
        status, reason, note = LOST_ANOTHER, "it lost the connection to another process.", ""
        with contextlib.suppress(Exception):  # a process that was killed leaves no note
            note = _client().blocking_key_value_get(_NOTE, 2000)
        if note:
            _print_error(f"{note} So process {me} ends too. {_RESUME}")
        else:
            _print_error(f"Process {me} lost another process, which died or was killed: {_first_line(error)} {_RESUME}")
    else:
        status, reason = 1, _first_line(error)
        traceback.print_exception(error)
    with contextlib.suppress(Exception):  # the first note stands
        _client().key_value_set(_NOTE, f"Process {me} failed: {reason}")
    _exit(status)


def exit_within(seconds: float, status: int) -> threading.Timer:
    """Has the process end after some seconds, whatever it then waits for: a coordination service that is gone need not say so."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()
    return timer


def _exit(status: int) -> NoReturn:
    if _process() == 0:  # the service ends with this process: let the others read the note first
        time.sleep(4)
    sys.stdout.flush()
    os._exit(status)


def _is_lost_connection(error: BaseException) -> bool:
    """Returns whether an error of JAX says that a peer is gone: CPU's collectives (Gloo), NCCL, or the coordination service."""
    text = str(error)
    return any(sign in text for sign in _LOST_SIGNS)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}."
