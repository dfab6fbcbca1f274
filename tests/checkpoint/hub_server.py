# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face hub on this machine: the real client library downloads from it."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves files of repositories, all at one commit that is also called ``main``. Use it as a context manager."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        """``repositories``: name of a repository: name of a file: its bytes. One named ``gated`` is not given out."""
        outer = self
        self.downloads: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(send_body=False)

            def do_GET(self) -> None:
                self.answer(send_body=True)

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, send_body: bool) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                model_info = parts[:2] == ["api", "models"]
                owner_name = "/".join(parts[2:4] if model_info else parts[:2])
                revision = parts[5] if model_info and len(parts) > 5 else "main" if model_info else parts[3]
                files = repositories.get(owner_name)
                if files is None:
                    self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"", send_body)
                elif "gated" in owner_name:
                    self.reply(403, {"X-Error-Code": "GatedRepo"}, b"", send_body)
                elif revision not in ("main", COMMIT):
                    self.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"", send_body)
                elif model_info:
                    info = {"id": owner_name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    self.reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), send_body)
                elif parts[4] not in files:
                    self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"", send_body)
                else:
                    data = files[parts[4]]
                    tag = f'"{hashlib.sha256(data).hexdigest()}"'
                    if send_body:
                        outer.downloads.append(parts[4])
                    self.reply(200, {"ETag": tag, "X-Repo-Commit": COMMIT}, data, send_body)

            def reply(self, status: int, headers: dict[str, str], body: bytes, send_body: bool) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if send_body:
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
