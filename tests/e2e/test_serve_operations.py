"""What an operator sees: probes while the server loads, warms up and is stuck, every metric, the log, and the drain."""

import io
import json
import logging
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from gorgon.decode.request import Request
from gorgon.decode.slots import Slots
from gorgon.serve import scheduler as scheduler_module
from gorgon.serve import server as server_module
from gorgon.serve.gate import JsonLines
from gorgon.serve.settings import ServeConfig
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, get, make_engine, post, server, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture
def log():
    """The lines that the server writes, as objects, in the order in which they came."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("gorgon.serve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)


def send(port, body, buffer=None):
    """A request on a connection of its own, whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", port))
    connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                       b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data)  # fmt: skip
    return connection


def statuses(served):
    return {path: get(served, path)[0] for path in ("/ping", "/health", "/v1/models")}


def test_probes_fail_until_the_model_is_loaded_and_warm(engine, log, monkeypatch):
    loaded, warmed, warming = threading.Event(), threading.Event(), threading.Event()
    warm_up = scheduler_module.warm_up

    def slowly(*arguments, **options):
        warming.set()
        assert warmed.wait(30)
        warm_up(*arguments, **options)

    def load():
        assert loaded.wait(30)
        return engine

    monkeypatch.setattr(scheduler_module, "warm_up", slowly)
    with server(engine, load=load, slots=1) as served:
        wait_for(lambda: get(served, "/metrics")[0] == 200)
        assert set(statuses(served).values()) == {503}
        status, _, body = post(served, "/invocations", ask())
        assert (status, body["error"]["message"], body["error"]["code"]) == (503, "the model is loading", "unavailable")
        loaded.set()
        assert warming.wait(30)
        assert set(statuses(served).values()) == {503}
        assert get(served, "/ping")[2]["error"]["message"] == "the server is warming up"
        warmed.set()
        wait_for(lambda: get(served, "/ping")[0] == 200)
        assert set(statuses(served).values()) == {200}
        assert get(served, "/health")[2] == {
            "status": "ready", "model": "embedded", "queued": 0, "active": 0, "slots": 1, "context": 512,
            "drafts": "tuned",
        }  # fmt: skip
    probes = [line["status"] for line in log() if line.get("path") == "/ping"]
    assert probes == [503, 200], "probes are logged when their answer changes, not every few seconds"


def test_probes_fail_while_a_step_hangs_and_recover_with_it(engine, monkeypatch):
    monkeypatch.setattr(scheduler_module, "STUCK_S", 0.2)
    hangs, goes_on, step = threading.Event(), threading.Event(), Slots.step

    def hanging(self):
        if hangs.is_set() and self.running:
            assert goes_on.wait(30)
        return step(self)

    monkeypatch.setattr(Slots, "step", hanging)
    with server(engine, slots=2) as served:
        hangs.set()
        with send(served.port, ask(max_tokens=4, stream=True)) as waiting:
            wait_for(lambda: get(served, "/ping")[0] == 503, 10)
            assert set(statuses(served).values()) == {503}
            assert post(served, CHAT, ask())[2]["error"]["message"] == "the engine is stuck"
            goes_on.set()
            wait_for(lambda: get(served, "/ping")[0] == 200, 10)
            waiting.settimeout(30)
            received = b""
            while b"[DONE]" not in received:
                part = waiting.recv(65536)
                assert part, "the connection was closed"
                received += part
        assert post(served, CHAT, ask(max_tokens=2))[0] == 200


