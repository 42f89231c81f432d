"""Every fault as an HTTP answer in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gorgon.errors import GorgonError, LimitError
from gorgon.serve.errors import BusyError, ServeError, UnauthorizedError, status_of
from gorgon.serve.schemas import ErrorBody

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong; `param` names the field.", 401: "No key, or a wrong one.",
        404: "No such model.", 413: "The body is too large.", 415: "The body is not JSON.",
        429: "The queue is full; see Retry-After.", 500: "A fault of the server or the model.",
        503: "The model is loading, or the server shuts down.", 504: "The deadline passed.",
    }.items()
}  # fmt: skip


LOGGED: ContextVar[dict[str, Any]] = ContextVar("LOGGED")
"""What the log line of the request that is being answered will say beside the usual; the gate makes one per request."""
_UNION = re.compile(r"[\[-]")


def problem(error: GorgonError) -> dict[str, Any]:
    """The error's body."""
    code = error.code if isinstance(error, ServeError) else None
    kind = error.kind if isinstance(error, ServeError) else "invalid_request_error"
    if isinstance(error, LimitError) and error.field in ("prompt", "max_tokens"):
        code = "context_length_exceeded"
    if status_of(error) >= 500 and not isinstance(error, ServeError):
        kind = "server_error"
    message = str(error) + (f"; {error.hint}" if error.hint else "")
    return _body(message, kind, error.field, code)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    message = _safe(message)
    note(message)
    return {"error": {"message": message, "type": kind, "param": param and _safe(param), "code": code}}


def note(message: str) -> None:
    """Puts into the log why the request has no whole answer; a stream's status cannot say it."""
    if (fields := LOGGED.get(None)) is not None:
        fields["error"] = message


def _safe(text: str) -> str:
    """At most 500 characters, all of which have a UTF-8."""
    return text[:500].encode("utf-8", "backslashreplace").decode()


def problem_response(error: GorgonError) -> JSONResponse:
    """The whole answer, with the headers that belong to it."""
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(problem(error), status_of(error), headers)


def invalid(errors: Sequence[Mapping[str, Any]]) -> GorgonError:
    """Pydantic's findings as one error that names the first field and tells of all."""
    # A union reports every member's complaint; the one that got furthest into the field says most, and among equals one
    # that is not about the type.
    alike = [e for e in errors if _within_body(e)[:1] == _within_body(errors[0])[:1]]
    first = max(alike, key=lambda e: (len(e["loc"]), not str(e["type"]).endswith("_type")))
    kind = str(first["type"])
    # A union's members are part of pydantic's path and no part of the body's.
    names = [str(part) for part in first["loc"] if part not in ("body", "str", "int") and not _UNION.search(str(part))]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not names and kind in ("model_attributes_type", "dict_type", "model_type"):
        message = "the body is not a JSON object; is its content type application/json?"
    elif kind == "json_invalid":
        names, message = [], "the body is not valid JSON"
    elif kind == "extra_forbidden":
        message = f"'{names[-1]}' is not a field of this request, or not supported"
    elif kind == "missing" and not names:
        message = "the request has no JSON body"
    elif kind == "value_error" and message.startswith("'") and not names:
        names = [message.split("'")[1]]
    elif names:
        message = f"'{'.'.join(names)}': {message}"
    others = list(dict.fromkeys(str(_within_body(e)[0]) for e in errors if e not in alike and _within_body(e)))
    if others:
        message += f" (and wrong: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''})"
    return GorgonError(message, field=".".join(names) or None)


def _within_body(error: Mapping[str, Any]) -> tuple[Any, ...]:
    path = tuple(error["loc"])
    return path[1:] if path[:1] == ("body",) else path


def plain_problem(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An answer for faults that never became one of our errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_body(message, kind, param, code), status)


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(GorgonError)
    async def typed(_request: Request, error: GorgonError) -> JSONResponse:
        return problem_response(error)

    @app.exception_handler(RequestValidationError)
    async def validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        found = invalid(error.errors())
        return plain_problem(400, found.problem, found.field)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        response = plain_problem(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response
