"""Three endpoints side by side: told the price before, compared fairly, and deleted whatever happens."""

import json
from types import SimpleNamespace

import pytest

from gorgon.bench.endpoints import report
from gorgon.cloud import compare as compare_module
from gorgon.cloud.compare import Answer, compare_endpoints, measure, read_tuning
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.errors import BudgetError, CloudError, DataError
from tests.cloud_plane.plane import BUCKET, Fault
from tests.page_support import HOSTILE, check_page

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]
MODEL, DATA = f"s3://{BUCKET}/model", f"s3://{BUCKET}/data"
TREE = {
    "format": 5, "device": "some GPU", "dtype": "bfloat16",
    "trees": [{"batch_size": 1, "kind": "dynamic", "nodes": 8, "threshold": 0.1, "mean_nodes": 6.2}],
    "cost_curves": {"1": [{"nodes": 1, "step_ms": 1.9}, {"nodes": 8, "step_ms": 2.4}]},
    "candidates": [
        {"kind": "static", "nodes": 4, "mean_nodes": 4, "ngram": 0, "tokens_per_s": 850.0},
        {"kind": "dynamic", "nodes": 8, "mean_nodes": 6.2, "tokens_per_s": 1300.0},
    ],
}  # fmt: skip
HEADS = {"evaluations": [
    {"step": step, "loss": 3.0 - step, "accuracy": [[0.2 * step, 0.6], [0.1 * step, 0.4]]} for step in (1, 2)
]}  # fmt: skip


@pytest.fixture
def compare(plane, tmp_path):
    plane.store.put(f"{MODEL}/config.json", json.dumps({"medusa_num_heads": 3}))
    rows = [{"id": f"test-{n}", "messages": [{"role": "user", "content": text}], "answer": "0 noitseuq"}
            for n, text in enumerate(("question 0", "question 1", "question 2", HOSTILE))]  # fmt: skip
    plane.store.put(f"{DATA}/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    endpoint = EndpointConfig(instance_type="ml.m5.xlarge", image="me/stand-in:1.0", compare_trials=2)

    def run(**settings):
        cloud = SageMakerConfig(endpoint=endpoint, price_per_hour={"ml.m5.xlarge": 3.6}, **settings)
        return compare_endpoints("embedded", MODEL, DATA, cloud, tmp_path / "out", report=report, stamp="1")

    return run


def test_the_comparison_and_its_files(compare, plane, tmp_path):
    plane.store.put(f"{MODEL}/tree.json", json.dumps(TREE))
    plane.store.put(f"{MODEL}/heads.json", json.dumps(HEADS))
    summary = compare()
    assert (summary["prompts"], summary["trials"], summary["reference"]) == (4, 2, "fine-tuned")
    assert summary["speedup"]["vs_fine-tuned"] > 1.0 and summary["speedup"]["vs_base"] > 1.0
    assert summary["exact_match"] == 1.0 and summary["differing"] == []
    assert summary["exact_match_of"] == {"medusa": 1.0, "fine-tuned": 1.0, "base": 1.0}
    assert summary["tokens_per_step_of"] == {"medusa": 2.0, "fine-tuned": 1.0, "base": 1.0}
    assert summary["quality"]["exact_match"] == 0.25, "the answers are compared with the references too"
    for name, row in summary["latency_ms"].items():
        assert 0 < row["p50"] <= row["p90"] <= row["p99"]
        # one dollar in a thousand seconds: 1e6 tokens at t tokens/s cost 1e3/t dollars
        usd = summary["usd_per_million_tokens"][name]
        assert usd == pytest.approx(1e3 / summary["tokens_per_s"][name], rel=1e-3)
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == summary
    first = json.loads((out / "answers.jsonl").read_text().splitlines()[0])
    assert first["messages"] == [{"role": "user", "content": "question 0"}]
    assert len(first["answers"]["medusa"]["seconds"]) == 2
    assert "| medusa |" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    check_page(page)
    for words in ("USD per million tokens", "ml.m5.xlarge each, with Gorgon’s engine", "Why these drafts.",
                  "First choices during training", "USD for a million answer tokens", "in each of the 2 trials",
                  f"{summary['speedup']['vs_fine-tuned']:.2f} times as fast, and the same answers"):  # fmt: skip
        assert words in page, words
    assert page.count("<svg") == 7
    created = [r["EndpointName"] for name, r in plane.requests if name == "CreateEndpoint"]
    assert created == ["gorgon-base-1", "gorgon-sft-1", "gorgon-medusa-1"]
    assert not any(plane.left().values()), plane.left()

    again = tmp_path / "again"
    again.mkdir()
    assert report(json.loads((out / "measured.json").read_text()), again) == summary, "nothing else is needed"
    assert (again / "report.html").read_text() == page


def test_one_that_does_not_come_up_takes_the_others_with_it(compare, plane):
    original = plane.do_CreateEndpoint

    def create(request):
        if request["EndpointName"] == "gorgon-medusa-1":
            raise Fault("ResourceLimitExceeded", "The service limit 'ml.m5.xlarge for endpoint usage' is 2")
        return original(request)

    plane.do_CreateEndpoint = create
    with pytest.raises(CloudError, match="endpoint usage") as error:
        compare()
    assert "ml.m5.xlarge for endpoint usage" in error.value.hint
    assert not any(plane.left().values()), plane.left()


def test_one_that_breaks_while_compared_takes_them_all_down(compare, plane):
    from tests.cloud_plane.endpoints import Endpoint

    asked = []
    original = Endpoint.ask

    def ask(self, body, content_type):
        asked.append(self.name)
        if len(asked) == 8:
            self.container.kill()
            raise Fault("ModelError", "gone", 424, OriginalStatusCode=500, OriginalMessage="out of memory")
        return original(self, body, content_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "ask", ask)
        with pytest.raises(CloudError, match="500: out of memory"):
            compare()
    assert not any(plane.left().values()), plane.left()


def test_nothing_starts_over_budget_or_without_prompts(compare, plane):
    with pytest.raises(BudgetError, match=r"up to 21\.60 USD"):
        compare(budget_usd=20)
    for text, words in (("", "the test split is empty"), ('{"messages": []}\n', "a row that is no chat"),
                        ("{", "a row that is no chat"), (None, "there is no test.jsonl")):  # fmt: skip
        plane.store.path(f"{DATA}/test.jsonl").unlink(missing_ok=True)
        if text is not None:
            plane.store.put(f"{DATA}/test.jsonl", text)
        with pytest.raises(DataError, match=words):
            compare()
    assert not [name for name, _ in plane.requests if name.startswith("Create")]


def test_what_was_paid_for_is_kept_when_the_time_is_up():
    """Whole trials count; of a first trial that is not whole, the prompts that all endpoints have answered."""
    clock = iter(range(1000))

    def asked(end):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
            return measure(["a", "b"], [[], [], []], lambda name, prompt: Answer(name, 1, 1.0), trials=5, end=end)

    assert [len(trial) for trial in asked(next(clock) + 8)["b"]] == [3, 3], "the third trial was not whole"
    assert [len(trial) for trial in asked(next(clock) + 2)["a"]] == [2]
    with pytest.raises(CloudError, match="took all 120 minutes"):
        asked(0)


def measured(medusa, usd_per_hour=None):
    def answer(text, seconds):
        return {"text": text, "tokens": 2, "seconds": seconds, "steps": None, "stepped": None}

    plain = [[answer("a", 1.0), answer("b", 1.0)]]
    fact = {"endpoint": "e", "model": "s3://b/m", "engine": "vllm", "image": "me/vllm:0.30.0", "price": "unknown",
            "instance_type": "ml.g5.xlarge", "machines": 1, "usd_per_hour": usd_per_hour}  # fmt: skip
    return {
        "data": "s3://b/data", "region": "us-east-1", "tuning": {"tree.json": {"format": 5, "trees": [{}]}},
        "settings": {"prompts": 2, "trials": 1, "max_tokens": 8, "stop": []},
        "endpoints": dict.fromkeys(("base", "fine-tuned", "medusa"), fact),
        "answers": {"base": plain, "fine-tuned": plain, "medusa": [[answer(t, 0.5) for t in medusa]]},
        "rows": [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "a"}]}] * 2,
    }  # fmt: skip


