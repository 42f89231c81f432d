"""Gorgon's engine behind the DJL container's Python async handler.

`handle` is called with an empty input when the container starts, and then once for every request, concurrently.
GORGON_MODEL names the model directory; GORGON_PLAIN=1 decodes without drafts, for comparison, and needs no heads.
A request is an OpenAI chat request (`messages`, `max_tokens`, `stop`, `stream`) or TGI's (`inputs`, `parameters`).
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from djl_python.inputs import Input  # type: ignore[import-not-found, unused-ignore]
from djl_python.outputs import Output  # type: ignore[import-not-found, unused-ignore]

from gorgon.errors import GorgonError

MODEL = os.environ.get("GORGON_MODEL", "/opt/ml/additional-model-data-sources/model")
PLAIN = os.environ.get("GORGON_PLAIN") == "1"
CHAT_KEYS = {"messages", "model", "max_tokens", "max_completion_tokens", "stop", "stream", "temperature", "n"}
TGI_KEYS = {"inputs", "parameters", "stream"}
TGI_PARAMETERS = {"max_new_tokens", "stop", "do_sample", "return_full_text", "temperature"}

_engine: Any = None
_one_at_a_time = threading.Lock()


def _load() -> None:
    global _engine  # noqa: PLW0603 - the container keeps one process per model
    from gorgon.decode.engine import PLAIN as NO_DRAFTS
    from gorgon.decode.engine import Engine
    from gorgon.decode.load import load_engine
    from gorgon.models.backbone import load_backbone

    _engine = Engine(load_backbone(MODEL), None, NO_DRAFTS) if PLAIN else load_engine(MODEL)
    _engine.answer(_engine.backbone.tokenizer.encode("warm up"), max_new_tokens=2)


async def handle(inputs: Input) -> Output | AsyncGenerator[Output, None] | None:
    """One request. An answer in one piece, or for `"stream": true` in pieces as it decodes."""
    if inputs.is_empty():
        await asyncio.get_running_loop().run_in_executor(None, _load)
        return None
    try:
        request = _parse(inputs.get_as_json())
    except (GorgonError, ValueError) as error:
        return _error(str(error), 400)
    if request["stream"]:
        return _stream(request)
    try:
        generation = await asyncio.get_running_loop().run_in_executor(None, _answer, request)
    except GorgonError as error:
        return _error(str(error), 400)
    return _output(json.dumps(_document(request, generation, generation.text)), last=True, lines=False)


def _parse(document: Any) -> dict[str, Any]:
    """Prompt, limit, stop strings and the form of the answer; whatever we cannot honour is refused, never ignored."""
    if not isinstance(document, dict):
        raise GorgonError("the request must be a JSON object", field="body")
    from gorgon.data.chat import encode_prompt

    tokenizer = _engine.backbone.tokenizer
    if "messages" in document:
        _refuse_unknown(document, CHAT_KEYS)
        from gorgon.data.examples import check_messages

        prompt = encode_prompt(tokenizer, check_messages(document["messages"], file="request", line=1))
        limit, stop, chat = document.get("max_tokens", document.get("max_completion_tokens", 256)), "stop", True
        options = document
    elif "inputs" in document:
        _refuse_unknown(document, TGI_KEYS)
        options = document.get("parameters") or {}
        _refuse_unknown(options, TGI_PARAMETERS)
        prompt = tokenizer.encode(str(document["inputs"]), add_special_tokens=False)
        limit, stop, chat = options.get("max_new_tokens", 100), "stop", False
        if options.get("do_sample"):
            raise GorgonError("this endpoint decodes greedily", field="do_sample", value=True, allowed="false")
    else:
        raise GorgonError("the request has no prompt", field="body", allowed="'messages' or 'inputs'")
    if options.get("temperature") not in (None, 0, 0.0) or document.get("n", 1) != 1:
        raise GorgonError("this endpoint decodes greedily, one answer each", field="temperature", allowed="0")
    stops = options.get(stop) or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise GorgonError("the token limit must be a whole number", field="max_tokens", value=limit)
    return {
        "prompt": prompt, "limit": limit, "stop": stops, "chat": chat, "stream": document.get("stream") is True,
        "id": f"chatcmpl-{uuid.uuid4().hex[:24]}", "created": int(time.time()),
    }  # fmt: skip


def _refuse_unknown(document: dict[str, Any], known: set[str]) -> None:
    for key in document:
        if key not in known:
            raise GorgonError("this field is not supported", field=key, allowed=", ".join(sorted(known)))


def _answer(request: dict[str, Any]) -> Any:
    with _one_at_a_time:
        return _engine.answer(request["prompt"], max_new_tokens=request["limit"], stop=request["stop"])


def _document(request: dict[str, Any], generation: Any, text: str) -> Any:
    finish = {"end": "stop"}.get(generation.finish, generation.finish)
    facts = {"tokens_per_step": round(generation.tokens_per_step, 3), "seconds": round(generation.seconds, 4)}
    if not request["chat"]:
        details = {"finish_reason": finish, "generated_tokens": len(generation.token_ids), **facts}
        return [{"generated_text": text, "details": details}]
    prompt, completion = len(request["prompt"]), len(generation.token_ids)
    return {
        "id": request["id"], "object": "chat.completion", "created": request["created"], "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        "gorgon": facts,
    }  # fmt: skip


def _pieces(request: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Pieces of text as they are decided; the last one with the reason why the answer ends."""
    from gorgon.decode.request import Request
    from gorgon.decode.text import TextStream

    watch, shown, taken, finish = TextStream(_engine.backbone.tokenizer, request["stop"]), 0, 0, "length"
    with _one_at_a_time:
        stream = _engine.stream(Request(request["prompt"], request["limit"], request["stop"]))
        for generation in stream:
            for token in generation.token_ids[taken:]:
                watch.push(token)
            taken, finish = len(generation.token_ids), generation.finish
            if len(watch.text) > shown:
                yield watch.text[shown:], None
                shown = len(watch.text)
    yield watch.finish()[shown:], {"end": "stop"}.get(finish, finish)


async def _stream(request: dict[str, Any]) -> AsyncGenerator[Output, None]:
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()

    def work() -> None:
        try:
            for piece in _pieces(request):
                loop.call_soon_threadsafe(queue.put_nowait, piece)
        except GorgonError as error:
            loop.call_soon_threadsafe(queue.put_nowait, error)

    loop.run_in_executor(None, work)
    while True:
        piece = await queue.get()
        if isinstance(piece, GorgonError):
            yield _error(str(piece), 400)
            return
        text, finish = piece
        if request["chat"]:
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
            document: dict[str, Any] = {
                "id": request["id"], "object": "chat.completion.chunk", "created": request["created"], "model": MODEL,
                "choices": [choice],
            }  # fmt: skip
        else:
            document = {"token": {"text": text}, "finish_reason": finish}
        yield _output(json.dumps(document) + "\n", last=finish is not None, lines=True)
        if finish is not None:
            return


def _output(text: str, *, last: bool, lines: bool) -> Output:
    output = Output()
    output.add(Output.binary_encode({"data": text, "last": last}))
    output.add_property("Content-Type", "application/jsonlines" if lines else "application/json")
    return output


def _error(text: str, code: int) -> Output:
    output = Output()
    body = json.dumps({"error": {"message": text, "type": "invalid_request_error", "code": code}})
    output.add(Output.binary_encode({"data": body, "last": True, "error": text, "code": code}))
    output.add_property("Content-Type", "application/json")
    return output
