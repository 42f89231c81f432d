"""The playground's race: the same prompt decoded plainly and with drafts, both as they happen, on one clock each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from gorgon.decode.request import Request
from gorgon.errors import GorgonError
from gorgon.serve.choices import Choice, token_text
from gorgon.serve.jobs import End, Event, Submission, Tokens
from gorgon.serve.openai import sse
from gorgon.serve.problems import RESPONSES, problem
from gorgon.serve.schemas import Body, Text
from gorgon.serve.service import EventStream, Service

MOST_RACE_TOKENS = 1024


class RaceBody(Body):
    """What is raced over."""

    prompt: Text = Field(min_length=1)
    system: Text = ""
    max_tokens: int = Field(256, ge=1, le=MOST_RACE_TOKENS)


class Race:
    """Two submissions and the events of both in one stream.

    Seconds count the machine's own time for each side, so taking turns on one machine does not change who wins.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self._tokenizer = service.engine.backbone.tokenizer
        self.sides = {"plain": service.submit([request], lane="plain")}
        try:
            self.sides["medusa"] = service.submit([request])
        except GorgonError:
            self.cancel()
            raise
        self._choices = {name: service.choices(side)[0] for name, side in self.sides.items()}
        self._seconds = dict.fromkeys(self.sides, 0.0)
        self._firsts = dict.fromkeys(self.sides, 0.0)

    def cancel(self) -> None:
        """Frees both slots."""
        for side in self.sides.values():
            side.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        """Blocks of both sides as they arrive, then the comparison."""
        both: asyncio.Queue[tuple[str, Event]] = asyncio.Queue()

        async def forward(name: str, side: Submission) -> None:
            async for _, event in side.events():
                await both.put((name, event))

        tasks = [asyncio.ensure_future(forward(name, side)) for name, side in self.sides.items()]
        try:
            running = len(tasks)
            while running:
                name, event = await both.get()
                running -= isinstance(event, End)
                yield sse(self._block(name, self._choices[name], event))
            yield sse(self._comparison())
        except GorgonError as error:
            yield sse(problem(error))
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    def _block(self, name: str, choice: Choice, event: Event) -> dict[str, Any]:
        delta = choice.take(event)
        if isinstance(event, End):
            return {"side": name, "text": delta.text, "tokens": 0, "seconds": self._seconds[name],
                    "end": {"finish": event.generation.finish, "tokens": len(event.generation.token_ids),
                            "steps": len(event.generation.step_tokens),
                            "tokens_per_step": round(event.generation.tokens_per_step, 3)}}  # fmt: skip
        if not self._firsts[name]:
            self._firsts[name] = event.seconds
        self._seconds[name] = event.seconds
        return {"side": name, "text": delta.text, "tokens": len(event.ids), "seconds": event.seconds,
                "draft": self._draft(event), "own": self._own(event)}  # fmt: skip

    def _draft(self, event: Tokens) -> list[dict[str, Any]] | None:
        """The step's nodes: text, parent, and whether they were accepted; None for a root alone."""
        draft = event.draft
        if draft is None or draft.nodes == 1:
            return None
        accepted = draft.path(event.node)
        return [
            {"text": token_text(self._tokenizer, token), "parent": parent if i else None,
             "accepted": i in accepted}
            for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True))
        ]  # fmt: skip

    def _own(self, event: Tokens) -> str | None:
        """The token that the model chose after its last confirmed draft; None where the answer ended before it."""
        if event.draft is None or len(event.ids) <= event.draft.depth(event.node):
            return None
        return token_text(self._tokenizer, event.ids[-1])

    def _comparison(self) -> dict[str, Any]:
        plain, medusa = (self._choices[name].generation for name in ("plain", "medusa"))
        assert plain is not None and medusa is not None
        speed = {}
        for name, generation in (("plain", plain), ("medusa", medusa)):
            seconds = self._seconds[name]
            speed[name] = len(generation.token_ids) / seconds if seconds else 0.0
        ratio = self._seconds["plain"] / self._seconds["medusa"] if self._seconds["medusa"] else 1.0
        return {"done": {"identical": plain.token_ids == medusa.token_ids, "speedup": round(ratio, 3),
                         "tokens_per_s": speed}}  # fmt: skip


class RaceStream(EventStream):
    """The race's events; both sides end when the page is closed."""

    def __init__(self, race: Race) -> None:
        super().__init__(race.stream(), race.sides["medusa"])
        self._submissions = list(race.sides.values())


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/playground", responses=RESPONSES)

    @routes.post("/race", response_model=None, include_in_schema=False)
    async def race(_http: HttpRequest, body: RaceBody) -> Response:
        messages = [{"role": "system", "content": body.system}] if body.system else []
        prompt = await service.encode_chat([*messages, {"role": "user", "content": body.prompt}])
        limit = min(body.max_tokens, service.room(prompt))
        return RaceStream(Race(service, service.check(Request(prompt, limit), "max_tokens")))

    return routes
