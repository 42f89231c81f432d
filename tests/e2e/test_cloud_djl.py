"""The DJL container's handler: many requests on one event loop, decoded together, each as if it were alone."""

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest

import gorgon.cloud
from gorgon.core.sampling import Sampling
from gorgon.decode.request import Request
from gorgon.errors import ConfigError, GorgonError, ModelError
from gorgon.serve import server
from gorgon.serve.metrics import Meter
from tests.cloud_plane.djl_front import Front, load_handler
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, make_engine

ASSETS = Path(gorgon.cloud.__file__).parent / "assets" / "djl"
SETTINGS = {"SLOTS": "4", "CONTEXT": "512", "WARMUP": "false", "QUEUE": "8", "STEPS": "eager", "MODEL": "embedded"}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture
def front(engine, monkeypatch):
    """Starts a container's process around the handler: a front per call, with settings of its own."""
    monkeypatch.setattr(server, "load", lambda config: engine)
    made = []

    def start(**settings):
        for name, value in {**SETTINGS, **settings}.items():
            monkeypatch.setenv(f"GORGON_{name}", value)
        made.append(Front(load_handler(ASSETS)))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def rows(monkeypatch):
    """How many answers took part in each step."""
    seen, original = [], Meter.step
    monkeypatch.setattr(
        Meter, "step", lambda self, count, seconds: (seen.append(count), original(self, count, seconds))
    )
    return seen


