"""A Hub on 127.0.0.1: real HTTP with the endpoints that pushing and loading a model use, and failures on demand.

Clients are fresh processes (:meth:`LoopbackHub.environment`), since huggingface_hub reads its settings when imported.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from helpers.process import ROOT

WRITER, READER = "hf_writer", "hf_reader"
CUT = -1  # as a fault's status: close the connection without an answer
LFS_SUFFIXES = (".safetensors", ".png")
RELATIONS = ("adapter", "finetune", "merge", "quantized")


@dataclasses.dataclass
class Repository:
    private: bool
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclasses.dataclass
class Fault:
    """Answer the next ``times`` requests whose ``"METHOD path"`` matches with ``status``."""

    pattern: str
    status: int
    times: int = 1


class LoopbackHub:
    """``with LoopbackHub() as hub:`` serves until the block ends. Only ``hf_writer`` may write, to ``me/...``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home, token: str | None = WRITER) -> dict[str, str]:
        """The environment of a client process that knows this Hub only, with its own empty cache ``home``."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        settings = {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return kept | settings | ({"HF_TOKEN": token} if token else {})


def check_metadata(card: str) -> list[str]:
    """What the Hub would not accept in a model card's metadata block."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return []  # the Hub warns, no more
    data = yaml.safe_load(match[1])
    if not isinstance(data, dict):
        return ["the metadata are not a mapping"]
    strings = {key: data[key] for key in ("license", "library_name", "pipeline_tag") if key in data}
    errors = [f"{key} must be a string" for key, value in strings.items() if not isinstance(value, str)]
    lists = {key: data[key] for key in ("tags", "datasets", "language") if key in data}
    errors += [
        f"{key} must be a list of strings"
        for key, value in lists.items()
        if not (isinstance(value, list) and all(isinstance(each, str) for each in value))
    ]
    if "base_model_relation" in data and (data["base_model_relation"] not in RELATIONS or "base_model" not in data):
        errors.append("base_model_relation needs a base_model and one of the known relations")
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(base)):
            errors.append("base_model must be owner/name, or a list of such names")
    if "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
            errors += [f"{each.metric_type} is not a number" for each in results
                       if not isinstance(each.metric_value, int | float)]  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            errors.append(f"model-index: {error!r}")
    try:
        ModelCardData(**{key.replace("-", "_"): value for key, value in data.items()}, ignore_metadata_errors=False)
    except ValueError as error:
        errors.append(str(error))
    return errors


class Handler(BaseHTTPRequestHandler):
    """The routes. Every answer has a length, so that connections stay open."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    # Plumbing

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: bytes | dict | list | str = b"", **headers: str) -> None:
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._answer(status, {"error": message or code}, X_Error_Message=message or code or str(status), **headers)

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        line = f"{self.command} {path}"
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = next((each for each in self.hub.faults if each.times and re.search(each.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == CUT:
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None:
            self._refuse(fault.status, message="fault on demand")
            return
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in method.split("|") and match:
                if self._token not in (None, WRITER, READER):
                    self._refuse(401, message="Invalid credentials in Authorization header")
                    return
                with self.hub.lock:
                    getattr(self, name)(*match.groups(), body=body, query=query)
                return
        self._refuse(404, message=f"no such route: {line}")

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token is None):
            self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _writable(self, name: str) -> Repository | None:
        if self._token is None:
            self._refuse(401, message="Invalid username or password.")
            return None
        repository = self._repository(name)
        if repository is not None and (self._token != WRITER or not name.startswith("me/")):
            self._refuse(403, message="You don't have the rights to write here")
            return None
        return repository

    # Routes

    def create(self, body: bytes, query: dict) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if self._token is None:
            self._refuse(401, message="Invalid username or password.")
        elif self._token != WRITER or not name.startswith("me/"):
            self._refuse(403, message="You don't have the rights to create a model here")
        elif name in self.hub.repositories:
            self._answer(409, url | {"error": "You already created this model repo"})
        else:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repository = Repository(private)
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.hub.repositories[name] = repository
            self._answer(200, url)

    def branch(self, name: str, branch: str, body: bytes, query: dict) -> None:
        if repository := self._writable(name):
            if branch in repository.branches:
                self._answer(409, {"error": f"Branch {branch} already exists"})
            else:
                repository.branches[branch] = repository.branches["main"]
                self._answer(201, {})

    def preupload(self, name: str, revision: str, body: bytes, query: dict) -> None:
        repository = self._repository(name) if "create_pr" in query else self._writable(name)
        if repository is None:
            return
        if repository.files(revision) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": modes})

    def lfs_batch(self, name: str, body: bytes, query: dict) -> None:
        wanted = json.loads(body)["objects"]
        for each in wanted:
            if each["oid"] not in self.hub.objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}
        self._answer(200, {"transfer": "basic", "objects": wanted})

    def lfs_put(self, oid: str, body: bytes, query: dict) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, message="the bytes do not have this oid")
        else:
            self.hub.objects[oid] = body
            self._answer(200)

    def commit(self, name: str, revision: str, body: bytes, query: dict) -> None:
        repository = self._repository(name) if "create_pr" in query else self._writable(name)
        if repository is None:
            return
        files, message = dict(repository.files(revision) or {}), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._refuse(400, message=f"{value['path']}: LFS object not uploaded")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        answer = {}
        if "create_pr" in query:
            repository.pull_requests += 1
            revision = f"refs/pr/{repository.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{repository.pull_requests}"
        sha = repository.commit(revision, files, message)
        self._answer(
            200, {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha} | answer
        )

    def validate_yaml(self, body: bytes, query: dict) -> None:
        errors = check_metadata(json.loads(body)["content"])
        if errors:
            self._answer(400, {"errors": [{"message": error} for error in errors], "warnings": []})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str | None, body: bytes, query: dict) -> None:
        if repository := self._repository(name):
            files = repository.files(revision or "main")
            if files is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return
            sha = repository.branches.get(revision or "main", revision)
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repository.private,
                               "tags": [], "siblings": siblings})  # fmt: skip

    def tree(self, name: str, revision: str, body: bytes, query: dict) -> None:
        if repository := self._repository(name):
            files = repository.files(revision) or {}
            self._answer(200, [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                               for path, data in files.items()])  # fmt: skip

    def resolve(self, name: str, revision: str, path: str, body: bytes, query: dict) -> None:
        if repository := self._repository(name):
            files = repository.files(revision)
            if files is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif path not in files:
                self._refuse(404, "EntryNotFound", "Entry not found")
            else:
                data = files[path]
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self._answer(200, data, ETag=etag, X_Repo_Commit=repository.branches.get(revision, revision),
                             X_Linked_Size=str(len(data)), X_Linked_Etag=etag)  # fmt: skip


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", "commit"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(\w+)", "lfs_put"),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", "tree"),
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", "info"),
    ("GET|HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", "resolve"),
)
