"""The whole step with scripted decoders: summary, answers, and a report that stands alone."""

import json
from types import SimpleNamespace

import pytest

from gorgon.bench import compare as compare_module
from gorgon.bench import workload
from gorgon.bench.compare import best_tree, compare
from gorgon.bench.decoders import Answer
from gorgon.bench.figures import _spread
from gorgon.bench.report import headline, magnitude, milliseconds, percent, pick_examples
from gorgon.bench.tree_figure import _rows
from gorgon.config import CompareConfig
from gorgon.core.tree import DraftTree
from gorgon.data.examples import Example, write_examples
from gorgon.errors import DataError, GorgonError, LimitError
from tests.page_support import HOSTILE, check_page

TREE = DraftTree.of([(0,), (1,), (0, 0)], ngram=2)
WORDS = ["", "<end>", "SELECT ", "name ", "FROM ", "head", HOSTILE]


def row(name, answer="x"):
    return Example(name, [{"role": "user", "content": HOSTILE}], answer, "CREATE TABLE head (name TEXT)")


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(WORDS[i] for i in ids if i != 1)


class Scripted:
    def __init__(self, name, tokens, steps, nodes):
        self.name, self._answer = (
            name,
            Answer(tokens, Tokenizer().decode(tokens, skip_special_tokens=True), 0.001, steps, nodes),
        )

    def answer(self, prompt_ids, max_new_tokens, stop):
        return self._answer


class FakeContestants:
    def __init__(self, decoders):
        tokenizer = Tokenizer()
        backbone = SimpleNamespace(tokenizer=tokenizer, max_length=64)
        self.engine = SimpleNamespace(backbone=backbone)
        self.decoders = decoders

    def facts(self):
        return {
            "type": "llama", "parameters": 4_262_144, "layers": 4, "hidden_size": 256, "vocab_size": 2048,
            "max_length": 64, "heads": 2, "head_parameters": 1000, "dtype": "float32", "device": "cpu", "threads": 1,
        }  # fmt: skip

    def example_step(self, prompt_ids):
        return {
            "parents": [0, 0, 1, 0],
            "texts": ["SELECT", " $na", "me$", HOSTILE],
            "accepted": [True, True, True, False],
        }

    def blocks(self, answer):
        from gorgon.bench.contestants import Contestants

        return Contestants.blocks(self, answer)


TOKENS = [2, 3, 4, 5, 1]


@pytest.fixture
def directories(tmp_path, monkeypatch):
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    shares = [{"path": [0], "share": 0.5}, {"path": [1], "share": 0.2}, {"path": [0, 0], "share": 0.3}]
    tree = {
        "format": 5,
        "trees": [{"batch_size": 1, "kind": "static", "paths": [[0], [0, 0], [1]], "ngram": 2, "nodes": 6,
                   "mean_nodes": 5.5, "tokens_per_step": 2.1, "step_ms": 2.4, "plain_step_ms": 1.9}],
        "cost_curves": {"1": [{"nodes": 1, "step_ms": 1.9}, {"nodes": 8, "step_ms": 2.4}]},
        "candidates": [{"kind": "static", "nodes": 6, "mean_nodes": 5.5, "ngram": 2,
                        "tokens_per_step": 2.1, "step_ms": 2.4, "tokens_per_s": 900.0},
                       {"kind": "static", "nodes": 4, "mean_nodes": 4, "ngram": 0,
                        "tokens_per_step": 1.9, "step_ms": 2.3, "tokens_per_s": 850.0}],
        "best_by_nodes": [{"nodes": 5, "ngram": 2, "tokens_per_step": 2.0}],
        "rank_statistics": {"positions": 10, "paths": shares},
    }  # fmt: skip
    evaluation = {"step": 1, "seconds": 1.0, "loss": 2.0, "accuracy": [[0.5, 0.6, 0.7], [0.3, 0.4, 0.5]]}
    (model / "tree.json").write_text(json.dumps(tree))
    (model / "heads.json").write_text(
        json.dumps({"evaluations": [evaluation, evaluation | {"step": 2, "loss": 3.0, "accuracy": [[0.1] * 3] * 2}]})
    )
    rows = [row(f"test-{i}", "SELECT name FROM head" if i else f"other {HOSTILE}") for i in range(4)]
    write_examples(data / "test.jsonl", rows)
    monkeypatch.setattr(workload, "encode_prompt", lambda tokenizer, messages: [2, 3])
    return model, data


