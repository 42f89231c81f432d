"""SageMaker end to end, against the control plane: real jobs under /opt/ml, a real endpoint, nothing left behind."""

import json
import signal
import subprocess
import sys

import pytest

from gorgon.artifacts import read_manifest
from gorgon.cloud.aws import Aws
from gorgon.cloud.deploy import invoke, invoke_stream
from gorgon.errors import CloudError
from gorgon.pipeline import load_recipe, run_one
from tests.cloud_plane import sandbox
from tests.cloud_plane.fixtures import TINY, cli, process, settings, until
from tests.cloud_plane.plane import BUCKET
from tests.cloud_plane.sandbox import namespaces

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("cloud")]
MESSAGES = [
    {"role": "system", "content": "CREATE TABLE pet (age INTEGER)"},
    {"role": "user", "content": "How many pets?"},
]


def _logs(plane, name):
    streams = plane.logs.get("/aws/sagemaker/TrainingJobs", {})
    return "\n".join(line for stream, lines in streams.items() if stream.startswith(name) for _, line in lines)


def test_two_jobs_then_an_endpoint_then_nothing(plane, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "quickstart", *settings(*TINY), "--on", "sagemaker", "--out", "run"]
    done = cli(*command)
    assert done.code == 0, done.err
    results = json.loads(done.out)
    prepared, trained = (plane.store.path(results[step]) for step in ("prepare", "train-heads"))

    # the container's result is the laptop's: same settings, same inputs, same files
    from gorgon.pipeline import find_recipe

    recipe = load_recipe(find_recipe("quickstart"), TINY, tmp_path / "here")
    here = run_one(recipe.steps["prepare"], tmp_path / "here" / "prepare")
    assert read_manifest(prepared)["fingerprint"] == here.manifest["fingerprint"]
    assert read_manifest(prepared)["outputs"] == here.manifest["outputs"]
    assert (trained / "medusa_lm_head.safetensors").is_file() and (trained / "base-model" / "config.json").is_file()
    argv = read_manifest(trained)["argv"]
    if namespaces():
        assert argv[1:] == ["step", "train-heads", "--base-dir", "/opt/ml"]
    assert "top-1" in done.err and "s billed" in done.err, "the job's own log is followed"
    assert json.loads((trained.parent / "data" / "metrics.json").read_text())["steps"] > 0

    again = cli(*command)
    assert again.code == 0 and json.loads(again.out) == results
    assert [name for name, _ in plane.requests].count("CreateTrainingJob") == 2, "finished steps are reused"

    # tune is left out to save time: this is the tree that it would write
    tree = {"format": 2, "trees": [{"batch_size": 1, "kind": "static", "paths": [[0]], "ngram": 2}]}
    plane.store.put(f"{results['train-heads']}/tree.json", json.dumps(tree))
    plane.prices = {"ml.m5.xlarge": {"USE1-Host:ml.m5.xlarge": 0.23, "USE1-Train:ml.m5.xlarge": 0.99}}
    done = cli("deploy", results["train-heads"], "--name", "sql", "--instance-type", "ml.m5.xlarge")
    assert done.code == 0 and done.out.strip() == "sql", (done.err, done.error)
    assert "0.230 USD/h (AWS price list)" in done.err and "gorgon endpoints delete sql" in done.err
    assert [row["name"] for row in json.loads(cli("endpoints", "list", "--json").out)] == ["sql"]

    aws = Aws()
    request = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = invoke(aws, "sql", request)
    text, usage = whole["choices"][0]["message"]["content"], whole["usage"]
    assert text and usage["completion_tokens"] <= 24 and usage["speculation"]["tokens_per_step"] >= 1.0
    pieces = list(invoke_stream(aws, "sql", request))
    assert len(pieces) > 2, "pieces come while it decodes"
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    parameters = {"max_new_tokens": 3, "do_sample": False, "details": True}
    tgi = invoke(aws, "sql", {"inputs": "SELECT", "parameters": parameters})
    assert 1 <= tgi[0]["details"]["generated_tokens"] <= 3
    for bad, code, word in (
        ({"messages": MESSAGES, "best_off": 3}, 400, "best_off"),
        ({"messages": []}, 400, "messages"),
        ({"messages": MESSAGES, "temperature": 7}, 400, "temperature"),
        ({"inputs": "x", "parameters": {"best_of": 2}}, 422, "best_of"),
    ):
        with pytest.raises(CloudError, match=rf'answered {code}: .*"code": {code}, "error": .*{word}'):
            invoke(aws, "sql", bad)
    assert cli("endpoints", "invoke", "sql", "How many pets?", "--max-tokens", 8).out.strip()
    assert '"EndpointStatus": "InService"' in cli("endpoints", "describe", "sql").out
    assert "loaded" in cli("endpoints", "logs", "sql").out

    done = cli("endpoints", "delete", "sql")
    assert done.code == 0 and "with its configuration and model" in done.out
    assert not any(plane.left().values()), plane.left()
    assert cli("endpoints", "delete", "sql").error.hint, "a second time there is nothing to delete"


