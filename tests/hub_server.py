"""A stand-in of the Hugging Face hub on the loopback: what its client and `datasets` ask when they fetch a repository.

with StandIn() as hub:
    commit = hub.add("owner/model", "model", {"config.json": b"{}"})  # adding it again makes a new commit, which is main
    ...  # HF_ENDPOINT=hub.url in a process, or its constants patched
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+)(?:/(.*))?)?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files of each commit, and what names mean: a gated one shows its list of files to all, and the files to `readers`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False


class StandIn:
    """The server, with what it holds and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.accounts: set[str] = set()
        """Tokens that are valid."""
        self.readers: set[str] = set()
        """Those whose account accepted the licences."""
        self.asked: list[str] = []
        """Method, path and range of bytes of each request."""
        self.cut_after: int | None = None
        """Bytes after which the next file breaks off; None: none does."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, kind: str, files: dict[str, bytes], *, is_gated: bool = False, tag: str | None = None) -> str:
        """Make a commit of these files, which main then means; returns its 40 hexadecimal digits."""
        repository = self.repositories.setdefault((kind, name), Repository(is_gated=is_gated))
        commit = hashlib.sha1(f"{name} {kind} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs["main"] = commit
        if tag:
            repository.refs[tag] = commit
        return commit

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the console."""

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            hub.asked.append(" ".join([self.command, path, self.headers.get("Range") or ""]).strip())
            if match := _FILE.fullmatch(path):
                kind = "dataset" if match[1] else "model"
                self.on_repository(kind, match[2], match[3], lambda files, commit: self.file(files, commit, match[4]), True)
            elif match := _API.fullmatch(urlsplit(self.path).path):
                kind, name, action, revision, inside = match.groups()
                if action == "auth-check":
                    self.on_repository(kind, name, "main", lambda files, commit: self.send(200, b"{}"), True)
                    return
                about = {
                    "tree": lambda files, commit: self.tree(files, unquote(inside or "")),
                    "paths-info": lambda files, commit: self.paths_info(files, body),
                }.get(action, lambda files, commit: self.info(kind, name, files, commit))
                self.on_repository(kind, name, unquote(revision or "main"), about, False)
            else:
                self.refuse(404, "", "no such page")

        def on_repository(self, kind: str, name: str, revision: str, go_on: Any, needs_licence: bool) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            repository = hub.repositories.get((kind, name))
            if token and token not in hub.accounts:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif repository is None:
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif needs_licence and repository.is_gated and token not in hub.readers:
                said = f"Access to {kind} {name} is restricted" + (" and you are not in the authorized list" if token else "")
                self.refuse(403 if token else 401, "GatedRepo", said)
            elif (commit := repository.refs.get(revision, revision)) not in repository.commits:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                go_on(repository.commits[commit], commit)

        def info(self, kind: str, name: str, files: dict[str, bytes], commit: str) -> None:
            repository = hub.repositories[kind, name]
            siblings = [{"rfilename": file} for file in sorted(files)]
            gated = "manual" if repository.is_gated else False
            known = {
                "id": name,
                "sha": commit,
                "private": False,
                "gated": gated,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
            }
            self.send(200, json.dumps(known).encode())

        def tree(self, files: dict[str, bytes], inside: str) -> None:
            is_deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            at = inside.strip("/") + "/" if inside.strip("/") else ""
            entries = [entry for entry in _entries(files) if entry["path"].startswith(at)]
            if not entries:
                self.refuse(404, "EntryNotFound", f"{inside} does not exist")
                return
            shown = [entry for entry in entries if is_deep or "/" not in entry["path"][len(at) :]]
            self.send(200, json.dumps(shown).encode())

        def paths_info(self, files: dict[str, bytes], body: str) -> None:
            paths = parse_qs(body).get("paths", [])
            self.send(200, json.dumps([entry for entry in _entries(files) if entry["path"] in paths]).encode())

        def file(self, files: dict[str, bytes], commit: str, path: str) -> None:
            if path not in files:
                self.refuse(404, "EntryNotFound", f"{path} does not exist")
                return
            content, headers = files[path], {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206 if start else 200, content[start:], headers)

        def refuse(self, status: int, code: str, said: str) -> None:
            headers = {"X-Error-Message": said} | ({"X-Error-Code": code} if code else {})
            self.send(status, json.dumps({"error": said}).encode(), headers)

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut_after is not None and "ETag" in (headers or {}) and len(content) > hub.cut_after:
                content, hub.cut_after, self.close_connection = content[: hub.cut_after], None, True
            self.wfile.write(content)

    return Handler


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    folders = {"/".join(file.split("/")[:depth]) for file in files for depth in range(1, file.count("/") + 1)}
    return [{"type": "directory", "path": folder, "oid": _oid(folder.encode()), "size": 0} for folder in sorted(folders)] + [
        {"type": "file", "path": file, "oid": _oid(content), "size": len(content)} for file, content in sorted(files.items())
    ]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
