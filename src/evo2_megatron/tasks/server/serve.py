# SPDX-License-Identifier: Apache-2.0
"""Serve a model: the socket, the two threads, and how they end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.server.app import make_app
from evo2_megatron.tasks.server.engine import Engine, ModelInfo, ModelSettings

logger = logging.getLogger(__name__)


def serve(settings: ModelSettings, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGTERM or SIGINT; what is under way is finished, and nothing new is taken.

    Call it from the main thread of a single process.

    Args:
        settings: Which model.
        host: Name or address of an interface of this machine.
        port: 0 takes a free one; the log says which.

    Raises:
        UserError: The port is taken, or the model cannot be loaded.
    """
    if distributed.world_size() > 1:
        raise UserError("evo2_serve runs in one process, on one device; start it without torchrun")
    start = time.perf_counter()
    listener = _listen(host, port)
    name, number = listener.getsockname()[:2]
    url = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"

    def ready(info: ModelInfo) -> None:
        logger.info(
            "Ready after %.1f s at %s (%s/docs): sequences up to %d tokens, %d at a time",
            time.perf_counter() - start, url, url, info.max_seq_length, settings.max_batch_size,
        )  # fmt: skip

    with listener:
        engine = Engine(settings, on_ready=ready)
        # None: log lines go where ours go
        config = uvicorn.Config(make_app(engine), log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        with _already_ended(), concurrent.futures.ThreadPoolExecutor(1, "engine") as threads:
            work = threads.submit(engine.run)
            work.add_done_callback(lambda _: setattr(server, "should_exit", True))
            try:
                server.run(sockets=[listener])
            finally:
                engine.stop()
            work.result()
    logger.info("Stopped")


@contextlib.contextmanager
def _already_ended() -> Iterator[None]:
    """uvicorn catches a signal, ends in order and then raises it again: by then there is nothing left to end."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; give a name or address of this machine") from None
    except OSError as error:
        reason = os.strerror(error.errno)  # strerror has the address in it, again
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None
