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


def test_jobs_then_an_endpoint_then_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = (f"sagemaker.budget_usd={BUDGET}", "sagemaker.max_runtime_s=1800", "tune.prompts=4")
    tiny = [text for text in TINY if text != "tune=null"]
    done = cli("run", "quickstart", *settings(*tiny, *limits), "--on", "sagemaker", "--out", "run")
    assert done.code == 0, (done.err, done.error)
    model = json.loads(done.out)["tune"]
    before = {e["name"] for e in json.loads(cli("endpoints", "list", "--json").out)}
    try:
        done = cli("deploy", model, "--name", "gorgon-test", "--instance-type", "ml.g5.xlarge")
        assert done.code == 0, (done.err, done.error)
        assert cli("endpoints", "invoke", "gorgon-test", "How many pets are there?").out.strip()
    finally:
        cli("endpoints", "delete", "gorgon-test")
    assert {e["name"] for e in json.loads(cli("endpoints", "list", "--json").out)} == before
