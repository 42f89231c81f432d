"""The gate: every request gets an id, shows its key, has a bounded body, and leaves a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gorgon.errors import GorgonError
from gorgon.serve.errors import InternalError, TooLargeError, UnauthorizedError
from gorgon.serve.metrics import Meter
from gorgon.serve.problems import LOGGED, note, problem_response

OPEN = frozenset({"/", "/ping", "/health", "/metrics"})
"""Paths that need no key: probes, and the page, which asks for the key itself."""
ROUTES = frozenset({*OPEN, "/v1/models", "/v1/completions", "/v1/chat/completions", "/invocations", "/playground/race",
                    "/openapi.json"})  # fmt: skip
"""Labels in the metrics; anything else is counted as one, so that strangers cannot make labels."""
QUIET = frozenset({"/ping", "/health", "/metrics"})
"""Paths that are asked every few seconds; they are logged only when their status is another one than before."""
CROWDED = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths that are refused before their body is looked at while no place is left: a crowd of refused clients must not
take the interpreter from the engine."""
MOST_DISCARDED = 8
"""Bodies up to this many times the limit are read to their end and dropped, so that the client hears why."""
log = logging.getLogger("gorgon.serve")


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, message and fields."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "message": record.getMessage(), **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def start_log() -> None:
    """The server's log goes to stderr, one JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("gorgon.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "gorgon.serve" else logging.WARNING)


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, meter: Meter, api_key: str | None, max_body_bytes: int, check_room: Callable[[], None]
    ) -> None:
        """Args: check_room: raises BusyError while no answer can be queued."""
        self._app, self._meter, self._max_body_bytes, self._check_room = app, meter, max_body_bytes, check_room
        self._probed = dict.fromkeys(QUIET, 200)
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id") or headers.get("x-amzn-sagemaker-inference-id") or ""
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        start, status = time.monotonic(), 499
        fields: dict[str, object] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        LOGGED.set(fields)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._pass(scope, headers, receive, sending)
        except GorgonError as error:
            await problem_response(error)(scope, receive, sending)
        except asyncio.CancelledError:  # the drain is over; the connection is closed behind us
            note("cut off: the server has stopped")
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if status == 499:
                await problem_response(InternalError("the server made a mistake"))(scope, receive, sending)
        finally:
            path = scope["path"]
            self._meter.request(path if path in ROUTES else "other", status)
            if self._probed.get(path) != status:
                if path in QUIET:
                    self._probed[path] = status
                fields |= {"status": status, "seconds": round(time.monotonic() - start, 4)}
                log.info("request", extra={"fields": fields})

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if self._key is not None and scope["path"] not in OPEN:
            word, _, key = headers.get("authorization", "").partition(" ")
            if word.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                raise UnauthorizedError("the API key is missing or wrong", field="authorization",
                                        hint="send 'Authorization: Bearer KEY'")  # fmt: skip
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body, ended = await self._body(receive)
        if scope["path"] in CROWDED:
            self._check_room()

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message: Message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        if ended:
            await self._app(scope, replay, send)

    async def _body(self, receive: Receive) -> tuple[bytes | None, bool]:
        """The whole body, and whether it came to its end before the client left.

        Raises: TooLargeError; the body is then read on, up to a bound, and dropped.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, False
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_body_bytes:
                parts.append(part)
            if not message.get("more_body") or size > MOST_DISCARDED * self._max_body_bytes:
                break
        if size > self._max_body_bytes:
            raise TooLargeError("the body is too large", field="body", value=f"{size} bytes or more",
                                allowed=f"at most {self._max_body_bytes}")  # fmt: skip
        return b"".join(parts), True
