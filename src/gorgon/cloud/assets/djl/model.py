"""Gorgon's server behind the DJL container's Python async handler.

`handle` is called with an empty input when the container starts, and then once for every request, all of them on one
event loop. A request goes to the application that `gorgon serve` runs, as POST /invocations with no socket in between,
and the application's scheduler decodes the requests that are there together. Bodies, answers and limits are therefore
the server's own, and so are the settings, as environment variables: GORGON_MODEL, GORGON_DRAFTS, GORGON_SLOTS, ...

What is the container's: a streamed answer is JSON lines, where the server writes server-sent events, and an error is a
code and a text, of which the container makes the body {"code": ..., "error": ...}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from djl_python.inputs import Input  # type: ignore[import-not-found, unused-ignore]
from djl_python.outputs import Output  # type: ignore[import-not-found, unused-ignore]

MODEL = "/opt/ml/additional-model-data-sources/model"
WHOLE, LINES = "application/json", "application/jsonlines"
FAILED = 424
"""The container's code for an answer that breaks off: its status line is sent by then."""
log = logging.getLogger("gorgon.serve")

_app: Any = None


async def handle(inputs: Input) -> Output | AsyncGenerator[Output, None] | None:
    """One request: its answer in one piece, or for `"stream": true` in pieces as it decodes."""
    if inputs.is_empty():
        await _start()
        return None
    exchange = _Exchange(inputs.get_as_bytes())
    status, kind = await exchange.head()
    if kind.startswith("text/event-stream"):
        return _stream(exchange)
    text = b"".join([piece async for piece in exchange.body()]).decode()
    return _output(text) if status == 200 else _error(text, status)


async def _start() -> None:
    """Loads and warms the model up. Raises what that raises: the container then says that it did not come up."""
    global _app  # noqa: PLW0603 - the container keeps one process per model
    from gorgon.config import build
    from gorgon.errors import GorgonError
    from gorgon.serve.app import make_app
    from gorgon.serve.gate import start_log
    from gorgon.serve.metrics import Meter
    from gorgon.serve.scheduler import Scheduler
    from gorgon.serve.server import SWITCH_S, load
    from gorgon.serve.settings import ServeConfig, environment_settings

    config = build(ServeConfig, {"model": MODEL, "playground": False, **environment_settings()}, step="serve")
    if config.api_key is not None:
        raise GorgonError("an endpoint has AWS's own access control", field="GORGON_API_KEY", allowed="unset")
    sys.setswitchinterval(SWITCH_S)
    start_log()
    meter = Meter()
    scheduler = Scheduler(lambda: load(config), config, meter)
    _app = make_app(config, scheduler, meter)
    scheduler.start()
    while scheduler.state == "loading":
        await asyncio.sleep(0.05)
    if scheduler.failure is not None:
        raise scheduler.failure
    log.info("ready", extra={"fields": {"model": config.model, "plan": str(scheduler.plan)}})


class _Exchange:
    """One request through the application, by its own protocol, ASGI."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = bytes(body)
        self._sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._over = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/invocations", "raw_path": b"/invocations", "query_string": b"", "root_path": "",
            "headers": [(b"content-type", WHOLE.encode())], "client": None, "server": None,
        }  # fmt: skip
        try:
            await _app(scope, self._receive, self._sent.put)
        except Exception:
            log.exception("a request failed")
        finally:
            self._sent.put_nowait(None)

    async def _receive(self) -> dict[str, Any]:
        if self._body is None:
            await self._over.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def head(self) -> tuple[int, str]:
        """Status and content type, as soon as they are known."""
        message = await self._sent.get()
        if message is None:
            self._sent.put_nowait(None)
            return 500, WHOLE
        return message["status"], dict(message["headers"]).get(b"content-type", b"").decode()

    async def body(self) -> AsyncIterator[bytes]:
        """The pieces of the body as they come. Whoever stops listening ends the answer."""
        try:
            while (message := await self._sent.get()) is not None:
                yield message.get("body", b"")
                if not message.get("more_body"):
                    return
        finally:
            self._over.set()


async def _stream(exchange: _Exchange) -> AsyncGenerator[Output, None]:
    """Each event as a JSON line of its own, then an empty last piece; an error is the last piece itself."""
    rest = b""
    async for piece in exchange.body():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            text = event.removeprefix(b"data: ").decode()
            if text == "[DONE]":
                continue
            if "error" in json.loads(text):
                yield _error(text, FAILED, LINES)
                return
            yield _output(text + "\n", LINES, last=False)
    yield _output("", LINES)


def _output(text: str, kind: str = WHOLE, *, last: bool = True, **more: Any) -> Output:
    output = Output()
    output.add(Output.binary_encode({"data": text, "last": last, **more}))
    output.add_property("Content-Type", kind)
    return output


def _error(text: str, code: int, kind: str = WHOLE) -> Output:
    """The container's error, from the body that the server has for it: OpenAI's shape, or TGI's."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, LookupError, TypeError):
        error = text or "the request failed; the log says why"
    return _output("", kind, error=error["message"] if isinstance(error, dict) else str(error), code=code)
