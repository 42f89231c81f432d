"""A step inside the container's tree: inputs read, results published, the real error left, a stop that resumes."""

import json
import zipfile
from pathlib import Path

import pytest

from gorgon.artifacts import run_step, write_json
from gorgon.cloud.container import read_job, run_in_container
from gorgon.cloud.job import Channel, JobSpec, split_settings
from gorgon.cloud.layout import Layout
from gorgon.cloud.local import run_local
from gorgon.cloud.wheel import build_wheel
from gorgon.config import PrepareConfig, TrainHeadsConfig
from gorgon.errors import CloudError, ConfigError, DataError, Interrupted, ModelError


@pytest.fixture
def layout(tmp_path):
    made = Layout(tmp_path / "ml")
    (made.channels / "data").mkdir(parents=True)
    (made.channels / "data" / "train.jsonl").write_text("{}")
    channels = (Channel("data", "elsewhere"),)
    spec = JobSpec("j", "train-heads", split_settings(TrainHeadsConfig(heads=2), channels), channels, "out")
    made.create(spec.hyperparameters, ["data"])
    return made


def body_that(write):
    """A real step with a body of our own."""

    def run(config, out):
        return run_step("train-heads", config, {"data": config.data}, out, write)

    return run


def test_settings_and_channels_become_the_configuration(layout):
    config = read_job("train-heads", layout)
    assert config == TrainHeadsConfig(heads=2, data=str(layout.channels / "data"))


def test_text_that_is_no_json_stays_text_and_the_toolkits_keys_are_left_out(layout):
    given = {"model": "org/name", "heads": "3", "sagemaker_program": "x.py", "sagemaker_region": '"eu"'}
    write_json(layout.config / "hyperparameters.json", given)
    config = read_job("train-heads", layout)
    assert (config.model, config.heads) == ("org/name", 3)


def test_a_result_is_published_and_no_checkpoint_is_left(layout):
    def write(run):
        (run.directory / "deep").mkdir()
        (run.directory / "deep" / "weights").write_text("w")
        run.metrics["loss"] = 0.5

    run_in_container("train-heads", layout.base, body_that(write))
    assert (layout.model / "deep" / "weights").read_text() == "w"
    assert json.loads((layout.output_data / "metrics.json").read_text()) == {"loss": 0.5}
    assert json.loads((layout.model / "manifest.json").read_text())["step"] == "train-heads"
    assert list(layout.checkpoints.iterdir()) == [] and not layout.failure.exists()


def test_a_stop_ends_well_and_the_next_start_finds_the_checkpoint(layout):
    seen = []

    def write(run):
        seen.append([p.name for p in run.checkpoints.iterdir()])
        if len(seen) == 1:
            (run.checkpoints / "heads.pt").write_text("half")
            raise Interrupted("stopped")

    run_in_container("train-heads", layout.base, body_that(write))
    assert list(layout.model.iterdir()) == [] and not layout.failure.exists()
    run_in_container("train-heads", layout.base, body_that(write))
    assert seen == [[], ["heads.pt"]] and (layout.model / "manifest.json").is_file()


def test_our_errors_are_left_with_their_hint(layout):
    def write(run):
        raise ModelError("no such thing", field="model", value="m", hint="look again")

    with pytest.raises(ModelError):
        run_in_container("train-heads", layout.base, body_that(write))
    said = layout.failure.read_text()
    assert said == "ModelError: no such thing (field: model; given: 'm')\nhint: look again"
    assert list(layout.model.iterdir()) == []


def test_any_other_error_is_left_with_the_end_of_its_traceback(layout):
    def write(run):
        raise ValueError("odd " + "x" * 100)

    with pytest.raises(ValueError, match="odd"):
        run_in_container("train-heads", layout.base, body_that(write))
    said = layout.failure.read_text()
    assert said.startswith("ValueError: odd") and "in write" in said and len(said) <= 1024


def test_a_long_error_is_cut_to_what_the_service_shows(layout):
    def write(run):
        raise ValueError("y" * 5000)

    with pytest.raises(ValueError, match="y"):
        run_in_container("train-heads", layout.base, body_that(write))
    assert len(layout.failure.read_text()) == 1024


def _empty(layout):
    (layout.channels / "data" / "train.jsonl").unlink()


def _partly(layout):
    write_json(layout.channels / "data" / "manifest.json", {"outputs": {"train.jsonl": "0", "test.jsonl": "0"}})


def _missing(layout):
    _empty(layout)
    (layout.channels / "data").rmdir()


def _unknown(layout):
    write_json(layout.config / "hyperparameters.json", {"head": "3"})


def _broken(layout):
    (layout.config / "hyperparameters.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "kind", "word"),
    [
        (_empty, DataError, "the channel is empty"),
        (_partly, DataError, "test.jsonl is missing"),
        (_missing, DataError, "directory is missing"),
        (_unknown, ConfigError, "did you mean 'heads'"),
        (_broken, DataError, "not valid JSON"),
    ],
)
def test_bad_inputs_reach_the_failure_file(layout, spoil, kind, word):
    spoil(layout)
    with pytest.raises(kind, match=word):
        run_in_container("train-heads", layout.base, body_that(lambda run: None))
    assert word in layout.failure.read_text()


def test_an_unknown_step_and_a_place_that_is_no_container(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tune'"):
        read_job("tun", Layout(tmp_path))
    with pytest.raises(DataError, match="not laid out like /opt/ml"):
        read_job("tune", Layout(tmp_path))


def test_a_data_file_comes_as_a_channel_of_one_file(tmp_path):
    layout = Layout(tmp_path)
    layout.create({"model": '"embedded"'}, ["train"])
    (layout.channels / "train").mkdir()
    (layout.channels / "train" / "rows.csv").write_text("a")
    assert read_job("prepare", layout).train == str(layout.channels / "train" / "rows.csv")
    (layout.channels / "train" / "more.csv").write_text("a")
    with pytest.raises(DataError, match="one file, not 2"):
        read_job("prepare", layout)


def test_a_local_job_is_a_process_with_the_same_arguments(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q"}\n')
    channels = (Channel("train", str(tmp_path / "rows.jsonl")),)
    spec = JobSpec("j", "prepare", split_settings(PrepareConfig(), channels), channels, "out")
    assert spec.argv() == ["gorgon", "step", "prepare", "--base-dir", "/opt/ml"]
    with pytest.raises(CloudError, match=r"'j' failed: DataError: .*rows\.jsonl, line 1"):
        run_local(spec, tmp_path / "job")
    with pytest.raises(DataError, match="not on this machine"):
        run_local(JobSpec("j", "prepare", {}, (Channel("train", "s3://b/k"),), "out"), tmp_path / "other")


def test_the_wheel_is_complete_and_the_same_each_time(tmp_path):
    (tmp_path / "b").mkdir()
    first, second = build_wheel(tmp_path), build_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    package = Path(__file__).parents[2] / "src" / "gorgon"
    wanted = {
        f"gorgon/{p.relative_to(package)}" for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert wanted <= set(names)
    assert any(n.endswith("entry_points.txt") for n in names) and any(n.endswith("RECORD") for n in names)
