# SPDX-License-Identifier: Apache-2.0
"""Serve a model: the socket, the two threads, and how they end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn

from evo2_megatron.config import UserError
from evo2_megatron.data.genome import Genome
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.server.app import make_app
from evo2_megatron.tasks.server.engine import Engine, ModelInfo, ModelSettings

logger = logging.getLogger(__name__)

_STALLED_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_PORT = "evo2_serve/port"


def serve(settings: ModelSettings, *, fasta: Path | None = None, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until SIGTERM or SIGINT; what is under way is finished, and nothing new is taken.

    Call it from the main thread, on all processes. The first of those that share a copy of the model listens; on the
    port of several copies the kernel gives each new connection to one of them.

    Args:
        settings: Which model.
        fasta: Genome that variants may be about; plain, gzip or bgzip.
        host: Name or address of an interface of this machine.
        port: 0 takes a free one; the log says which.

    Raises:
        UserError: The port is taken, or the genome cannot be read, or the model not loaded.
    """
    settings.parallel.check_world_size(distributed.world_size())
    if distributed.rank() % settings.tensor_parallel_size > 0:
        Engine(settings).run()
        return
    start = time.perf_counter()
    if distributed.world_size() == settings.tensor_parallel_size:
        listener = _listen(host, port)
    else:
        listener = _listen_together(host, port)
    name, number = listener.getsockname()[:2]
    url = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"

    is_ready = threading.Event()

    def ready(info: ModelInfo) -> None:
        is_ready.set()
        logger.info(
            "Ready after %.1f s at %s (%s/docs): sequences up to %d tokens, %d at a time%s",
            time.perf_counter() - start, url, url, info.max_seq_length, settings.max_batch_size,
            f" in each of {info.num_copies} copies" if info.num_copies > 1 else "",
        )  # fmt: skip

    with listener, contextlib.nullcontext() if fasta is None else Genome(fasta) as genome:
        engine = Engine(settings, on_ready=ready)
        # None: log lines go where ours go
        config = uvicorn.Config(make_app(engine, genome), log_config=None, access_log=False, lifespan="off")
        server = _Server(config, engine)
        with _ending(server), concurrent.futures.ThreadPoolExecutor(1, "engine") as threads:
            work = threads.submit(engine.run)
            work.add_done_callback(lambda _: setattr(server, "should_exit", True))
            try:
                server.run(sockets=[listener])
            finally:
                engine.stop()
            if not (is_ready.is_set() or work.done()):
                # nothing was taken; loading takes its time, and waits for processes that may have ended already
                logger.info("Stopped before the model was loaded")
                os._exit(0)
            work.result()
    logger.info("Stopped")


class _Server(uvicorn.Server):
    """Ends when clients have what they asked for, or take no more of it.

    By itself uvicorn waits for every connection, also for one that never sends the rest of its request.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        watch = asyncio.ensure_future(self._give_up())
        await super().shutdown(sockets)
        watch.cancel()

    async def _give_up(self) -> None:
        """Leave those who have made no progress for ``_STALLED_SECONDS``, though the engine waits for nothing."""
        since, before = time.monotonic(), -1
        while time.monotonic() - since < _STALLED_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            unsent = sum(each.transport.get_write_buffer_size() for each in self.server_state.connections)
            if unsent != before or not self._engine.is_idle:
                since, before = time.monotonic(), unsent
        stalled = list(self.server_state.connections)
        logger.warning("Leaving %d clients who neither send nor take anything", len(stalled))
        for each in stalled:
            each.transport.abort()
        self.force_exit = True


@contextlib.contextmanager
def _ending(server: _Server) -> Iterator[None]:
    """Signals before uvicorn catches them; and after, where it raises again what has ended it in order."""

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen_together(host: str, port: int) -> socket.socket:
    """A socket for each copy of the model, on one port: the first process sees that it is free, or which one is."""
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    if rank == 0:
        with _listen(host, port) as alone:
            port = alone.getsockname()[1]
        listener = _listen(host, port, shared=True)
        store.set(_PORT, str(port))
        return listener
    store.wait([_PORT])
    return _listen(host, int(store.get(_PORT)), shared=True)


def _listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024, reuse_port=shared)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; give a name or address of this machine") from None
    except OSError as error:
        reason = os.strerror(error.errno)  # strerror has the address in it, again
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None
