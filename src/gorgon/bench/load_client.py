"""One request to a server that writes text, timed as its answer arrives.

Three interfaces: OpenAI's chat completions, the same body at SageMaker's /invocations, and TGI's inputs and parameters
there. Each request streams, so the time to the first token can be seen. `cloud.runtime` has a transport of its own for
endpoints that only AWS's signed requests reach.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from gorgon.errors import GorgonError, RefusedError

Api = Literal["openai", "invocations", "tgi"]
PATHS: dict[str, str] = {"openai": "/v1/chat/completions", "invocations": "/invocations", "tgi": "/invocations"}
HINTS = {401: "give the server's key with --api-key", 404: "do --api and --model fit this server?",
         503: "is it still loading?"}  # fmt: skip


@dataclass
class Outcome:
    """What became of one request. Times are seconds; `start` is on the clock of the run.

    Attributes:
        first_s, seconds: from the request's start to the first text and to the end; 0 when there was none.
        tokens: as the server counts them; the number of events with text where it does not say.
        steps: decoding steps, from a server that reports speculation; 0 elsewhere.
        error: why there is no whole answer, such as '429' or 'timeout'; '' when there is one.
    """

    prompt: int
    start: float
    first_s: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    text: str = ""
    error: str = ""
    retry_after_s: float = 0.0
    pieces: list[str] = field(default_factory=list, repr=False)


class Transport(Protocol):
    """Sends a body and yields the lines of the answer's event stream."""

    def lines(self, body: Mapping[str, Any]) -> Iterator[bytes]:
        """Raises: RefusedError for a status other than 200; OSError or http.client.HTTPException when it breaks off."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class HttpTransport:
    """One kept connection. Not for several threads at once."""

    def __init__(self, url: str, api: Api, api_key: str | None, timeout_s: float) -> None:
        """Raises: GorgonError for a URL that is not http or https."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GorgonError("not a URL of a server", field="url", value=url, hint="such as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + PATHS[api]
        self._headers = {"content-type": "application/json", "accept": "text/event-stream"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def lines(self, body: Mapping[str, Any]) -> Iterator[bytes]:
        """As the protocol says."""
        fresh = self._connection.sock is None
        try:
            response = self._send(body)
        except (http.client.RemoteDisconnected, ConnectionError):
            if fresh:
                raise
            self._connection.close()  # a kept connection may have been closed meanwhile; a new one tells
            response = self._send(body)
        if response.status != 200:
            text = response.read().decode("utf-8", "replace")
            try:
                retry = float(response.headers.get("retry-after") or 0)
            except ValueError:
                retry = 0.0
            raise RefusedError(response.status, reason(text), retry_after_s=retry, hint=HINTS.get(response.status))
        while line := response.readline():
            yield line

    def _send(self, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        self._connection.request("POST", self._path, json.dumps(body).encode(), self._headers)
        if self._connection.sock is not None:
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._connection.getresponse()

    def close(self) -> None:
        """As the protocol says."""
        self._connection.close()


def reason(text: str) -> str:
    """The message in an error's body, as OpenAI's, TGI's and FastAPI's servers write it; all of the text elsewhere."""
    try:
        found = json.loads(text)
        found = found.get("error") or found.get("detail") or found.get("message") or text
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, AttributeError, KeyError):
        return text


def body_of(
    messages: Sequence[Mapping[str, str]], api: Api, *, model: str | None, max_tokens: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """A greedy, streaming request. TGI gets the messages' text alone: it knows no chats at this route."""
    if api == "tgi":
        text = "\n".join(m["content"] for m in messages)
        return {
            "inputs": text,
            "stream": True,
            "parameters": {"max_new_tokens": max_tokens, "do_sample": False, **extra},
        }
    body: dict[str, Any] = {
        "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **extra,
    }  # fmt: skip
    return body if model is None else {"model": model, **body}


def send(transport: Transport, body: Mapping[str, Any], prompt: int, start: float) -> Outcome:
    """Sends one request and reads its answer to the end; whatever goes wrong is part of the outcome."""
    outcome = Outcome(prompt, start)
    began = time.perf_counter()
    ended = False
    try:
        for line in transport.lines(body):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                continue
            ended = _take(outcome, json.loads(data), time.perf_counter() - began) or ended
    except RefusedError as error:
        outcome.error, outcome.retry_after_s = str(error.status), error.retry_after_s
    except GorgonError as error:  # such as credentials that have expired
        outcome.error = type(error).__name__
    except TimeoutError:
        outcome.error = "timeout"
    except (OSError, http.client.HTTPException) as error:
        outcome.error = type(error).__name__
    except ValueError:
        outcome.error = "not JSON"
    outcome.seconds = time.perf_counter() - began
    outcome.text = "".join(outcome.pieces)
    outcome.tokens = outcome.tokens or len(outcome.pieces)
    if not outcome.error and not ended:
        outcome.error = "cut off"
    if outcome.error:
        transport.close()
    return outcome


def _take(outcome: Outcome, event: Any, now: float) -> bool:
    """Reads one event; True when it is a stream's last one."""
    if not isinstance(event, dict):
        return False
    if event.get("error"):
        error = event["error"]
        outcome.error = str(error.get("code") or error.get("type")) if isinstance(error, dict) else "error"
        return True
    text, last = "", False
    if "token" in event:  # TGI
        last = event.get("generated_text") is not None
        text = "" if event["token"].get("special") else str(event["token"].get("text", ""))
        if last:
            outcome.tokens = int((event.get("details") or {}).get("generated_tokens") or 0)
    for choice in event.get("choices") or ():
        text += str((choice.get("delta") or {}).get("content") or choice.get("text") or "")
        last = last or choice.get("finish_reason") is not None  # not every server ends with [DONE]
    usage = event.get("usage")
    if usage:
        outcome.tokens = int(usage.get("completion_tokens") or 0)
        outcome.steps = int((usage.get("speculation") or {}).get("steps") or 0)
    if text:
        outcome.first_s = outcome.first_s or now
        outcome.pieces.append(text)
    return last
