"""Fixtures for tests against the control plane, and the ways to call the command line."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from gorgon.cli import app
from gorgon.cloud.wheel import build_wheel
from gorgon.pipeline import find_recipe, load_recipe, run_one
from tests.cloud_plane.plane import Plane
from tests.cloud_plane.sandbox import make_image

TINY = (
    "prepare.rows=60", "finetune=null", "distill=null", "train-heads.heads=1", "train-heads.epochs=1",
    "train-heads.evaluations=1", "tune=null", "compare=null", "sagemaker.instance_type=ml.m5.xlarge",
)  # fmt: skip


def settings(*given):
    return [part for text in given for part in ("--set", text)]


def cli(*arguments):
    """The command in this process: code, out, err and the typed error if it raised one."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    error = result.exception if isinstance(result.exception, Exception) else None
    if error is not None and not hasattr(error, "exit_code"):
        raise error
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, error=error)


def process(*arguments):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "gorgon.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds=150.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def own_image(tmp_path_factory):
    """What the Dockerfile builds: the same environment with Gorgon installed in it."""
    made = make_image(tmp_path_factory.mktemp("own-image"))
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    pip = [made / "python3", "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    return made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model directory with a trained head and a tree: the embedded backbone, trained for a few seconds."""
    out = tmp_path_factory.mktemp("tiny")
    steps = load_recipe(find_recipe("quickstart"), TINY, out).steps
    for name in ("prepare", "train-heads"):
        run_one(steps[name], out / name)
    tree = {"format": 5, "trees": [{"batch_size": 1, "kind": "static", "paths": [[0]], "ngram": 2}]}
    (out / "train-heads" / "tree.json").write_text(json.dumps(tree))
    return out / "train-heads"


@pytest.fixture
def plane(tmp_path, image, monkeypatch):
    """An empty account, which this process and its children take for AWS."""
    made = Plane(tmp_path / "aws", image)
    for key, value in made.environment().items():
        monkeypatch.setenv(key, value)
    for key in [k for k in os.environ if k.startswith("AWS_PROFILE")]:
        monkeypatch.delenv(key)
    yield made
    made.close()
