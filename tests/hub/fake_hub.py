"""The parts of the Hub's API that pushing, loading and predicting use, on loopback and in memory.

Tokens decide what a caller may do: ``TOKENS`` gives each its user and role. Regular files come inside the commit, large
ones by the LFS batch call and a PUT; a commit takes effect as a whole. ``FakeHub.log`` has every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_writer": ("someone", "write"), "hf_reader": ("someone", "read"), "hf_other": ("other", "write")}
LARGEST_BODY = 64 * 2**20
LFS_FROM = 100_000  # bytes; smaller files go inside the commit, unless their name says weights


class Answer(Exception):
    """What the server answers when a request ends early."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class Repository:
    """Branches of whole trees; a commit is the SHA of a tree with its parent."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.trees: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1((parent + message).encode())
        for path in sorted(tree):
            digest.update(path.encode() + hashlib.sha1(tree[path]).digest())
        self.branches[branch] = digest.hexdigest()
        self.trees[digest.hexdigest()] = dict(tree)
        self.messages.append(message)
        return digest.hexdigest()

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.trees:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class FakeHub:
    """The state: ``repositories`` by id, ``large`` files by SHA-256, ``log`` of (method, path, status)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.broken = ""  # requests whose path holds this fail with a 500
        self.lock = Lock()
        self.url = ""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.trees[repository.resolve(revision)]

    # -- who may what -------------------------------------------------------------------------------------------------

    def user(self, token: str | None) -> tuple[str, str]:
        if token is None:
            raise Answer(401, message="Invalid username or password.")
        if token not in TOKENS:
            raise Answer(401, message="Invalid credentials in Authorization header")
        return TOKENS[token]

    def may_write(self, token: str | None, repo_id: str) -> None:
        name, role = self.user(token)
        if role != "write" or repo_id.partition("/")[0] != name:
            raise Answer(403, message=f"You don't have the rights to write to {repo_id}")

    def readable(self, token: str | None, repo_id: str) -> Repository:
        repository = self.repositories.get(repo_id)
        allowed = repository is not None and (
            not repository.private or TOKENS.get(token or "", ("",))[0] == repo_id.partition("/")[0]
        )
        if repository is None or not allowed:
            raise Answer(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    # -- the API ------------------------------------------------------------------------------------------------------

    def validate_yaml(self, token: str | None, body: bytes) -> dict[str, Any]:
        content = json.loads(body)["content"]
        data = yaml.safe_load(content.split("---\n")[1])
        for field, kind in (("tags", list), ("library_name", str), ("pipeline_tag", str), ("model-index", list)):
            if field in data and not isinstance(data[field], kind):
                raise Answer(400, message=f"{field} is no {kind.__name__}")
        return {"errors": [], "warnings": []}

    def create_repo(self, token: str | None, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or self.user(token)[0]}/{asked['name']}"
        self.may_write(token, repo_id)
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            raise Answer(409, message=json.dumps(answer))
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[repo_id] = Repository(private)
        return answer

    def create_branch(self, token: str | None, body: bytes, repo_id: str, branch: str) -> dict[str, Any]:
        self.may_write(token, repo_id)
        repository = self.readable(token, repo_id)
        if branch in repository.branches:
            raise Answer(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def model_info(self, token: str | None, body: bytes, repo_id: str, revision: str | None = None) -> dict[str, Any]:
        repository = self.readable(token, repo_id)
        sha = repository.resolve(revision or "main")
        return {
            "id": repo_id,
            "sha": sha,
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in repository.trees[sha]],
            "tags": [],
        }

    def tree(self, token: str | None, body: bytes, repo_id: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        repository = self.readable(token, repo_id)
        files = repository.trees[repository.resolve(revision)]
        found = {name: data for name, data in files.items() if name.startswith(path)}
        if path and not found:
            raise Answer(404, "EntryNotFound", f"{path} does not exist")
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in found.items()
        ]

    def preupload(self, token: str | None, body: bytes, repo_id: str, revision: str) -> dict[str, Any]:
        self.may_write(token, repo_id)
        self.readable(token, repo_id).resolve(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, token: str | None, body: bytes, repo_id: str) -> dict[str, Any]:
        self.may_write(token, repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}
            known = asked["oid"] in self.large
            objects.append({**asked, **({} if known else {"actions": {"upload": upload}})})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, token: str | None, body: bytes, oid: str) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, message="The content has another SHA-256")
        self.large[oid] = body
        return {}

    def commit(self, token: str | None, body: bytes, repo_id: str, revision: str) -> dict[str, Any]:
        self.may_write(token, repo_id)
        repository = self.readable(token, repo_id)
        repository.resolve(revision)
        tree, summary = dict(repository.trees[repository.branches[revision]]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"], validate=True)
                if is_large(value["path"], len(tree[value["path"]])):
                    raise Answer(400, message=f"{value['path']} is too large for a regular file")
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Answer(400, message=f"{value['path']} was never uploaded")
                tree[value["path"]] = self.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise Answer(400, message=f"unknown operation {item['key']}")
        sha = repository.commit(revision, tree, summary)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}

    def resolve(self, token: str | None, repo_id: str, revision: str, path: str) -> tuple[str, bytes]:
        """The commit and the content of a file."""
        repository = self.readable(token, repo_id)
        sha = repository.resolve(revision)
        if path not in repository.trees[sha]:
            raise Answer(404, "EntryNotFound", "Entry not found")
        return sha, repository.trees[sha][path]


def is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".png")) or size >= LFS_FROM


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/validate-yaml", FakeHub.validate_yaml),
    ("POST", r"/api/repos/create", FakeHub.create_repo),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", FakeHub.create_branch),
    ("GET", rf"/api/models/{_REPO}", FakeHub.model_info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", FakeHub.model_info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", FakeHub.tree),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", FakeHub.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", FakeHub.lfs_upload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", FakeHub.commit),
]
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Keep quiet; the hub has its own log."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > LARGEST_BODY:
            self.close_connection = True
            return self._send(413, b"")
        body, path = self.rfile.read(length), urlsplit(self.path).path
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        try:
            with self.hub.lock:
                if self.hub.broken and self.hub.broken in path:
                    raise Answer(500, message="out of order")
                if self.command in ("GET", "HEAD") and (found := _RESOLVE.fullmatch(path)):
                    sha, content = self.hub.resolve(token, **{k: unquote(v) for k, v in found.groupdict().items()})
                    etag = hashlib.sha256(content).hexdigest()
                    return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
                answer = self._route(path, token, body)
        except Answer as stop:
            headers = {"X-Error-Code": stop.code, "X-Error-Message": stop.message}
            content = stop.message if stop.message.startswith("{") else json.dumps({"error": stop.message})
            return self._send(stop.status, content.encode(), headers)
        return self._send(200, json.dumps(answer).encode())

    def _route(self, path: str, token: str | None, body: bytes) -> Any:
        for method, pattern, action in _ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return action(self.hub, token, body, **{k: unquote(v) for k, v in found.groupdict().items() if v})
        raise Answer(404, message=f"no such call: {self.command} {path}")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers on ``hub.url`` while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
