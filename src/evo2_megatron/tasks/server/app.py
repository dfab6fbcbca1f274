# SPDX-License-Identifier: Apache-2.0
"""The application: routes, a limit on what is read, and errors in one form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from importlib import metadata
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from evo2_megatron.config import UserError
from evo2_megatron.data.genome import Genome
from evo2_megatron.tasks.server.engine import Engine, still_loading
from evo2_megatron.tasks.server.jobs import Refused
from evo2_megatron.tasks.server.routes import make_router, max_body_bytes, refusal

# of ASGI
Message = Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_DESCRIPTION = (
    "Continue, score and embed DNA, and tell effects of variants, with an Evo 2 model. Routes under /biology take "
    "what NVIDIA's NIM takes."
)


def make_app(engine: Engine, genome: Genome | None = None) -> FastAPI:
    """The application in front of an engine, which may still be loading.

    Args:
        engine: What computes.
        genome: What variants are in that come without a sequence; in use until the application ends.
    """
    app = FastAPIOffline(title="evo2_serve", description=_DESCRIPTION, version=metadata.version("evo2-megatron"))
    app.include_router(make_router(engine, genome))
    app.add_middleware(_BodyLimit, engine=engine)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
        parts = error.errors()
        kind = request.headers.get("content-type", "")
        if any(part["loc"] == ("body",) for part in parts) and "json" not in kind:
            detail = f"the body has the Content-Type {kind!r}; send JSON, as application/json"
        else:
            detail = "; ".join(_readable(part) for part in parts)
        return JSONResponse({"detail": detail}, 422)

    @app.exception_handler(400)  # FastAPI's, of a body that it cannot parse
    async def no_json(_request: Request, error: HTTPException) -> JSONResponse:
        cause = str(error.__cause__ or error.detail).partition(";")[0]
        return JSONResponse({"detail": f"the body is not JSON that can be read: {cause}"}, 422)

    @app.exception_handler(UserError)
    async def wrong_value(_request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> JSONResponse:
        return refusal(error)

    return app


def _readable(error: dict[str, Any]) -> str:
    """One of pydantic's errors as ``field: what it should be``."""
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "body"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field"
    message = error["msg"]
    return f"{where}: {message[:1].lower()}{message[1:]}"


class _BodyLimit:
    """Stops reading a request that is longer than any that could be accepted."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._engine.info is None:
            # without reading what is sent
            await (self._app if scope["method"] in ("GET", "HEAD") else refusal(still_loading()))(scope, receive, send)
            return
        limit, num_read = max_body_bytes(self._engine.info), 0
        message = f"the body has more than {limit} bytes; send fewer or shorter sequences"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await refusal(Refused(413, message))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal num_read
            received = await receive()
            num_read += len(received.get("body", b""))
            if num_read > limit:
                # of another class FastAPI would make a 400
                raise HTTPException(413, message)
            return received

        await self._app(scope, counted, send)
