"""`gorgon bench` against the real server: numbers that add up, answers compared, faults counted, bad input refused."""

import json
import socket
import threading
import time

import pytest

from gorgon.bench import load_run
from gorgon.bench.load import Level, run_level
from gorgon.bench.load_client import HttpTransport, Outcome, body_of
from gorgon.bench.load_report import percentiles, render, summarize
from gorgon.bench.load_run import bench
from gorgon.errors import DataError, GorgonError, RefusedError
from tests.cloud_plane.fixtures import cli
from tests.e2e.conftest import gorgon
from tests.serve_support import QUESTIONS, SCHEMA, make_engine, server


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=4, queue=64) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"messages": [{"role": "system", "content": SCHEMA}, {"role": "user", "content": q}]} for q in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("api", ["openai", "invocations", "tgi"])
def test_levels_add_up_and_answers_stay_the_same(served, prompts, tmp_path, api):
    levels = [Level(6, clients=1), Level(12, clients=4), Level(6, rate=50.0)]
    document = bench(served.url, api=api, levels=levels, prompts=prompts, max_tokens=12, out=tmp_path, warmup=1)
    for row, level in zip(document["levels"], levels, strict=True):
        assert (row["answers"], row["errors"], row["exact_match"]) == (level.requests, {}, 1.0)
        assert 0 < row["first_token_ms"]["max"] <= row["latency_ms"]["max"]
        assert 0 < row["token_ms"]["mean"] < row["latency_ms"]["mean"]
        assert row["tokens"] > row["answers"]
        assert ("tokens_per_step" in row) == (api != "tgi")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == list(range(len(QUESTIONS)))
    page = (tmp_path / "load.html").read_text()
    assert page.count("<svg") == 2 and "http://www.w3.org/2000/svg" in page and "<script" not in page
    again = bench(
        served.url, api=api, levels=levels[:1], prompts=prompts, max_tokens=12, reference=tmp_path / "answers.jsonl"
    )
    assert again["levels"][0]["exact_match"] == 1.0


def test_a_wrong_answer_is_found(served, prompts, tmp_path):
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps({"answer": "no"}) + "\n" for _ in QUESTIONS))
    document = bench(served.url, levels=[Level(6)], prompts=prompts, max_tokens=4, reference=reference)
    assert document["levels"][0]["exact_match"] == 0.0


def test_refusals_are_counted_by_kind(served):
    with server(served.engine, slots=1, queue=0) as small:
        body = body_of(
            [{"role": "user", "content": "x"}], "openai", model=None, max_tokens=60, extra={"ignore_eos": True}
        )
        outcomes = run_level(Level(12, clients=4), [body], lambda: HttpTransport(small.url, "openai", None, 60))
        row = summarize(Level(12, clients=4), outcomes, None)
    assert set(row["errors"]) == {"429"}
    assert row["answers"] + row["errors"]["429"] == 12 and row["answers"] >= 1


def test_times_and_rates_are_what_they_are_called():
    """Two answers of 5 and 9 tokens, their first after 0.2 and 0.4 s, their last after 1.0 and 2.0 s; one refusal."""
    outcomes = [
        Outcome(0, 0.0, first_s=0.2, seconds=1.0, tokens=5, steps=2, text="a"),
        Outcome(1, 0.5, first_s=0.4, seconds=2.0, tokens=9, steps=4, text="b"),
        Outcome(0, 0.6, seconds=0.1, error="429"),
    ]
    row = summarize(Level(3, clients=2), outcomes, {0: "a", 1: "c"})
    assert row["first_token_ms"]["mean"] == 300.0 and row["latency_ms"]["mean"] == 1500.0
    assert row["token_ms"] == {"mean": 200.0, "p50": 200.0, "p90": 200.0, "p99": 200.0, "max": 200.0}
    assert (row["seconds"], row["tokens"], row["tokens_per_s"], row["requests_per_s"]) == (2.5, 14, 5.6, 0.8)
    assert row["tokens_per_step"] == 2.0  # 12 tokens of 6 steps; the first ones come from the prompts
    assert (row["answers"], row["errors"], row["exact_match"]) == (2, {"429": 1}, 0.5)


def test_warm_up_progress_and_levels(served, monkeypatch):
    """The warm-up comes first and is in no row; the bar counts both."""
    bars = []

    class Counting:
        def __init__(self, title, total):
            self.total, self.done, self.notes = total, 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, amount=1):
            self.done += amount

        def note(self, text):
            self.notes.append((self.done, text))

    monkeypatch.setattr(load_run, "bar", Counting)
    document = bench(served.url, levels=[Level(3), Level(4, clients=2), Level(2, rate=100.0)], max_tokens=2, warmup=5)
    assert [row["requests"] for row in document["levels"]] == [3, 4, 2]
    (counted,) = bars
    assert counted.total == counted.done == 14
    assert counted.notes == [(5, "1 client"), (8, "2 clients"), (12, "100 per second")]