def answer_with(monkeypatch, medusa=TOKENS, transformers=TOKENS):
    decoders = [
        Scripted("plain", TOKENS, [1] * 4, [0] * 4),
        Scripted("medusa", medusa, [3, 1], [3, 0]),
        Scripted("transformers", transformers, [], []),
        Scripted("tree_4", TOKENS, [2, 2], [1, 1]),
    ]
    monkeypatch.setattr(compare_module.Contestants, "load", lambda *_, **__: FakeContestants(decoders))
    monkeypatch.setattr(compare_module, "top_margin", lambda backbone, ids: 0.25)


def config(directories, **more):
    model, data = directories
    values = {"model": str(model), "data": str(data), "trials": 2, "max_new_tokens": 8, "warmup_prompts": 1}
    return CompareConfig(**(values | more))


def test_summary_answers_and_report(directories, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    out = tmp_path / "out"
    result = compare(config(directories, extra_nodes=[4]), out)
    summary = json.loads((out / "summary.json").read_text())
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]

    assert summary["exact_match"] == 1.0
    assert summary["differing"] == []
    assert summary["tokens_per_step"] == 2.0
    assert summary["accepted_histogram"] == {"1": 4, "2": 0, "3": 4}
    assert set(summary["speedup"]) >= {"vs_plain", "vs_plain_range", "vs_transformers", "vs_transformers_range"}
    assert set(summary["latency_ms"]) == {"plain", "medusa", "transformers", "tree_4"}
    assert set(summary["latency_ms"]["medusa"]) == {"mean", "p50", "p90", "p99"}
    assert summary["heads"]["top1"] == [0.5, 0.3]  # of the evaluation with the lowest loss, not the last
    tree = summary["tree"]
    assert tree["paths"] == [[0], [0, 0], [1]]
    assert (tree["nodes"], tree["ngram"], tree["steps"]) == (6, 2, 8)
    assert tree["observed"] == [1.0, 0.0, 0.0, 0.5, 0.0, 0.0]
    assert tree["expected"] == [1.0, 0.5, 0.3, 0.2, None, None]
    assert summary["quality"]["exact_match"] == 0.75
    assert summary["quality"]["sql_runs"] == 1.0
    assert summary["quality"]["reference_runs"] == 0.75
    assert summary["extra_trees"][0]["nodes"] == 4
    assert (summary["prompts"], summary["trials"]) == (4, 2)
    assert summary["model"]["threads"] == 1
    assert summary["versions"]["torch"]
    assert "cpu" in summary["machine"]
    assert result.manifest["metrics"]["exact_match"] == 1.0

    assert [a["id"] for a in answers] == ["test-0", "test-1", "test-2", "test-3"]
    assert answers[1]["blocks"] == [
        {"tokens": 1, "text": "SELECT "}, {"tokens": 3, "text": "name FROM head"}, {"tokens": 1, "text": ""},
    ]  # fmt: skip
    assert set(answers[0]["median_ms"]) == {"plain", "medusa", "transformers", "tree_4"}

    assert compare(config(directories, extra_nodes=[4]), out).reused
    check_page((out / "report.html").read_text())


