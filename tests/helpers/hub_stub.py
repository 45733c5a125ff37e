"""A Hugging Face hub in one process: as much of its API as making, writing, listing and reading a repository takes."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """What the server holds: {repository: {branch: {path: bytes}}}; `token` is what a writer must send."""

    def __init__(self, token="hf_test"):
        self.token, self.repos, self.blobs, self.private, self.log = token, {}, {}, {}, []

    def add(self, repo, files, branch="main"):
        self.repos.setdefault(repo, {"main": {}}).setdefault(branch, {}).update(files)


def _commit(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self, value, status=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, one in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, one)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code, what):
        self.answer({"error": what}, 404, {"X-Error-Code": code, "X-Error-Message": what})

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        data = self.body()
        writes = self.command == "POST" and path != "/api/validate-yaml"
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, function in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return function(self, data, *found.groups())
        return self.answer({"error": f"the stub does not know {self.command} {path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def files(self, repo, revision):
        if repo not in self.hub.repos:
            self.missing("RepoNotFound", f"Repository {repo} not found")
            return None
        for name, files in self.hub.repos[repo].items():
            if revision in (name, _commit(files)):
                return files
        self.missing("RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # -- routes

    def create(self, data):
        wanted = json.loads(data)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        exists = name in self.hub.repos
        self.hub.repos.setdefault(name, {"main": {}})
        self.hub.private.setdefault(name, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.answer({"url": f"{self.server.url}/{name}", "id": name}, 409 if exists else 200)

    def branch(self, _, repo, name):
        branches = self.hub.repos[repo]
        exists = name in branches
        branches.setdefault(name, dict(branches["main"]))
        self.answer({}, 409 if exists else 200)

    def info(self, _, repo, revision="main"):
        files = self.files(repo, revision)
        if files is not None:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": repo, "modelId": repo, "sha": _commit(files), "siblings": siblings, "private": False})

    def tree(self, _, repo, revision):
        files = self.files(repo, revision)
        if files is not None:
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()])

    def resolve(self, _, repo, revision, name):
        files = self.files(repo, revision)
        if files is None:
            return
        if name not in files:
            self.missing("EntryNotFound", f"{name} does not exist in {repo}")
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self.answer(files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": _commit(files)})

    def preupload(self, data, *_):
        wanted = json.loads(data)["files"]
        mode = {True: "lfs", False: "regular"}
        answers = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in wanted]
        self.answer({"files": [{**one, "shouldIgnore": False, "oid": None} for one in answers]})

    def batch(self, data, *_):
        objects = []
        for one in json.loads(data)["objects"]:
            upload = {"href": f"{self.server.url}/blob/{one['oid']}", "header": {}}
            known = one["oid"] in self.hub.blobs
            objects.append({**one, "authenticated": True, **({} if known else {"actions": {"upload": upload}})})
        self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def blob(self, data, oid):
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self.answer({})

    def commit(self, data, repo, branch):
        files = self.hub.repos[repo][branch]
        for line in data.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = _commit(files)
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", lambda self, _: self.answer({"errors": [], "warnings": []})),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /blob/(\w+)", _Handler.blob),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def serve(hub):
    """Runs the hub on a free port of this machine; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.url = hub, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
