"""A hub on loopback for tests: its API, its redirects to a storage elsewhere, and everything that goes wrong."""

import gzip
import hashlib
import json
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

REPO = "acme/GLM-small"
PIECE_BYTES = 16 << 10


@dataclass
class Fault:
    """What one answer does wrong.

    Args:
        cut: close the connection after so many bytes of the body.
        status: answer with this status and no body.
        headers: added to the answer, replacing what was there.
        ignore_range: send the whole file whatever was asked.
        body: send this instead of the content.
        gzip: compress the body.
        chunked: state no length.
        pause: seconds before each piece of the body.
        piece: bytes of such a piece.
        silence: seconds before anything is answered.
        hold: after so many bytes of the body, wait until the hub is told to go on; -1: before anything is answered.
        pause_after: seconds before each piece from there on.
    """

    cut: int | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    ignore_range: bool = False
    body: bytes | None = None
    gzip: bool = False
    chunked: bool = False
    pause: float = 0.0
    piece: int = PIECE_BYTES
    silence: float = 0.0
    hold: int | None = None
    pause_after: float = 0.0


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeHub:
    """One repository with its commits. Files that end in .safetensors are LFS files behind a redirect."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.served: Counter[str] = Counter()  # bytes of bodies, by path
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # server, path, headers
        self.token: str | None = None
        self.gated = False
        self.go = threading.Event()  # ends what a fault holds
        self.siblings: list[dict[str, Any]] | None = None
        self.push("main", files)
        self.hub = self._serve("hub")
        self.storage = self._serve("storage")

    def push(self, branch: str, files: Mapping[str, bytes]) -> str:
        """Make a commit and let the branch point at it."""
        commit = hashlib.sha1(branch.encode() + b"".join(k.encode() + v for k, v in sorted(files.items()))).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    @property
    def commit(self) -> str:
        return self.branches["main"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_port}"

    def fail(self, path: str, *faults: Fault) -> None:
        """Let the next answers for a path go wrong, one each."""
        self.faults[path].extend(faults)

    def asked(self, path: str) -> list[str]:
        """Return the Range headers of the requests for the content of a file."""
        server = "storage" if path.endswith(".safetensors") else "hub"
        return [h.get("range", "") for s, p, h in self.requests if s == server and p.endswith(f"/{path}")]

    def listing(self, commit: str) -> list[dict[str, Any]]:
        if self.siblings is not None:
            return self.siblings
        return [sibling(path, data) for path, data in self.commits[commit].items()]

    def _serve(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"owner": self, "server_name_": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # clients hang up whenever they like
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def close(self) -> None:
        self.go.set()
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()


def sibling(path: str, data: bytes) -> dict[str, Any]:
    """Return what the API says about a file."""
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_blob_id(data)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    server_name_: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append((self.server_name_, path, {k.lower(): v for k, v in self.headers.items()}))
        if self.server_name_ == "storage":
            _, commit, file = path.split("/", 2)
            self._content(commit, file)
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._api(path.rsplit("/", 1)[1])
        elif path.startswith(f"/{REPO}/resolve/"):
            self._resolve(*path.removeprefix(f"/{REPO}/resolve/").split("/", 1))
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _next_fault(self, key: str) -> Fault:
        faults = self.owner.faults[key]
        return faults.popleft() if faults else Fault()

    def _keep_silent(self, fault: Fault) -> None:
        time.sleep(fault.silence)
        if fault.hold == -1:
            self.owner.go.wait()

    def _authorized(self) -> bool:
        return self.owner.token is None or self.headers.get("Authorization") == f"Bearer {self.owner.token}"

    def _api(self, revision: str) -> None:
        fault = self._next_fault("api")
        self._keep_silent(fault)
        commit = self.owner.branches.get(revision, revision)
        if fault.status:
            self._send(fault.status, fault.body or b"", fault.headers)
        elif commit not in self.owner.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            info = {"id": REPO, "sha": commit, "siblings": self.owner.listing(commit), "tags": [], "downloads": 0}
            self._send(200, fault.body or json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, commit: str, file: str) -> None:
        if self.owner.gated and not (self.owner.token and self._authorized()):
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif file not in self.owner.commits.get(commit, {}):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(".safetensors"):
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{sha256(self.owner.commits[commit][file])}"'}
            location = f"http://127.0.0.1:{self.owner.storage.server_port}/{commit}/{file}"
            replaced = self._next_fault(f"redirect {file}").headers
            self._send(302, b"", {**headers, "Location": location, **replaced})
        else:
            self._content(commit, file)

    def _content(self, commit: str, file: str) -> None:
        fault = self._next_fault(file)
        self._keep_silent(fault)
        if fault.status:
            self._send(fault.status, fault.body or b"", fault.headers)
            return
        whole = self.owner.commits[commit][file] if fault.body is None else fault.body
        asked = "" if fault.ignore_range else self.headers.get("Range", "")
        begin, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(begin or 0), int(last or len(whole) - 1) + 1
        headers = {"ETag": f'"{git_blob_id(whole)}"'}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(whole)}"
        body = whole[begin:end]
        if fault.gzip:
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        headers |= {"Transfer-Encoding": "chunked"} if fault.chunked else {"Content-Length": str(len(body))}
        self._send_headers(206 if asked else 200, {**headers, **fault.headers})
        self._stream(file, body, fault)

    def _stream(self, file: str, body: bytes, fault: Fault) -> None:
        end = len(body) if fault.cut is None else min(fault.cut, len(body))
        try:
            for start in range(0, end, fault.piece):
                if fault.hold is not None and start >= fault.hold:
                    self.owner.go.wait()
                    time.sleep(fault.pause_after)
                time.sleep(fault.pause)
                piece = body[start : min(start + fault.piece, end)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
                self.owner.served[file] += len(piece)
            if fault.chunked and fault.cut is None:
                self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if fault.cut is not None:
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._send_headers(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _send_headers(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving(files: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve files as REPO, and let huggingface_hub in this process take it for the hub."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = FakeHub(files)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    # what the machine sets must not reach the programs that tests start
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr("converters.hub.fetch.RetryPolicy.delay", lambda self, failures, retry_after: 0.001)
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        hub.close()


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, our state left out."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".glm4moe" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
