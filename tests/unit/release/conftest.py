"""A model hub on this machine: the few endpoints that huggingface_hub's client uses, over real HTTP.

Large files go by git LFS, as they do for a client without hf_xet; the chunked protocol of hf_xet is not spoken here.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """Repositories as name → path → bytes; ``private`` and ``commits`` by name; objects by SHA-256."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: dict[str, list[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    token: str = TOKEN

    def commit(self, name: str) -> str:
        oid = hashlib.sha1(f"{name}{len(self.commits[name])}".encode()).hexdigest()
        self.commits[name].append(oid)
        return oid


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in objects]
            return self._json({"transfer": "basic", "objects": actions})
        _, _, _, owner, name, verb, _ = path.split("/", 6)
        if verb == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        assert verb == "commit", path
        return self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])

    def _validate(self, content: str) -> None:
        try:
            front = yaml.safe_load(content.split("---\n")[1])
            errors = [] if {"license", "tags", "library_name"} <= set(front) else [{"message": "metadata is missing"}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name], self.hub.commits[name] = {}, []
            self.hub.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.commit(name)
        self._json({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, status)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(name)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            _, _, owner, name, verb, *rest = [*parts, ""]
        else:
            owner, name, verb, *rest = parts
        full = f"{owner}/{name}"
        hidden = self.hub.private.get(full) and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if full not in self.hub.repositories or hidden:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files, head = self.hub.repositories[full], self.hub.commits[full][-1]
        if rest and rest[0] not in ("main", "", *self.hub.commits[full]):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
            self._json([{"type": "file", "path": p, "size": len(d), "oid": oids[p]} for p, d in files.items()])
        elif verb == "resolve":
            path = "/".join(rest[1:])
            headers = {"X-Repo-Commit": head, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
            self._send(files[path], "application/octet-stream", 200, headers)
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": full, "modelId": full, "sha": head, "siblings": siblings, "private": False, "tags": []})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), "application/json", status, headers or {})

    def _send(self, data: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
