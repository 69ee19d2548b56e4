"""A hub that lives in the memory of one test, on the loopback address: what huggingface_hub asks for, and no more."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "aLittleHubOnTheLoopbackAddress00"
OWNER = "someone"


@dataclass
class Repo:
    """A repository: who sees it, and its commits, each with all files of that time."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    card_data: dict | None = None

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class LittleHub(ThreadingHTTPServer):
    """Repositories, everything that was asked and sent, and the ways in which a hub can fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.role = "write"
        self.may_write = True
        self.takes_commits = True
        self.makes_all_public = False
        self.spoils = ""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, private: bool, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[repo_id] = repo = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {}), "initial commit")
        return repo

    def pushes(self) -> list[str]:
        """The commit requests that came in."""
        return [path for verb, path in self.asked if verb == "POST" and "/commit/" in path]


class Door(BaseHTTPRequestHandler):
    """One request."""

    server: LittleHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for 40 ms

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.reply(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code})

    def answer(self, verb: str) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.server.asked.append((verb, path))
        self.server.received.append(body)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/lfs/"):
            self.server.blobs[path.removeprefix("/lfs/")] = body
            self.reply(200, {})
        elif path == "/api/agent-harnesses":
            self.reply(404, {})
        elif not known:
            self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        elif path == "/api/whoami-v2":
            self.reply(200, {"type": "user", "name": OWNER, "auth": {"accessToken": {"role": self.server.role}}})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.startswith("/api/models/"):
            self.model(path.removeprefix("/api/models/"), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.refuse(404, "NotFound")

    def create(self, wanted: dict) -> None:
        repo_id = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        if not self.server.may_write:
            self.refuse(403, "Forbidden", f"You don't have the rights to create a model under {repo_id}")
        elif repo_id in self.server.repos:
            self.reply(409, {"error": "You already created this repo", "url": f"{self.server.address}/{repo_id}"})
        else:
            hidden = wanted.get("visibility") == "private" and not self.server.makes_all_public
            self.server.add(repo_id, hidden)
            self.reply(200, {"url": f"{self.server.address}/{repo_id}"})

    def model(self, path: str, body: bytes) -> None:
        owner, name, *rest = path.split("/")
        repo_id = f"{owner}/{name}"
        repo = self.server.repos.get(repo_id)
        what, revision = [*rest, "revision", "main"][:2] if len(rest) < 2 else (rest[0], "/".join(rest[1:]))
        if repo is None:
            self.refuse(404, "RepoNotFound")
        elif what == "branch":
            repo.branches.setdefault(revision, repo.branches["main"])
            self.reply(200, {})
        elif (files := repo.files(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        elif what == "revision":
            sha = repo.branches.get(revision, revision)
            self.reply(200, {"id": repo_id, "private": repo.private, "sha": sha, "cardData": repo.card_data})
        elif what == "tree":
            self.reply(200, [entry(name, data) for name, data in files.items()])
        elif what == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self.reply(200, [entry(name, data) for name, data in files.items() if name in wanted])
        elif what == "preupload":
            asked = json.loads(body)["files"]
            self.reply(200, {"files": [preupload(one["path"], files.get(one["path"])) for one in asked]})
        elif what == "commit":
            self.commit(repo, repo_id, revision, [json.loads(line) for line in body.splitlines()])

    def batch(self, asked: dict) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, repo_id: str, branch: str, lines: list[dict]) -> None:
        if not self.server.takes_commits:
            self.refuse(403, "Forbidden", "You are out of storage")
            return
        files, message = dict(repo.files(branch) or {}), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        for name in [name for name in files if name == self.server.spoils]:
            files[name] = files[name][:-1] + b"?"
        oid = repo.commit(files, message, branch)
        self.reply(200, {"commitOid": oid, "commitUrl": f"{self.server.address}/{repo_id}/commit/{oid}"})

    def resolve(self, path: str) -> None:
        repo_id, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        repo = self.server.repos.get(repo_id)
        data = (repo.files(revision) or {}).get(name) if repo else None
        if repo is None or data is None:
            self.refuse(404, "EntryNotFound" if repo else "RepoNotFound")
            return
        commit = repo.branches.get(revision, revision)
        self.reply(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit})


def entry(name: str, data: bytes) -> dict:
    """A file as a tree lists it."""
    oid = hashlib.sha256(data).hexdigest()
    large = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if name.endswith(".safetensors") else {}
    return {"type": "file", "path": name, "size": len(data), "oid": blob(data), **large}


def preupload(name: str, there: bytes | None) -> dict:
    """How a file is to be sent."""
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    oid = None if there is None else hashlib.sha256(there).hexdigest() if mode == "lfs" else blob(there)
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def blob(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()
