"""Step directories: whole or not at all, reused, resumed."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gorgon.artifacts import digest_input, link_tree, read_manifest, require_step_file, run_step, write_json
from gorgon.config import TuneConfig
from gorgon.errors import DataError, GorgonError, Interrupted, StorageError


def _step(out, body, *, config=None, inputs=None, force=False):
    return run_step("tune", config or TuneConfig(), inputs or {}, out, body, force=force)


def _write(text):
    def body(run):
        (run.directory / "result.txt").write_text(text)
        run.metrics["length"] = len(text)

    return body


def _fail(error):
    def body(run):
        (run.directory / "half.txt").write_text("half")
        raise error

    return body


def test_a_finished_step_has_a_manifest(tmp_path):
    result = _step(tmp_path / "out", _write("hello"))
    manifest = read_manifest(tmp_path / "out")
    assert result.manifest == manifest and not result.reused
    assert manifest["metrics"] == {"length": 5}
    assert set(manifest["outputs"]) == {"result.txt"}
    assert manifest["config"]["prompts"] == 100 and manifest["versions"]["torch"] and manifest["machine"]["cores"]
    assert sorted(p.name for p in (tmp_path).iterdir()) == ["out"]


def test_the_same_step_is_reused_and_another_replaces_it(tmp_path):
    out, source = tmp_path / "out", tmp_path / "input.txt"
    source.write_text("a")
    _step(out, _write("one"), inputs={"x": source})
    assert _step(out, _write("two"), inputs={"x": source}).reused
    assert not _step(out, _write("two"), inputs={"x": source}, config=TuneConfig(prompts=3)).reused
    assert (out / "result.txt").read_text() == "two"
    source.write_text("b")
    assert not _step(out, _write("three"), inputs={"x": source}, config=TuneConfig(prompts=3)).reused
    assert not _step(out, _write("four"), inputs={"x": source}, config=TuneConfig(prompts=3), force=True).reused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt", "out"]


@pytest.mark.parametrize("error", [ValueError("ours"), GorgonError("theirs"), KeyboardInterrupt()])
def test_a_failed_step_leaves_nothing_and_keeps_the_old_output(tmp_path, error):
    out = tmp_path / "out"
    _step(out, _write("old"))
    with pytest.raises(type(error)):
        _step(out, _fail(error), config=TuneConfig(prompts=7))
    assert (out / "result.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_storage_failures_are_typed(tmp_path, number, word):
    with pytest.raises(StorageError, match=word):
        _step(tmp_path / "out", _fail(OSError(number, os.strerror(number))))
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_are_not_disguised(tmp_path):
    with pytest.raises(FileNotFoundError):
        _step(tmp_path / "out", _fail(FileNotFoundError(errno.ENOENT, "x")))


def test_a_really_full_disk(tmp_path):
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")

    def body(run):
        with device.open("w") as file:
            file.write("x" * 100_000)

    with pytest.raises(StorageError, match="disk is full"):
        _step(tmp_path / "out", body)


def test_an_interrupted_step_resumes_from_its_checkpoint(tmp_path):
    out = tmp_path / "out"

    def first(run):
        (run.checkpoints / "state.json").write_text("17")
        (run.directory / "half.txt").write_text("half")
        raise Interrupted("stop")

    def second(run):
        assert (run.checkpoints / "state.json").read_text() == "17"
        assert not (run.directory / "half.txt").exists()
        _write("done")(run)

    with pytest.raises(Interrupted):
        _step(out, first)
    assert not out.exists()
    _step(out, second)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "result.txt"]


def test_a_checkpoint_of_another_configuration_is_not_used(tmp_path):
    def first(run):
        (run.checkpoints / "state.json").write_text("17")
        raise Interrupted("stop")

    def second(run):
        assert not (run.checkpoints / "state.json").exists()
        _write("done")(run)

    with pytest.raises(Interrupted):
        _step(tmp_path / "out", first)
    _step(tmp_path / "out", second, config=TuneConfig(prompts=9))


def test_foreign_files_are_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="no step of ours"):
        _step(out, _write("x"))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        _step(tmp_path / "file" / "out", _write("x"))


def test_digests_follow_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = digest_input(tmp_path / "a")
    (tmp_path / "a" / "x").write_text("2")
    assert digest_input(tmp_path / "a") != before
    assert digest_input("some/hub-id") == "id:some/hub-id"


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_linked_trees_are_equal(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "x").write_text("1")
    (tmp_path / "a" / "skip").write_text("2")
    link_tree(tmp_path / "a", tmp_path / "b", skip=frozenset({"skip"}))
    assert [str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*")] == ["sub", "sub/x"]


def test_missing_inputs_name_the_step_that_writes_them(tmp_path):
    with pytest.raises(GorgonError) as error:
        require_step_file(None, "x", field="data", step="prepare")
    assert "gorgon prepare" in error.value.hint
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        require_step_file(tmp_path, "train.jsonl", field="data", step="prepare")


def test_a_broken_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_a_kill_in_the_middle_of_writing_leaves_no_output(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from gorgon.artifacts import run_step
from gorgon.config import TuneConfig

def body(run):
    (run.directory / "result.txt").write_text("half")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

run_step("tune", TuneConfig(), {}, Path(sys.argv[1]), body)
"""
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(out), "kill"], check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    subprocess.run([sys.executable, "-c", code, str(out), "finish"], check=True)
    assert (out / "result.txt").read_text() == "half"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_input_that_was_moved_is_the_same_input(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).write_text("same")
        config = TuneConfig(data=str(tmp_path / place))
        result = _step(tmp_path / "out", _write("x"), config=config, inputs={"data": tmp_path / place})
        assert result.reused == (place == "b")
