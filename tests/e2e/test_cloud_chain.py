"""A recipe from rows to endpoints, its command killed at every stage: nothing is lost, and nothing is left behind."""

import json
import os
import signal
import threading
from concurrent.futures import Future

import pytest

from gorgon.artifacts import read_manifest
from gorgon.cloud.aws import Aws
from gorgon.cloud.deploy import invoke, invoke_stream
from gorgon.errors import CloudError
from gorgon.pipeline import find_recipe, load_recipe
from tests.cloud_plane.endpoints import Endpoint
from tests.cloud_plane.fixtures import cli, process, settings, until
from tests.cloud_plane.plane import BUCKET
from tests.cloud_plane.sandbox import namespaces
from tests.page_support import check_page

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]
STEPS = ("prepare", "finetune", "train-heads", "tune")
SMALL = (
    "prepare.rows=24", "finetune.max_steps=1", "finetune.eval_steps=1",
    "finetune.eval_rows=4", "distill=null", "train-heads.heads=1", "train-heads.epochs=1",
    "train-heads.evaluations=1", "tune.prompts=1", "tune.max_new_tokens=8", "tune.max_nodes=2", "tune.trials=3",
    "tune.ngram_lengths=[0]", "tune.dynamic=false", "tune.finalist_answers=1", "tune.steps=eager", "compare=null",
    "sagemaker.instance_type=ml.m5.xlarge",
)  # fmt: skip
STAND_IN, UNTUNED = "me/stand-in:1.0", "tune=null"
MESSAGES = [
    {"role": "system", "content": "CREATE TABLE pet (age INTEGER)"},
    {"role": "user", "content": "How many pets?"},
]


def run(image, *more):
    compare = "compare: true, compare_prompts: 2, compare_trials: 1, compare_max_tokens: 12"
    endpoint = f"sagemaker.endpoint={{instance_type: ml.m5.xlarge, image: '{image}', {compare}}}"
    return process("run", "quickstart", *settings(*SMALL, endpoint, *more), "--on", "sagemaker", "--out", "run")


def ended(running):
    out, said = running.communicate(timeout=120)
    return running.returncode, out, said


def killed_at(plane, monkeypatch, operation, number, *more, count=1):
    """Runs the command and sends it a signal while AWS handles its `count`-th call of an operation."""
    original, begun, calls = getattr(plane, f"do_{operation}"), threading.Event(), []

    def handle(request):
        answer = original(request)
        calls.append(request)
        if len(calls) == count:
            begun.wait()
            os.kill(running.pid, number)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(plane, f"do_{operation}", handle)
        running = run(STAND_IN, *more)
        begun.set()
        return ended(running)


def endpoints_left(plane):
    """What there is beside jobs."""
    return {kind: names for kind, names in plane.left().items() if names and kind != "jobs"}


def result(plane, step):
    """Where a step's one job put its result."""
    (name,) = [name for name in plane.jobs if name.startswith(f"quickstart-{step}-")]
    return f"{plane.jobs[name].request['OutputDataConfig']['S3OutputPath']}/{name}/output/model"


def test_the_chain_killed_at_every_stage(plane, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plane.prices = {"ml.m5.xlarge": {"USE1-Host:ml.m5.xlarge": 0.23, "USE1-Train:ml.m5.xlarge": 0.99}}

    # while each job is made: the job runs on, and the next run finds it and follows it
    logged = ""
    for step in STEPS:
        code, _, said = killed_at(plane, monkeypatch, "CreateTrainingJob", signal.SIGKILL)
        logged += said
        assert code == -signal.SIGKILL, said
        job = list(plane.jobs.values())[-1]
        assert job.status == "InProgress" and f"-{step}-" in job.name, (job.name, job.reason)

    # while the three endpoints are made: those of the heads that there are already, for the last job is still tuning
    code, _, said = killed_at(plane, monkeypatch, "CreateEndpoint", signal.SIGTERM, UNTUNED, count=2)
    assert code == 130 and "cleaning up" in said, said
    assert not endpoints_left(plane)
    code, *_ = killed_at(plane, monkeypatch, "CreateEndpoint", signal.SIGKILL, UNTUNED, count=3)
    assert code == -signal.SIGKILL
    found = json.loads(cli("endpoints", "list", "--json").out)
    assert len(found) == 3 and all(e["delete_at"] for e in found), "nobody can act after SIGKILL, but they are marked"
    assert cli("endpoints", "delete", "--all").code == 0
    assert not endpoints_left(plane)

    # while they are compared
    asked, original = [], Endpoint.ask

    def ask(endpoint, body, kind):
        asked.append(endpoint.name)
        if len(asked) == 5:
            os.kill(running.pid, signal.SIGINT)
        return original(endpoint, body, kind)

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "ask", ask)
        running = run(STAND_IN, UNTUNED)
        code, _, said = ended(running)
    assert code == 130 and len(asked) >= 5, said
    assert not endpoints_left(plane)
    assert not (tmp_path / "run" / "endpoints").exists(), "half a comparison is none"

    until(lambda: job.status == "Completed")
    assert not any(plane.left().values()), plane.left()

    # not killed: our engine on three endpoints, of which one is used in every other way before they are deleted
    asked = before_the_first_delete(plane, monkeypatch, check_endpoint)
    code, out, said = ended(run("djl"))
    assert code == 0, said
    assert asked.result(timeout=1) is None
    assert not any(plane.left().values()), plane.left()
    results = json.loads(out)
    assert said.count("unchanged, reused") == len(STEPS)
    check_jobs(plane, results, logged, tmp_path)
    check_comparison(results["endpoints"], tmp_path / "run" / "endpoints")
    assert all(key.startswith("gorgon/") for key in plane.store.keys(BUCKET))


