"""Servers beside the DJL container's: an image of our own that runs `gorgon serve`, and exports for vLLM and TGI."""

import json
import threading
import urllib.request
from pathlib import Path

import boto3
import pytest
import torch
from botocore.exceptions import ClientError
from safetensors.torch import load_file

from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.cloud.launch import Launch
from gorgon.data.chat import encode_prompt
from gorgon.decode.load import load_engine
from tests.cloud_plane import endpoints
from tests.cloud_plane.endpoints import Endpoint
from tests.cloud_plane.fixtures import cli
from tests.cloud_plane.sandbox import namespaces

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]
IMAGE = "me/gorgon:0.1.0"
CHATS = [
    [{"role": "system", "content": "CREATE TABLE pet (age INTEGER)"}, {"role": "user", "content": question}]
    for question in ("How many pets?", "What is the oldest pet's age?", "Which ages are there?")
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def processes(session):
    """Ids of the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not namespaces(), reason="this kernel bars user namespaces, so there is no /opt/ml/model")
def test_an_image_of_our_own_serves_under_the_containers_contract(plane, own_image, tiny, here):
    plane.images[IMAGE] = own_image
    limits = {"max_total_tokens": 300, "max_input_tokens": 200}
    cloud = SageMakerConfig(endpoint=EndpointConfig(instance_type="ml.m5.xlarge", image=IMAGE, **limits))
    Launch(str(tiny), cloud, name="own").run()
    endpoint = plane.endpoints["own"]
    command = endpoint.container.process.args
    assert command[-2:] == ["gorgon", "serve"], "the Dockerfile's entry point and SageMaker's word"
    assert endpoint.port == endpoints.PORT or "SAGEMAKER_BIND_TO_PORT" in endpoint.container.environment
    with urllib.request.urlopen(f"http://{endpoints.HOST}:{endpoint.port}/ping", timeout=2) as answer:
        assert (answer.status, json.load(answer)) == (200, {"status": "ready"})
    with urllib.request.urlopen(f"http://{endpoints.HOST}:{endpoint.port}/health", timeout=2) as answer:
        assert json.load(answer)["context"] == 300
    if Path("/proc").is_dir():
        assert processes(endpoint.container.process.pid), "what is looked for below can be found"

    engine = load_engine(tiny, dtype="float32")
    prompts = [encode_prompt(engine.backbone.tokenizer, chat) for chat in CHATS]
    texts = [engine.answer(prompt, max_new_tokens=24).text for prompt in prompts]

    client, found = boto3.client("sagemaker-runtime"), {}

    def ask(number):
        body = json.dumps({"messages": CHATS[number], "max_tokens": 24, "temperature": 0})
        answer = client.invoke_endpoint(EndpointName="own", ContentType="application/json", Body=body)
        found[number] = json.loads(answer["Body"].read())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(CHATS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[n]["choices"][0]["message"]["content"] for n in range(len(CHATS))] == texts
    assert found[0]["usage"]["speculation"]["tokens_per_step"] >= 1.0

    body = json.dumps({"messages": CHATS[0], "max_tokens": 24, "temperature": 0, "stream": True})
    answer = client.invoke_endpoint_with_response_stream(
        EndpointName="own", ContentType="application/json", Body=body
    )  # fmt: skip
    parts = [event["PayloadPart"]["Bytes"] for event in answer["Body"]]
    events = b"".join(parts).decode().split("\n\n")
    assert len(parts) > 2 and events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content") or "" for delta in deltas) == texts[0]

    with pytest.raises(ClientError) as error:
        client.invoke_endpoint(EndpointName="own", ContentType="application/json", Body=b'{"messages": []}')
    assert error.value.response["OriginalStatusCode"] == 400
    assert "messages" in json.loads(error.value.response["OriginalMessage"])["error"]["message"]
    long = json.dumps({"messages": [{"role": "user", "content": "many pets " * 200}], "max_tokens": 1})
    with pytest.raises(ClientError, match="at most 200"):
        client.invoke_endpoint(EndpointName="own", ContentType="application/json", Body=long)

    assert cli("endpoints", "delete", "own").code == 0
    assert not any(plane.left().values()), plane.left()
    assert endpoint.container.process.poll() == 0, "SIGTERM ends the server well"
    assert processes(endpoint.container.process.pid) == []


# exports


@pytest.fixture
def served(monkeypatch):
    """Neither vLLM nor TGI runs here: their endpoints serve at once, and nothing asks them."""
    monkeypatch.setattr(Endpoint, "run", lambda self: setattr(self, "status", "InService"))


def files(plane, uri):
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return {key.removeprefix(prefix) for key in plane.store.keys(bucket, prefix)}


def deploy(plane, model, engine):
    done = cli("deploy", model, "--engine", engine, "--name", "sql", "--instance-type", "ml.g5.xlarge")
    assert (done.code, done.out) == (0, "sql\n"), (done.err, done.error)
    return plane.models["sql"]["PrimaryContainer"]


def test_vllm_gets_the_heads_in_its_own_format(plane, tiny, here, served):
    container = deploy(plane, tiny, "vllm")
    (source,) = container["AdditionalModelDataSources"]
    heads = source["S3DataSource"]["S3Uri"]
    assert source["ChannelName"] == "heads"
    assert files(plane, heads) == {"config.json", "model.safetensors", "manifest.json"}, "no second copy of the weights"
    described = json.loads(plane.store.path(f"{heads}config.json").read_text())
    base = json.loads((tiny / "base-model" / "config.json").read_text())
    assert described["architectures"] == ["MedusaModel"] and described["model_type"] == "medusa"
    assert (described["num_heads"], described["num_hidden_layers"]) == (1, 1)
    assert (described["hidden_size"], described["vocab_size"]) == (base["hidden_size"], base["vocab_size"])
    sent, ours = (
        load_file(plane.store.path(f"{heads}model.safetensors")),
        load_file(tiny / "medusa_lm_head.safetensors"),
    )
    assert torch.equal(sent["blocks.0.layers.0.weight"], ours["0.0.linear.weight"])
    assert torch.equal(sent["blocks.0.layers.0.bias"], ours["0.0.linear.bias"])
    assert torch.equal(sent["lm_heads.0.weight"], ours["0.1.weight"])
    assert len(sent) == 3

    model = container["ModelDataSource"]["S3DataSource"]["S3Uri"]
    weights = plane.store.path(f"{model}base-model/model.safetensors").read_bytes()
    assert weights == (tiny / "base-model" / "model.safetensors").read_bytes()
    assert {"base-model/tokenizer.json", "base-model/config.json"} <= files(plane, model)
    environment = container["Environment"]
    assert environment["SM_VLLM_MODEL"] == "/opt/ml/model/base-model"
    assert json.loads(environment["SM_VLLM_SPECULATIVE_CONFIG"]) == {
        "method": "medusa", "model": "/opt/ml/additional-model-data-sources/heads", "num_speculative_tokens": 1,
    }  # fmt: skip
    done = cli("deploy", model, "--engine", "vllm", "--name", "other", "--instance-type", "ml.g5.xlarge")
    assert done.error.exit_code == 2 and "must be exported for vllm first" in str(done.error)
    assert "other" not in plane.models


def test_tgi_gets_a_directory_that_it_reads(plane, tiny, here, served):
    container = deploy(plane, tiny, "tgi")
    model = container["ModelDataSource"]["S3DataSource"]["S3Uri"]
    found = files(plane, model)
    assert {"config.json", "medusa_lm_head.safetensors", "tokenizer.json", "base-model/config.json",
            "base-model/model.safetensors", "base-model/tokenizer.json"} <= found  # fmt: skip
    assert not found & {"tree.json", "gorgon.json", "heads.json"}, "what only we read stays here"
    described = json.loads(plane.store.path(f"{model}config.json").read_text())
    assert described == {
        "medusa_num_heads": 1, "medusa_num_layers": 1, "base_model_name_or_path": "/opt/ml/model/base-model",
        "version": "1",
    }  # fmt: skip
    sent = load_file(plane.store.path(f"{model}medusa_lm_head.safetensors"))
    ours = load_file(tiny / "medusa_lm_head.safetensors")
    assert set(sent) == set(ours) and all(torch.equal(sent[key], ours[key]) for key in ours)
    weights = plane.store.path(f"{model}base-model/model.safetensors").read_bytes()
    assert weights == (tiny / "base-model" / "model.safetensors").read_bytes()
    assert container["Environment"]["HF_MODEL_ID"] == "/opt/ml/model"
    assert "AdditionalModelDataSources" not in container


@pytest.mark.parametrize("engine", ["vllm", "tgi"])
def test_heads_that_another_server_cannot_run_are_not_deployed(plane, tiny, here, served, engine):
    changed = here / "hydra"
    changed.mkdir()
    for path in tiny.iterdir():
        (changed / path.name).symlink_to(path)
    (changed / "gorgon.json").unlink()
    (changed / "gorgon.json").write_text('{"format": 1, "head_kind": "hydra"}')
    done = cli("deploy", changed, "--engine", engine, "--name", "sql", "--instance-type", "ml.g5.xlarge")
    assert done.error.exit_code == 2 and "heads of this kind" in str(done.error), str(done.error)
    assert not any(plane.left().values())
