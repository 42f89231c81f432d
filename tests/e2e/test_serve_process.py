"""`gorgon serve` as a process: drains on SIGTERM, comes back after SIGKILL, refuses bad input with exit code 2."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from gorgon.serve.server import _listen
from gorgon.serve.settings import ServeConfig
from tests.cloud_plane.fixtures import cli
from tests.e2e.conftest import gorgon
from tests.serve_support import ask, get, post, wait_for

OPTIONS = ("--drafts", "ngram", "--slots", "2", "--context", "512", "--no-playground", "--set", "steps=eager")


def _start(*arguments):
    """A running server and its log as it grows."""
    command = [str(Path(sys.executable).with_name("gorgon")), "serve", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    lines = []

    def read():
        lines.extend(process.stderr)

    threading.Thread(target=read, daemon=True).start()
    wait_for(lambda: process.poll() is not None or any("serving" in line for line in lines), 120)
    text = "".join(lines)
    found = re.search(r"serving \S+ at http://127.0.0.1:(\d+)", text)
    assert found, text
    return SimpleNamespace(process=process, lines=lines, port=int(found.group(1)), text=text)


def test_sigkill_then_restart_then_sigterm_in_the_middle_of_a_stream():
    first = _start("embedded", "--port", "0", *OPTIONS)
    assert re.search(r"KV cache: 2 slots of 512 tokens, 3 buffers, [\d.]+ MiB", first.text)
    before = post(first, "/v1/chat/completions", ask())[2]["choices"][0]["message"]["content"]
    first.process.send_signal(signal.SIGKILL)
    assert first.process.wait(10) == -signal.SIGKILL

    again = _start("embedded", "--port", str(first.port), *OPTIONS)
    assert post(again, "/v1/chat/completions", ask())[2]["choices"][0]["message"]["content"] == before
    with openai.OpenAI(base_url=f"http://127.0.0.1:{again.port}/v1", api_key="-", max_retries=0) as client:
        body = ask(model="embedded", max_tokens=300, extra=None)
        body.pop("extra")
        stream = client.chat.completions.create(**body, stream=True, extra_body={"ignore_eos": True})
        chunks = [next(stream) for _ in range(3)]
        again.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"  # nothing was cut off
    assert again.process.wait(30) == 0
    logged = [json.loads(line) for line in again.lines if line.startswith("{")]
    assert [entry["message"] for entry in logged][-2:] == ["draining", "request"]
    assert all(entry["request_id"] for entry in logged if entry["message"] == "request")
    with pytest.raises(ConnectionRefusedError):
        get(again, "/ping")


def test_a_typed_error_is_told_without_a_traceback():
    done = gorgon("serve", "embedded", "--set", "port=0")
    assert done.returncode == 2 and done.stdout == ""
    assert "no tuned heads" in done.stderr and "--drafts ngram" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], ["no model is given"]),
        (["serve", "./nowhere", "--drafts", "none"], ["nowhere"]),
        (["serve", "embedded", "--drafts", "some"], ["drafts"]),
        (["serve", "embedded", "--set", "slot=2"], ["did you mean 'slots'"]),
        (["serve", "embedded", "--slots", "0"], ["slots"]),
        (["serve", "embedded", "--drafts", "none", "--context", "99999"], ["context"]),
        (["serve", "embedded", "--host", "203.0.113.1"], ["cannot listen"]),
    ],
)
def test_bad_input_ends_with_exit_code_2(arguments, words, monkeypatch):
    monkeypatch.setattr("gorgon.serve.server.start_log", lambda: None)  # it is for a process of its own
    found = cli(*arguments, *(("--set", "steps=eager", "--set", "port=0") if len(arguments) > 1 else ()))
    assert found.error is not None and found.error.exit_code == 2 and found.out == ""
    for word in words:
        assert word in f"{found.error} {found.error.hint}"


def test_pieces_of_a_stream_do_not_wait_for_acknowledgements():
    listener = _listen(ServeConfig(model="embedded", port=0))
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_command_line_starts_without_the_servers_packages():
    heavy = ("torch", "fastapi", "uvicorn", "transformers", "boto3")
    code = f"import sys, gorgon.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
