"""boto3's own client drives the real server through SageMaker's runtime protocol, and so does `gorgon bench`."""

import json
import socket
import threading

import pytest

from gorgon.bench.load import Level, run_level
from gorgon.bench.load_client import body_of
from gorgon.cloud.runtime import connector
from gorgon.decode.request import Request
from gorgon.errors import CloudError, RefusedError
from tests.cloud_plane.endpoints import Attached, frame
from tests.cloud_plane.fixtures import cli
from tests.cloud_plane.plane import Plane
from tests.e2e.conftest import gorgon
from tests.serve_support import QUESTIONS, SCHEMA, alone, ask, chat_ids, make_engine, server

boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def served():
    with server(make_engine(), slots=4, queue=64) as running:
        yield running


@pytest.fixture
def plane(served, tmp_path, monkeypatch):
    """An account with one endpoint, which this process and its children take for AWS."""
    made = Plane(tmp_path / "aws", None)
    made.endpoints["sql"] = Attached(served.port)
    for key, value in made.environment().items():
        monkeypatch.setenv(key, value)
    for key in ("AWS_PROFILE", "GORGON_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    yield made
    made.close()


@pytest.fixture
def runtime(plane):
    return boto3.client("sagemaker-runtime", endpoint_url=plane.url, region_name="us-east-1")


@pytest.fixture(scope="module")
def expected(served):
    return alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 24))


def invoke(runtime, body, **more):
    return runtime.invoke_endpoint(
        EndpointName="sql", ContentType="application/json", Accept="application/json", Body=json.dumps(body), **more
    )


def stream(runtime, body):
    answer = runtime.invoke_endpoint_with_response_stream(
        EndpointName="sql", ContentType="application/json", Body=json.dumps(body)
    )
    return [event["PayloadPart"]["Bytes"] for event in answer["Body"]]


def events(parts):
    lines = b"".join(parts).decode().strip().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_invoke_endpoint(runtime, expected):
    answer = invoke(runtime, ask(), TargetVariant="main", InferenceId="abc", CustomAttributes="x=1")
    assert answer["ContentType"].startswith("application/json")
    document = json.loads(answer["Body"].read())
    assert document["choices"][0]["message"]["content"] == expected.text
    tgi = {"inputs": "SELECT", "parameters": {"max_new_tokens": 3, "details": True}}
    assert 1 <= json.loads(invoke(runtime, tgi)["Body"].read())[0]["details"]["generated_tokens"] <= 3
    text = {"prompt": "SELECT", "max_tokens": 2, "temperature": 0}
    assert json.loads(invoke(runtime, text)["Body"].read())["object"] == "text_completion"


def test_invoke_endpoint_with_response_stream(runtime, expected):
    parts = stream(runtime, ask(stream=True))
    assert len(parts) > 1  # it came in pieces
    assert b"".join(parts).endswith(b"data: [DONE]\n\n")
    found = events(parts)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found) == expected.text
    tgi = events(stream(runtime, {"inputs": "SELECT", "parameters": {"max_new_tokens": 5}, "stream": True}))
    assert tgi[-1]["generated_text"] == "".join(e["token"]["text"] for e in tgi if not e["token"]["special"])


def test_the_servers_refusals_reach_the_caller(runtime):
    for body, status, words in (
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, "watermark"),
        (ask(temperature=3), 400, "temperature"),
        (ask(max_tokens=10**6), 400, "do not fit"),
    ):  # fmt: skip
        for call in (invoke, stream):
            with pytest.raises(runtime.exceptions.ModelError) as refused:
                call(runtime, body)
            assert refused.value.response["OriginalStatusCode"] == status
            assert words in refused.value.response["OriginalMessage"]


# the load generator


