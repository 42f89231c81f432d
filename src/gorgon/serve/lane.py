"""A lane: the engine's slots and the jobs that wait for them or have them; one turn is some prefill and one step.

Between two steps at most `chunk` tokens are read, of at most as many prompts as there are slots: neither a long prompt
nor many short ones delay the others' next tokens by more than that. Jobs get slots in the order in which they came.
"""

from __future__ import annotations

import math
import time
from collections import deque

from gorgon.decode.request import Generation
from gorgon.decode.slots import Running, Slots
from gorgon.errors import GorgonError
from gorgon.serve.errors import CancelledError, DeadlineError, UnavailableError
from gorgon.serve.jobs import End, Event, Job, Tokens
from gorgon.serve.metrics import Meter

Sent = list[tuple[Job, Event]]


class Seat:
    """A job that has a slot: how much of its answer was sent, and the lane's clock when it began."""

    def __init__(self, job: Job, began: float) -> None:
        self.job, self.began = job, began
        self.sent = self.steps = 0


class Lane:
    """Jobs in order of arrival over one `Slots`. Only the scheduler's thread calls it, `waiting` apart."""

    def __init__(self, slots: Slots, chunk: int, meter: Meter) -> None:
        self.slots, self._chunk, self._meter = slots, chunk, meter
        self.waiting: deque[Job] = deque()
        self.spent = 0.0  # seconds of the machine that this lane has had
        self.until = math.inf  # when every job ends, on `time.monotonic`'s clock; another thread sets it for a drain
        self._seats: dict[Running, Seat] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._seats)

    @property
    def active(self) -> int:
        """Jobs that have a slot."""
        return len(self._seats)

    @property
    def tokens_held(self) -> int:
        """Cache rows in use."""
        return sum(max(r.length, r.read) for r in self._seats)

    def turn(self) -> Sent:
        """Lets go of who left or is late, reads up to a chunk of prompts, and makes one step for all who decode."""
        start = time.monotonic()
        sent: Sent = []
        self._clear(sent, start)
        self._read_prompts(sent)
        self.spent += time.monotonic() - start
        start = time.monotonic()
        batch = self.slots.step()
        if batch:
            seconds = time.monotonic() - start
            self.spent += seconds
            self._meter.step(len(batch), seconds)
        for running in batch:
            self._report(running, sent)
        return sent

    def _clear(self, sent: Sent, now: float) -> None:
        for job in list(self.waiting):
            if (error := self._over(job, now)) is not None:
                self.waiting.remove(job)
                self._refuse(job, sent, error)
        for running, seat in list(self._seats.items()):
            if (error := self._over(seat.job, now)) is not None:
                self._leave(running, sent, error)

    def _over(self, job: Job, now: float) -> GorgonError | None:
        """Why the job ends before its answer is complete, if it does."""
        if job.cancelled:
            return CancelledError("the client closed the connection")
        if job.deadline < now:
            seconds = job.deadline - job.submitted
            return DeadlineError("the answer was not complete in time", field="deadline_s", value=f"{seconds:g} s")
        if self.until < now:
            return UnavailableError("the server is shutting down")
        return None

    def _read_prompts(self, sent: Sent) -> None:
        budget, prompts = self._chunk, self.slots.count  # a prompt costs a pass, however few of its tokens are new
        while budget > 0 and prompts > 0:
            if self.slots.entering is None and not self._seat_next(sent):
                return
            running = self.slots.entering
            assert running is not None
            before = running.read
            if self.slots.read_prompt(budget):
                prompts -= 1
                self._meter.prompt_read(running)
                self._report(running, sent)
            budget -= running.read - before

    def _seat_next(self, sent: Sent) -> bool:
        while self.waiting and self.slots.free:
            job = self.waiting.popleft()
            try:
                running = self.slots.admit(job.request, stream=job.stream)
            except GorgonError as error:  # the HTTP side checks first; this is the engine's own word
                self._refuse(job, sent, error)
                continue
            self._seats[running] = Seat(job, self.spent)
            self._meter.seated(job)
            return True
        return False

    def _report(self, running: Running, sent: Sent) -> None:
        """Sends what is new, and the end if it has come."""
        seat, generation = self._seats[running], running.generation
        fresh = generation.token_ids[seat.sent :]
        if fresh:
            stepped = len(generation.step_tokens) > seat.steps
            sent.append((seat.job, Tokens(
                fresh, generation.logprobs[seat.sent :], running.draft if stepped else None,
                generation.step_nodes[-1] if stepped else 0, self.spent - seat.began,
            )))  # fmt: skip
            seat.sent, seat.steps = len(generation.token_ids), len(generation.step_tokens)
        if running.done:
            self._leave(running, sent, running.error)

    def _refuse(self, job: Job, sent: Sent, error: GorgonError) -> None:
        """Ends a job that never had a slot."""
        self._meter.refused(error)
        sent.append((job, End(Generation(), error)))

    def _leave(self, running: Running, sent: Sent, error: GorgonError | None) -> None:
        seat = self._seats.pop(running)
        self.slots.drop(running)
        self._meter.left(seat.job, running, error)
        sent.append((seat.job, End(running.generation, error)))

    def fail(self, error: GorgonError) -> Sent:
        """Ends every job with the same error."""
        sent: Sent = []
        for running in list(self._seats):
            self._leave(running, sent, error)
        while self.waiting:
            self._refuse(self.waiting.popleft(), sent, error)
        return sent
