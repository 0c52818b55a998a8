"""Data sets of the hub, without a network: a folder of its layout in the place of its file system, or named as its mirror."""

import gzip
import json

import pyarrow
import pytest
from data_of_streams import take
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from pyarrow import parquet

from flax_switch.config import ConfigError
from flax_switch.data import prepare, remote, sources

pytest.importorskip("huggingface_hub")
LINES = [f"ba ke lo {word} mi nu ra se{' ti' * i}." for word in ("ti", "vo", "zu", "ba", "ke", "mi") for i in range(30)]
NAME = "hf://datasets/owner/words@main/en"


@pytest.fixture
def layout(tmp_path):
    """A folder with a data set of every kind of file."""
    folder = tmp_path / "hub" / "datasets" / "owner" / "words@main" / "en"
    (folder / "deep").mkdir(parents=True)
    records = [json.dumps({"text": line}) + "\n" for line in LINES]
    (folder / "a.json.gz").write_bytes(gzip.compress("".join(records[:60]).encode()))
    (folder / "b.txt").write_text("\n".join(LINES[60:90]) + "\n")
    (folder / "c.csv").write_text("text\n" + "\n".join(LINES[90:120]) + "\n")
    (folder / "README.rst").write_text("not read")
    parquet.write_table(pyarrow.table({"text": LINES[120:]}), folder / "deep" / "d.parquet")
    return tmp_path / "hub"


class Hub(DirFileSystem):
    """The folder under hf:// names; `faults` are raised by the next openings and readings, one each."""

    protocol = "hf"
    cachable = False
    root = ""
    faults: list = []
    opened: list = []

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem())

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("hf://").strip("/")

    def open(self, path, mode="rb", **options):
        self.opened.append(path)
        raise_next(self.faults)
        return Unsteady(super().open(path, mode, **options), self.faults)


class Unsteady:
    def __init__(self, file, faults):
        self._read, self.seek, self.close, self.faults = file.read, file.seek, file.close, faults

    def read(self, count):
        raise_next(self.faults)
        return self._read(min(count, 100))  # a little at a time


def raise_next(faults):
    if faults:
        fault = faults.pop(0)
        if fault is not None:
            raise fault


@pytest.fixture
def hub(layout, monkeypatch):
    monkeypatch.setattr(Hub, "root", str(layout))
    monkeypatch.setattr(Hub, "faults", [])
    monkeypatch.setattr(Hub, "opened", [])
    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Hub
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_files_folders_and_globs_of_a_data_set_are_read_in_every_format(hub):
    paths = sources.find_files(NAME)
    assert [str(path) for path in paths] == [f"{NAME}/{name}" for name in ("a.json.gz", "b.txt", "c.csv", "deep/d.parquet")]
    assert list(sources.documents(paths)) == LINES
    assert list(sources.documents(sources.find_files(f"{NAME}/*.json.gz"))) == LINES[:60]
    assert list(sources.documents(sources.find_files((f"{NAME}/b.txt", f"{NAME}/deep")))) == LINES[60:90] + LINES[120:]


def test_a_data_set_of_the_hub_is_streamed_unless_told_otherwise(hub, config, vocabulary, tmp_path):
    config = config.replace(source=f"{NAME}/*.json.gz", heldout_fraction=0.1, shuffle_buffer=10)
    assert config.streamed and not config.replace(streaming=False).streamed
    prepared = prepare(config, vocabulary=vocabulary, quiet=True)
    assert prepared.describe()[0]["train"] == {"files, read as a stream": 1}
    before = len(hub.opened)
    take(prepared, 2)
    assert len(hub.opened) > before  # while batches are made
    whole = prepare(config.replace(streaming=False), vocabulary=vocabulary, quiet=True)
    before = len(hub.opened)
    take(whole, 2)
    assert len(hub.opened) == before


def test_a_mirror_is_read_in_the_hub_s_place(layout, monkeypatch):
    monkeypatch.setenv(remote.MIRROR, f"{layout}/")
    paths = sources.find_files(f"{NAME}/*.json.gz")
    assert paths == [layout / "datasets" / "owner" / "words@main" / "en" / "a.json.gz"]
    assert list(sources.documents(paths)) == LINES[:60]
    with pytest.raises(ConfigError, match="datasets/owner/words/en.* is no file or folder"):
        sources.find_files("hf://datasets/owner/words/en")


class Status(Exception):
    def __init__(self, code):
        super().__init__(f"the server answered {code}")
        self.response = type("Response", (), {"status_code": code})


@pytest.mark.parametrize("fault", [ConnectionError("reset"), TimeoutError("slow"), Status(503), Status(429), RuntimeError("odd")])
def test_a_network_that_fails_for_a_while_is_waited_for(hub, fault, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,) * 6)
    paths = sources.find_files(NAME)
    hub.faults += [fault, None, None, fault, fault, None, fault, fault, fault]
    assert list(sources.documents(paths)) == LINES
    assert not hub.faults


def test_what_lasts_is_one_sentence(hub, monkeypatch):
    paths = sources.find_files(f"{NAME}/b.txt")
    hub.faults += [ConnectionError("reset by peer")] * 4
    with pytest.raises(ConfigError) as raised:
        list(sources.documents(paths))
    assert str(raised.value) == f"Cannot read {NAME}/b.txt after 4 tries: reset by peer."
    for lasting, said in ((Status(403), "the server answered 403"), (FileNotFoundError("gone"), "gone")):
        hub.faults[:] = [lasting]
        with pytest.raises(ConfigError, match=f"Cannot read {NAME}/b.txt: {said}[.]$"):
            list(sources.documents(paths))
        assert not hub.faults  # it was tried once


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://datasets/owner/other/*.txt", "names no file that ends in .*Is there such a data set[?] For a private one"),
        (f"{NAME}/none-*.txt", "names no file that ends in"),
        ("hf://owner/words/a.txt", "names no data set of the hub; write hf://datasets/OWNER/NAME/PATH"),
        ("hf://datasets/words", "names no data set of the hub"),
    ],
)  # fmt: skip
def test_a_data_set_that_is_not_there_is_an_error(hub, name, said):
    with pytest.raises(ConfigError, match=rf"data.source: '{name[:10]}.*{said}"):
        sources.find_files(name)


def test_offline_mode_says_what_to_do(monkeypatch):
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)  # of newer versions
    HfFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read in the hub's offline mode; unset HF_HUB_OFFLINE, or let FLAX_SWITCH_HUB"):
        sources.find_files("hf://datasets/owner/words/*.txt")
    HfFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_without_the_hub_s_package_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(ConfigError, match=r"needs a package that is not installed .*: pip install 'flax_switch\[hub\]'"):
        sources.find_files("hf://datasets/owner/words/*.txt")
