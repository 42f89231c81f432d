"""Bad input through the command line: exit code 2, a message naming the fault, no traceback, nothing left behind."""

import json

import pytest

from tests.e2e.conftest import gorgon


def _refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr


def _rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"question": "How many?", "context": "CREATE TABLE t (a INTEGER)", "answer": "SELECT COUNT(*) FROM t"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["rows.jsonl", "no such file"]),
        ("", ["rows.jsonl"]),
        ('{"question": "a"\n', ["rows.jsonl", "line 1"]),
        (json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": 3}) + "\n", ["line 2", "answer"]),
        (json.dumps({"question": "q", "answer": "a"}) + "\n", ["context"]),
    ],
)
def test_datasets(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    _refused(gorgon("prepare", "--train", path, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "quickstrt"], ["no recipe", "did you mean 'quickstart'"]),
        (["run", "nothing.yaml"], ["no such file"]),
        (["run", "quickstart", "--set", "train-heads.epoch=3"], ["train-heads.epoch", "did you mean 'epochs'"]),
        (["run", "quickstart", "--set", "compare"], ["key=value"]),
        (["run", "quickstart", "--set", "tune.trials=1"], ["tune.trials", "greater than or equal to 3"]),
        (["tune", "--out", "x"], ["no directory given for 'model'"]),
        (["compare", "--model", "nowhere", "--out", "x"], ["nowhere"]),
        (["train-heads", "--out", "x", "--model", "./nowhere", "--data", "nowhere"], ["nowhere"]),
        (["generate", "./nowhere", "hello"], ["nowhere"]),
        (["generate", "embedded"], ["prompt"]),
        (["inspect", "./nowhere"], ["config.json is missing"]),
        (["prepare", "--dataset", "embedded", "--seeed", "3", "--out", "x"], ["--seeed"]),
    ],
)
def test_commands(tmp_path, arguments, words):
    _refused(gorgon(*arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.xdist_group("trained")
def test_a_prompt_longer_than_the_context(trained):
    _refused(gorgon("generate", trained.out / "tune", "word " * 3000), "does not fit the model's context")


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize("limit", ["0", "-3"])
def test_limits_below_one(trained, limit):
    _refused(gorgon("generate", trained.out / "tune", "hi", "--max-new-tokens", limit), "max_new_tokens")


def test_help_is_instant_and_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['gorgon', '--help']\n"
        "from gorgon.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
