"""One small run of the whole path through the real command line, shared by the end-to-end tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from tests.cloud_plane.fixtures import image, own_image, plane, tiny  # noqa: F401 - SageMaker's stand-in
from tests.serve_support import make_engine, server

SMALL = (
    "prepare.rows=400", "finetune.max_steps=12", "finetune.eval_steps=12", "finetune.eval_rows=16", "distill.rows=160",
    "train-heads.heads=3", "train-heads.epochs=8", "train-heads.evaluations=2", "tune.prompts=12", "tune.max_nodes=16",
    "tune.trials=3", "tune.finalist_answers=6", "compare.prompts=12", "compare.trials=2", "compare.warmup_prompts=2",
    "compare.examples=2", "tune.steps=eager", "compare.steps=eager",  # compiled steps have tests of their own
)  # fmt: skip


def gorgon(*arguments, timeout=280, **options):
    """Runs the installed command and returns the finished process."""
    command = [str(Path(sys.executable).with_name("gorgon")), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False, **options
    )


@pytest.fixture(scope="module")
def served():
    """A running server of the test engine; a module whose server must be otherwise has a fixture of its own."""
    with server(make_engine(), slots=4, queue=40) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's own client, talking to it."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`gorgon run quickstart`, small: out (directory), document (its --json)."""
    out = tmp_path_factory.mktemp("small") / "run"
    settings = [part for text in SMALL for part in ("--set", text)]
    done = gorgon("run", "quickstart", *settings, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, document=json.loads(done.stdout), settings=settings, stderr=done.stderr)
