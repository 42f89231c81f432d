"""The same against a real account: only with a budget and a role, never by default. It costs money."""

import json
import os

import pytest

from tests.cloud_plane.fixtures import TINY, cli, settings

BUDGET = os.environ.get("GORGON_AWS_BUDGET_USD")
pytestmark = [
    pytest.mark.aws, pytest.mark.timeout(7200),
    pytest.mark.skipif(BUDGET is None, reason="GORGON_AWS_BUDGET_USD is not set"),
]  # fmt: skip


def test_jobs_then_endpoints_compared_and_asked_then_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = "instance_type: ml.g5.xlarge"
    limits = (
        f"sagemaker.budget_usd={BUDGET}", "sagemaker.max_runtime_s=1800", "tune.prompts=4", "finetune.max_steps=2",
        f"sagemaker.endpoint={{{machine}, compare: true, compare_prompts: 4, compare_trials: 1}}",
    )  # fmt: skip
    tiny = [text for text in TINY if text not in ("tune=null", "finetune=null")]
    before = {e["name"] for e in json.loads(cli("endpoints", "list", "--json").out)}
    done = cli("run", "quickstart", *settings(*tiny, *limits), "--on", "sagemaker", "--out", "run")
    assert done.code == 0, (done.err, done.error)
    results = json.loads(done.out)
    assert results["endpoints"]["exact_match"] == 1.0
    try:
        done = cli("deploy", results["tune"], "--name", "gorgon-test", "--instance-type", "ml.g5.xlarge")
        assert done.code == 0, (done.err, done.error)
        for how in ("--stream", "--whole"):
            assert cli("endpoints", "invoke", "gorgon-test", "How many pets are there?", how).out.strip()
    finally:
        cli("endpoints", "delete", "gorgon-test")
    assert {e["name"] for e in json.loads(cli("endpoints", "list", "--json").out)} == before
