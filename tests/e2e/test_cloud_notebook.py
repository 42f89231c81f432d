"""The notebook: its five steps in the reference's order, run offline from first cell to last."""

import json
from pathlib import Path

import pytest

from tests.cloud_plane.fixtures import TINY

PATH = Path(__file__).parents[2] / "notebooks" / "medusa_on_sagemaker.ipynb"
SETTINGS = (
    *(text for text in TINY if not text.endswith("=null")), "prepare.rows=40", "finetune=null", "distill=null",
    "tune.prompts=2", "tune.max_nodes=2", "tune.trials=3", "tune.max_new_tokens=8", "tune.ngram_lengths=[0]",
    "compare.prompts=2", "compare.trials=1", "compare.warmup_prompts=0", "compare.max_new_tokens=8",
    "compare.examples=1", "tune.steps=eager", "compare.steps=eager",  # compiled steps have tests of their own
)  # fmt: skip


def cells(kind):
    document = json.loads(PATH.read_text())
    return [cell for cell in document["cells"] if cell["cell_type"] == kind]


def test_five_steps_in_the_references_order():
    heads = [line for cell in cells("markdown") for line in cell["source"] if line.startswith("## ")]
    words = ("dataset", "Fine-tune", "Medusa heads", "Deploy", "speed-up", "Nothing left")
    assert len(heads) == len(words) and all(word in head for word, head in zip(words, heads, strict=True))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


@pytest.mark.timeout(200)
def test_it_runs_offline_from_the_first_cell_to_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GORGON_SAGEMAKER_ROLE"):
        monkeypatch.delenv(key, raising=False)
    names = {}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), PATH.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert names["ON"] == "local"
            names["SETTINGS"] = list(SETTINGS)
    said = capsys.readouterr().out
    assert "same answers as plain decoding: 100.0 %" in said and "nothing ran outside this machine" in said
    assert (tmp_path / "runs" / "notebook" / "compare" / "report.html").is_file()


def test_its_sagemaker_branches_leave_nothing(plane, tmp_path, monkeypatch, capsys):
    """The jobs' results are made up and the server is a stand-in; clients, requests, waiting and deleting are real."""
    from gorgon.cloud.layout import Layout
    from tests.cloud_plane.jobs import Job

    def attempt(job):
        model = Layout(job.root / "ml").model
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"medusa_num_heads": 3}')
        row = {"messages": [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "three"}]}
        (model / "test.jsonl").write_text(json.dumps(row) + "\n")
        return 0

    monkeypatch.setattr(Job, "_attempt", attempt)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), PATH.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            endpoint = "sagemaker.endpoint={instance_type: ml.m5.xlarge, image: 'me/stand-in:1.0'}"
            names |= {"ON": "sagemaker", "SETTINGS": [*SETTINGS, endpoint]}
    said = capsys.readouterr().out
    assert "?ereht era step ynam woH" in said, "the endpoint of step 4 has answered"
    assert "| medusa |" in said and said.rstrip().endswith("no endpoints")
    started = [r["TrainingJobName"] for name, r in plane.requests if name == "CreateTrainingJob"]
    assert [name.split("-")[1] for name in started] == ["prepare", "train", "tune"], "each step once"
    assert sum(name == "CreateEndpoint" for name, _ in plane.requests) == 4
    assert not any(plane.left().values()), plane.left()


def test_its_sagemaker_branches_name_things_that_exist():
    import ast
    from importlib import import_module

    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells("code")))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("gorgon")]
    assert len(found) >= 6
    for node in found:
        for alias in node.names:
            assert hasattr(import_module(node.module), alias.name), (node.module, alias.name)
