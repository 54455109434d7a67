"""What ``huggingface_hub`` asks of the Hub to make a repository, commit to it and read from it."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """Serves on this machine; ``files`` by repository and name, ``tokens`` as they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = repo in self.server.files
            if not there:
                self.server.files[repo] = {}
                self.server.private[repo] = asked.get("visibility") == "private"
            return self._answer({"url": f"{self.server.address}/{repo}"}, 409 if there else 200)
        _, _, _, owner, name, action, _ = self.path.split("/")
        if action == "preupload":  # "regular": the content comes with the commit
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._answer({"files": modes})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[f"{owner}/{name}"][line["value"]["path"]] = content
        url = f"{self.server.address}/{owner}/{name}"
        return self._answer({"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_HEAD(self) -> None:
        owner, name, resolve, _, file = self.path.strip("/").split("/")
        assert resolve == "resolve"
        repo = self.server.files.get(f"{owner}/{name}")
        if repo is None or file not in repo:
            kind = "RepoNotFound" if repo is None else "EntryNotFound"
            return self._send(404, b"", {"X-Error-Code": kind})
        etag = hashlib.sha1(repo[file]).hexdigest()
        return self._send(200, repo[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def _answer(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Tests need no log."""


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A Hub until the end of the block."""
    with LocalHub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
