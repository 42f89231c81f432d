"""What strangers and bad networks send: every answer is a 4xx in OpenAI's shape, and the server lives on."""

import json
import socket
import threading
import time

import pytest

from tests.serve_support import ask, get, make_engine, post, server, wait_for


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=2, queue=200, max_body_bytes=100_000, send_buffer=8192) as running:
        yield running
        assert running.scheduler.state == "ready"
        assert get(running, "/ping")[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"null", 400), (b"[]", 400), (b'"x"', 400), (b"\xff\xfe", 400),
        (b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}', 400), (b"[" * 50_000, 400),
        (b'{"a":' * 15_000, 400), (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b"x" * 100_001, 413), (b"x" * 700_000, 413),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/invocations", "/playground/race"])
def test_malformed_bodies(served, path, body, status):
    found, _, answer = post(served, path, body)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_ten_megabytes_are_refused(served):
    found = post(served, "/v1/chat/completions", ask(user="x" * 10_000_000))
    assert (found[0], found[2]["error"]["code"]) == (413, "body_too_large")


def test_other_content_types_paths_and_methods(served):
    status, _, body = post(served, "/v1/chat/completions", ask(), {"content-type": "text/plain"})
    assert status == 400 and "content type" in body["error"]["message"]
    status, _, body = get(served, "/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "invalid_request_error")
    assert get(served, "/v1/chat/completions")[0] == 405
    assert post(served, "/v1/models", b"{}")[0] == 405


def _raw(port, data, wait=5.0):
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionResetError):
            pass
        return received


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n", b"GET /ping HTTP/1.1\r\nx: \xff\x00\r\n\r\n",
        b"GET /ping HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 30_000 + b"\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    ],
)  # fmt: skip
def test_broken_http_and_header_floods(served, data):
    answer = _raw(served.port, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:100]
    assert get(served, "/ping")[0] == 200


def test_a_client_that_stops_in_the_middle_of_its_body_is_forgotten(served):
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 5000\r\n\r\n{")  # fmt: skip
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head)
    assert post(served, "/v1/chat/completions", ask(max_tokens=2))[0] == 200
    assert (served.scheduler.active, served.scheduler.queued) == (0, 0)


def _request(body):
    data = json.dumps(body).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(data)).encode() + b"\r\n\r\n" + data)  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_disconnects_leave_no_slot_taken(served, stream):
    data = _request(ask(max_tokens=400, ignore_eos=True, stream=stream))

    def ended(how):
        return served.meter.registry.get_sample_value("gorgon_answers_total", {"finish": how}) or 0.0

    whole, left = ended("length"), ended("CancelledError")
    for i in range(50):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(data)
            if i % 3 == 0:
                wait_for(lambda: served.scheduler.active + served.scheduler.queued > 0)
            if stream and i % 5 == 0:
                connection.recv(100)
    wait_for(lambda: served.scheduler.active == served.scheduler.queued == 0, 20)
    assert ended("length") == whole and ended("CancelledError") >= left + 10, "answers went on for nobody"
    assert post(served, "/v1/chat/completions", ask(max_tokens=2))[0] == 200


def test_a_slow_reader_slows_nobody(served):
    data = _request(ask(max_tokens=450, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20))

    def answered():
        labels = {"route": "/v1/chat/completions", "status": "200"}
        return served.meter.registry.get_sample_value("gorgon_http_requests_total", labels) or 0

    before = answered()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(data)
        wait_for(lambda: served.scheduler.active == 1)
        answers = []

        def quick():
            answers.append(post(served, "/v1/chat/completions", ask(max_tokens=8))[0])

        threads = [threading.Thread(target=quick) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert answers == [200] * 4
        wait_for(lambda: served.scheduler.active == 0, 30)  # its answer is complete although nobody reads it
        assert answered() == before + 4  # and the rest of it waits to be sent
        received = b""
        slow.settimeout(20)
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(65536)
            time.sleep(0)
        assert b"data: [DONE]" in received
        assert received.count(b'"finish_reason":"length"') == 1
