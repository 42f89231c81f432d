"""The start script of a job: SIGTERM and a failing pip before the step, and the step in its place afterwards."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import gorgon.cloud

SCRIPT = Path(gorgon.cloud.__file__).parent / "assets" / "start.sh"


@pytest.fixture
def start(tmp_path):
    """Starts the script with a `python3` of our own as the image's."""

    def run(python3, *command):
        tool = tmp_path / "bin" / "python3"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{python3}\n")
        tool.chmod(0o755)
        environment = {
            "PATH": f"{tool.parent}:{os.environ['PATH']}", "GORGON_CODE": str(tmp_path / "code"),
            "GORGON_FAILURE": str(tmp_path / "output" / "failure"), "GORGON_EXTRAS": "[gpu]",
        }  # fmt: skip
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / "gorgon_llm-1.0-py3-none-any.whl").touch()
        return subprocess.Popen(
            ["bash", str(SCRIPT), *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    return run


def test_the_step_takes_the_scripts_place(start):
    process = start("exit 0", "bash", "-c", "echo $$ $HF_HOME")
    said, _ = process.communicate(timeout=20)
    assert said.split() == [str(process.pid), "/opt/ml/cache/huggingface"], "exec: the step has the script's process id"


def test_pip_gets_the_wheel_with_its_extras_and_keeps_the_images_torch(start, tmp_path):
    record = tmp_path / "arguments"
    process = start(f'[ "$1" = -c ] && echo torch==2.9.0 || echo "$@" > {record}', "true")
    assert process.wait(20) == 0
    arguments = record.read_text().split()
    assert arguments[-1] == f"{tmp_path}/code/gorgon_llm-1.0-py3-none-any.whl[gpu]"
    constraint = arguments[arguments.index("--constraint") + 1]
    assert Path(constraint).read_text() == "torch==2.9.0\n"


def test_a_failing_pip_is_the_jobs_failure(start, tmp_path):
    process = start('[ "$1" = -c ] || { echo "no matching distribution"; exit 1; }', "echo", "never")
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and "never" not in said
    failure = (tmp_path / "output" / "failure").read_text()
    assert failure.startswith("InstallError") and "no matching distribution" in failure


def test_a_stop_while_pip_runs_ends_well(start, tmp_path):
    begun = tmp_path / "begun"
    process = start(f'[ "$1" = -c ] || {{ touch {begun}; sleep 30; }}', "echo", "never")
    while not begun.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(20) == 0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "output" / "failure").exists()