def test_a_dynamic_tree_is_shown_by_one_step(directories, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    file = directories[0] / "tree.json"
    tree = json.loads(file.read_text())
    tree["trees"] = [{"batch_size": 1, "kind": "dynamic", "nodes": 8, "threshold": 0.1, "width": 4, "mean_nodes": 6.2,
                      "tokens_per_step": 3.0, "step_ms": 2.2, "plain_step_ms": 1.9}]  # fmt: skip
    tree["candidates"].append({"kind": "dynamic", "nodes": 8, "mean_nodes": 6.2, "threshold": 0.1, "width": 4,
                               "tokens_per_step": 3.0, "step_ms": 2.2, "tokens_per_s": 1300.0})  # fmt: skip
    file.write_text(json.dumps(tree))
    compare(config(directories), tmp_path / "out")
    shown = json.loads((tmp_path / "out" / "summary.json").read_text())["tree"]
    assert (shown["kind"], shown["nodes"], shown["mean_nodes"], shown["threshold"]) == ("dynamic", 8, 6.2, 0.1)
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert "grown anew in every step" in page and "6.2 nodes on average" in page


def test_differing_answers_are_told_everywhere(directories, tmp_path, monkeypatch):
    answer_with(monkeypatch, medusa=[2, 3, 6, 5, 1], transformers=[2, 3])
    result = compare(config(directories), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["exact_match"] == 0.0
    assert [d["decoder"] for d in summary["differing"]] == ["medusa"] * 4 + ["transformers"] * 4
    assert summary["differing"][0] == {
        "decoder": "medusa", "id": "test-0", "trial": 0, "position": 2, "plain_token": 4, "token": 6,
        "logit_margin": 0.25,
    }  # fmt: skip
    assert result.manifest["warnings"] == ["4 answers differ from plain decoding"]
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert "4 of 4 answers differ from plain decoding" in page
    assert "and the same answers" not in page


def test_imported_heads_have_no_training_to_show(directories, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    (directories[0] / "heads.json").unlink()
    (directories[0] / "gorgon.json").write_text('{"format": 1, "head_kind": "medusa", "imported_from": "a/b"}')
    compare(config(directories), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["heads"] == {"top1": [], "accuracy": [], "evaluations": []}
    assert "heads-heading" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "place", "step"),
    [("tree.json", 0, "tune"), ("heads.json", 0, "train-heads"), ("test.jsonl", 1, "prepare")],
)
def test_a_missing_file_names_the_step_that_writes_it(directories, tmp_path, name, place, step):
    (directories[place] / name).unlink()
    with pytest.raises(GorgonError) as caught:
        compare(config(directories), tmp_path / "out")
    assert name in str(caught.value)
    assert step in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"trees": []}'])
def test_a_broken_tree_file_is_an_input_error(directories, tmp_path, text):
    (directories[0] / "tree.json").write_text(text)
    with pytest.raises(DataError):
        compare(config(directories), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_prompt_that_does_not_fit_names_its_row(directories, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    with pytest.raises(LimitError) as caught:
        compare(config(directories, max_new_tokens=63), tmp_path / "out")
    assert "test-0" in str(caught.value)


def test_prompt_choice_is_seeded_and_keeps_order():
    rows = [row(str(i)) for i in range(20)]
    chosen = workload.choose(rows, 5, 1)
    assert chosen == workload.choose(rows, 5, 1)
    assert chosen != workload.choose(rows, 5, 2)
    assert [int(r.id) for r in chosen] == sorted(int(r.id) for r in chosen)
    assert workload.choose(rows, None, 1) == workload.choose(rows, 99, 1) == rows


def test_best_tree_of_a_size():
    shares = [{"path": [1], "share": 0.2}, {"path": [0], "share": 0.5}, {"path": [0, 0], "share": 0.2}]
    tuned = {"rank_statistics": {"paths": shares}}
    assert best_tree(tuned, 3) == DraftTree.of([(0,), (1,)])  # equal shares: the shorter path first
    assert best_tree(tuned, 4) == DraftTree.of([(0,), (0, 0), (1,)])
    with pytest.raises(GorgonError):
        best_tree(tuned, 5)


def test_words_and_numbers():
    assert headline({"speedup": {"vs_plain": 0.9}, "exact_match": 1.0}).startswith("Slower")
    assert headline({"speedup": {"vs_plain": 2.214}, "exact_match": 1.0}) == "2.21 times as fast, and the same answers"
    assert "differ" in headline({"speedup": {"vs_plain": 2.0}, "exact_match": 0.99})
    assert [milliseconds(v) for v in (1.234, 12.34, 123.4)] == ["1.23", "12.3", "123"]
    assert [percent(v) for v in (1.0, 0.99999, 0.5, None)] == ["100 %", "99.9 %", "50 %", "–"]
    assert [magnitude(v) for v in (4_262_144, 7_000_000_000, 1500, 12)] == ["4.3M", "7.0B", "1.5k", "12"]


def test_examples_span_the_range():
    answers = [{"id": str(i), "tokens_per_step": float(i)} for i in range(11)]
    assert [a["id"] for a in pick_examples(answers, 3)] == ["10", "5", "0"]
    assert len(pick_examples(answers, 99)) == 11
    assert pick_examples(answers, 0) == []
    assert len(pick_examples(answers, 1)) == 1


def test_layout_helpers():
    assert _rows([-1, 0, 1, 0, 0]) == [0, 0, 0, 1, 2]
    assert _spread([0.5, 0.49, 0.1], 0.05) == pytest.approx([0.5, 0.45, 0.1])
