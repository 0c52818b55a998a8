"""A hub on this machine for uploads: the few addresses of the Hugging Face hub's API that huggingface_hub then asks for."""

import base64
import contextlib
import http.server
import json
import threading

import yaml


class FakeHub(http.server.ThreadingHTTPServer):
    """Keeps what was uploaded: `repositories[name][branch][file]` is its content."""

    def __init__(self, token="hf_right", refuse_commits=False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.refuse_commits = token, refuse_commits
        self.repositories, self.private, self.large, self.messages = {}, {}, {}, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running(**settings):
    """A hub that answers until the end of the block."""
    hub = FakeHub(**settings)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _knows_the_user(self):
        if self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return True
        self._body()
        self._answer({"error": "Invalid user token"}, 401)
        return False

    def do_GET(self):
        if self._knows_the_user():
            if self.path.endswith("?expand=xetEnabled"):  # asked by old versions, such as 0.30
                return self._answer({"id": self.path.split("/models/")[1].split("/revision/")[0], "xetEnabled": False})
            found = self.path == "/api/whoami-v2"
            self._answer({"name": "ada", "type": "user"} if found else {"error": "not here"}, 200 if found else 404)
        return None

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self):
        if not self._knows_the_user():
            return
        body, hub = self._body(), self.server
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name'].rpartition('/')[2]}"
            exists = name in hub.repositories
            hub.repositories.setdefault(name, {"main": {}})
            hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            self._answer({"url": f"{hub.address}/{name}", "name": name}, 409 if exists else 200)
        elif self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            missing = [] if {"license", "tags"} <= yaml.safe_load(head).keys() else [{"message": "no license, or no tags"}]
            self._answer({"errors": missing, "warnings": []})
        elif parts[-1] == "batch":  # where large files go
            objects = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}} for one in objects]
            self._answer({"transfer": "basic", "objects": upload})
        else:
            name, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
            self._on_branch(hub, name, what, branch, body)

    def _on_branch(self, hub, name, what, branch, body):
        if what == "branch":
            hub.repositories[name].setdefault(branch, dict(hub.repositories[name]["main"]))
            self._answer({})
        elif what == "preupload":
            files = json.loads(body)["files"]
            modes = [dict(path=f["path"], uploadMode="lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            self._answer({"files": [dict(one, shouldIgnore=False) for one in modes]})
        elif hub.refuse_commits:
            self._answer({"error": "the disk is full"}, 507)
        else:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "lfsFile":
                    hub.repositories[name][branch][value["path"]] = hub.large[value["oid"]]
                elif line["key"] == "file":
                    hub.repositories[name][branch][value["path"]] = base64.b64decode(value["content"])
            address = f"{hub.address}/{name}/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})
