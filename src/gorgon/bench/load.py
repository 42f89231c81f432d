"""Load: requests against a server, by clients that each wait for their answer, or at a rate that waits for nothing."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon import interrupts
from gorgon.bench.load_client import Outcome, Transport, send
from gorgon.errors import Interrupted

MOST_PENDING = 512
"""Requests of an open loop that may wait for their answer at once; beyond that the server is overrun anyway."""
LONGEST_WAIT_S = 5.0
"""A refused client waits as Retry-After says, but not longer than this, before its next request."""


@dataclass(frozen=True)
class Level:
    """One load: `clients` in a closed loop, or `rate` requests per second in an open one.

    Attributes: requests: how many are sent in all.
    """

    requests: int
    clients: int = 1
    rate: float | None = None

    @property
    def name(self) -> str:
        """Such as '4 clients' or '2.5 per second'."""
        if self.rate is not None:
            return f"{self.rate:g} per second"
        return "1 client" if self.clients == 1 else f"{self.clients} clients"


def run_level(
    level: Level,
    bodies: Sequence[Mapping[str, Any]],
    connect: Callable[[], Transport],
    *,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Sends `level.requests` requests, going round the bodies, and returns what became of each, in order of sending.

    A closed loop's client sends its next request when it has its answer; it obeys Retry-After. An open loop sends at
    times of a Poisson process, whatever the server does: so a slow server's queue shows (no coordinated omission).
    Args: connect: makes a client's connection. done: called after each answer, from any thread.
    Raises: Interrupted when a stop was asked for.
    """
    zero = time.perf_counter()
    work: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
    outcomes: list[Outcome | None] = [None] * level.requests
    workers = level.clients if level.rate is None else min(MOST_PENDING, level.requests)

    def client() -> None:
        transport = connect()
        while (task := work.get()) is not None:
            index, due = task
            start = time.perf_counter() - zero
            outcome = send(transport, bodies[index % len(bodies)], index % len(bodies), start)
            if level.rate is not None:  # waiting for a free connection is part of the answer's time
                late = max(start - due, 0.0)
                outcome.start, outcome.seconds = due, outcome.seconds + late
                outcome.first_s += late if outcome.first_s else 0.0
            outcomes[index] = outcome
            done()
            if outcome.error == "429" and level.rate is None:
                time.sleep(min(outcome.retry_after_s, LONGEST_WAIT_S))
        transport.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    chance, due = random.Random(seed), 0.0
    for index in range(level.requests):
        if level.rate is not None:
            due += chance.expovariate(level.rate)
            while (wait := due - (time.perf_counter() - zero)) > 0:
                _poll()
                time.sleep(min(wait, 0.2))
        work.put((index, due))
    for _ in threads:
        work.put(None)
    for thread in threads:
        while thread.is_alive():
            _poll()
            thread.join(0.2)
    return [outcome for outcome in outcomes if outcome is not None]


def _poll() -> None:
    if interrupts.requested():
        raise Interrupted("stopped before the load was over; nothing is kept")
