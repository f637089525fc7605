"""A Hub on this machine: the part of its HTTP API that reads datasets, over a folder of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def mock_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root/OWNER/NAME/...` as datasets; gives the endpoint and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api" and parts[1] == "datasets" and (root / parts[2] / parts[3]).is_dir():
                self._api(root / parts[2] / parts[3], parts[4:])
            elif parts[0] == "datasets" and parts[3] == "resolve":
                self._file(root.joinpath(*parts[1:3], *parts[5:]), known=root.joinpath(*parts[1:3]).is_dir())
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _api(self, folder: Path, rest: list[str]) -> None:
            if rest[:1] == ["tree"]:
                below = folder.joinpath(*rest[2:])
                if not below.exists():
                    self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
                self._json([_entry(folder, path) for path in sorted(below.rglob("*"))])
            elif rest[:1] == ["paths-info"]:
                self._json([])
            else:
                files = [{"rfilename": _name(folder, path)} for path in sorted(folder.rglob("*")) if path.is_file()]
                name = "/".join(folder.parts[-2:])
                self._json({"id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False, "tags": []})

        def _file(self, path: Path, known: bool) -> None:
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
                return
            data = path.read_bytes()
            first = 0
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                first, last = int(first), int(last or len(data) - 1)
                part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                self._send(206, data[first : last + 1], part | _headers(data))
                return
            self._send(200, data, _headers(data))

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def _headers(data: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _entry(folder: Path, path: Path) -> dict[str, object]:
    if path.is_dir():
        return {"type": "directory", "path": _name(folder, path), "oid": COMMIT, "size": 0}
    data = path.read_bytes()
    return {"type": "file", "path": _name(folder, path), "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Make `datasets` and `huggingface_hub` in this process talk to `endpoint` and keep what they fetch in `home`."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()  # an instance remembers its endpoint
