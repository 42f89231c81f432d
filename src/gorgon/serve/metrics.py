"""What the server counts and times, for Prometheus; the engine's thread and the event loop both write."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gorgon.decode.slots import Running
from gorgon.errors import GorgonError
from gorgon.serve.jobs import Job
from gorgon.serve.memory import KvPlan

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
TOKENS_PER_STEP = (1, 1.25, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
FORGETTING = 0.1
"""Weight of the newest answer in the running mean that Retry-After is made from."""


class Meter:
    """All metrics in a registry of their own, so that several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.recent_answer_s = 1.0
        self._queue = Gauge("gorgon_queue_length", "Answers that wait for a slot.", registry=r)
        self._active = Gauge("gorgon_active_rows", "Answers that have a slot.", registry=r)
        self._kv_used = Gauge("gorgon_kv_tokens_used", "Cache rows in use.", registry=r)
        self._kv_total = Gauge("gorgon_kv_tokens_total", "Cache rows that there are.", registry=r)
        self._kv_bytes = Gauge("gorgon_kv_bytes", "Memory of the key-value cache.", registry=r)
        self._prompt = Counter("gorgon_prompt_tokens", "Prompt tokens read.", registry=r)
        self._reused = Counter(
            "gorgon_reused_prompt_tokens", "Prompt tokens whose rows were there already.", registry=r
        )
        self._output = Counter("gorgon_output_tokens", "Tokens of answers.", registry=r)
        self._steps = Counter("gorgon_steps", "Decoding steps.", registry=r)
        self._rows = Counter("gorgon_step_rows", "Answers that took part in steps, summed over steps.", registry=r)
        self._answers = Counter("gorgon_answers", "Answers by how they ended.", ["finish"], registry=r)
        self._requests = Counter("gorgon_http_requests", "HTTP requests.", ["route", "status"], registry=r)
        self._step_s = Histogram("gorgon_step_seconds", "Time of a step.", buckets=STEP_SECONDS, registry=r)
        self._wait_s = Histogram("gorgon_queue_seconds", "Time until a slot was free.", buckets=SECONDS, registry=r)
        self._first_s = Histogram("gorgon_first_token_seconds", "Time to the first token, queue included.",
                                  buckets=SECONDS, registry=r)  # fmt: skip
        self._token_s = Histogram("gorgon_token_seconds", "Time per token after the first.",
                                  buckets=STEP_SECONDS, registry=r)  # fmt: skip
        self._answer_s = Histogram("gorgon_answer_seconds", "Time of a whole answer, queue included.",
                                   buckets=SECONDS, registry=r)  # fmt: skip
        self._per_step = Histogram("gorgon_tokens_per_step", "Tokens per step of each complete answer.",
                                   buckets=TOKENS_PER_STEP, registry=r)  # fmt: skip

    def planned(self, plan: KvPlan) -> None:
        """The cache was made."""
        self._kv_total.set(plan.sequences * plan.capacity)
        self._kv_bytes.set(plan.total_bytes)

    def load(self, queued: int, active: int, kv_tokens: int) -> None:
        """How busy the server is now."""
        self._queue.set(queued)
        self._active.set(active)
        self._kv_used.set(kv_tokens)

    def step(self, rows: int, seconds: float) -> None:
        """A step was made."""
        self._steps.inc()
        self._rows.inc(rows)
        self._step_s.observe(seconds)

    def seated(self, job: Job) -> None:
        """A job got a slot."""
        self._wait_s.observe(time.monotonic() - job.submitted)

    def prompt_read(self, running: Running) -> None:
        """A prompt is complete."""
        reused = running.generation.reused_tokens
        self._prompt.inc(len(running.request.prompt_ids) - reused)
        self._reused.inc(reused)

    def refused(self, error: GorgonError) -> None:
        """A job ended before it had a slot."""
        self._answers.labels(type(error).__name__).inc()

    def left(self, job: Job, running: Running, error: GorgonError | None) -> None:
        """A job gave its slot back."""
        generation = running.generation
        self._output.inc(len(generation.token_ids))
        if error is not None:
            self._answers.labels(type(error).__name__).inc()
            return
        self._answers.labels(generation.finish).inc()
        seconds = time.monotonic() - job.submitted
        self.recent_answer_s += FORGETTING * (seconds - self.recent_answer_s)
        self._answer_s.observe(seconds)
        decoding = generation.seconds - generation.first_token_s
        self._first_s.observe(max(seconds - decoding, 0.0))
        if len(generation.token_ids) > 1:
            self._token_s.observe(decoding / (len(generation.token_ids) - 1))
        if generation.step_tokens:
            self._per_step.observe(generation.tokens_per_step)

    def request(self, route: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
