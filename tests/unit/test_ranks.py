"""Which process this is, what several of them may run, and how many a job starts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gorgon import ranks
from gorgon.artifacts import run_step, write_json
from gorgon.cli import app
from gorgon.cloud.container import process_count, run_in_container, run_in_processes
from gorgon.cloud.images import GPUS
from gorgon.cloud.layout import Layout
from gorgon.cloud.sagemaker import check_gpus
from gorgon.config import TrainHeadsConfig
from gorgon.errors import CloudError, ConfigError, Interrupted, ModelError, PeerError
from gorgon.ranks import Rank

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SM_NUM_GPUS")


@pytest.fixture
def place(monkeypatch):
    """Sets this process's place among several."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return put


@pytest.fixture
def layout(tmp_path):
    made = Layout(tmp_path / "ml")
    made.create({"heads": "2"}, [])
    return made


def machine(layout, instance_type):
    write_json(layout.config / "resourceconfig.json", {"current_instance_type": instance_type, "hosts": ["algo-1"]})


def test_the_environment_says_which_process_this_is(place):
    assert ranks.this() == Rank(0, 1, 0) and ranks.this().first
    place(WORLD_SIZE=4, RANK=3, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)
    assert ranks.this() == Rank(3, 4, 3) and not ranks.this().first
    place(WORLD_SIZE=1, RANK=7)
    assert ranks.this() == Rank(), "one process is one process, whatever else is set"


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": 2}, "RANK is None"),
        ({"WORLD_SIZE": 2, "RANK": 1}, "LOCAL_RANK is None"),
        ({"WORLD_SIZE": 2, "RANK": 2, "LOCAL_RANK": 0}, "process 2 .* of 2 cannot be"),
        ({"WORLD_SIZE": 4, "RANK": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}, "several machines"),
    ],
)
def test_half_an_environment_is_refused(place, environment, word):
    place(**environment)
    with pytest.raises(ConfigError, match=word) as caught:
        ranks.this()
    assert caught.value.hint and ranks.tells(caught.value), "a process that does not know its place says so itself"


@pytest.mark.parametrize("command", [["tune", "--out", "x"], ["run", "quickstart"], ["inspect", "embedded"]])
def test_what_cannot_be_shared_runs_in_one_process(place, command):
    place(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError)
    assert f"'gorgon {command[0]}' runs in one process, and 2 were started" in str(result.exception)


def test_in_a_job_that_reaches_the_failure_file(place, layout):
    place(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1)
    with pytest.raises(ConfigError, match="runs in one process"):
        run_in_container("tune", layout.base, lambda config, out: pytest.fail("it ran"))
    assert "'gorgon tune' runs in one process" in layout.failure.read_text()


def test_an_error_is_told_by_the_process_it_happened_in_and_by_the_first(place):
    error = ModelError("no")
    assert ranks.tells(error)
    place(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1)
    assert not ranks.tells(error)
    error.process = 1
    assert ranks.tells(error)


def test_a_job_starts_a_process_per_gpu_for_the_steps_that_share_their_work(place, layout):
    assert process_count("finetune", layout.base) == 1, "nothing says what the machine is"
    machine(layout, "ml.g5.12xlarge")
    assert [process_count(step, layout.base) for step in ranks.TOGETHER] == [4, 4]
    assert [process_count(step, layout.base) for step in ("prepare", "distill", "tune", "compare")] == [1] * 4
    place(SM_NUM_GPUS=2)
    assert process_count("finetune", layout.base) == 2
    assert process_count("finetune", layout.base, 3) == 3
    place(SM_NUM_GPUS=0)
    assert process_count("finetune", layout.base) == 1
    with pytest.raises(ConfigError, match="'--processes 2': the step 'tune' runs in one process"):
        process_count("tune", layout.base, 2)
    place(SM_NUM_GPUS=4, WORLD_SIZE=4, RANK=0, LOCAL_RANK=0)
    assert process_count("finetune", layout.base) == 1, "a process that was started starts no others"


def test_only_the_first_process_publishes(place, layout):
    def run(config, out):
        return run_step("train-heads", config, {}, out, lambda run: (run.directory / "w").write_text("w"))

    place(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1)
    run_in_container("train-heads", layout.base, run)
    assert not list(layout.model.iterdir())
    place(RANK=0, LOCAL_RANK=0)
    run_in_container("train-heads", layout.base, run)
    assert (layout.model / "w").is_file()


def test_word_of_anothers_failure_does_not_cover_its_own(layout):
    def fail(process):
        def run(config, out):
            error = PeerError("process 1 failed: a head is odd")
            error.process = process
            raise error

        return run

    with pytest.raises(PeerError):
        run_in_container("train-heads", layout.base, fail(None))
    assert not layout.failure.exists(), "process 1 writes it"
    with pytest.raises(PeerError):
        run_in_container("train-heads", layout.base, fail(0))
    assert "a head is odd" in layout.failure.read_text(), "nobody else is left who could"


def test_the_exit_code_of_a_job_in_several_processes(layout):
    seen = []

    def ends(code):
        return lambda arguments, count: seen.append((arguments, count)) or code

    assert run_in_processes("finetune", layout.base, 4, ends(0)) == 0
    assert seen == [(["step", "finetune", "--base-dir", str(layout.base)], 4)]
    assert run_in_processes("finetune", layout.base, 4, ends(Interrupted.exit_code)) == 0
    assert not layout.failure.exists()
    assert run_in_processes("finetune", layout.base, 4, ends(137)) == 137
    assert layout.failure.read_text().startswith("CloudError: a process ended with exit code 137 and left no word")
    layout.failure.write_text("ModelError: the real one")
    assert run_in_processes("finetune", layout.base, 4, ends(2)) == 2
    assert layout.failure.read_text() == "ModelError: the real one"
    assert run_in_processes("finetune", layout.base, 4, ends(Interrupted.exit_code)) != 0, "a stop that went wrong"


def test_several_gpus_are_for_steps_that_use_them_all():
    for step in ranks.TOGETHER:
        check_gpus(step, ["ml.p4d.24xlarge"])
        check_gpus(step, ["ml.g5.12xlarge", "ml.g6.12xlarge"])
        with pytest.raises(CloudError, match="different numbers of GPUs"):
            check_gpus(step, ["ml.g5.12xlarge", "ml.g5.48xlarge"])
    for step in ("prepare", "distill", "tune", "compare"):
        check_gpus(step, ["ml.g5.2xlarge", "ml.m5.xlarge"])
        with pytest.raises(CloudError, match="uses one GPU and this machine has 4") as caught:
            check_gpus(step, ["ml.g5.2xlarge", "ml.g5.12xlarge"])
        assert f"sagemaker.instance_types.{step}=" in str(caught.value.hint)
    assert min(GPUS.values()) > 1


def test_another_number_of_processes_starts_over_but_a_finished_result_is_reused(tmp_path):
    seen = []

    def run(processes, *, stop=True):
        def body(run):
            seen.append(len(list(run.checkpoints.iterdir())))
            (run.checkpoints / "half").touch()
            if stop:
                raise Interrupted("stopped")

        return run_step("train-heads", TrainHeadsConfig(), {}, tmp_path / "out", body, processes=processes)

    for processes in (1, 2, 2):
        with pytest.raises(Interrupted):
            run(processes)
    assert not run(2, stop=False).reused
    assert seen == [0, 0, 1, 1], "a checkpoint of one process is not what two go on from"
    assert run(1).reused