def before_the_first_delete(plane, monkeypatch, check):
    """Has the Medusa endpoint of the comparison checked when it is over; the outcome, as a future."""
    original, outcome = plane.do_DeleteEndpoint, Future()

    def delete(request):
        if not outcome.done():
            (name,) = [name for name in plane.endpoints if "-medusa-" in name]
            try:
                outcome.set_result(check(name))
            except BaseException as error:  # noqa: BLE001 - it is the test's, which asks for it
                outcome.set_exception(error)
        return original(request)

    monkeypatch.setattr(plane, "do_DeleteEndpoint", delete)
    return outcome


def check_jobs(plane, results, said, folder):
    """One job per step, with the laptop's argv and settings, chained by their results in S3."""
    created = [request for name, request in plane.requests if name == "CreateTrainingJob"]
    assert len(created) == len(STEPS), "each job was made once, whatever was killed"
    sources = [
        {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in request["InputDataConfig"]}
        for request in created
    ]
    assert results["train-heads"] == result(plane, "train-heads")
    assert sources[1]["data"] == sources[2]["data"] == sources[3]["data"] == results["prepare"] + "/"
    assert sources[2]["model"] == results["finetune"] + "/", "heads are trained on what the job before fine-tuned"
    assert sources[3]["model"] == results["train-heads"] + "/", "and tuned by the one after"
    prepared, backbone, heads, tuned = (plane.store.path(results[step]) for step in STEPS)
    assert read_manifest(backbone)["step"] == "finetune"
    assert (heads / "base-model" / "model.safetensors").read_bytes() == (backbone / "model.safetensors").read_bytes()
    trained = (heads / "medusa_lm_head.safetensors").read_bytes()
    assert (tuned / "medusa_lm_head.safetensors").read_bytes() == trained
    assert read_manifest(tuned)["step"] == "tune"
    assert [tree["batch_size"] for tree in json.loads((tuned / "tree.json").read_text())["trees"]] == [1]
    here = load_recipe(find_recipe("quickstart"), SMALL, folder / "run")
    assert read_manifest(prepared)["config"] == here.steps["prepare"].model_dump(mode="json"), "the laptop's settings"
    if namespaces():
        for step, made in zip(STEPS, (prepared, backbone, heads, tuned), strict=True):
            assert read_manifest(made)["argv"][1:] == ["step", step, "--base-dir", "/opt/ml"]
    assert "top-1" in said and "s billed" in said, "the job's own log is followed"
    assert json.loads((heads.parent / "data" / "metrics.json").read_text())["steps"] > 0


def check_comparison(summary, out):
    """Heads change no answer, only the first two decode plainly, and the page is there."""
    assert summary["exact_match"] == 1.0
    assert summary["tokens_per_step_of"]["fine-tuned"] == summary["tokens_per_step_of"]["base"] == 1.0
    assert summary["tokens_per_step"] >= 1.0
    assert all(usd > 0 for usd in summary["usd_per_million_tokens"].values())
    assert summary["heads"]["evaluations"], "read from the model in S3"
    assert {e["price"] for e in summary["endpoints"].values()} == {"AWS price list"}
    check_page((out / "report.html").read_text(), hostile=False)


def check_endpoint(name):
    """Asked in every way, through the DJL container."""
    rows = json.loads(cli("endpoints", "list", "--json").out)
    assert name in [row["name"] for row in rows] and len(rows) == 3
    aws = Aws()
    request = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = invoke(aws, name, request)
    text, usage = whole["choices"][0]["message"]["content"], whole["usage"]
    assert text and usage["completion_tokens"] <= 24 and usage["speculation"]["tokens_per_step"] >= 1.0
    pieces = list(invoke_stream(aws, name, request))
    assert len(pieces) > 2, "pieces come while it decodes"
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    parameters = {"max_new_tokens": 3, "do_sample": False, "details": True}
    tgi = invoke(aws, name, {"inputs": "SELECT", "parameters": parameters})
    assert 1 <= tgi[0]["details"]["generated_tokens"] <= 3
    for bad, code, word in (
        ({"messages": MESSAGES, "best_off": 3}, 400, "best_off"),
        ({"messages": []}, 400, "messages"),
        ({"messages": MESSAGES, "temperature": 7}, 400, "temperature"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, 422, "best_of"),
    ):
        with pytest.raises(CloudError, match=rf'answered {code}: .*"code": {code}, "error": .*{word}'):
            invoke(aws, name, bad)
    assert cli("endpoints", "invoke", name, "How many pets?", "--max-tokens", 8).out.strip()
    assert '"EndpointStatus": "InService"' in cli("endpoints", "describe", name).out
    assert "loaded" in cli("endpoints", "logs", name).out