def test_different_answers_and_what_is_not_known_are_told(tmp_path):
    summary = report(measured(["a", HOSTILE]), tmp_path)
    assert (summary["exact_match"], summary["speedup"]["vs_fine-tuned"]) == (0.5, 2.0)
    assert summary["tokens_per_step"] is None and summary["tree"] is None
    assert set(summary["usd_per_million_tokens"].values()) == {None}
    (other,) = summary["differing"]
    assert (other["id"], other["position"], other["reference"], other["text"]) == ("1", 0, "b", HOSTILE[:24])
    page = (tmp_path / "report.html").read_text()
    check_page(page)
    assert "but some answers differ" in page and "differs from the answer without heads" in page
    assert "price_per_hour" in page and "Where the gain comes from" not in page and "tokens per step</dt>" not in page
    assert "| unknown |" in (tmp_path / "table.md").read_text()


def test_a_measurement_that_is_not_one_is_refused(tmp_path):
    half = measured(["a", "b"])
    del half["answers"]["base"]
    with pytest.raises(DataError, match="not a comparison of three endpoints"):
        report(half, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_tuning_left_is_read_from_a_directory_too(tmp_path):
    assert read_tuning(str(tmp_path), None) == {}
    (tmp_path / "tree.json").write_text('{"format": 5}')
    assert read_tuning(str(tmp_path), None) == {"tree.json": {"format": 5}}
    (tmp_path / "heads.json").write_text("{")
    with pytest.raises(DataError, match=r"heads\.json is not valid JSON"):
        read_tuning(str(tmp_path), None)
