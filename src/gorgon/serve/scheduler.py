"""The scheduler: one thread that owns the engine, and a bounded queue in front of it.

The event loop hands jobs over under a lock; events come back in one `call_soon_threadsafe` per turn. Two lanes share
the machine when plain decoding races Medusa in the playground: the lane that has had less time takes the next turn, so
each gets half of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from gorgon.decode.engine import Engine
from gorgon.decode.grammar import Grammars
from gorgon.errors import GorgonError
from gorgon.serve.errors import BusyError, InternalError, UnavailableError
from gorgon.serve.jobs import Job, Submission
from gorgon.serve.lane import Lane, Sent
from gorgon.serve.memory import KvPlan, plan_kv
from gorgon.serve.metrics import Meter
from gorgon.serve.settings import ServeConfig
from gorgon.serve.warmup import warm_up

State = Literal["loading", "ready", "draining", "failed", "stopped"]
STUCK_S = 30.0
"""A turn takes milliseconds; one that takes longer than this will hardly end."""
MOST_FAULTS = 3
"""Turns that may fail in a row before the server calls itself failed, to be replaced by whoever watches it."""

log = logging.getLogger("gorgon.serve")


class Scheduler:
    """Runs jobs. `submit`, `state` and the other short methods may be called from any thread."""

    def __init__(self, load: Callable[[], Engine], config: ServeConfig, meter: Meter) -> None:
        """Args: load: makes the engine; called on the scheduler's own thread."""
        self.config, self.meter = config, meter
        self.state: State = "loading"
        self.warming = False  # whether the model is there and only its first steps are missing
        self.failure: Exception | None = None
        self.engine: Engine | None = None
        self.plan: KvPlan | None = None
        self.grammars: Grammars | None = None
        self.lanes: dict[str, Lane] = {}
        self._load = load
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_end: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="gorgon-engine", daemon=True)
        self._turn_began: float | None = None
        self._faults = 0
        self._stopping = False

    def start(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Begins to load. Args: on_end: called on the event loop if the engine cannot be loaded."""
        self._loop, self._on_end = asyncio.get_running_loop(), on_end
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """Whether a turn takes so long that it will hardly end."""
        began = self._turn_began
        return self.state != "loading" and began is not None and time.monotonic() - began > STUCK_S

    @property
    def queued(self) -> int:
        """Jobs that wait for a slot."""
        return sum(len(lane.waiting) for lane in self.lanes.values())

    @property
    def active(self) -> int:
        """Jobs that have a slot."""
        return sum(lane.active for lane in self.lanes.values())

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that a slot holds."""
        assert self.plan is not None
        return self.plan.context

    def check_ready(self) -> Engine:
        """The engine, once it is there.

        Raises: UnavailableError saying what keeps the server from answering.
        """
        if self.state == "ready" and self.engine is not None and not self.stuck:
            return self.engine
        loading = "the server is warming up" if self.warming else "the model is loading"
        reason = {"loading": loading, "draining": "the server is shutting down",
                  "failed": "the engine has failed", "stopped": "the server has stopped",
                  "ready": "the engine is stuck"}[self.state]  # fmt: skip
        raise UnavailableError(reason)

    def check_alive(self) -> None:
        """Raises: UnavailableError unless the server answers requests, or finishes those it has."""
        if self.state != "draining" or self.stuck:
            self.check_ready()

    def submit(self, jobs: Sequence[Job]) -> Submission:
        """Queues all of the jobs, or none.

        Raises: UnavailableError; BusyError when the queue has no room for all.
        """
        self.check_ready()
        submission = Submission(jobs)
        with self._changed:
            for name in {job.lane for job in jobs}:
                self.check_room(name, sum(job.lane == name for job in jobs))
            for job in jobs:
                self.lanes[job.lane].waiting.append(job)
            self._changed.notify()
        return submission

    def check_room(self, name: str = "main", new: int = 1) -> None:
        """Raises: BusyError when a lane has no place for that many new jobs."""
        if (lane := self.lanes.get(name)) is not None:
            free = max(lane.slots.count - lane.active, 0)
            if len(lane.waiting) + new > self.config.queue + free:
                raise BusyError(len(lane.waiting), self._retry_after(lane))

    def _retry_after(self, lane: Lane) -> int:
        """Seconds until a place in the queue should be free, by how long answers took lately."""
        turns = (len(lane.waiting) + 1) / lane.slots.count
        return min(max(math.ceil(turns * self.meter.recent_answer_s), 1), 60)

    def drain(self) -> None:
        """From now on new jobs are refused; those that were taken go on for up to `drain_s`, then end with an error."""
        if self.state == "ready":
            self.state = "draining"
            for lane in self.lanes.values():
                lane.until = time.monotonic() + self.config.drain_s

    def stop(self, timeout: float = 2.0) -> None:
        """Ends the thread after its turn; jobs that are left end with an error.

        Args: timeout: seconds that a turn gets.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._prepare()
        except Exception as error:  # noqa: BLE001 - told to the event loop, which ends the process with it
            self.failure, self.state = error, "failed"
            self._call(self._on_end)
            return
        end: State = "stopped"
        try:
            while (lane := self._next_lane()) is not None:
                self._take_turn(lane)
        except Exception:
            log.exception("the engine's thread ends")
            end = "failed"
        self.state = end  # before the jobs end, so that no new one is left behind
        for lane in self.lanes.values():
            self._send(lane.fail(UnavailableError(f"the server has {end}")))

    def _take_turn(self, lane: Lane) -> None:
        self._turn_began = time.monotonic()
        try:
            sent = lane.turn()
            self._faults = 0
        except Exception:
            sent = self._recover(lane)
            fields = {"request_ids": sorted({job.request_id for job, _ in sent})}
            log.exception("a step failed; these requests end with an error", extra={"fields": fields})
        self._turn_began = None
        self.meter.load(self.queued, self.active, sum(lane.tokens_held for lane in self.lanes.values()))
        self._send(sent)

    def _next_lane(self) -> Lane | None:
        """The busy lane that has had the least time; waits for one. None when it is time to stop."""
        lanes = list(self.lanes.values())
        with self._changed:
            idle = [lane for lane in lanes if not lane.busy]
            while len(idle) == len(lanes) and not self._stopping:
                self._changed.wait()
                idle = [lane for lane in lanes if not lane.busy]
            if self._stopping:
                return None
        busy = [lane for lane in lanes if lane.busy]
        least = min(lane.spent for lane in busy)
        for lane in idle:  # who did not want the machine has no claim on it later
            lane.spent = max(lane.spent, least)
        return min(busy, key=lambda lane: lane.spent)

    def _recover(self, lane: Lane) -> Sent:
        """After a failed turn: ends the lane's jobs and gives it fresh slots; too many in a row end the service."""
        self._faults += 1
        sent = lane.fail(InternalError("the step failed", hint="the server's log says why"))
        try:
            lane.slots = lane.slots.engine.slots(lane.slots.count, lane.slots.context, reuse=self.config.reuse_prefixes)
        except Exception:
            log.exception("no fresh slots could be made")
            self._faults = MOST_FAULTS
        if self._faults >= MOST_FAULTS:
            self.state = "failed"
        return sent

    def _send(self, sent: Sent) -> None:
        if sent:
            self._call(lambda: _hand_out(sent))

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: the process is about to end and nobody listens
            log.debug("the event loop has ended")

    def _prepare(self) -> None:
        engine = self.engine = self._load()
        self.warming = True
        plan = plan_kv(engine, self.config)
        reuse = self.config.reuse_prefixes
        lanes = {
            "main": Lane(engine.slots(plan.slots, plan.context, reuse=reuse), self.config.prefill_chunk, self.meter)
        }
        if self.config.playground:
            plain = engine.plain().slots(1, plan.context, reuse=reuse)
            lanes["plain"] = Lane(plain, self.config.prefill_chunk, self.meter)
        for name, lane in lanes.items():
            warm_up(lane.slots, full=self.config.warmup and name == "main")
        self.grammars = _grammars(engine, prepare=self.config.warmup)
        self.plan, self.lanes = plan, lanes
        self.meter.planned(plan)
        if self.state == "loading":
            self.state = "ready"


def _grammars(engine: Engine, *, prepare: bool) -> Grammars:
    backbone = engine.backbone
    made = Grammars(backbone.tokenizer, backbone.vocab_size, backbone.end_ids)
    try:
        if prepare:
            made.prepare()
    except GorgonError as error:  # a request that asks for a grammar will be told
        log.warning("no grammars: %s", error)
    return made


def _hand_out(sent: Sent) -> None:
    for job, event in sent:
        assert job.submission is not None
        job.submission.put(job.index, event)