def _metrics(served):
    lines = [line for line in get(served, "/metrics")[2].decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_of_a_busy_server_and_of_one_answer(engine):
    whole = alone(engine, Request(chat_ids(engine, QUESTIONS[0]), 24))
    with server(engine, slots=2, queue=4) as served:
        endless = [send(served.port, ask(max_tokens=400, ignore_eos=True)) for _ in range(4)]
        wait_for(lambda: _metrics(served)["gorgon_queue_length"] == 2)
        busy = _metrics(served)
        for connection in endless:
            connection.close()
        wait_for(lambda: (served.scheduler.active, served.scheduler.queued) == (0, 0), 10)
        before = _metrics(served)
        assert post(served, CHAT, ask())[0] == 200
        found = _metrics(served)

    plan = served.scheduler.plan
    assert (busy["gorgon_active_rows"], busy["gorgon_queue_length"]) == (2, 2)
    assert 0 < busy["gorgon_kv_tokens_used"] <= busy["gorgon_kv_tokens_total"] == plan.sequences * plan.capacity
    assert busy["gorgon_kv_bytes"] == plan.total_bytes
    idle = {before[f"gorgon_{name}"] for name in ("active_rows", "queue_length", "kv_tokens_used")}
    assert idle == {0}
    assert before['gorgon_answers_total{finish="CancelledError"}'] == 4  # those that only waited are counted too

    more = {name: value - before.get(name, 0) for name, value in found.items()}
    prompt, steps = len(chat_ids(engine, QUESTIONS[0])), len(whole.step_tokens)
    assert more["gorgon_prompt_tokens_total"] + more["gorgon_reused_prompt_tokens_total"] == prompt
    assert more["gorgon_output_tokens_total"] == len(whole.token_ids)
    assert more["gorgon_steps_total"] == more["gorgon_step_rows_total"] == more["gorgon_step_seconds_count"] == steps
    assert more["gorgon_tokens_per_step_sum"] == pytest.approx(whole.tokens_per_step)
    finish = f'gorgon_answers_total{{finish="{whole.finish}"}}'
    assert more[finish] == more[f'gorgon_http_requests_total{{route="{CHAT}",status="200"}}'] == 1
    for name in ("queue", "first_token", "token", "answer"):
        assert more[f"gorgon_{name}_seconds_count"] == 1
        assert more[f"gorgon_{name}_seconds_sum"] >= 0
    assert more["gorgon_answer_seconds_sum"] >= more["gorgon_first_token_seconds_sum"] > 0


def test_the_log_has_a_line_per_request_with_its_id_and_what_went_wrong(engine, log, monkeypatch):
    with server(engine, slots=1, deadline_s=0.3) as served:
        mine = {"x-request-id": "mine-1"}
        assert post(served, CHAT, ask(max_tokens=2), mine)[1]["x-request-id"] == "mine-1"
        post(served, CHAT, ask(temperature=9), {"x-amzn-sagemaker-inference-id": "mine-2"})
        late = ask(max_tokens=400, ignore_eos=True, stream=True)
        post(served, CHAT, late, {"x-request-id": "mine-3"})
        with send(served.port, {**late, "max_tokens": 300}) as connection:
            connection.recv(10)
        wait_for(lambda: len([line for line in log() if line["message"] == "request"]) == 4, 10)
        wait_for(lambda: served.scheduler.active == 0)  # the last one's slot is free
        monkeypatch.setattr(Slots, "step", lambda _: 1 // 0)
        assert post(served, CHAT, ask(), {"x-request-id": "mine-5"})[0] == 500
        get(served, "/ping")
        wait_for(lambda: len([line for line in log() if line["message"] == "request"]) == 5, 10)
    lines = log()
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["request_id"] for line in requests[:3]] == ["mine-1", "mine-2", "mine-3"]
    assert [line["status"] for line in requests] == [200, 400, 200, 200, 500]
    for line in requests:
        assert (line["method"], line["path"], line["level"]) == ("POST", CHAT, "info")
        assert line["seconds"] >= 0 and line["time"].endswith("+00:00")
    assert "error" not in requests[0]
    words = ("temperature", "not complete in time", "closed", "the step failed")
    assert all(word in line["error"] for word, line in zip(words, requests[1:], strict=True))
    (failed,) = [line for line in lines if line["message"].startswith("a step failed")]
    assert failed["request_ids"] == ["mine-5"] and "ZeroDivisionError" in failed["exception"]


def test_the_drain_ends_in_time_whatever_runs(engine, log, monkeypatch):
    """SageMaker kills 30 seconds after SIGTERM; clients whose answers take longer are told, streamed or not."""
    step = Slots.step

    def slow(self):
        time.sleep(0.05 if self.running else 0)
        return step(self)

    monkeypatch.setattr(Slots, "step", slow)
    long = ask(max_tokens=400, ignore_eos=True)
    with server(engine, slots=2, drain_s=1) as served:
        connections = [send(served.port, {**long, "stream": stream}) for stream in (True, False)]
        wait_for(lambda: served.scheduler.active == 2)
        served.scheduler.drain()  # as the signal's handler does
        began = time.monotonic()
    assert 0.9 < time.monotonic() - began < 2.5
    streamed, whole = (_rest(connection) for connection in connections)
    assert b"data: " in streamed and b"[DONE]" not in streamed
    assert b'"message":"the server is shutting down"' in streamed.split(b"data: ")[-1]
    assert whole.startswith(b"HTTP/1.1 503 ") and b"the server is shutting down" in whole
    assert [line["error"] for line in log()] == ["the server is shutting down"] * 2


def test_a_client_that_does_not_read_cannot_hold_up_the_end(engine, log, monkeypatch):
    monkeypatch.setattr(server_module, "LAST_WORDS_S", 1)
    body = ask(max_tokens=200, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)
    with server(engine, slots=1, drain_s=0, send_buffer=8192) as served:
        deaf = send(served.port, body, buffer=4096)
        wait_for(lambda: served.scheduler.active + served.scheduler.queued > 0)
        wait_for(lambda: served.scheduler.active + served.scheduler.queued == 0, 60)  # complete, and read by nobody
        served.scheduler.drain()
        began = time.monotonic()
    assert time.monotonic() - began < 3
    deaf.close()
    assert [line.get("error") for line in log()] == ["cut off: the server has stopped"]


def test_a_stop_while_the_model_loads_ends_the_process_at_once(monkeypatch):
    """Python cannot end while another thread compiles or loads: it would crash."""
    ends, goes_on = [], threading.Event()
    monkeypatch.setattr(server_module, "start_log", lambda: None)
    monkeypatch.setattr(server_module, "load", lambda _: goes_on.wait(30))
    monkeypatch.setattr(server_module.os, "_exit", ends.append)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def stop():
        served = SimpleNamespace(port=port)
        wait_for(lambda: _listens(port))
        assert get(served, "/ping")[0] == 503
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    server_module.serve(ServeConfig(model="embedded", port=port))
    assert ends == [0]
    goes_on.set()


def _listens(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _rest(connection):
    connection.settimeout(5)
    received = b""
    while part := connection.recv(65536):
        received += part
    connection.close()
    return received
