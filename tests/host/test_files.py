"""A file gets its final name only once its bytes are with the system: what a power cut leaves is whole, or the former one."""

import os

import pytest

from flax_switch.host import files


@pytest.mark.parametrize("former", [None, b"former"])
def test_all_bytes_are_synced_before_the_file_has_its_name(former, tmp_path, monkeypatch):
    target, events = tmp_path / "file", []
    if former is not None:
        target.write_bytes(former)
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("synced", os.fstat(descriptor).st_size))
        sync(descriptor)

    def named(source, name):
        assert (target.read_bytes() if target.exists() else None) == former
        events.append(("named", os.stat(source).st_size))
        replace(source, name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    files.write_bytes(target, b"content")
    assert events == [("synced", 7), ("named", 7)] and target.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [target]
