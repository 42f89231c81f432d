"""A server over the embedded backbone, in this process, and requests to compare with the engine's own answers."""

import asyncio
import contextlib
import http.client
import json
import random
import socket
import sys
import threading
import time
from types import SimpleNamespace

import torch
import uvicorn

from gorgon.core.heads import MedusaHeads
from gorgon.core.sampling import GREEDY, Sampling
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.request import Request
from gorgon.models.backbone import load_backbone
from gorgon.serve.app import make_app
from gorgon.serve.metrics import Meter
from gorgon.serve.scheduler import Scheduler
from gorgon.serve.server import SWITCH_S, _listen, http_config
from gorgon.serve.settings import ServeConfig

SCHEMA = "CREATE TABLE head (age INTEGER, name VARCHAR, born_state VARCHAR)"
QUESTIONS = (
    "How many heads are older than 56?", "List the names of heads born in Alabama.", "What is the average age?",
    "Which states are the heads born in, without repetition?", "Name the oldest head.", "x",
)  # fmt: skip


def make_engine(model="embedded"):
    """Random heads and other trees for 1, 2, 3 and more rows: what is drafted must not matter."""
    backbone = load_backbone(str(model), dtype="float32")
    torch.manual_seed(0)
    heads = MedusaHeads(3, 1, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight)
    wide = DraftTree.of([(0,), (1,), (2,), (0, 0), (0, 1), (0, 0, 0)], ngram=4)
    small = DraftTree.of([(0,), (0, 0)], ngram=3)
    drafters = {1: StaticDrafter(wide), 2: StaticDrafter(small), 3: StaticDrafter(DraftTree.of([], ngram=5)), 4: PLAIN}
    return Engine(backbone, heads.eval().requires_grad_(False), drafters)


def chat_ids(engine, question, system=SCHEMA):
    """Token ids of a chat."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return encode_prompt(engine.backbone.tokenizer, messages)


def varied_requests(engine, count, seed):
    """Requests of many kinds, the same ones for the same seed."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = chat_ids(engine, chance.choice(QUESTIONS), SCHEMA + "x, y" * chance.choice([0, 0, 1, 40]))
        sampling = chance.choice([
            GREEDY, GREEDY, Sampling(temperature=1.0, seed=chance.randrange(100)),
            Sampling(temperature=0.7, top_p=0.8, seed=chance.randrange(100)),
            Sampling(frequency_penalty=0.5), Sampling(temperature=1.2, top_k=20, presence_penalty=1.0, seed=3),
        ])  # fmt: skip
        stop = chance.choice([(), (), ("FROM",), ("zzz", " W")])
        ignore = chance.random() < 0.3
        made.append(Request(prompt, chance.randint(1, 40), stop, sampling, ignore_end=ignore))
    return made


def alone(engine, request):
    """The answer when nobody else is there."""
    return list(engine.stream(request))[-1]


def config(**settings):
    """Small settings for tests."""
    return ServeConfig(**{"model": "embedded", "port": 0, "slots": 4, "context": 512, "prefill_chunk": 32, **settings})


@contextlib.contextmanager
def scheduler(engine, **settings):
    """A scheduler and a loop in a thread; `run(coroutine)` runs on it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine, timeout=120):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    made = Scheduler(lambda: engine, config(**settings), Meter())

    async def start():
        made.start()

    run(start())
    wait_for(lambda: made.state != "loading")
    assert made.state == "ready", made.failure
    try:
        yield made, run
    finally:
        made.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def server(engine, *, load=None, send_buffer=None, **settings):
    """The whole application behind a socket: url, port, scheduler. With a `load` of the test's it is not waited for.

    Args: send_buffer: bytes that the kernel keeps of an answer that nobody reads; megabytes unless given.
    """
    settings = config(**settings)
    sys.setswitchinterval(SWITCH_S)  # as `serve` does; it stays so for this process's other servers
    meter = Meter()
    made = Scheduler(load or (lambda: engine), settings, meter)
    listener = _listen(settings)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    port = listener.getsockname()[1]
    options = http_config(make_app(settings, made, meter), settings)
    running = uvicorn.Server(options)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])), daemon=True)
    thread.start()
    if load is None:
        wait_for(lambda: made.state != "loading")
        assert made.state == "ready", made.failure
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, scheduler=made, meter=meter, engine=engine)
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition, seconds=60):
    """Waits until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def post(served, path, body, headers=(), method="POST"):
    """(status, headers, body) of one request; `body` is bytes or becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request(method, path, data, {"content-type": "application/json", **dict(headers)})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = "json" in (response.headers.get("content-type") or "")
    return response.status, response.headers, json.loads(text) if is_json else text


def get(served, path, headers=()):
    """The same for GET."""
    return post(served, path, None, headers, "GET")


def ask(question=QUESTIONS[0], **more):
    """A greedy chat body."""
    messages = [{"role": "system", "content": SCHEMA}, {"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24, **more}
