"""A Hub on 127.0.0.1: what `huggingface_hub` asks the Hugging Face Hub for when models are pushed and loaded.

Real requests over a real socket, repositories in memory. A client reaches it by `HF_ENDPOINT`, with `HF_TOKEN` set to
its token. Files go into a commit (`regular`) or through LFS, as `lfs` says; as on the Hub, LFS files live at another
host (`localhost` here), where credentials must not be sent. The server knows nothing of xet, which `huggingface_hub`
does not ask a server about before it uploads: set `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER = "user"
REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Blob:
    """A file; `oid` is its git hash, or its SHA-256 where it is kept by LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Files by commit and path, and which commit a branch is at."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        state = [len(self.commits), *((path, blob.oid) for path, blob in sorted(files.items()))]
        oid = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def sha(self, revision: str) -> str | None:
        """The commit of a branch or, if there is one, of that name."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.commits[self.sha(revision)].items()}


@dataclass
class Hub:
    """The state, and what came in.

    Attributes:
        endpoint: for `HF_ENDPOINT`.
        storage: where LFS files are.
        lfs: whether a file (repository, path) goes through LFS.
        requests: method and path of each request.
        unknown: those that this server does not serve.
        private: repositories that only the token may read.
    """

    endpoint: str
    storage: str
    token: str
    lfs: Callable[[str, str], bool]
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self, home: Any) -> dict[str, str]:
        """Variables for a process that uses this Hub, with its cache under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }


@contextmanager
def serve(
    lfs: Callable[[str, str], bool] = lambda repo, path: fnmatch.fnmatch(path, "*.safetensors"), token: str = "hf_test"
) -> Iterator[Hub]:
    """Runs a Hub in a thread, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_address[1]
    server.hub = hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}", token, lfs)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Refused(Exception):
    """An answer that is an error; `code` is what `huggingface_hub` tells the kinds apart by."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.status, self.message = status, message or code
        self.headers = {key: value for key, value in named.items() if value} | headers
        super().__init__(self.message)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as on the Hub

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.body()  # always read: the connection goes on
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                for wanted, pattern, answer in ROUTES:
                    if wanted == method and (match := re.fullmatch(pattern, path)):
                        found = {key: unquote(value or "") for key, value in match.groupdict().items()}
                        self.check(path)
                        status, content, headers = answer(self, body, **found)
                        break
                else:
                    self.hub.unknown.append((self.command, path))
                    raise Refused(404, message=f"not served here: {self.command} {path}")
            except Refused as error:
                status, content, headers = error.status, {"error": error.message}, error.headers
        self.answer(status, content, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def check(self, path: str) -> None:
        """Writers need the token, a wrong one is never good; the storage refuses any, as a signed address does."""
        given = self.headers.get("Authorization")
        if path.startswith(("/storage/", "/upload/")):
            if given is not None:
                raise Refused(400, message="credentials were sent to the storage")
        elif given == f"Bearer {self.hub.token}":
            pass
        elif given is not None or (self.command in ("POST", "PUT") and path != "/api/validate-yaml"):
            raise Refused(401, message="Invalid credentials in Authorization header")

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # What is asked for

    def repo(self, name: str) -> Repo:
        known = self.headers.get("Authorization") is not None
        if name not in self.hub.repos or (name in self.hub.private and not known):
            raise Refused(
                404 if known else 401, "RepoNotFound", "Repository not found"
            )  # as the Hub, which tells nothing
        return self.hub.repos[name]

    def commit_of(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(name)
        sha = repo.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    def whoami(self, body: bytes) -> Any:
        return 200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "id": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        self.hub.repos[name] = repo = Repo()
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return 200, answer, {}

    def branch(self, body: bytes, repo: str, revision: str) -> Any:
        if revision in self.repo(repo).branches:
            raise Refused(409, message=f"Reference already exists: {revision}")
        found, sha = self.commit_of(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        found.branches[revision] = sha
        return 200, {}, {}

    def validate(self, body: bytes) -> Any:
        errors = metadata_errors(json.loads(body)["content"])
        return 400 if errors else 200, {"errors": [{"message": line} for line in errors], "warnings": []}, {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        found, sha = self.commit_of(repo, revision)
        here = found.commits[sha]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self.hub.lfs(repo, file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": here[file["path"]].oid if file["path"] in here else None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def lfs_batch(self, body: bytes, repo: str) -> Any:
        self.repo(repo)
        asked = json.loads(body)
        if "basic" not in asked["transfers"]:
            raise Refused(422, message="only basic transfers")
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.objects:
                hrefs = {
                    "upload": f"{self.hub.storage}/upload/{wanted['oid']}",
                    "verify": f"{self.hub.endpoint}/verify",
                }
                objects[-1]["actions"] = {action: {"href": href} for action, href in hrefs.items()}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content is not what its address says")
        self.hub.objects[oid] = body
        return 200, b"", {"ETag": f'"{oid}"'}

    def verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="object not found")
        return 200, {}, {}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        found, sha = self.commit_of(repo, revision)
        if revision not in found.branches:
            raise Refused(400, message=f"{revision} is no branch")
        files = dict(found.commits[sha])
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                if value.get("parentCommit", sha) != sha:
                    raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    raise Refused(400, message=f"LFS pointer of {value['path']} points to no object")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
            else:
                raise Refused(400, message=f"unknown operation {kind}")
        if errors := metadata_errors(files["README.md"].content.decode()) if "README.md" in files else []:
            raise Refused(400, message="; ".join(errors))
        oid = found.commit(revision, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}, {}

    def info(self, body: bytes, repo: str, revision: str = "") -> Any:
        found, sha = self.commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        answer = {"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings}
        return 200, answer, {}

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> Any:
        found, sha = self.commit_of(repo, revision)
        files = {p: b for p, b in found.commits[sha].items() if not folder or p.startswith(f"{folder}/")}
        if folder and not files:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist", **{"X-Repo-Commit": sha})
        return 200, [self.entry(path, blob) for path, blob in sorted(files.items())], {}

    @staticmethod
    def entry(path: str, blob: Blob) -> dict[str, Any]:
        size = len(blob.content)
        row: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": blob.oid[:40]}
        return row | ({"lfs": {"oid": blob.oid, "size": size, "pointerSize": 127}} if blob.lfs else {})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> Any:
        found, sha = self.commit_of(repo, revision)
        blob = found.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **headers)
        headers["ETag"] = f'"{blob.oid}"'
        if not blob.lfs:
            return 200, blob.content, headers
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, b"", {**headers, "Location": f"{self.hub.storage}/storage/{blob.oid}"}

    def stored(self, body: bytes, oid: str) -> Any:
        if oid not in self.hub.objects:
            raise Refused(404, message="no such object")
        return 200, self.hub.objects[oid], {"ETag": f'"{oid}"'}


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a README.md; of the Hub's rules the few that our cards come near."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return []  # the Hub only warns
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    lists = [f'"{key}" must be an array' for key in ("tags", "metrics") if not isinstance(data.get(key, []), list)]
    names = [data.get(key) or [] for key in ("datasets", "base_model")]
    flat = [name for value in names for name in ([value] if isinstance(value, str) else value)]
    wrong = [f'"{name}" is no id of the Hub' for name in flat if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or "type" not in result["dataset"]:
                wrong.append('"model-index" lacks task, dataset or metrics')
    return lists + wrong


OID = r"(?P<oid>[0-9a-f]{64})"
MODEL = f"/api/models/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"{MODEL}/branch/{REVISION}", Handler.branch),
    ("POST", f"{MODEL}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{MODEL}/commit/{REVISION}", Handler.commit),
    ("GET", MODEL, Handler.info),
    ("GET", f"{MODEL}/revision/{REVISION}", Handler.info),
    ("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", "/verify", Handler.verify),
    ("PUT", f"/upload/{OID}", Handler.upload),
    ("GET", f"/storage/{OID}", Handler.stored),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
