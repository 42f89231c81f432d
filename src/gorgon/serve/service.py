"""What every HTTP interface needs: checked requests in, running jobs out, and an end when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gorgon.data.chat import Message, encode_prompt
from gorgon.decode.engine import Engine
from gorgon.decode.grammar import Grammar
from gorgon.decode.request import Request
from gorgon.errors import GorgonError, LimitError, ModelError
from gorgon.serve.choices import Choice
from gorgon.serve.errors import CancelledError, NoSuchModelError
from gorgon.serve.jobs import End, Job, Submission
from gorgon.serve.metrics import Meter
from gorgon.serve.problems import LOGGED, note
from gorgon.serve.scheduler import Scheduler
from gorgon.serve.settings import ServeConfig

LONG_TEXT = 20_000
"""Characters from which on a text is tokenized beside the event loop."""


class Service:
    """The scheduler as HTTP routes use it. Lives on the event loop."""

    def __init__(self, config: ServeConfig, scheduler: Scheduler, meter: Meter, name: str) -> None:
        self.config, self.scheduler, self.meter, self.name = config, scheduler, meter, name
        self.created = int(time.time())

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises: UnavailableError while it is not ready.
        """
        return self.scheduler.check_ready()

    def check_model(self, name: str | None) -> None:
        """Raises: NoSuchModelError unless the name is the served model's, or none is given."""
        if name is not None and name != self.name:
            raise NoSuchModelError("there is no such model", field="model", value=name, allowed=self.name)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat.

        Raises: GorgonError when the model's chat template refuses it.
        """
        tokenizer = self.engine.backbone.tokenizer
        try:
            if sum(len(m["content"]) for m in messages) < LONG_TEXT:
                return encode_prompt(tokenizer, messages)
            return await asyncio.to_thread(encode_prompt, tokenizer, messages)
        except ModelError as error:
            raise GorgonError(error.problem, field="messages", value=error.value) from error

    async def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around it."""
        tokenizer = self.engine.backbone.tokenizer
        if len(text) < LONG_TEXT:
            ids = tokenizer(text)["input_ids"]
        else:
            ids = (await asyncio.to_thread(tokenizer, text))["input_ids"]
        return [int(i) for i in ids]

    async def grammar(self, kind: Literal["json", "regex"], text: Any, field: str) -> Grammar:
        """What an answer is to be held to; made beside the event loop, for a schema may take a while.

        Args: text: a JSON Schema or None, or a pattern. field: what an error names.
        Raises: GrammarError when there is no such grammar.
        """
        _ = self.engine  # ready, so there are grammars
        assert self.scheduler.grammars is not None
        return await asyncio.to_thread(getattr(self.scheduler.grammars, kind), text, field=field)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that an answer to this prompt may have.

        Raises: LimitError when the prompt leaves none, or is longer than the server takes.
        """
        context, longest = self.scheduler.context, self.config.max_prompt
        most = context - 1 if longest is None else min(context - 1, longest)
        if len(prompt_ids) > most:
            limit = "the context" if most == context - 1 else "this server's limit for prompts"
            raise LimitError(f"the prompt does not fit into {limit}", field="prompt",
                             value=f"{len(prompt_ids)} tokens", allowed=f"at most {most}")  # fmt: skip
        return context - len(prompt_ids)

    def check(self, request: Request, limit_field: str) -> Request:
        """The request, if the engine can take it.

        Raises: LimitError when prompt and answer exceed the context; what `Request.limit` and `check_vocabulary` raise.
        """
        backbone = self.engine.backbone
        request.limit(self.scheduler.context, backbone.vocab_size)
        request.sampling.check_vocabulary(backbone.vocab_size)
        room = self.room(request.prompt_ids)
        if request.max_new_tokens > room:
            raise LimitError(
                "prompt and answer do not fit into the context", field=limit_field, value=request.max_new_tokens,
                allowed=f"at most {room} after a prompt of {len(request.prompt_ids)} tokens",
            )  # fmt: skip
        return request

    def submit(self, requests: Sequence[Request], *, lane: str = "main") -> Submission:
        """Queues the requests; the index among them is the stream of their random numbers.

        Raises: LimitError when there are more than the server could ever hold; what `Scheduler.submit` raises.
        """
        most = self.config.slots + self.config.queue
        if len(requests) > most:
            raise LimitError("the request asks for more answers than the server holds", field="n",
                             value=len(requests), allowed=f"at most {most}")  # fmt: skip
        deadline = time.monotonic() + self.config.deadline_s
        request_id = LOGGED.get({}).get("request_id", "")
        jobs = [Job(r, deadline, stream=i, lane=lane, request_id=request_id) for i, r in enumerate(requests)]
        return self.scheduler.submit(jobs)

    def choices(self, submission: Submission) -> list[Choice]:
        """One empty answer per job."""
        backbone = self.engine.backbone
        return [Choice(backbone.tokenizer, backbone.end_ids, job) for job in submission.jobs]

    async def finished(self, http: HttpRequest, submission: Submission) -> list[Choice]:
        """All answers, complete.

        Raises: the first error that ended one, after freeing the others; CancelledError when the client left.
        """
        choices = self.choices(submission)

        async def collect() -> None:
            async for index, event in submission.events():
                if isinstance(event, End):
                    choices[index].take(event)

        try:
            await _unless_gone(http.receive, collect())
        finally:
            submission.cancel()
        return choices


async def _unless_gone(receive: Receive, work: Any) -> None:
    """Awaits the work, but gives it up when the client closes the connection.

    Raises: CancelledError then.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledError("the client closed the connection")
        task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the jobs end when the client leaves. A slow reader is waited for, by nobody else."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], submission: Submission) -> None:
        self._events, self._submissions = events, [submission]
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end."""
        try:
            await _unless_gone(receive, self._send(send))
        except (CancelledError, OSError) as error:
            note(str(error))  # nobody else is left to be told
        finally:
            for submission in self._submissions:
                submission.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
