"""SageMaker's contract: /ping, and /invocations with the reference system's clients and boto3's request shapes."""

import json

import pytest
from typer.testing import CliRunner

from gorgon.cli import app
from gorgon.core.sampling import Sampling
from gorgon.decode.request import Request
from gorgon.errors import ConfigError
from gorgon.serve import settings
from tests.serve_support import QUESTIONS, SCHEMA, alone, ask, chat_ids, get, make_engine, post, server


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=2) as running:
        yield running


@pytest.fixture(scope="module")
def prompt(served):
    messages = [{"role": "system", "content": SCHEMA}, {"role": "user", "content": QUESTIONS[0]}]
    return served.engine.backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_draining_server_still_answers_probes_and_no_one_else(served, monkeypatch):
    """Loading, warming up and hanging are in `test_serve_operations.py`."""
    for state, ping in (("ready", 200), ("draining", 200), ("failed", 503), ("stopped", 503)):
        monkeypatch.setattr(served.scheduler, "state", state)
        assert get(served, "/ping")[0] == get(served, "/health")[0] == ping
        for body in (ask(max_tokens=1), {"inputs": "x", "parameters": {"max_new_tokens": 1}}):
            assert post(served, "/invocations", body)[0] == (200 if state == "ready" else 503)


def test_chat_and_completions_bodies(served):
    expected = alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 24)).text
    status, _, body = post(served, "/invocations", ask(), {"content-type": "application/octet-stream"})
    assert (status, body["choices"][0]["message"]["content"]) == (200, expected)
    status, headers, text = post(served, "/invocations", ask(stream=True))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.endswith(b"data: [DONE]\n\n")
    assert post(served, "/invocations", {"prompt": "SELECT", "max_tokens": 2})[2]["object"] == "text_completion"


def test_the_reference_systems_payload(served, prompt):
    """`predict` of the AWS sample: templated inputs, 512 new tokens at most, greedy, a line break stops."""
    expected = alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 400, ("\n",)))
    parameters = {"max_new_tokens": 400, "do_sample": False, "return_full_text": False, "stop": ["\n"]}
    status, _, body = post(served, "/invocations", {"inputs": prompt, "parameters": parameters})
    assert status == 200
    assert body[0]["generated_text"].split("\n")[0] == expected.text


def test_tgi_details_and_stop_strings_stay(served, prompt):
    whole = alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 24)).text
    stop = whole[7:10]
    body = {"inputs": prompt, "parameters": {"stop": [stop], "details": True, "max_new_tokens": 24}}
    answer = post(served, "/invocations", body)[2][0]
    assert answer["generated_text"].startswith(whole[: whole.index(stop) + len(stop)])
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert "".join(t["text"] for t in answer["details"]["tokens"]) == answer["generated_text"]
    full = post(
        served, "/invocations", {"inputs": prompt, "parameters": {"return_full_text": True, "max_new_tokens": 2}}
    )
    assert full[2][0]["generated_text"].startswith(prompt)


def test_tgi_stream(served, prompt):
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 24}}
    whole = post(served, "/invocations", body)[2][0]["generated_text"]
    status, headers, text = post(served, "/invocations", {**body, "stream": True})
    events = [json.loads(e.removeprefix("data: ")) for e in text.decode().strip().split("\n\n")]
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert [e["index"] for e in events] == list(range(1, len(events) + 1))
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == whole
    assert [e["generated_text"] for e in events] == [None] * (len(events) - 1) + [whole]
    assert events[-1]["details"]["generated_tokens"] == len(events)


def test_tgi_sampling_repeats_with_a_seed(served, prompt):
    options = {"do_sample": True, "temperature": 1.4, "top_p": 0.9, "seed": 5, "max_new_tokens": 16}
    expected = alone(
        served.engine,
        Request(chat_ids(served.engine, QUESTIONS[0]), 16, sampling=Sampling(temperature=1.4, top_p=0.9, seed=5)),
    )
    for _ in range(2):
        assert (
            post(served, "/invocations", {"inputs": prompt, "parameters": options})[2][0]["generated_text"]
            == expected.text
        )


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "JSON"), (b"[]", 400, "object"), (b"{}", 400, "inputs"), (b'{"inputs": "\xff"}', 400, "JSON"),
        ({"inputs": 3}, 400, "inputs"), ({"inputs": "x", "parameters": {"tempratur": 1}}, 400, "tempratur"),
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, "watermark"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, 422, "best_of"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 10**6}}, 422, "do not fit"),
        ({"inputs": ""}, 422, "empty"),
        ({"messages": "x"}, 400, "messages"),
    ],
)  # fmt: skip
def test_wrong_bodies(served, body, status, words):
    found, _, answer = post(served, "/invocations", body)
    assert found == status
    message = answer["error"] if status == 422 else answer["error"]["message"]
    assert words in message, answer


def test_container_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "MODEL_DIRECTORY", tmp_path / "model")
    assert settings.container_defaults() == {}
    (tmp_path / "model").mkdir()
    monkeypatch.delenv("SAGEMAKER_BIND_TO_PORT", raising=False)
    assert settings.container_defaults()["port"] == 8080
    assert settings.container_defaults()["host"] == "0.0.0.0"
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8123")
    assert settings.container_defaults()["port"] == 8123


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"model": "/from/environment", "slots": 3, "drafts": "none", "warmup": False, "name": "007"}),
        (("elsewhere", "--slots", "2", "--set", "drafts=ngram"), {"model": "elsewhere", "slots": 2, "drafts": "ngram"}),
    ],
)
def test_a_container_is_told_by_its_environment(tmp_path, monkeypatch, arguments, expected):
    """Every setting has a variable; what the command line says counts more, and the container's defaults less."""
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(settings, "MODEL_DIRECTORY", tmp_path / "model")
    for name, text in {"MODEL": "/from/environment", "SLOTS": "3", "DRAFTS": "none", "WARMUP": "false",
                       "NAME": "007"}.items():  # fmt: skip
        monkeypatch.setenv(f"GORGON_{name}", text)
    given = []
    monkeypatch.setattr("gorgon.serve.server.serve", given.append)
    assert CliRunner().invoke(app, ["serve", *arguments]).exit_code == 0
    (config,) = given
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.host == ("127.0.0.1" if arguments else "0.0.0.0")
    monkeypatch.setenv("GORGON_PREFILL_CHUNK", "many")
    result = CliRunner().invoke(app, ["serve"])
    assert isinstance(result.exception, ConfigError) and "prefill_chunk" in str(result.exception)
    assert len(given) == 1
