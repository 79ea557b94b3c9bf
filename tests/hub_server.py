"""A server on this machine that speaks as much of the Hugging Face hub's API as downloads and uploads of models need.

Large files are served as from the hub's content network: by a redirect to another host (`localhost` in place of
`127.0.0.1`), to which no token may be sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

__all__ = ["TOKEN", "HubServer", "RemoteRepository", "Seen", "hub_environment", "read_folder", "serve_hub"]

_LARGE = (".safetensors", ".onnx", ".bin", ".ckpt")
TOKEN = "hf_" + "s3cretOfTheTests"


class Seen(NamedTuple):
    """A request that the server has received."""

    method: str
    path: str
    token: str | None


@dataclass
class RemoteRepository:
    """A repository: branch or tag → commit, and commit → its files.

    Attributes:
        private: answers 401 without the token. gated: answers 403 to everything but the repository's page.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make these the files of a branch; return the commit."""
        content = json.dumps([len(self.commits), {name: _sha256(data) for name, data in files.items()}])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name], self.refs[branch] = dict(files), name
        return name


class HubServer(ThreadingHTTPServer):
    """The server; tests put repositories into it, and read the requests that it has seen.

    Attributes:
        repositories: by `owner/name`.
        answers: part of a path → the status of the answer to every request whose path contains it.
        truncated, padded: names of files that are sent without their second half, or with more bytes than announced.
        listed_sizes: the sizes that listings have in place of the real ones.
        headers: sent with each file in place of the real ones.
        seen: the requests, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, RemoteRepository] = {}
        self.answers: dict[str, int] = {}
        self.truncated: set[str] = set()
        self.padded: set[str] = set()
        self.listed_sizes: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.uploads: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes] | Path | None = None) -> RemoteRepository:
        """Add a repository with the files of a folder, or with these, on `main`."""
        found = files if not isinstance(files, Path) else read_folder(files)
        self.repositories[name] = RemoteRepository()
        self.repositories[name].commit(found or {})
        return self.repositories[name]

    @property
    def downloads(self) -> list[str]:
        """The files whose content was requested."""
        paths = [unquote(each.path) for each in self.seen if each.method == "GET"]
        return [path.split("/", 5)[5] for path in paths if path.split("/")[3:4] in (["resolve"], ["content"])]


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Run a server within the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def hub_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Return the variables of a process that uses this server, and a folder as its cache."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        self.body = self._read_body()
        path, header = urlsplit(self.path).path, self.headers.get("Authorization")
        self.server.seen.append(Seen(self.command, path, header and header.removeprefix("Bearer ")))
        self.token = self.server.seen[-1].token
        status = next((status for part, status in self.server.answers.items() if part in path), None)
        if status is not None:
            self._send(status, b"the server's own words")
            return
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._send_json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, *rest]:
                self._answer_api(f"{owner}/{name}", [unquote(each) for each in rest])
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", unquote(revision), unquote("/".join(file)))
            case ["cdn", name, "content", revision, *file]:
                self._send_content(name.replace("--", "/"), revision, unquote("/".join(file)))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._answer_batch()
            case ["upload", sha256]:
                self.server.uploads[sha256] = self.body
                self._send(200, b"")
            case _:
                self._send(404, b"")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    # Repositories

    def _find(self, name: str, revision: str | None) -> tuple[RemoteRepository, str] | None:
        """Return a repository and a commit; send the error and return None if there are none."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.token != TOKEN):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.refs.get(revision or "main", revision)
        if commit not in repository.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def _answer_api(self, name: str, rest: list[str]) -> None:
        if self.command == "POST":
            return self._answer_write(name, rest)
        found = self._find(name, rest[1] if rest[:1] == ["revision"] else None)
        if found is not None:
            repository, commit = found
            siblings = [self._describe(path, data) for path, data in repository.commits[commit].items()]
            self._send_json({"id": name, "sha": commit, "siblings": siblings, "private": repository.private})
        return None

    def _describe(self, path: str, data: bytes) -> dict[str, Any]:
        size, sha256 = self.server.listed_sizes.get(path, len(data)), _sha256(data)
        large = {"sha256": sha256, "size": size, "pointerSize": 134}
        return {"rfilename": path, "size": size, "blobId": sha256[:40], **({"lfs": large} if _is_large(path) else {})}

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return None
        repository, commit = found
        if repository.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        data = repository.commits[commit].get(path)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha256(data)[:40]}"', **self.server.headers}
        if _is_large(path):
            place = f"/cdn/{name.replace('/', '--')}/content/{commit}/{quote(path)}"
            large = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data)), **self.server.headers}
            location = f"http://localhost:{self.server.server_address[1]}{place}"
            return self._send(302, b"", {**headers, **large, "Location": location})
        return self._send_file(path, data, headers)

    def _send_content(self, name: str, commit: str, path: str) -> None:
        self._send_file(path, self.server.repositories[name].commits[commit][path], {})

    def _send_file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        status, size = 200, len(data)
        if found := self.headers.get("Range"):
            first = int(found.removeprefix("bytes=").partition("-")[0])
            status, data = 206, data[first:]
            headers = {**headers, "Content-Range": f"bytes {first}-{size - 1}/{size}"}
        if path in self.server.padded and self.command == "GET":  # in chunks, whose length nobody announces
            return self._send_chunks(data + bytes(1 << 20), headers)
        sent = data[: len(data) // 2] if path in self.server.truncated else data
        self._send(status, sent, {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"})
        if sent is not data:
            self.close_connection = True
        return None

    # Uploads

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != TOKEN:
            return self._send(401, b"")
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name].private = asked.get("visibility") == "private"
        return self._send_json({"url": f"{self.server.url}/{name}"}, status)

    def _answer_write(self, name: str, rest: list[str]) -> None:
        if self.token != TOKEN:
            return self._send(403, b"")
        repository = self.server.repositories[name]
        match rest:
            case ["branch", branch]:
                status = 409 if branch in repository.refs else 200
                repository.refs.setdefault(branch, repository.refs["main"])
                self._send_json({}, status)
            case ["preupload", _]:
                files = [
                    {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": False}
                    for path in (each["path"] for each in json.loads(self.body)["files"])
                ]
                self._send_json({"files": files})
            case ["commit", branch]:
                commit = repository.commit(self._apply(repository.commits[repository.refs[branch]]), branch)
                url = f"{self.server.url}/{name}/commit/{commit}"
                self._send_json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})
            case _:
                self._send(404, b"")
        return None

    def _apply(self, before: dict[str, bytes]) -> dict[str, bytes]:
        files = dict(before)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def _answer_batch(self) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/upload/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._send_json({"objects": objects, "transfer": "basic"})

    # Answers

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_chunks(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n")


def _is_large(path: str) -> bool:
    return path.endswith(_LARGE)
