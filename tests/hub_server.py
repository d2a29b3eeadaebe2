"""A server of the Hugging Face hub, in memory, as far as huggingface_hub uses it for models.

Large files (.safetensors) are stored apart from the commits, as by Git LFS: a push asks where to
send them, sends them, and names them in its commit. Downloads of them are redirected to another
host, which must not be sent the token.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REPO = r"/api/models/([^/]+/[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", REPO, "describe"),
    ("GET", REPO + r"/revision/([^/]+)", "describe"),
    ("GET", REPO + r"/tree/([^/]+)", "tree"),
    ("POST", REPO + r"/branch/([^/]+)", "branch"),
    ("POST", REPO + r"/preupload/([^/]+)", "preupload"),
    ("POST", REPO + r"/commit/([^/]+)", "commit"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/store/(\w+)", "store"),
    ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/stored/(\w+)", "stored"),
)


class Repository:
    """Commits, {sha: {path: content, or "sha256:..." of a large file}}; branches, {name: sha}."""

    def __init__(self, private):
        self.private, self.gated = private, False
        self.commits, self.branches = {}, {}


class Hub:
    """Repositories by name, large files by sha256, accounts {token: namespace}, and faults."""

    def __init__(self):
        self.lock = threading.Lock()
        self.clear()

    def clear(self):
        """Forgets everything, for another test."""
        self.repositories, self.large = {}, {}
        self.accounts = {"hf_alice": "alice", "hf_bob": "bob"}
        self.numbers = itertools.count(1)
        self.calls = []  # (method, path) of all requests
        self.refused = ""  # a regular expression: requests "METHOD PATH" that get status 507
        self.damaged = set()  # paths of files that are sent with a flipped bit
        self.cut = set()  # sha256 of large files of which the next download breaks off

    def commit(self, name, changes, branch="main", private=False):
        """Adds a commit with {path: content, None to delete}; returns its sha."""
        repository = self.repositories.setdefault(name, Repository(private))
        files = dict(repository.commits.get(repository.branches.get(branch), {})) | changes
        files = {path: content for path, content in files.items() if content is not None}
        sha = hashlib.sha1(f"{name} {next(self.numbers)}".encode()).hexdigest()
        repository.commits[sha] = files
        repository.branches[branch] = sha
        return sha

    def files(self, name, branch="main"):
        """{path: bytes} of a branch."""
        repository = self.repositories[name]
        found = repository.commits[repository.branches[branch]]
        return {path: self.content(x) for path, x in found.items()}

    def content(self, stored):
        return self.large[stored[7:]] if isinstance(stored, str) else stored

    def times_sent(self):
        """How often a large file was sent."""
        return sum(method == "PUT" for method, _ in self.calls)


@contextlib.contextmanager
def serve():
    """A context with (the Hub, its address)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hub = True, Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Refusal(Exception):
    """status, X-Error-Code, message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # sends a reply in one packet

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.hub.calls.append((self.command, url.path))
        try:
            if self.hub.refused and re.search(self.hub.refused, f"{self.command} {url.path}"):
                raise Refusal(507, "", "no space left")
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and re.fullmatch(method, self.command):
                    self.query = parse_qs(url.query)
                    with self.hub.lock:
                        answer = getattr(self, name)(*map(unquote, match.groups()))
                    break
            else:
                raise Refusal(501, "", f"{self.command} {self.path}")
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            return self.reply(status, json.dumps({"error": message}).encode(), headers)
        if answer is not None:
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, status, content=b"", headers=()):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | dict(headers)).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def account(self):
        """The namespace of the token that was sent, None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def open(self, name, *, write=False):
        account, repository = self.account(), self.hub.repositories.get(name)
        owns = account == name.split("/")[0]
        if repository is None or (repository.private and not owns):
            raise Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not owns:
            raise Refusal(403, "GatedRepo", "You have to accept the conditions")
        if write and not owns:
            raise Refusal(403, "", "Forbidden: you don't have write permission")
        return repository

    def find(self, repository, revision):
        """(sha, files) of a branch or commit."""
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def create(self):
        asked, account = json.loads(self.body), self.account()
        namespace = asked.get("organization") or account
        name = f"{namespace}/{asked['name']}"
        if namespace != account:
            raise Refusal(403, "", f"You don't have the rights to create a model under {namespace}")
        if name in self.hub.repositories:
            raise Refusal(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs"}, private=private)
        return {"url": f"https://huggingface.co/{name}", "name": name}

    def validate(self):
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        fields = yaml.safe_load(found[1]) if found else {}
        if not isinstance(fields.get("license"), str):
            self.reply(400, json.dumps({"errors": [{"message": "license"}]}).encode())
            return None
        return {"errors": [], "warnings": []}

    def describe(self, name, revision="main"):
        repository = self.open(name)
        sha, files = self.find(repository, revision)
        siblings = []
        for path, content in files.items():
            entry = self.entry(path, content)
            about = {"rfilename": path}
            if self.query.get("blobs"):
                about |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    about["lfs"] = {"sha256": entry["lfs"]["oid"], **entry["lfs"]}
            siblings.append(about)
        fields = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        return fields | {"tags": [], "gated": False}

    def tree(self, name, revision):
        _, files = self.find(self.open(name), revision)
        return [self.entry(path, content) for path, content in files.items()]

    def entry(self, path, stored):
        content = self.hub.content(stored)
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if isinstance(stored, str):
            entry["lfs"] = {"oid": stored[7:], "size": len(content), "pointerSize": 134}
        return entry

    def branch(self, name, branch):
        repository = self.open(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, name, revision):
        self.find(self.open(name, write=True), revision)
        kinds = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": kinds[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def batch(self, name):
        self.open(name, write=True)
        objects = []
        for file in json.loads(self.body)["objects"]:
            if file["oid"] not in self.hub.large:
                address = f"http://{self.headers['Host']}/store/{file['oid']}"
                file["actions"] = {"upload": {"href": address}}
            objects.append(file)
        return {"transfer": "basic", "objects": objects}

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the content has another sha256")
        self.hub.large[oid] = self.body
        return {}

    def commit(self, name, revision):
        repository = self.open(name, write=True)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        changes = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (
                None,
                repository.branches[revision],
            ):
                raise Refusal(412, "", "A commit has happened since")
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, "", "the large file was not sent")
                changes[value["path"]] = f"sha256:{value['oid']}"
            elif key == "deletedFile":
                changes[value["path"]] = None
        sha = self.hub.commit(name, changes, revision)
        return {"commitUrl": f"https://huggingface.co/{name}/commit/{sha}", "commitOid": sha}

    def resolve(self, name, revision, path):
        sha, files = self.find(self.open(name), revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        stored, content = files[path], self.hub.content(files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_sha1(content)}"'}
        if isinstance(stored, str):
            oid = stored[7:]
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": len(content)}
            port = self.server.server_port
            headers["Location"] = f"http://localhost:{port}/stored/{oid}"  # another host
            return self.reply(302, b"", headers)
        return self.reply(200, self.sent(content, path), headers)

    def stored(self, oid):
        if "Authorization" in self.headers:
            raise Refusal(400, "", "the token was sent to another host")
        content, status, headers = self.sent(self.hub.large[oid], oid), 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        if oid in self.hub.cut:
            self.hub.cut.remove(oid)
            headers["Content-Length"] = len(content)
            content, self.close_connection = content[: len(content) // 2], True
        self.reply(status, content, headers)

    def sent(self, content, name):
        if name not in self.hub.damaged:
            return content
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
