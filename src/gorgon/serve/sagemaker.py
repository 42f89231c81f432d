"""SageMaker's contract: GET /ping and POST /invocations, on the same process as OpenAI's routes.

`/invocations` takes a chat or completions body as OpenAI has them, and TGI's `{"inputs", "parameters"}`, told apart by
their fields. TGI's answers follow TGI 2.x and 3.x, stop strings included: they stay part of `generated_text` there.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

from gorgon.core.sampling import GREEDY, Sampling
from gorgon.decode.grammar import Grammar
from gorgon.decode.logprobs import Logprob
from gorgon.decode.request import Generation, Request
from gorgon.errors import GorgonError
from gorgon.serve.choices import token_text
from gorgon.serve.errors import ServeError, status_of
from gorgon.serve.jobs import End, Submission
from gorgon.serve.openai import answer_chat, answer_completion, sse
from gorgon.serve.problems import RESPONSES, invalid, problem
from gorgon.serve.schemas import Body, ChatBody, CompletionBody, StopText, Text
from gorgon.serve.service import EventStream, Service

DEFAULT_NEW_TOKENS = 100
"""TGI's own default."""


class NamedSchema(Body):
    """TGI's newer way to give a schema."""

    name: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class TgiGrammar(Body):
    """What the answer is held to: a JSON Schema, as an object or as its text, or a regular expression."""

    type: Literal["json", "json_schema", "regex"]
    value: Any

    async def grammar(self, service: Service) -> Grammar:
        """The grammar.

        Raises: GrammarError when there is no such grammar; GorgonError for a value that does not go with the type.
        """
        field, value = "parameters.grammar.value", self.value
        if self.type == "regex":
            if not isinstance(value, str):
                raise GorgonError("the pattern is not text", field=field)
            return await service.grammar("regex", value, field)
        if self.type == "json_schema":
            try:
                return await service.grammar("json", NamedSchema.model_validate(value).schema_, field)
            except ValidationError as error:
                raise GorgonError(invalid(error.errors()).problem, field=field) from error
        try:
            schema = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise GorgonError("the schema is not valid JSON", field=field) from error
        if not isinstance(schema, dict):
            raise GorgonError("the schema is not an object", field=field)
        return await service.grammar("json", schema, field)


class TgiParameters(Body):
    """TGI's options. Those that Gorgon does not have are refused unless they change nothing."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "best_of": (1,), "decoder_input_details": (False,), "top_n_tokens": (0,), "truncate": (), "typical_p": (1.0,),
        "watermark": (False,), "adapter_id": (),
    }  # fmt: skip
    best_of: int | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None
    adapter_id: str | None = None

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[StopText], Field(max_length=16)] | None = None
    grammar: TgiGrammar | None = None
    return_full_text: bool | None = None
    details: bool | None = None

    def sampling(self) -> Sampling:
        """The engine's options: TGI samples when `do_sample` says so, or when a filter or temperature asks for it."""
        for name, neutral in self.unsupported.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise GorgonError(f"'{name}' is not supported", field=f"parameters.{name}")
        penalties = {"repetition_penalty": self.repetition_penalty, "frequency_penalty": self.frequency_penalty}
        given: dict[str, Any] = {k: v for k, v in penalties.items() if v is not None}
        filters: dict[str, Any] = {k: v for k in ("top_k", "top_p") if (v := getattr(self, k)) is not None}
        if not (self.do_sample or self.temperature not in (None, 1.0) or filters):
            return Sampling(**given) if given else GREEDY
        return Sampling(temperature=self.temperature or 1.0, seed=self.seed, **filters, **given)


class TgiBody(Body):
    """TGI's body."""

    inputs: Text
    parameters: TgiParameters | None = None
    stream: bool | None = None


