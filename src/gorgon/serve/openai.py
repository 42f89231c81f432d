"""OpenAI's interface: /v1/models, /v1/completions and /v1/chat/completions, streamed or whole."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from gorgon.core.sampling import Sampling
from gorgon.decode.grammar import Grammar
from gorgon.decode.logprobs import Logprob
from gorgon.decode.request import Generation, Request
from gorgon.errors import GorgonError, SamplingError
from gorgon.serve.choices import Choice, Delta, token_text
from gorgon.serve.jobs import Submission
from gorgon.serve.problems import RESPONSES, problem
from gorgon.serve.schemas import (
    ChatAnswer,
    ChatBody,
    CompletionAnswer,
    CompletionBody,
    ResponseFormat,
    SamplingBody,
)
from gorgon.serve.service import EventStream, Service

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default for text completions; a chat may go on to the end of the context."""
STREAMS = {"description": "The answer; with 'stream': true, server-sent events.",
           "content": {"text/event-stream": {"schema": {"type": "string"}}}}  # fmt: skip


def sampling_of(body: SamplingBody) -> Sampling:
    """The engine's options. At temperature 0 the filters cannot remove the likeliest token, so they change nothing.

    Raises: SamplingError naming a field out of range.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    filters = {} if temperature == 0 else {"top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p}
    given = {
        **filters, "seed": body.seed, "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty, "repetition_penalty": body.repetition_penalty,
        "logit_bias": None if body.logit_bias is None else _bias(body.logit_bias),
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Sampling(temperature=temperature, **options)


def _bias(bias: dict[str, float]) -> dict[int, float]:
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise SamplingError("a biased token is not a token id", field="logit_bias", value=token,
                                allowed="integers, 0 or more")  # fmt: skip
        if not -100 <= value <= 100:
            raise SamplingError("a token's bias is out of range", field="logit_bias", value={token: value},
                                allowed="-100 to 100")  # fmt: skip
    return {int(token): value for token, value in bias.items()}


async def grammar_of(service: Service, asked: ResponseFormat | None) -> Grammar | None:
    """What `response_format` holds the answer to.

    Raises: GrammarError naming the field.
    """
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None:
        return await service.grammar("json", None, "response_format")
    return await service.grammar("json", asked.json_schema.schema_, "response_format.json_schema.schema")


async def requests_of(
    service: Service, body: SamplingBody, prompts: Sequence[Sequence[int]], limit: int | None, logprobs: int | None
) -> list[Request]:
    """One checked request per answer: all answers to the first prompt, then to the second.

    Args: limit: tokens per answer; None is as many as the context holds.
    """
    sampling, stop = sampling_of(body), body.stop or []
    grammar = await grammar_of(service, body.response_format)
    made = []
    for prompt in prompts:
        room = service.room(prompt)
        request = Request(
            prompt, room if limit is None else limit, [stop] if isinstance(stop, str) else list(stop), sampling,
            ignore_end=bool(body.ignore_eos), logprobs=logprobs, grammar=grammar,
        )  # fmt: skip
        made += [service.check(request, "max_tokens")] * (body.n or 1)
    return made


def usage_of(generations: Sequence[Generation], prompts: Sequence[Sequence[int]], reused: int) -> dict[str, Any]:
    """Token counts of all answers together; tokens per step is their mean over steps."""
    steps = sum(len(g.step_tokens) for g in generations)
    stepped = sum(sum(g.step_tokens) for g in generations)
    prompt, made = sum(map(len, prompts)), sum(len(g.token_ids) for g in generations)
    return {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": reused},
        "speculation": {"steps": steps, "tokens_per_step": round(stepped / steps, 4) if steps else 1.0},
    }  # fmt: skip


class Format(ABC):
    """How one kind of answer is written: a chat's or a text completion's."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, service: Service, body: SamplingBody, prompts: Sequence[Sequence[int]]) -> None:
        self.service, self.body, self.prompts = service, body, prompts
        self.tokenizer = service.engine.backbone.tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def envelope(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """What every answer and chunk has."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name,
                "choices": choices, **more}  # fmt: skip

    @abstractmethod
    def whole(self, index: int, generation: Generation) -> dict[str, Any]:
        """A complete choice."""

    @abstractmethod
    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk's choice."""

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Choices of the chunk before the first token, if there is one."""
        return []

    def answer(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The complete answer."""
        generations = [choice.generation for choice in choices if choice.generation is not None]
        whole = [self.whole(i, generation) for i, generation in enumerate(generations)]
        return self.envelope(self.kind, whole, usage=self.usage(choices))

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Counts over all choices."""
        generations = [choice.generation for choice in choices if choice.generation is not None]
        answers = self.body.n or 1
        reused = sum(g.reused_tokens for g in generations[::answers])
        return usage_of(generations, self.prompts, reused)

    async def stream(self, submission: Submission) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error after the first byte is an event too."""
        choices = self.service.choices(submission)
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        extra = {"usage": None} if with_usage else {}
        opening = self.opening(len(choices))
        if opening:
            yield sse(self.envelope(self.chunk_kind, opening, **extra))
        try:
            async for index, event in submission.events():
                delta = choices[index].take(event)
                if delta.text or delta.tokens or delta.finish:
                    yield sse(self.envelope(self.chunk_kind, [self.part(index, delta)], **extra))
        except GorgonError as error:
            yield sse(problem(error))
            return
        if with_usage:
            yield sse(self.envelope(self.chunk_kind, [], usage=self.usage(choices)))
        yield b"data: [DONE]\n\n"

    def pairs(self, generation: Generation) -> list[tuple[int, Logprob]]:
        """A complete answer's tokens with their log-probabilities, the end token left out."""
        ids = generation.token_ids[: -1 if generation.finish == "end" else None]
        return list(zip(ids, generation.logprobs, strict=False))


class ChatFormat(Format):
    """A chat's answer."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, index: int, generation: Generation) -> dict[str, Any]:
        """A message."""
        finish = "length" if generation.finish == "length" else "stop"
        message = {"role": "assistant", "content": generation.text, "refusal": None}
        logprobs = self._logprobs(self.pairs(generation))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text."""
        content = {} if delta.finish and not delta.text else {"content": delta.text}
        logprobs = self._logprobs(delta.tokens) if delta.tokens else None
        return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """OpenAI's first chunk: the role and no text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(count)]

    def _logprobs(self, pairs: list[tuple[int, Logprob]]) -> dict[str, Any] | None:
        if not getattr(self.body, "logprobs", None):
            return None
        content = []
        for token, one in pairs:
            likeliest = [self._entry(t, value) for t, value in one.likeliest]
            content.append({**self._entry(token, one.logprob), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode())}


class CompletionFormat(Format):
    """A text completion."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, body: SamplingBody, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(service, body, prompts)
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, generation: Generation) -> dict[str, Any]:
        """A text."""
        finish = "length" if generation.finish == "length" else "stop"
        return {"index": index, "text": generation.text, "logprobs": self._logprobs(index, self.pairs(generation)),
                "finish_reason": finish}  # fmt: skip

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text."""
        logprobs = self._logprobs(index, delta.tokens) if delta.tokens else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def _logprobs(self, index: int, pairs: list[tuple[int, Logprob]]) -> dict[str, Any] | None:
        if getattr(self.body, "logprobs", None) is None:
            return None
        tokens, offsets = [token_text(self.tokenizer, token) for token, _ in pairs], []
        for text in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        top = [{token_text(self.tokenizer, t): value for t, value in one.likeliest} for _, one in pairs]
        return {"tokens": tokens, "token_logprobs": [one.logprob for _, one in pairs], "top_logprobs": top,
                "text_offset": offsets}  # fmt: skip


def sse(document: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def reply(http: HttpRequest, service: Service, form: Format, requests: list[Request]) -> Response:
    """Submits, and answers as the body asks."""
    submission = service.submit(requests)
    if form.body.stream:
        return EventStream(form.stream(submission), submission)
    return JSONResponse(form.answer(await service.finished(http, submission)))


async def answer_chat(http: HttpRequest, service: Service, body: ChatBody) -> Response:
    """The whole of /v1/chat/completions."""
    service.check_model(body.model)
    prompt = await service.encode_chat([message.as_dict() for message in body.messages])
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = await requests_of(service, body, [prompt], limit, logprobs)
    return await reply(http, service, ChatFormat(service, body, [prompt]), requests)


async def answer_completion(http: HttpRequest, service: Service, body: CompletionBody) -> Response:
    """The whole of /v1/completions."""
    service.check_model(body.model)
    given = body.prompt
    if isinstance(given, str):
        prompts: list[list[int]] = [await service.encode_text(given)]
    elif isinstance(given[0], int):
        prompts = [[int(i) for i in given]]  # the schema lets no mixture through
    else:
        prompts = [await service.encode_text(p) if isinstance(p, str) else list(p) for p in given]
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    requests = await requests_of(service, body, prompts, limit, body.logprobs)
    return await reply(http, service, CompletionFormat(service, body, prompts), requests)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", responses=RESPONSES)

    def card() -> dict[str, Any]:
        service.scheduler.check_ready()
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "gorgon",
                "max_model_len": service.scheduler.context}  # fmt: skip

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card()

    @routes.post("/chat/completions", response_model=None, responses={200: {"model": ChatAnswer, **STREAMS}})
    async def chat(http: HttpRequest, body: ChatBody) -> Response:
        return await answer_chat(http, service, body)

    @routes.post("/completions", response_model=None, responses={200: {"model": CompletionAnswer, **STREAMS}})
    async def completions(http: HttpRequest, body: CompletionBody) -> Response:
        return await answer_completion(http, service, body)

    return routes
