"""A bucket on this machine that stands in for Google's: an HTTP server for tensorstore, a file system for epath, one folder.

It knows the requests that tensorstore and epath make: whole objects written, read (in ranges), listed by prefix and deleted, with
generations. As in the real one nothing can be appended to.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
import urllib.parse
from pathlib import Path

from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def _parsed(self):
        """(bucket, object or None, query)."""
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.partition("/b/")[2].split("/", 2)  # BUCKET/o or BUCKET/o/OBJECT, the object's slashes quoted
        name = urllib.parse.unquote(parts[2]) if len(parts) > 2 else None
        return parts[0], name, {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}

    def _generation(self, file):
        """Changes with every writing; 0 is that of an object that is not there."""
        return str(self.server.generations.get(file, 1)) if file.is_file() else "0"

    def _allowed(self, file, query):
        now = self._generation(file)
        return query.get("ifGenerationMatch", now) == now

    def _describe(self, bucket, file):
        name = str(file.relative_to(self.server.root / bucket))
        return {"name": name, "bucket": bucket, "generation": self._generation(file), "size": str(file.stat().st_size)}

    def do_GET(self):
        bucket, name, query = self._parsed()
        folder = self.server.root / bucket
        if name is None:
            prefix = query.get("prefix", "")
            found = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: str(p.relative_to(folder)))
            items = [self._describe(bucket, p) for p in found if str(p.relative_to(folder)).startswith(prefix)]
            end = query.get("endOffset")
            items = [i for i in items if i["name"] >= query.get("startOffset", "") and (not end or i["name"] < end)]
            return self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
        file = folder / name
        if not file.is_file():
            return self._answer(404)
        generation = self._generation(file)
        if query.get("ifGenerationNotMatch") == generation:
            return self._answer(304)
        if not self._allowed(file, query):
            return self._answer(412)
        content, wanted = file.read_bytes(), self.headers.get("Range")
        if query.get("alt") != "media":
            return self._answer(200, json.dumps(self._describe(bucket, file)).encode(), Content_Type="application/json")
        headers = {"x_goog_generation": generation, "x_goog_stored_content_length": len(content)}
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            size = len(content)
            start = int(first) if first else size - int(last)
            stop = min(int(last) + 1, size) if first and last else size
            return self._answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{size}", **headers)
        return self._answer(200, content, **headers)

    def do_POST(self):
        bucket, _, query = self._parsed()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        file = self.server.root / bucket / query["name"]
        with self.server.lock:
            if not self._allowed(file, query):
                return self._answer(412)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{threading.get_ident()}")
            temporary.write_bytes(content)
            temporary.replace(file)
            self.server.generations[file] = next(self.server.numbers)
            self.server.written.append(f"{bucket}/{query['name']}")
        return self._answer(200, json.dumps(self._describe(bucket, file)).encode(), Content_Type="application/json")

    def do_DELETE(self):
        bucket, name, query = self._parsed()
        file = self.server.root / bucket / name
        with self.server.lock:
            if not file.is_file():
                return self._answer(404)
            if not self._allowed(file, query):
                return self._answer(412)
            file.unlink()
        return self._answer(204)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.lock, self.written = root, threading.Lock(), []
        self.generations, self.numbers = {}, itertools.count(2)


class _Files(DirFileSystem):
    """The bucket's folder under gs:// names."""

    protocol = ("gcs", "gs")
    cachable = False
    root = ""

    def __init__(self, **_):
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).rpartition("://")[2].strip("/")

    def open(self, path, mode="rb", **options):
        if "a" in mode or "+" in mode:
            raise NotImplementedError(f"objects are written as a whole; {path} cannot be opened with mode {mode!r}")
        return super().open(path, mode, **options)


@contextlib.contextmanager
def fake_bucket(root: Path, monkeypatch):
    """gs://... is the folder `root` while the block runs; yields the list of objects that were written over HTTP."""
    server = _Server(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")  # no credentials are looked for on the network
    monkeypatch.setattr(_Files, "root", str(root))
    for name in ("gcs", "gs"):
        monkeypatch.setitem(_registry, name, _Files)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: None)  # Orbax asks Google's own client whether folders are real
    try:
        yield server.written
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
        server.shutdown()
        server.server_close()
        thread.join()
