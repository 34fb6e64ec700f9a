"""A stand-in for Google Cloud Storage on this machine: serves a folder's subfolders as buckets, to read only.

    python tests/data/object_store.py FOLDER

prints its address. Clients find it by CLOUD_STORAGE_EMULATOR_ENDPOINT (array_record) and STORAGE_EMULATOR_HOST (gcsfs).
"""

import base64
import hashlib
import http.server
import json
import pathlib
import sys
import urllib.parse
from typing import Any

ROOT = pathlib.Path(sys.argv[1]) if __name__ == "__main__" else pathlib.Path()


class Handler(http.server.BaseHTTPRequestHandler):
    """What reading needs of the JSON and XML interfaces: an object's description, its bytes, lists."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, *parts = url.path.removeprefix("/download").split("/")
        if parts[:3] != ["storage", "v1", "b"]:
            self.send_object(parts[0], urllib.parse.unquote("/".join(parts[1:])))
        elif len(parts) == 4:
            self.send_json({"name": parts[3]})
        elif len(parts) == 5:
            self.send_list(parts[3], query.get("prefix", ""), query.get("delimiter", ""))
        elif query.get("alt") == "media":
            self.send_object(parts[3], urllib.parse.unquote("/".join(parts[5:])))
        else:
            self.send_description(parts[3], urllib.parse.unquote("/".join(parts[5:])))

    def send_object(self, bucket: str, name: str) -> None:
        path = ROOT / bucket / name
        if not path.is_file():
            return self.send_missing(name)
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first = int(low) if low else max(0, len(content) - int(high))
            last = min(int(high), last) if low and high else last
        headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if asked else {}
        headers |= {"x-goog-generation": "1", "x-goog-stored-content-length": str(len(content))}
        self.send(206 if asked else 200, content[first : last + 1], headers)

    def send_description(self, bucket: str, name: str) -> None:
        if not (ROOT / bucket / name).is_file():
            return self.send_missing(name)
        self.send_json(describe(bucket, name))

    def send_list(self, bucket: str, prefix: str, delimiter: str) -> None:
        files = (path for path in sorted((ROOT / bucket).rglob("*")) if path.is_file())
        names = [path.relative_to(ROOT / bucket).as_posix() for path in files]
        items, folders = [], set()
        for name in names:
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(describe(bucket, name))
        self.send_json({"items": items, "prefixes": sorted(folders)})

    def send_missing(self, name: str) -> None:
        self.send_json({"error": {"code": 404, "message": f"{name} is not there"}}, 404)

    def send_json(self, content: dict[str, Any], status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def describe(bucket: str, name: str) -> dict[str, Any]:
    content = (ROOT / bucket / name).read_bytes()
    checksum = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {
        "kind": "storage#object", "id": f"{bucket}/{name}/1", "name": name, "bucket": bucket, "generation": "1",
        "metageneration": "1", "size": str(len(content)), "md5Hash": checksum,
        "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