class _Broken:
    """A transport that yields these lines, or raises."""

    def __init__(self, lines):
        self._lines = lines

    def lines(self, _body):
        for line in self._lines:
            if isinstance(line, Exception):
                raise line
            yield line

    def close(self):
        pass


def test_refused_clients_come_back_when_they_are_told_to():
    moments = []

    class Refusing(_Broken):
        def lines(self, _body):
            moments.append(time.monotonic())
            if len(moments) == 1:
                raise RefusedError(429, "", retry_after_s=0.3)
            yield b'data: {"choices": [{"text": "a"}]}\n'
            yield b"data: [DONE]\n"

    assert [o.error for o in run_level(Level(2), [{}], lambda: Refusing([]))] == ["429", ""]
    assert moments[1] - moments[0] >= 0.3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached"), (b"", "cannot be reached"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\nnot here!", "404"),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\n{}", "401"),
        (b'HTTP/1.1 503 No\r\ncontent-length: 33\r\n\r\n{"error": {"message": "loading"}}', "503: loading "),
    ],
)  # fmt: skip
def test_a_first_request_that_fails_ends_the_command_with_the_reason(answer, words):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(GorgonError, match=words):
            bench(f"http://127.0.0.1:{listener.getsockname()[1]}", levels=[Level(1)], timeout_s=5)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([b'data: {"choices": [{"delta": {"content": "a"}}]}\n'], "cut off"),
        ([b"data: {\n"], "not JSON"),
        ([TimeoutError()], "timeout"),
        ([b'data: {"choices": []}\n', ConnectionResetError()], "ConnectionResetError"),
        ([b'data: {"error": {"code": "deadline_exceeded"}}\n'], "deadline_exceeded"),
        ([b": comment\n", b'data: {"choices": [{"text": "a"}]}\n', b"data: [DONE]\n"], ""),
    ],
)
def test_broken_streams(lines, error):
    outcome = run_level(Level(1), [{}], lambda: _Broken(lines))[0]
    assert outcome.error == error


def test_an_open_loop_counts_the_time_in_the_queue():
    """One connection's worth of service at a time, far too slow for the rate: later requests wait longer."""
    lock = threading.Lock()

    class Slow(_Broken):
        def lines(self, _body):
            with lock:
                time.sleep(0.02)
            yield b'data: {"choices": [{"text": "a"}]}\n'
            yield b"data: [DONE]\n"

    outcomes = run_level(Level(20, rate=1000.0), [{}], lambda: Slow([]))
    assert max(o.seconds for o in outcomes) > 0.2
    assert all(o.first_s <= o.seconds for o in outcomes)


def test_percentiles_are_values_that_occurred():
    found = percentiles([0.1, 0.2, 0.3, 0.4])
    assert found == {"mean": 250.0, "p50": 200.0, "p90": 400.0, "p99": 400.0, "max": 400.0}
    assert percentiles([]) is None


def test_a_run_without_answers_still_makes_a_page():
    row = summarize(Level(1), [Outcome(0, 0.0, error="500")], {0: "x"})
    assert row["exact_match"] is None and row["latency_ms"] is None
    document = {"url": "<b>", "api": "openai", "prompts": 1, "max_tokens": 1, "warmup": 0, "time": "now",
                "compared_with": "a.jsonl"}  # fmt: skip
    page = render({**document, "levels": [row]})
    assert "&lt;b&gt;" in page and "1 × 500" in page


def test_bad_files(served, tmp_path):
    for text, words in (("{}\n", "rows"), ("x\n" * 4, "not a JSON"), ('{"text": 3}\n' * 4, "must be text")):
        path = tmp_path / "reference.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            bench(served.url, levels=[Level(1)], reference=path)
    with pytest.raises(GorgonError, match="cannot be reached"):
        bench("http://127.0.0.1:9", levels=[Level(1)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["localhost"], "not a URL"), (["http://127.0.0.1:9"], "cannot be reached"),
        (["http://127.0.0.1:9", "--api", "grpc"], "no such interface"),
        (["http://127.0.0.1:9", "--clients", "1.5"], "positive numbers"),
        (["http://127.0.0.1:9", "--clients", ""], "no load"),
        (["http://127.0.0.1:9", "--prompts", "nowhere.jsonl"], "no such file"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_exit_code_2(arguments, words):
    found = cli("bench", *arguments)
    assert found.error is not None and found.error.exit_code == 2 and words in str(found.error)


def test_the_command_prints_json(served, tmp_path):
    done = gorgon("bench", served.url, "--requests", 4, "--clients", "1,2", "--max-tokens", 8, "--json")
    assert done.returncode == 0, done.stderr
    assert [row["clients"] for row in json.loads(done.stdout)["levels"]] == [1, 2]
