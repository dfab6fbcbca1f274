# SPDX-License-Identifier: Apache-2.0
"""A process of evo2_serve for tests, and its clients."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import requests

from processes import until

COMMAND = [sys.executable, "-c", "from evo2_megatron.cli.serve import main; main()"]


class Server:
    """A process of evo2_serve; ``get`` and ``post`` are its clients."""

    def __init__(self, checkpoint, folder, *flags):
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            command = [*COMMAND, "--ckpt-dir", str(checkpoint), "--port", "0", *flags]
            self.process = subprocess.Popen(command, stderr=log)
        until(lambda: self.process.poll() is not None or " at http" in self.log.read_text(), 120)
        self.url = re.search(r" at (http://[\d.:]+)", self.log.read_text())[1]

    def get(self, route):
        return requests.get(self.url + route, timeout=60)

    def post(self, route, body, **options):
        return requests.post(self.url + route, json=body, **({"timeout": 120} | options))

    def ask(self, route, body):
        """The answer to a request that must succeed, without the time it took."""
        response = self.post(route, body)
        assert response.status_code == 200, response.text
        return {name: value for name, value in response.json().items() if name != "elapsed_ms"}

    def generating(self):
        return self.get("/v1/metadata").json()["load"]["generating"]

    def events(self, body):
        """Kind and data of each event of a stream."""
        with self.post("/v1/generate", body | {"stream": True}, stream=True) as response:
            assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
            lines = filter(None, response.iter_lines(chunk_size=None, decode_unicode=True))
            for kind in lines:
                yield kind.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))


def arrays_of(data):
    """Of an archive in Base64."""
    with np.load(io.BytesIO(base64.b64decode(data))) as archive:
        return dict(archive)
