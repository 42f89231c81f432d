"""Why the server refuses or gives up a request, each with its HTTP status."""

from __future__ import annotations

from gorgon.errors import GorgonError, ModelError


class ServeError(GorgonError):
    """A fault that has an HTTP status of its own; `code` and `kind` are OpenAI's `code` and `type`."""

    status = 500
    code: str | None = None
    kind = "server_error"


class BusyError(ServeError):
    """The queue is full."""

    status, code, kind = 429, "queue_full", "rate_limit_exceeded"

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__("the queue is full", value=f"{waiting} waiting", hint=f"retry after {retry_after_s} s")


class UnavailableError(ServeError):
    """The server loads, drains, or has failed."""

    status, code = 503, "unavailable"


class DeadlineError(ServeError):
    """The answer was not complete in time."""

    status, code, kind = 504, "deadline_exceeded", "timeout"


class CancelledError(ServeError):
    """The client went away."""

    status, code = 499, "client_closed_request"


class InternalError(ServeError):
    """A fault of ours."""

    status, code = 500, "internal_error"


class UnauthorizedError(ServeError):
    """No key, or a wrong one."""

    status, code, kind = 401, "invalid_api_key", "authentication_error"


class NoSuchModelError(ServeError):
    """A request names a model that is not served."""

    status, code, kind = 404, "model_not_found", "invalid_request_error"


class TooLargeError(ServeError):
    """The body is larger than allowed."""

    status, code, kind = 413, "body_too_large", "invalid_request_error"


def status_of(error: GorgonError) -> int:
    """A typed error's HTTP status: its own, 500 for a model that fails while it decodes, else 400."""
    if isinstance(error, ServeError):
        return error.status
    return 500 if isinstance(error, ModelError) else 400
