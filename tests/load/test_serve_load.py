"""Bounded load: many clients against few slots for a time; nothing is lost, doubled, slower than it must be, or kept.

`pytest -m load -s tests/load` runs two minutes with 64 clients and 1,000 disconnects, and prints what it measured; the
default run does a short form of it.
"""

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time

import psutil
import pytest

from gorgon.decode.request import Request
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, get, make_engine, post, server, wait_for

SHORT = pytest.param(5.0, 16, 60, id="short")
LONG = pytest.param(120.0, 64, 1000, id="long", marks=[pytest.mark.load, pytest.mark.timeout(600)])
ANSWERS = 12
"""Answers of which a median is taken."""
PING_S = 2.0
"""SageMaker's time limit for `GET /ping`."""
LIMITS = {question: 4 + 7 * i for i, question in enumerate(QUESTIONS)}
UNREAD = ask(max_tokens=180, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=8, context=256, queue=24) as running:
        yield running


@pytest.fixture
def steps(served, monkeypatch):
    """Seconds of every step from now on."""
    times, step = [], served.meter.step

    def timed(rows, seconds):
        times.append(seconds)
        step(rows, seconds)

    monkeypatch.setattr(served.meter, "step", timed)
    return times


@pytest.mark.parametrize(("seconds", "clients", "disconnects"), [SHORT, LONG])
def test_load(served, steps, seconds, clients, disconnects, record_property):
    before = _count(served, "gorgon_output_tokens_total")
    slow = _unread(served.port)
    crowd = _crowd(served, clients, seconds)
    memory, pings = [], []
    while crowd.poll() is None:
        time.sleep(seconds / 20)
        memory.append(psutil.Process(os.getpid()).memory_info().rss)
        asked = time.monotonic()
        assert get(served, "/ping")[0] == 200
        pings.append(time.monotonic() - asked)
    found = json.loads(crowd.stdout.read())
    assert crowd.wait() == 0
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 30)
    slow.close()

    assert found["faults"] == [], "an error other than 429, or tokens that differ from the answer alone"
    assert found["answers"] > clients
    # the server made the tokens that clients received, those of the answer that nobody read, and no others
    assert _count(served, "gorgon_output_tokens_total") - before == found["tokens"] + UNREAD["max_tokens"]
    grown = max(memory[len(memory) // 2 :]) - max(memory[: len(memory) // 2])
    assert grown < 32 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB in the second half"
    _check_cache(served)
    assert max(pings) < PING_S
    p50, p99, longest = (1000 * sorted(steps)[int(share * (len(steps) - 1))] for share in (0.5, 0.99, 1.0))
    record_property("p99_step_ms", p99)
    print(f"\n{found['answers']} answers with {found['tokens']} tokens, none lost or doubled\n"
          f"{found['refusals']} times 429\n"
          f"{len(steps)} steps, p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {longest:.0f} ms\n"
          f"memory {max(memory) / 2**20:.0f} MiB, {grown / 2**20:+.1f} MiB in the second half\n"
          f"ping at most {1000 * max(pings):.0f} ms")  # fmt: skip
    _disconnect(served, disconnects)


def test_answers_that_nobody_reads_slow_nobody(served):
    """Their tokens wait in the server; whoever reads gets answers as fast as before."""
    body = ask(QUESTIONS[1], max_tokens=24)
    with server(served.engine, slots=8, context=256, queue=24, send_buffer=8192) as tight:
        without = _median_latency(tight, body)
        slow = [_unread(tight.port) for _ in range(6)]
        wait_for(lambda: tight.scheduler.active == 6)
        wait_for(lambda: tight.scheduler.active == 0, 30)
        answered = {"route": "/v1/chat/completions", "status": "200"}
        assert _count(tight, "gorgon_http_requests_total", answered) == ANSWERS, "who does not read was answered"
        unread = _median_latency(tight, body)
        for connection in slow:
            connection.close()
    print(f"\nmedian answer {1000 * without:.1f} ms, {1000 * unread:.1f} ms beside six answers that nobody reads")
    assert unread < 1.5 * without + 0.02


def _crowd(served, clients, seconds):
    """The clients' process, at work; what it compares with was computed alone."""
    asked = []
    for question, limit in LIMITS.items():
        whole = alone(served.engine, Request(chat_ids(served.engine, question), limit))
        body = ask(question, max_tokens=limit, stream=True, stream_options={"include_usage": True})
        asked.append({"body": body, "text": whole.text, "tokens": len(whole.token_ids)})
    given = {"url": served.url, "seconds": seconds, "clients": clients, "pause": 0.05, "asked": asked}
    command = [sys.executable, "-m", "tests.load.crowd"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(given))
    process.stdin.close()
    return process


def _count(served, name, labels=None):
    return served.meter.registry.get_sample_value(name, labels) or 0


def _check_cache(served):
    lanes = served.scheduler.lanes.values()
    caches = {id(cache): cache for lane in lanes for cache in (lane.slots._cache, lane.slots._entry)}
    assert sum(cache.bytes for cache in caches.values()) <= served.scheduler.plan.total_bytes


def _median_latency(served, body):
    seconds = []
    for _ in range(ANSWERS):
        start = time.monotonic()
        assert post(served, "/v1/chat/completions", body)[0] == 200
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def _unread(port):
    """A client that asks for a long answer and reads none of it."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", port))
    slow.sendall(_request(UNREAD))
    return slow


def _request(body):
    data = json.dumps(body).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data)  # fmt: skip


def _disconnect(served, times):
    """Clients that leave at once, or in the middle; none of their answers goes on."""
    whole = _count(served, "gorgon_answers_total", {"finish": "length"})
    chance, start = random.Random(0), time.monotonic()
    for _ in range(times):
        body = ask(max_tokens=200, ignore_eos=True, stream=chance.random() < 0.5)
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(_request(body))
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.02)
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 60)
    seconds = time.monotonic() - start
    assert _count(served, "gorgon_answers_total", {"finish": "length"}) == whole
    assert post(served, "/v1/chat/completions", ask(max_tokens=2))[0] == 200
    left = _count(served, "gorgon_answers_total", {"finish": "CancelledError"})
    print(
        f"{times} disconnects in {seconds:.1f} s, {left:.0f} while an answer was made or waited for; no slot is taken"
    )
