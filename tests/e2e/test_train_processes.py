"""Two real processes, started by torchrun, that talk through gloo: one result, one end, whatever happens to either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gorgon.artifacts import write_json
from gorgon.cloud.layout import Layout
from gorgon.config import FinetuneConfig, TrainHeadsConfig
from gorgon.train.finetune import finetune
from gorgon.train.heads import train_heads
from tests.e2e.warm_python import warm_python
from tests.train_support import tiny_project

GORGON = [sys.executable, "-m", "gorgon.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gorgon.cli"]
FAILS = """
import os
if os.environ.get("RANK") == "1":
    from gorgon.errors import ModelError
    from gorgon.train import heads

    def step(self):
        if self.training.step < 3:
            return before(self)
        raise ModelError("a head is odd", field="heads", value=7, hint="look at it")

    before, heads._Loop.step = heads._Loop.step, step
"""
KILLED = """
import os
import signal

from gorgon.errors import PeerError
from gorgon.train.processes import together

try:
    with together() as processes:
        assert processes.share("yes" if processes.first else "no") == "yes"
        assert not processes.any(False) and processes.any(processes.rank == 1)
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.barrier()
except PeerError as error:
    print(f"process {error.process}: {error}")
    raise SystemExit(error.exit_code)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Lets torchrun's workers fork from a process that has imported everything; launchers start as they always do."""
    modules = ("trl.trainer.sft_trainer", "peft", "gorgon.train.finetune", "gorgon.train.heads", "gorgon.pipeline")
    with warm_python(tmp_path_factory.mktemp("warm"), modules) as environment:
        yield environment


def start(command, *arguments, **environment):
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environment},
    )  # fmt: skip


def stop_when(process, file):
    """SIGTERM to the process that started the others, once a file is there."""
    while not file.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=100)


def options(values):
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", value)]


def same_weights(first: Path, second: Path, atol: float):
    wanted, found = load_file(first), load_file(second)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=1e-4, msg=key)


def container(folder: Path, project, hyperparameters) -> Layout:
    """A directory as SageMaker lays it out on a machine with two GPUs."""
    layout = Layout(folder)
    layout.create({k: json.dumps(v) for k, v in hyperparameters.items()}, ["model", "data"])
    for name, source in zip(("model", "data"), project, strict=True):
        (layout.channels / name).symlink_to(source, target_is_directory=True)
    write_json(layout.config / "resourceconfig.json", {"current_instance_type": "ml.g7e.12xlarge"})
    return layout


def test_heads_of_a_job_stopped_and_resumed_are_those_of_one_process_with_the_doubled_batch(project, warm, tmp_path):
    values = {"heads": 2, "epochs": 40.0, "evaluations": 3, "learning_rate": 0.005, "feature_batch_tokens": 300}
    layout = container(tmp_path / "ml", project, values | {"batch_tokens": 30})
    partial, out = layout.checkpoints / "train-heads.partial" / "checkpoints", layout.model
    process = start(GORGON, "step", "train-heads", "--base-dir", layout.base, **warm)
    _, said = stop_when(process, partial / "best.safetensors")
    assert process.returncode == 0, said
    assert "2 processes" in said and "stopped at step" in said and not layout.failure.exists()
    assert (partial / "heads.pt").is_file() and not list(out.iterdir())
    read = [json.loads((partial / "train" / f"progress-{rank}.json").read_text())["batches"] for rank in (0, 1)]
    assert sorted(p.name for p in (partial / "train").iterdir()) == ["hidden.bin", "progress-0.json", "progress-1.json"]
    assert min(read) > 1 and abs(read[0] - read[1]) <= 1, "each process read its share of the texts"

    process = start(GORGON, "step", "train-heads", "--base-dir", layout.base, **warm)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert said.count("resuming at step") == 1, "one process speaks for both"
    assert len(list((out / "tensorboard").iterdir())) == 2, "one file of curves for each run, not for each process"
    assert not list(layout.checkpoints.iterdir()) and "checkpoints" not in {p.name for p in out.iterdir()}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["processes"] == 2 and manifest["argv"][1] == "step"

    model, data = map(str, project)
    train_heads(TrainHeadsConfig(model=model, data=data, **(values | {"batch_tokens": 60})), tmp_path / "alone")
    same_weights(tmp_path / "alone" / "medusa_lm_head.safetensors", out / "medusa_lm_head.safetensors", 1e-4)
    wanted, found = (json.loads((d / "heads.json").read_text())["evaluations"] for d in (tmp_path / "alone", out))
    assert [look["step"] for look in wanted] == [look["step"] for look in found]
    for first, second in zip(wanted, found, strict=True):
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
        assert second["accuracy"][0] == pytest.approx(first["accuracy"][0], abs=0.05)


def test_fine_tuning_stopped_and_resumed_is_that_of_one_process_with_the_doubled_batch(project, warm, tmp_path):
    model, data = project
    values = {
        "model": model, "data": data, "epochs": 4.0, "learning_rate": 0.01, "lora_dropout": 0.0, "eval_steps": 16,
        "save_steps": 100,
    }  # fmt: skip
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = ["finetune", "--out", out, *options(values | {"batch_size": 3})]
    process = start(GORGON, *arguments, "--processes", 2, **warm)
    _, said = stop_when(process, partial / "checkpoints" / "evaluations.json")
    assert process.returncode == 143, said
    assert "stopped at step" in said and not out.exists()
    (checkpoint,) = (partial / "checkpoints" / "trainer").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {p.name for p in checkpoint.iterdir()}

    process = start(TORCHRUN, *arguments, **warm)  # torchrun itself is as good
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert printed.split() == [str(out)] and said.count("resuming at step") == 1
    assert len(list((out / "tensorboard").iterdir())) == 2
    metrics = json.loads((out / "manifest.json").read_text())["metrics"]
    assert metrics["processes"] == 2 and metrics["steps"] == 32

    alone = FinetuneConfig(**(values | {"model": str(model), "data": str(data), "batch_size": 6}))
    result = finetune(alone, tmp_path / "alone")
    same_weights(tmp_path / "alone" / "model.safetensors", out / "model.safetensors", 1e-4)
    assert metrics["loss_after"] == pytest.approx(result.manifest["metrics"]["loss_after"], rel=1e-4)


def test_an_error_in_one_process_ends_both_and_is_the_one_that_is_told(project, warm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    layout = container(tmp_path / "ml", project, {"heads": 2, "batch_tokens": 30})
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = start(GORGON, "step", "train-heads", "--base-dir", layout.base, PYTHONPATH=path, **warm)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "error: a head is odd (field: heads; given: 7)" in said and "hint: look at it" in said
    assert "error: process 1 failed: a head is odd" in said and "Traceback" not in said
    assert layout.failure.read_text() == "ModelError: a head is odd (field: heads; given: 7)\nhint: look at it"
    assert list(layout.model.iterdir()) == [] and list(layout.output_data.iterdir()) == []
    (partial,) = layout.checkpoints.iterdir()
    assert {p.name for p in partial.iterdir()} == {"checkpoints", "resume.json"}, "what resumes, and nothing else"


def test_a_process_that_is_killed_is_missed_by_the_other(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    process = start([*TORCHRUN[:-2], tmp_path / "killed.py"])
    printed, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert (
        printed == "process 0: another process is gone and left no word: it crashed, was killed, or ran out of memory\n"
    )
    assert "exitcode  : -9" in said, "torchrun names the process that was killed first"