def answer(front, body):
    """Status, content type and the body's documents: one, or one per line."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    pieces = list(front.pieces(data))
    text = b"".join(piece for _, _, piece, _ in pieces).decode()
    return pieces[0][0], pieces[0][1], [json.loads(line) for line in text.splitlines()]


def text_of(documents):
    first = documents[0]
    if isinstance(first, list):
        return first[0]["generated_text"]
    if "message" in first["choices"][0]:
        return first["choices"][0]["message"]["content"]
    return "".join(d["choices"][0]["delta"].get("content") or "" for d in documents)


def test_requests_at_once_are_decoded_together_and_answered_as_if_alone(front, engine, rows):
    """More requests than slots; whole and streamed, greedy and sampled, chat and TGI."""
    tokenizer = engine.backbone.tokenizer
    asked, expected = [], []
    for number, question in enumerate(QUESTIONS):
        ids, sampled = chat_ids(engine, question), number % 3 == 2
        options = {"temperature": 1.3, "seed": number} if sampled else {"temperature": 0}
        asked.append(ask(question, stream=number % 2 == 1, max_tokens=40, ignore_eos=True, **options))
        sampling = Sampling(temperature=options["temperature"], seed=options.get("seed"))
        expected.append(alone(engine, Request(ids, 40, sampling=sampling, ignore_end=True)).text)
    inputs = tokenizer.decode(chat_ids(engine, QUESTIONS[0]))
    asked.append({"inputs": inputs, "parameters": {"max_new_tokens": 12, "do_sample": False}})
    expected.append(alone(engine, Request(tokenizer(inputs)["input_ids"], 12)).text)

    running, found = front(), [None] * len(asked)

    def one(number):
        found[number] = answer(running, asked[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [status for status, _, _ in found] == [200] * len(asked)
    assert [text_of(documents) for _, _, documents in found] == expected
    assert max(rows) > 1, "one at a time"
    assert max(rows) <= 4
    kinds = [kind for _, kind, _ in found]
    assert kinds == ["application/jsonlines" if body.get("stream") else "application/json" for body in asked]
    alone_again = answer(running, asked[0])
    assert text_of(alone_again[2]) == expected[0]


def test_a_stream_comes_while_it_decodes_and_ends_with_its_reason(front):
    running = front()
    whole = answer(running, ask())[2][0]
    pieces = list(running.pieces(json.dumps(ask(stream=True, stream_options={"include_usage": True})).encode()))
    assert [last for *_, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.endswith(b"\n") and piece.count(b"\n") == 1 for _, _, piece, _ in pieces[:-1])
    *documents, usage = [json.loads(piece) for _, _, piece, _ in pieces[:-1]]
    assert len(documents) > 4
    assert text_of(documents) == whole["choices"][0]["message"]["content"]
    assert documents[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    tgi = {"inputs": "SELECT name FROM", "parameters": {"max_new_tokens": 3}, "stream": True}
    events = answer(running, tgi)[2]
    assert [e["index"] for e in events] == list(range(1, len(events) + 1))
    assert events[-1]["generated_text"] == answer(running, {**tgi, "stream": False})[2][0][0]["generated_text"]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"{", 400, "not valid JSON"), (b"[]", 400, "not a JSON object"), ({}, 400, "none of 'messages'"),
        ({"messages": []}, 400, "messages"), (ask(top_kk=3), 400, "top_kk"), (ask(max_tokens=0), 400, "max_tokens"),
        (ask(max_tokens=10**6, stream=True), 400, "do not fit"), (ask(model="other"), 404, "no such model"),
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, "'watermark' is not supported"),
    ],
)  # fmt: skip
def test_errors_have_the_containers_shape(front, body, code, words):
    status, kind, (document,) = answer(front(), body)
    assert (status, kind) == (code, "application/json")
    assert set(document) == {"code", "error"} and document["code"] == code and words in document["error"]


def test_the_endpoints_limits_hold(front, engine):
    """As `max_total_tokens` and `max_input_tokens` of the endpoint arrive here."""
    length = len(chat_ids(engine, QUESTIONS[0]))
    tight = front(CONTEXT=str(length + 8), MAX_PROMPT=str(length))
    assert answer(tight, ask(QUESTIONS[0], max_tokens=8))[0] == 200
    status, _, (document,) = answer(tight, ask(QUESTIONS[0], max_tokens=9))
    assert status == 400 and "prompt and answer do not fit into the context" in document["error"]
    status, _, (document,) = answer(front(MAX_PROMPT=str(length - 1)), ask(QUESTIONS[0], max_tokens=1))
    assert status == 400 and "does not fit into this server's limit for prompts" in document["error"]
    assert f"at most {length - 1}" in document["error"]


def test_a_full_queue_and_a_deadline(front):
    status, _, (document,) = answer(front(SLOTS="1", QUEUE="0"), ask(n=2))
    assert status == 400 and "more answers than the server holds" in document["error"]
    late = front(DEADLINE_S="0.00001")
    assert answer(late, ask())[0] == 504
    status, kind, documents = answer(late, ask(stream=True))
    assert (status, kind) == (200, "application/jsonlines"), "the stream had begun"
    assert documents[-1]["code"] == 424 and "not complete in time" in documents[-1]["error"]


def test_who_stops_listening_frees_the_slot(front):
    running = front(SLOTS="1")
    from djl_python.inputs import Input

    async def leave():
        stream = await running.handle(Input(json.dumps(ask(stream=True, max_tokens=400, ignore_eos=True)).encode()))
        await anext(stream)
        await anext(stream)
        await stream.aclose()

    asyncio.run_coroutine_threadsafe(leave(), running.loop).result(30)
    begun = time.monotonic()
    assert answer(running, ask(max_tokens=2))[0] == 200
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"API_KEY": "k"}, GorgonError, "access control"), ({"SLOTS": "many"}, ConfigError, "slots"),
        ({"CONTEXT": "9999999"}, GorgonError, "context is shorter"),
    ],
)  # fmt: skip
def test_a_container_that_cannot_start_says_why(front, settings, kind, words):
    with pytest.raises(kind, match=words):
        front(**settings)


def test_a_model_that_is_not_there_ends_the_start(monkeypatch):
    monkeypatch.setenv("GORGON_MODEL", "/nowhere/at/all")
    front = Front(load_handler(ASSETS))
    with pytest.raises(ModelError, match="no tuned heads"):
        front.start()
    front.close()
