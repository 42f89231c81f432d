"""Three endpoints side by side: told the price before, compared fairly, and deleted whatever happens."""

import json

import pytest

from gorgon.cloud.compare import Answer, Series, compare_endpoints, summarize
from gorgon.cloud.config import EndpointConfig, SageMakerConfig
from gorgon.errors import BudgetError, CloudError, DataError
from tests.cloud_plane.plane import BUCKET, Fault

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("cloud")]
MODEL, DATA = f"s3://{BUCKET}/model", f"s3://{BUCKET}/data"


@pytest.fixture
def compare(plane, tmp_path):
    plane.store.put(f"{MODEL}/config.json", json.dumps({"medusa_num_heads": 3}))
    rows = [{"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(4)]  # fmt: skip
    plane.store.put(f"{DATA}/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    endpoint = EndpointConfig(instance_type="ml.m5.xlarge", image="me/stand-in:1.0")

    def run(**settings):
        cloud = SageMakerConfig(endpoint=endpoint, price_per_hour={"ml.m5.xlarge": 3.6}, **settings)
        return compare_endpoints("embedded", MODEL, DATA, cloud, tmp_path / "out", stamp="1", trials=2)

    return run


def test_the_comparison_and_its_files(compare, plane, tmp_path):
    summary = compare()
    rows = summary["endpoints"]
    assert list(rows) == ["base", "fine-tuned", "medusa"] and summary["prompts"] == 4 and summary["trials"] == 2
    assert rows["fine-tuned"]["speedup"] == 1.0 and rows["medusa"]["speedup"] > 1.0
    assert all(row["same_answers"] == 1.0 for row in rows.values())
    for row in rows.values():
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        # one dollar in a thousand seconds: 1e6 tokens at t tokens/s cost 1e3/t dollars
        assert row["usd_per_million_tokens"] == pytest.approx(1e3 / row["tokens_per_s"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    first = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert first["messages"] == [{"role": "user", "content": "question 0"}]
    assert len(first["answers"]["medusa"]["seconds"]) == 2
    assert "| medusa |" in (tmp_path / "out" / "table.md").read_text()
    created = [r["EndpointName"] for name, r in plane.requests if name == "CreateEndpoint"]
    assert created == ["base-1", "sft-1", "medusa-1"]
    assert not any(plane.left().values()), plane.left()


def test_one_that_does_not_come_up_takes_the_others_with_it(compare, plane):
    original = plane.do_CreateEndpoint

    def create(request):
        if request["EndpointName"] == "medusa-1":
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
    plane.store.put(f"{DATA}/test.jsonl", "")
    with pytest.raises(DataError, match="the test split is empty"):
        compare()
    assert not [name for name, _ in plane.requests if name.startswith("Create")]


def test_different_answers_are_counted():
    one = Series([[Answer("a", 2, 1.0), Answer("b", 2, 1.0)]])
    other = Series([[Answer("a", 2, 0.5), Answer("c", 2, 0.5)]])
    row = summarize({"fine-tuned": one, "medusa": other}, {})["endpoints"]["medusa"]
    assert (row["same_answers"], row["speedup"], row["usd_per_million_tokens"]) == (0.5, 2.0, None)
