"""SIGTERM and SIGINT as a flag that long loops poll, so that they can write a checkpoint and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = False


def _request(signum: int, _frame: FrameType | None) -> None:
    global _requested  # signal handlers have no other way to leave word
    if _requested:  # the second signal means now
        raise KeyboardInterrupt
    _requested = True


@contextmanager
def graceful() -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT sets the flag and the second one interrupts at once.

    Works in the main thread only (Python's rule for signal handlers). The earlier handlers come back at the end.
    """
    global _requested
    _requested = False
    before = {s: signal.signal(s, _request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """True once a stop was asked for; loops call this between two units of work."""
    return _requested
