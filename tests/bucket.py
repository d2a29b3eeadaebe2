"""A server of the JSON API of Google Cloud Storage, in memory, as far as our clients use it.

The clients are gcsfs, google-cloud-storage and the gcs driver of TensorStore. The only bucket is
`tests`.
"""

import contextlib
import itertools
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "tests"
OBJECT = r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)"
ROUTES = (
    ("GET", r"/storage/v1/b/([^/]+)", "describe_bucket"),
    ("GET", r"/storage/v1/b/([^/]+)/o", "list"),
    ("GET", OBJECT, "read"),
    ("DELETE", OBJECT, "delete"),
    ("POST", OBJECT + r"/rewriteTo/b/([^/]+)/o/([^/]+)", "copy"),
    ("POST", r"/upload/storage/v1/b/([^/]+)/o", "upload"),
    ("P(?:OS|U)T", r"/session/(\d+)", "continue_upload"),
)


class Object(NamedTuple):
    content: bytes
    generation: int  # grows with every write
    updated: str


class Storage:
    """The objects of all buckets, {(bucket, name): Object}, and the permissions."""

    def __init__(self):
        self.objects, self.sessions, self.lock = {}, {}, threading.Lock()
        self.numbers = itertools.count(1)
        self.cuts = set()  # names of objects, of which the next reply with content is cut
        self.allow()

    def allow(self, read=lambda name: True, write=lambda name: True):
        """From now on read(name) and write(name) decide which objects may be read and written."""
        self.may_read, self.may_write = read, write

    def names(self, bucket):
        return sorted(name for b, name in list(self.objects) if b == bucket)

    def write(self, key, content, if_generation=None):
        """Writes an object; returns its resource, or the HTTP status if it is refused."""
        if not self.may_write(key[1]):
            return 403
        with self.lock:
            old = self.objects.get(key)
            if if_generation is not None and int(if_generation) != (old.generation if old else 0):
                return 412
            updated = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            self.objects[key] = Object(bytes(content), next(self.numbers), updated)
        return self.describe(key)

    def describe(self, key):
        item = self.objects[key]
        return {
            "kind": "storage#object",
            "bucket": key[0],
            "name": key[1],
            "generation": str(item.generation),
            "size": str(len(item.content)),
            "timeCreated": item.updated,
            "updated": item.updated,
        }


@contextlib.contextmanager
def serve():
    """A context with (the Storage, the environment variables that make clients use it)."""
    server = Server(("localhost", 0), Handler)
    server.storage = Storage()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://localhost:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": server.url,
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask for the bucket's type by gRPC
    }
    yield server.storage, environment
    server.shutdown()
    server.server_close()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), ConnectionError):  # a client was killed
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # sends a reply in one packet

    def log_message(self, *_):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and re.fullmatch(method, self.command):
                groups = [unquote(group) for group in match.groups()]
                exists = groups[0] == BUCKET or name == "continue_upload"
                answer = getattr(self, name)(body, *groups) if exists else 404
                break
        else:
            answer = 501
        if answer is not None:
            self.reply(answer) if isinstance(answer, int) else self.reply(200, answer)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def reply(self, status, content=b"", **headers):
        if status >= 400:
            content = {"error": {"code": status, "message": f"{status} of {self.path}"}}
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        self.send_response(status)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    @property
    def storage(self):
        return self.server.storage

    def describe_bucket(self, body, bucket):
        return {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "EU"}

    def list(self, body, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        if not self.storage.may_read(prefix):
            return 403
        found = {}  # by name: an object, or a prefix that ends with the delimiter
        for name in self.storage.names(bucket):
            if not name.startswith(prefix):
                continue
            head, found_one, _ = name[len(prefix) :].partition(delimiter or "\0")
            found[prefix + head + found_one if found_one else name] = bool(found_one)
        page = [name for name in found if name > self.query.get("pageToken", "")]
        count = int(self.query.get("maxResults", 1000))
        more = {"nextPageToken": page[count - 1]} if len(page) > count else {}
        page = page[:count]
        items = [self.storage.describe((bucket, name)) for name in page if not found[name]]
        prefixes = [name for name in page if found[name]]
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes} | more

    def read(self, body, *key):
        if not self.storage.may_read(key[1]):
            return 403
        item = self.storage.objects.get(key)
        if item is None:
            return 404
        if self.query.get("ifGenerationNotMatch") == str(item.generation):
            return 304
        if self.query.get("ifGenerationMatch", str(item.generation)) != str(item.generation):
            return 412
        if self.query.get("alt") != "media":
            return self.storage.describe(key)
        status, content, headers = 200, item.content, {"x_goog_generation": item.generation}
        if requested := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = requested.groups()
            if not first:
                first, last = max(0, len(content) - int(last)), ""
            last = min(int(last or len(content)), len(content) - 1)
            if int(first) >= len(content):
                return 416
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[int(first) : last + 1]
        if key[1] in self.storage.cuts:
            self.storage.cuts.remove(key[1])
            headers["Content_Length"] = len(content)
            content, self.close_connection = content[: len(content) // 2], True
        self.reply(status, content, **headers)

    def delete(self, body, *key):
        self.reply(204 if self.storage.objects.pop(key, None) else 404)

    def copy(self, body, *keys):
        if keys[:2] not in self.storage.objects:
            return 404
        content = self.storage.objects[keys[:2]].content
        resource = self.storage.write(keys[2:], content, self.query.get("ifGenerationMatch"))
        return resource if isinstance(resource, int) else {"done": True, "resource": resource}

    def upload(self, body, bucket):
        kind, name = self.query["uploadType"], self.query.get("name")
        condition = self.query.get("ifGenerationMatch")
        if kind == "multipart":
            boundary = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1]
            _, about, media = body.split(b"--" + boundary.encode())[:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", media, maxsplit=1)[1]
            body = body.removesuffix(b"\n").removesuffix(b"\r")
        if kind == "resumable":
            name = name or json.loads(body)["name"]
            number = str(next(self.storage.numbers))
            self.storage.sessions[number] = ((bucket, name), bytearray(), condition)
            return self.reply(200, Location=f"{self.server.url}/session/{number}")
        return self.storage.write((bucket, name), body, condition)

    def continue_upload(self, body, number):
        key, content, condition = self.storage.sessions[number]
        content += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.reply(308, Range=f"bytes=0-{len(content) - 1}")
        return self.storage.write(key, content, condition)