class Tgi:
    """One TGI request: how its answer is written."""

    def __init__(self, service: Service, body: TgiBody) -> None:
        self._service, self._body = service, body
        self._options = body.parameters or TgiParameters()
        self._tokenizer = service.engine.backbone.tokenizer

    async def answer(self, http: HttpRequest) -> Response:
        """The whole answer, or the stream that is asked for."""
        options, service = self._options, self._service
        prompt = await service.encode_text(self._body.inputs)
        service.room(prompt)
        asked = DEFAULT_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
        wants_logprobs = bool(self._body.stream or options.details)
        sampling = options.sampling()
        grammar = None if options.grammar is None else await options.grammar.grammar(service)
        logprobs = 0 if wants_logprobs else None
        request = Request(prompt, asked, options.stop or [], sampling, logprobs=logprobs, grammar=grammar)
        submission = service.submit([service.check(request, "parameters.max_new_tokens")])
        if self._body.stream:
            return EventStream(self._stream(submission), submission)
        generation = (await service.finished(http, submission))[0].generation
        assert generation is not None
        document: dict[str, Any] = {"generated_text": self._text(generation)}
        if options.details:
            ids = zip(generation.token_ids, generation.logprobs, strict=True)
            tokens = [self._token(token, one) for token, one in ids]
            document["details"] = {**self._ending(generation), "prefill": [], "tokens": tokens}
        return JSONResponse([document])

    async def _stream(self, submission: Submission) -> AsyncIterator[bytes]:
        index, held = 0, None
        try:
            async for _, event in submission.events():
                if isinstance(event, End):
                    if event.error is not None:
                        raise event.error
                    text, details = self._text(event.generation), self._ending(event.generation)
                    assert held is not None
                    yield sse({**held, "generated_text": text, "details": details})
                    return
                for token, one in zip(event.ids, event.logprobs, strict=True):
                    if held is not None:  # the last token goes with the whole text, so one is always kept back
                        yield sse({**held, "generated_text": None, "details": None})
                    index += 1
                    held = {"index": index, "token": self._token(token, one)}
        except GorgonError as error:
            yield sse(tgi_problem(error))

    def _text(self, generation: Generation) -> str:
        ids = generation.token_ids[: -1 if generation.finish == "end" else None]
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return self._body.inputs + text if self._options.return_full_text else text

    def _token(self, token: int, one: Logprob) -> dict[str, Any]:
        special = token in self._tokenizer.all_special_ids
        return {"id": token, "text": token_text(self._tokenizer, token), "logprob": one.logprob, "special": special}

    def _ending(self, generation: Generation) -> dict[str, Any]:
        reason = {"end": "eos_token", "stop": "stop_sequence", "length": "length"}[generation.finish]
        return {"finish_reason": reason, "generated_tokens": len(generation.token_ids), "seed": self._options.seed}


def tgi_problem(error: GorgonError) -> dict[str, Any]:
    """TGI's error body."""
    kind = "overloaded" if status_of(error) == 429 else "generation" if status_of(error) >= 500 else "validation"
    return {"error": problem(error)["error"]["message"], "error_type": kind}


async def invoke(http: HttpRequest, service: Service) -> Response:
    """Reads the body, whatever its content type, and hands it to the interface that it belongs to."""
    try:
        document = json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise GorgonError("the body is not valid JSON in UTF-8") from error
    if not isinstance(document, dict):
        raise GorgonError("the body is not a JSON object")
    try:
        if "messages" in document:
            return await answer_chat(http, service, ChatBody.model_validate(document))
        if "prompt" in document:
            return await answer_completion(http, service, CompletionBody.model_validate(document))
        if "inputs" not in document:
            raise GorgonError("the body has none of 'messages', 'prompt' and 'inputs'", field="inputs")
        body = TgiBody.model_validate(document)
    except ValidationError as error:
        raise invalid(error.errors()) from error
    try:
        return await Tgi(service, body).answer(http)
    except GorgonError as error:
        if isinstance(error, ServeError) and error.status in (401, 503):
            raise
        status = status_of(error)
        headers = {"retry-after": str(error.retry_after_s)} if hasattr(error, "retry_after_s") else None
        return JSONResponse(tgi_problem(error), 422 if status == 400 else status, headers)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/ping", responses={503: RESPONSES[503]})
    async def ping() -> dict[str, str]:
        service.scheduler.check_alive()
        return {"status": "ready"}

    body: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": {
        "type": "object", "description": "A body of /v1/chat/completions or /v1/completions, or TGI's.",
    }}}}}  # fmt: skip

    @routes.post("/invocations", response_model=None, openapi_extra=body,
                 responses={**RESPONSES, 422: {"description": "TGI's word for a wrong request."}})  # fmt: skip
    async def invocations(http: HttpRequest) -> Response:
        return await invoke(http, service)

    return routes
