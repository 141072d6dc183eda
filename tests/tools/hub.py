"""A hub on this machine: as much of the hub's API as an upload and a download of a model ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What lies on the hub.

    Attributes:
        files: content of the newest commit by path, for each repository.
        commits: its commit, for each repository.
        refuse: part of an address that is answered with 403; "" refuses nothing.
        asked: method and address of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse = ""
        self.asked: list[str] = []

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Takes files of a commit, NDJSON as the hub's client sends it, and returns the commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]
        content = json.dumps({p: hashlib.sha256(c).hexdigest() for p, c in sorted(self.files[repo].items())})
        self.commits[repo] = hashlib.sha1(content.encode()).hexdigest()
        return self.commits[repo]


@contextmanager
def hub_on_this_machine() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()

    class Answers(_Answers):
        pass

    Answers.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        path, here = self.path.partition("?")[0], f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            known = repo in self.hub.files
            self.hub.files.setdefault(repo, {})
            self._json({"url": f"{here}/{repo}", "id": repo}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = {
                f["path"]: "lfs" if f["path"].endswith((".safetensors", ".jit", ".png")) else "regular"
                for f in files
            }
            found = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for name, mode in modes.items()
            ]
            self._json({"files": found})
        elif path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {
                    **each,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{here}/lfs/{each['oid']}", "header": {}}},
                }
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": found}, kind="application/vnd.git-lfs+json")
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            lines = [json.loads(line) for line in body.decode().splitlines() if line.strip()]
            commit = self.hub.commit(match[1], lines)
            url = f"{here}/{match[1]}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._json({"error": f"no such address {path}"}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        if not self._refused():
            self.hub.objects[self.path.rpartition("/")[2]] = body
            self._send(b"", 200, {})

    def do_GET(self) -> None:
        if self._refused():
            return
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._about(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._json({"error": f"no such address {path}"}, 404)

    do_HEAD = do_GET

    def _about(self, repo: str, what: str | None, revision: str | None) -> None:
        commit = self.hub.commits.get(repo)
        if commit is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", "v1", commit):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            files = self.hub.files[repo].items()
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files
                ]
            )
        else:
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            self._json({"_id": "1", "id": repo, "sha": commit, "private": False, "siblings": siblings})

    def _file(self, repo: str, revision: str, name: str) -> None:
        content = self.hub.files.get(repo, {}).get(name)
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(content, 200, {"ETag": etag, "X-Repo-Commit": self.hub.commits[repo]})

    def _refused(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if not self.hub.refuse or self.hub.refuse not in self.path:
            return False
        self._json({"error": "you may not write here"}, 403)
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(
        self,
        value: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": kind, **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
