# SPDX-License-Identifier: Apache-2.0
"""evo2_serve that is to end before it has begun."""

import os
import signal
import threading
from pathlib import Path

from evo2_megatron.tasks.server import serve as serve_module
from evo2_megatron.tasks.server.engine import ModelSettings


class _Loading:
    """An engine that is told to end as it begins, and loads for a minute, or until ``end``."""

    info = None
    is_idle = True
    end = threading.Event()

    def __init__(self, *_, **__):
        self.end.clear()

    def run(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self.end.wait(60)

    def stop(self):
        pass


def test_a_signal_ends_a_server_that_loads(monkeypatch):
    monkeypatch.setattr(serve_module, "Engine", _Loading)
    statuses = []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), _Loading.end.set()))
    serve_module.serve(ModelSettings(ckpt_dir=Path("model")), port=0)
    assert statuses == [0]
