"""A job is one answer to be made; a submission is the jobs of one HTTP request and what they send back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from gorgon.core.draft import Draft
from gorgon.decode.logprobs import Logprob
from gorgon.decode.request import Generation, Request
from gorgon.errors import GorgonError


@dataclass(frozen=True)
class Tokens:
    """What a step, or the end of the prefill, added to an answer.

    Attributes:
        ids, logprobs: the new tokens; log-probabilities if they were asked for.
        draft, node: what the step verified and the deepest node it accepted; None and 0 after the prefill.
        seconds: time that the machine has worked on this answer's lane since the answer got its slot.
    """

    ids: list[int]
    logprobs: list[Logprob]
    draft: Draft | None
    node: int
    seconds: float


@dataclass(frozen=True)
class End:
    """The last event of a job: a complete answer, or why there is none."""

    generation: Generation
    error: GorgonError | None = None


Event = Tokens | End


@dataclass(eq=False)
class Job:
    """One answer. The scheduler's thread reads it; `cancelled` is the only field that others write after submission.

    Attributes:
        stream: tells the answers of one request apart, for sampling.
        deadline: on `time.monotonic`'s clock.
        lane: 'main', or 'plain' for plain decoding in a slot of its own.
        request_id: the HTTP request's, for the log.
    """

    request: Request
    deadline: float
    stream: int = 0
    lane: str = "main"
    request_id: str = ""
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    submission: Submission | None = None
    index: int = 0


class Submission:
    """The jobs of one HTTP request; lives on the event loop."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        for index, job in enumerate(self.jobs):
            job.submission, job.index = self, index

    def put(self, index: int, event: Event) -> None:
        """Hands an event in; on the event loop only."""
        self._events.put_nowait((index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(job's index, event) in the order they happen, until every job has ended."""
        open_jobs = len(self.jobs)
        while open_jobs:
            index, event = await self._events.get()
            open_jobs -= isinstance(event, End)
            yield index, event

    def cancel(self) -> None:
        """Frees the slots of jobs that have not ended, within one step."""
        for job in self.jobs:
            job.cancelled = True
