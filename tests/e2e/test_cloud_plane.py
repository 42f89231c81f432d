"""SageMaker jobs against the control plane: taken away, stopped, failed; test_cloud_chain.py has the whole chain."""

import json
import signal
import subprocess
import sys

import pytest

from gorgon.pipeline import load_recipe, run_one
from tests.cloud_plane import sandbox
from tests.cloud_plane.fixtures import TINY, cli, process, settings, until
from tests.cloud_plane.plane import BUCKET
from tests.cloud_plane.sandbox import namespaces

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("cloud")]


def _logs(plane, name):
    streams = plane.logs.get("/aws/sagemaker/TrainingJobs", {})
    return "\n".join(line for stream, lines in streams.items() if stream.startswith(name) for _, line in lines)


def test_spot_interruption_then_ctrl_c_then_stop(plane, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plane.inside = {}
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


def test_what_runs_jobs_and_reports_on_endpoints_loads_no_model_code():
    code = (
        "import sys, gorgon.cloud.submit, gorgon.cloud.dry, gorgon.bench.endpoints\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