def test_bench_drives_an_endpoint(plane, served, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "system", "content": SCHEMA}, {"role": "user", "content": q}]} for q in QUESTIONS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--prompts", prompts, "--requests", 6, "--clients", "1,3", "--max-tokens", 12, "--warmup", 1)
    done = gorgon("bench", "sagemaker://sql", "--region", "us-east-1", *common, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["url"] == "sagemaker://sql"
    for row in document["levels"]:
        assert (row["answers"], row["errors"], row["exact_match"]) == (6, {}, 1.0)
        assert 0 < row["first_token_ms"]["mean"] < row["latency_ms"]["mean"] and row["tokens_per_step"] >= 1
    straight = cli(
        "bench", served.url, "--json", "--reference", tmp_path / "out" / "answers.jsonl", *common[:4], *common[6:]
    )
    assert straight.code == 0, straight.err
    assert json.loads(straight.out)["levels"][0]["exact_match"] == 1.0  # the same answers as over HTTP
    tgi = cli("bench", "sagemaker://sql", "--api", "tgi", "--requests", 2, "--clients", 1, "--json", *common[:2])
    assert tgi.code == 0, tgi.err
    assert json.loads(tgi.out)["levels"][0]["answers"] == 2


def test_refusals_under_load_are_counted_by_the_containers_status_and_not_retried(plane, served):
    with server(served.engine, slots=1, queue=0) as small:
        plane.endpoints["small"] = Attached(small.port)
        body = body_of(
            [{"role": "user", "content": "x"}], "invocations", model=None, max_tokens=60, extra={"ignore_eos": True}
        )
        outcomes = run_level(Level(8, clients=4), [body], connector("small", None, 60.0))
    assert {o.error for o in outcomes} == {"", "429"}


def test_a_stream_that_breaks_off_is_an_error(plane):
    class Broken(Attached):
        """A container that dies in the middle of its answer."""

        def ask(self, _body, _content_type):
            listener = socket.create_server(("127.0.0.1", 0))

            def answer():
                connection, _ = listener.accept()
                connection.recv(65536)
                event = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
                connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + event)
                connection.close()
                listener.close()

            threading.Thread(target=answer, daemon=True).start()
            self.port = listener.getsockname()[1]
            return super().ask(b"", None)

    plane.endpoints["broken"] = Broken(0)
    assert [o.error for o in run_level(Level(1), [{}], connector("broken", None, 10.0))] == ["cut off"]


def test_faults_inside_a_stream_and_json_lines():
    """Frames as AWS sends them, read by botocore's own parser."""
    from botocore.eventstream import EventStream
    from botocore.session import get_session

    from gorgon.cloud.runtime import EndpointTransport

    model = get_session().get_service_model("sagemaker-runtime")
    shape = model.operation_model("InvokeEndpointWithResponseStream").output_shape.members["Body"]

    class Client:
        def __init__(self, *frames):
            self.frames = frames

        def invoke_endpoint_with_response_stream(self, **_request):
            from botocore.parsers import create_parser

            raw = type("Raw", (), {"stream": lambda _: iter(self.frames), "close": lambda _: None})()
            parser = create_parser("rest-json")._event_stream_parser
            return {"Body": EventStream(raw, shape, parser, "InvokeEndpointWithResponseStream")}

    lines = frame(b'{"token": {"text": "a"}}\n{"tok'), frame(b'en": {"text": "b"}, "generated_text": "ab"}')
    outcome = run_level(Level(1), [{}], lambda: EndpointTransport(Client(*lines), "x"))[0]
    assert (outcome.text, outcome.error) == ("ab", "")
    fault = frame(b'{"Message": "the model failed", "ErrorCode": "ModelStreamError"}', "exception", "ModelStreamError")
    outcome = run_level(Level(1), [{}], lambda: EndpointTransport(Client(lines[0], fault), "x"))[0]
    assert (outcome.error, outcome.text) == ("StreamBrokenError", "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sagemaker://nobody"], "Endpoint nobody of account"), (["sagemaker://a_b"], "not the name"),
        (["sagemaker://"], "not the name"), (["sagemaker://sql", "--region", "mars-1"], "not in this region"),
        (["sagemaker://sql", "--api-key", "x"], "signed"), (["http://x", "--region", "us-east-1"], "only SageMaker"),
        (["sagemaker://sql", "--api", "grpc"], "no such interface"),
    ],
)  # fmt: skip
def test_bad_input(plane, monkeypatch, arguments, words):
    if "mars-1" in arguments:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    found = cli("bench", *arguments)
    assert found.error is not None and found.error.exit_code == 2 and words in str(found.error), found.error


def test_missing_and_unknown_credentials(plane, monkeypatch):
    from tests.cloud_plane.plane import Fault

    class Unknown(Attached):
        def ask(self, _body, _content_type):
            raise Fault("UnrecognizedClientException", "The security token included in the request is invalid.", 403)

    plane.endpoints["unknown"] = Unknown(0)
    with pytest.raises(RefusedError, match="UnrecognizedClient") as refused:
        list(connector("unknown", None, 5.0)().lines({}))
    assert refused.value.status == 403 and "credentials" in refused.value.hint
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    with pytest.raises(CloudError, match="no AWS credentials"):
        list(connector("sql", None, 5.0)().lines({}))
    found = cli("bench", "sagemaker://sql", "--requests", 1)
    assert isinstance(found.error, CloudError) and found.error.exit_code == 2
    outcomes = run_level(Level(2), [{}], connector("sql", None, 5.0))
    assert [o.error for o in outcomes] == ["CloudError"] * 2  # under load it is one of the counted errors


def test_nobody_there(plane, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    found = cli("bench", "sagemaker://sql", "--requests", 1)
    assert found.error is not None and "does not answer" in str(found.error)
