"""A real SIGTERM to a real process: a checkpoint is left, and the same call finishes the work."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from gorgon.config import TrainHeadsConfig
from gorgon.models.directory import load_heads
from gorgon.train.heads import train_heads
from tests.train_support import tiny_project

PROGRAM = """
import sys
from gorgon import interrupts
from gorgon.config import TrainHeadsConfig
from gorgon.errors import Interrupted
from gorgon.train.heads import train_heads
try:
    with interrupts.graceful():
        train_heads(TrainHeadsConfig(**eval(sys.argv[1])), sys.argv[2])
except Interrupted as error:
    print(error, error.hint)
    sys.exit(error.exit_code)
"""


@pytest.mark.timeout(120)
def test_a_terminated_run_resumes_to_the_same_heads(tmp_path):
    model, data = tiny_project(tmp_path)
    values = {"model": str(model), "data": str(data), "heads": 2, "epochs": 100.0, "batch_tokens": 64}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, repr(values), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    notes = tmp_path / "out.partial" / "checkpoints" / "best.safetensors"  # written by the evaluation at the start
    while not notes.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "the same command resumes" in output
    assert (tmp_path / "out.partial" / "checkpoints" / "heads.pt").is_file()
    assert not (tmp_path / "out").exists()

    config = TrainHeadsConfig(**values)
    train_heads(config, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    train_heads(config, tmp_path / "straight")
    first, second = (
        load_heads(tmp_path / name, hidden_size=32, vocab_size=2048).state_dict() for name in ("out", "straight")
    )
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=1e-5, rtol=1e-4)
