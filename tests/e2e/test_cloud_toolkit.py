"""The genuine sagemaker-training toolkit as an oracle: it accepts our tree and runs the same step to the same result.

It wants an environment of its own (its pins are not ours): python -m venv T && T/bin/pip install sagemaker-training,
then GORGON_SAGEMAKER_TRAIN=T/bin/train. Skipped without.
"""

import json
import os
import subprocess
import sys

import pytest

from gorgon.artifacts import read_manifest
from gorgon.cloud.job import JobSpec, split_settings
from gorgon.cloud.layout import Layout
from gorgon.config import PrepareConfig
from gorgon.pipeline import run_one

TRAIN = os.environ.get("GORGON_SAGEMAKER_TRAIN")
pytestmark = [
    pytest.mark.skipif(TRAIN is None, reason="GORGON_SAGEMAKER_TRAIN names no toolkit"), pytest.mark.timeout(120)
]  # fmt: skip
SCRIPT = """import os
base = os.environ["SAGEMAKER_BASE_DIR"]
os.environ["PYTHONPATH"] = os.environ["GORGON_PATH"]
os.execv({python!r}, [{python!r}, "-m", "gorgon.cli", "step", "prepare", "--base-dir", base])
"""


def run_toolkit(tmp_path, settings):
    layout = Layout(tmp_path / "ml")
    spec = JobSpec("job", "prepare", settings, (), "out")
    code = layout.base / "code"
    program = {"sagemaker_program": '"run_step.py"', "sagemaker_submit_directory": json.dumps(str(code))}
    layout.create({**spec.hyperparameters, **program}, [], hosts=("localhost",))
    code.mkdir()
    (code / "run_step.py").write_text(SCRIPT.format(python=sys.executable))
    environment = {
        **os.environ, "SAGEMAKER_BASE_DIR": str(layout.base), "TRAINING_JOB_NAME": "job",
        "GORGON_PATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([TRAIN], env=environment, capture_output=True, text=True, check=False, timeout=100)
    return layout, done


def test_the_toolkit_runs_the_step_to_the_same_result(tmp_path):
    config = PrepareConfig(dataset="embedded", rows=60)
    layout, done = run_toolkit(tmp_path, split_settings(config, ()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (layout.base / "output" / "success").exists()
    here = run_one(config, tmp_path / "here")
    there = read_manifest(layout.model)
    assert (there["fingerprint"], there["outputs"]) == (here.manifest["fingerprint"], here.manifest["outputs"])


def test_a_failure_ends_the_toolkit_with_a_failure_too(tmp_path):
    layout, done = run_toolkit(tmp_path, {**split_settings(PrepareConfig(), ()), "rows": 1})
    assert done.returncode != 0 and layout.failure.exists()
    assert "'prepare.rows'" in done.stdout + done.stderr
