"""Fixtures for tests against the control plane, and the ways to call the command line."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from gorgon.cli import app
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
