"""A recipe for an endpoint of vLLM or TGI: its model is exported by a job, and three endpoints are compared."""

import json
import shutil

import pytest

from gorgon.artifacts import read_manifest
from gorgon.cloud.layout import Layout
from tests.cloud_plane.fixtures import TINY, cli, settings
from tests.cloud_plane.jobs import Job
from tests.cloud_plane.sandbox import namespaces

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]


def run(engine, *options):
    compare = "compare: true, compare_prompts: 2, compare_trials: 1"
    endpoint = f"sagemaker.endpoint={{engine: {engine}, instance_type: ml.g5.xlarge, {compare}}}"
    return cli("run", "quickstart", *settings(*TINY, endpoint), "--on", "sagemaker", "--out", "run", *options)


def deploy(model, engine):
    return cli("deploy", model, "--engine", engine, "--name", "gorgon-sql", "--instance-type", "ml.g5.xlarge")


@pytest.fixture
def jobs_before(tiny, monkeypatch):
    """Jobs other than the export leave at once what the same steps left in the shared small model."""
    original = Job._attempt

    def attempt(job):
        step = job.request["AlgorithmSpecification"]["ContainerArguments"][2]
        if step == "export":
            return original(job)
        shutil.copytree(tiny.parent / step, Layout(job.root / "ml").model)
        return 0

    monkeypatch.setattr(Job, "_attempt", attempt)


@pytest.mark.skipif(not namespaces(), reason="TGI's config.json names a place below /opt/ml")
@pytest.mark.parametrize("engine", ["vllm", "tgi"])
def test_the_model_is_exported_by_a_job_and_compared(plane, tiny, tmp_path, monkeypatch, jobs_before, engine):
    monkeypatch.chdir(tmp_path)
    done = run(engine)
    assert done.code == 0, (done.err, done.error)
    results = json.loads(done.out)
    created = [request for name, request in plane.requests if name == "CreateTrainingJob"]
    steps = [request["AlgorithmSpecification"]["ContainerArguments"] for request in created]
    assert steps == [["gorgon", "step", s, "--base-dir", "/opt/ml"] for s in ("prepare", "train-heads", "export")]
    sources = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in created[-1]["InputDataConfig"]}
    assert sources["model"] == results["train-heads"] + "/"
    exported = plane.store.path(results["export"])
    assert read_manifest(exported)["config"]["format"] == engine
    weights = (exported / "base-model" / "model.safetensors").read_bytes()
    assert weights == (tiny / "base-model" / "model.safetensors").read_bytes()

    # the stand-ins have looked for backbone and heads where the real servers do, and drafted only with heads
    summary = results["endpoints"]
    assert summary["exact_match"] == 1.0 and summary["speedup"]["vs_fine-tuned"] > 1.0
    assert summary["tokens_per_step_of"] == {"medusa": 2.0, "fine-tuned": 1.0, "base": 1.0}
    assert summary["heads"]["evaluations"], "told by the model before its export"
    models = [request["PrimaryContainer"] for name, request in plane.requests if name == "CreateModel"]
    places = [m.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri") for m in models]
    assert places == [None, results["export"] + "/", results["export"] + "/"], "the base model comes from the hub"
    assert not any("AdditionalModelDataSources" in m for m in models)
    assert not any(plane.left().values()), plane.left()
    shown = json.loads(run(engine, "--dry-run").out)["calls"]
    assert plane.made <= {call["operation"] for call in shown}, "--dry-run shows every call"

    done = deploy(results["export"], engine)
    assert done.out == "gorgon-sql\n", (done.err, done.error)  # what was exported is served as it is
    assert cli("endpoints", "delete", "gorgon-sql").code == 0
    assert f"was exported for {engine}" in str(deploy(results["export"], "gorgon").error)
    assert f"must be exported for {engine} first" in str(deploy(results["train-heads"], engine).error)
    assert not any(plane.left().values()), plane.left()
