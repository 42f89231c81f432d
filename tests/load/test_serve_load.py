"""Bounded load: many clients against few slots for a time; nothing is lost, doubled, slower than it must be, or kept.

`pytest -m load tests/load` runs two minutes with 64 clients and 1,000 disconnects; the default run a short form of it.
"""

import json
import os
import random
import socket
import threading
import time

import psutil
import pytest

from gorgon.bench.load_client import HttpTransport, send
from gorgon.decode.request import Request
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, make_engine, post, server, wait_for

SHORT = pytest.param(5.0, 16, 60, id="short")
LONG = pytest.param(120.0, 64, 1000, id="long", marks=[pytest.mark.load, pytest.mark.timeout(600)])


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=8, context=256, queue=24) as running:
        yield running


def _resident():
    return psutil.Process(os.getpid()).memory_info().rss


@pytest.mark.parametrize(("seconds", "clients", "disconnects"), [SHORT, LONG])
def test_load(served, seconds, clients, disconnects, record_property):
    limits = {q: 4 + 7 * i for i, q in enumerate(QUESTIONS)}
    expected = {q: alone(served.engine, Request(chat_ids(served.engine, q), limits[q])) for q in QUESTIONS}
    counts = {"answers": 0, "429": 0}
    faults, lock, memory = [], threading.Lock(), []
    end = time.monotonic() + seconds
    slow = _slow_reader(served.port)

    def client(number):
        chance = random.Random(number)
        transport = HttpTransport(served.url, "openai", None, 60)
        while time.monotonic() < end:
            question = chance.choice(QUESTIONS)
            extra = {"stream": True, "stream_options": {"include_usage": True}}
            outcome = send(transport, ask(question, max_tokens=limits[question], **extra), 0, 0.0)
            whole = expected[question]
            with lock:
                if outcome.error == "429":
                    counts["429"] += 1
                elif outcome.error or (outcome.text, outcome.tokens) != (whole.text, len(whole.token_ids)):
                    faults.append((question, outcome))
                else:
                    counts["answers"] += 1
            if outcome.error == "429":
                time.sleep(0.05)
        transport.close()

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(seconds / 20)
        memory.append(_resident())
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    slow.close()
    assert faults == []
    assert counts["answers"] > clients
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 30)
    grown = max(memory[len(memory) // 2 :]) - max(memory[: len(memory) // 2])
    assert grown < 32 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB in the second half"
    p99 = _step_quantile(served.meter.registry, 0.99)
    record_property("p99_step_s", p99)
    print(f"{counts['answers']} answers, {counts['429']} refusals, 99 % of steps within {1000 * p99:g} ms, "
          f"memory {max(memory) / 2**20:.0f} MiB, {grown / 2**20:+.1f} MiB in the second half")  # fmt: skip
    _disconnect(served, disconnects)


def _slow_reader(port):
    """A client that asks for a long answer and reads none of it, while the others work."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", port))
    slow.sendall(_request(ask(max_tokens=180, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)))
    return slow


def _request(body):
    data = json.dumps(body).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data)  # fmt: skip


def _disconnect(served, times):
    chance = random.Random(0)
    for _ in range(times):
        body = ask(max_tokens=200, ignore_eos=True, stream=chance.random() < 0.5)
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(_request(body))
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.02)
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 60)
    assert post(served, "/v1/chat/completions", ask(max_tokens=2))[0] == 200


def _step_quantile(registry, share):
    """The smallest bucket of the step histogram below which this share of the steps lies, in seconds."""
    count = registry.get_sample_value("gorgon_step_seconds_count")
    buckets = [s for m in registry.collect() if m.name == "gorgon_step_seconds" for s in m.samples if "le" in s.labels]
    return next(float(s.labels["le"]) for s in buckets if s.value >= share * count)