def test_spot_interruption_then_ctrl_c_then_stop(plane, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    run_one(load_recipe_steps(tmp_path)["prepare"], data)
    run = process(
        "run", "quickstart", *settings(*TINY), "--on", "sagemaker", "--out", "run",
        *settings("prepare=null", f"train-heads.data={data}", "train-heads.epochs=400", "sagemaker.spot=true"),
    )  # fmt: skip
    try:
        name, job = until(lambda: next(iter(plane.jobs.items()), None))
        until(lambda: "step    0/" in _logs(plane, name).replace("step 0/", "step    0/"))
        job.interrupt()
        until(lambda: "resuming at step" in _logs(plane, name))
        assert job.attempts == 2 and job.status == "InProgress"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
        assert run.returncode == 130, said
        assert "Interrupted" in said and f"gorgon jobs attach {name}" in said and f"gorgon jobs stop {name}" in said
        assert job.status == "InProgress", "Ctrl-C leaves the job alone"
        assert cli("jobs", "stop", name).code == 0
        until(lambda: job.status == "Stopped")
    finally:
        run.kill()
        run.communicate()
    kept = plane.store.keys(BUCKET, "gorgon/quickstart")
    assert any(key.endswith("checkpoints/heads.pt") for key in kept), "stopped with SIGTERM, it wrote a checkpoint"
    assert not any("/output/model/" in key for key in kept), "half a result is no result"
    attached = cli("jobs", "attach", name)
    assert attached.code == 1 and "was stopped" in str(attached.error)
    assert "resuming at step" in cli("jobs", "logs", name).out
    (row,) = json.loads(cli("jobs", "list", "--json").out)
    assert (row["name"], row["status"], row["step"]) == (name, "Stopped", "train-heads")


def load_recipe_steps(folder):
    from gorgon.pipeline import find_recipe

    return load_recipe(find_recipe("quickstart"), TINY, folder).steps


@pytest.mark.parametrize("inside", [True, False], ids=["under a real /opt/ml", "as a plain process"])
def test_a_failed_job_shows_its_own_error(plane, tmp_path, monkeypatch, inside):
    if inside and not namespaces():
        pytest.skip("this kernel bars user namespaces")
    monkeypatch.setattr(sandbox, "namespaces", lambda: inside)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        plane.store.put(f"s3://{BUCKET}/rows/{name}.jsonl", "{}")
    only = ["prepare.dataset=null", f"prepare.train=s3://{BUCKET}/rows", "train-heads=null"]
    done = cli("run", "quickstart", *settings(*TINY, *only), "--on", "sagemaker", "--out", "run")
    assert done.error.exit_code == 2 and "Traceback" not in done.err
    said = str(done.error)
    assert "AlgorithmError: DataError" in said and "must hold one file, not 2" in said and "exit code: 2" in said


def test_help_needs_neither_boto3_nor_torch():
    code = (
        "import sys; sys.argv = ['gorgon', 'endpoints', '--help']\n"
        "from gorgon.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'boto3', 'botocore'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
