"""A Hub on loopback for the real `huggingface_hub` client: repositories, commits, downloads, and faults on demand.

    with HubServer() as hub:
        hub.fail("commit", 403)
        subprocess.run(command, env=os.environ | hub.environment(home))

It speaks what the client needs to make a repository, upload to it (files in the commit itself or by LFS), list it,
look into it and download from it. State is kept in memory and can be read by the test.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_sentinelTokenThatMustNotBeSeenAnywhere"
USER = "somebody"
CUT = "cut"  # a fault: the connection is closed in the middle of the request's body
LARGE = (".safetensors", ".parquet", ".pt", ".pth")  # files that go by LFS where it is on

# The client waits seconds between its own attempts; a test need not.
_IMPATIENT = """import time
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.02))
"""


@dataclass
class Repository:
    """The files of every commit, oldest first: (id of the commit, message, path → content)."""

    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Id and files of a commit, `main` being the last; None if there is no such revision."""
        if revision == "main":
            return self.commits[-1][0], self.files
        return next(((oid, files) for oid, _, files in self.commits if oid == revision), None)


@dataclass
class Fault:
    """What happens to `times` requests whose `METHOD path` holds the pattern `where`, after `spared` such."""

    where: str
    what: int | str
    times: float
    spared: int


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, lfs: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lfs = lfs
        self.repositories: dict[str, Repository] = {}  # "models/user/name", "datasets/user/name"
        self.large: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in these tests; nobody need hear of it."""

    def fail(self, where: str, what: int | str, times: float = float("inf"), spared: int = 0) -> None:
        with self.lock:
            self.faults.append(Fault(where, what, times, spared))

    def heal(self) -> None:
        with self.lock:
            self.faults.clear()

    def fault_of(self, request: str) -> int | str | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.where, request):
                    if fault.spared > 0:
                        fault.spared -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault.what
        return None

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process on a machine of its own, whose cache and login are in `home`."""
        home.mkdir(parents=True, exist_ok=True)
        (home / "sitecustomize.py").write_text(_IMPATIENT)
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1" if self.lfs else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(home),
            "OMP_NUM_THREADS": "1",
        }
        return settings | ({"HF_TOKEN": token} if token else {"HF_TOKEN": ""})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.respond()

    do_HEAD = do_POST = do_PUT = do_GET

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.fault_of(f"{self.command} {path}")
        if fault == CUT:
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000) // 2)
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.body()
        if fault is not None:
            text = {401: "Invalid credentials in Authorization header", 403: "Forbidden"}.get(fault, "Out of order")
            self.send(fault, {"error": text}, {"X-Error-Message": text})
            return
        with self.server.lock:
            for method, pattern, answer in _ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    answer(self, body, **match.groupdict())
                    return
        self.send(404, {"error": f"no such address: {self.command} {path}"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if not isinstance(value, bytes):
            self.send_header("Content-Type", "application/json")
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        text = "Invalid credentials in Authorization header"
        self.send(401, {"error": text}, {"X-Error-Message": text})
        return False

    def repository(self, kind: str | None, name: str) -> Repository | None:
        found = self.server.repositories.get(f"{(kind or 'models').strip('/')}/{name}")
        if found is None:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def at(self, kind: str | None, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repository(kind, name)
        found = repository and repository.at(revision)
        if repository and found is None:
            self.send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def is_large(self, path: str) -> bool:
        return self.server.lfs and path.endswith(LARGE)

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        large = {"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 130}}
        told = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        return told | (large if self.is_large(path) else {})

    def who_am_i(self, body: bytes) -> None:
        if self.authorized():
            self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        if not self.authorized():
            return
        asked = json.loads(body)
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if f"{kind}/{name}" in self.server.repositories:
            self.send(409, {"error": "You already created this repository", "url": url})
            return
        self.server.repositories[f"{kind}/{name}"] = Repository()
        self.server.repositories[f"{kind}/{name}"].commit("initial commit", {".gitattributes": b"* -text\n"})
        self.send(200, {"url": url, "name": name, "id": name})

    def validate_yaml(self, body: bytes) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.S)
        try:
            value = yaml.safe_load(found[1]) if found else {}
            wrong = [] if isinstance(value, dict) else ["the metadata must be an object"]
            for model in value.get("model-index", []) if not wrong else []:
                wrong += [] if isinstance(model.get("name"), str) else ["model-index: a name is missing"]
                for result in model.get("results", []):
                    whole = {"type"} <= result["task"].keys() and {"type", "name"} <= result["dataset"].keys()
                    wrong += [] if whole and result["metrics"] else ["model-index: a result lacks task or dataset"]
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            wrong = [f"not valid metadata: {error!r}"]
        self.send(400 if wrong else 200, {"errors": [{"message": text} for text in wrong], "warnings": []})

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if not self.authorized() or not (found := self.at(kind, name, revision)):
            return
        files, told = found[1], []
        for path in (asked["path"] for asked in json.loads(body)["files"]):
            large = self.is_large(path)
            oid = (_sha256 if large else _git_oid)(files[path]) if path in files else None
            mode = "lfs" if large else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": told})

    def lfs_batch(self, body: bytes, kind: str | None, name: str) -> None:
        if not self.authorized() or not self.repository(kind, name):
            return
        told = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
            told.append(asked | ({} if asked["oid"] in self.server.large else upload))
        self.send(200, {"transfer": "basic", "objects": told})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if _sha256(body) == oid:
            self.server.large[oid] = body
        self.send(200 if _sha256(body) == oid else 400, {})

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if not self.authorized() or not (found := self.at(kind, name, revision)):
            return
        header, *changes = (json.loads(line) for line in body.splitlines())
        files = dict(found[1])
        for change in changes:
            path = change["value"]["path"]
            if change["key"] == "file":
                files[path] = base64.b64decode(change["value"]["content"])
            elif change["key"] == "lfsFile":
                files[path] = self.server.large[change["value"]["oid"]]
            else:
                folder = path.rstrip("/") + "/"
                files = {kept: content for kept, content in files.items() if kept != path and f"{kept}/" != folder
                         and not (change["key"] == "deletedFolder" and kept.startswith(folder))}  # fmt: skip
        oid = self.server.repositories[f"{kind}/{name}"].commit(header["value"]["summary"], files)
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        if found := self.at(kind, name, revision or "main"):
            oid, files = found
            told = {"id": name, "modelId": name, "sha": oid, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self.send(200, told | {"siblings": [{"rfilename": path} for path in files]})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        if not (found := self.at(kind, name, revision)):
            return
        prefix, told, folders = f"{folder}/" if folder else "", [], set()
        recursive = "recursive=true" in self.path.lower()
        for path, content in found[1].items():
            if path.startswith(prefix):
                first, _, rest = path.removeprefix(prefix).partition("/")
                if rest:
                    folders.add(prefix + first)
                if recursive or not rest:
                    told.append(self.entry(path, content))
        if folder and not told and not folders:
            self.send(404, {"error": "not there"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send(200, told + [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)])

    def paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        if found := self.at(kind, name, revision):
            asked = json.loads(body)["paths"]
            told = [self.entry(path, found[1][path]) for path in asked if path in found[1]]
            folders = [path for path in asked if any(file.startswith(f"{path}/") for file in found[1])]
            self.send(200, told + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def resolve(self, body: bytes, kind: str | None, name: str, revision: str, path: str) -> None:
        if not (found := self.at(kind, name, revision)):
            return
        oid, files = found
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            self.send(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        etag = _sha256(content) if self.is_large(path) else _git_oid(content)
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if start:
            first, last = int(start[1]), int(start[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self.send(206 if start else 200, content, headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_PLAIN = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_PLAIN}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w{64})", _Handler.lfs_put),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"{_API}(/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET HEAD", rf"{_PLAIN}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
