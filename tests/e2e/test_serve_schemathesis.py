"""Requests made from the server's own OpenAPI document: every answer is one that the document describes."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve_support import make_engine, server

OPERATIONS = ("GET /v1/models", "GET /v1/models/{name}", "POST /v1/chat/completions", "POST /v1/completions",
              "GET /ping", "POST /invocations", "GET /health", "GET /metrics")  # fmt: skip


@pytest.fixture(scope="module")
def operations():
    with server(make_engine(), slots=2, context=64) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        yield {o.label: o for o in (result.ok() for result in schema.get_all_operations())}
        assert running.scheduler.state == "ready"


def test_every_route_is_documented(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_documented(operations, label):
    @settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operations[label].as_strategy())
    def check(case):
        # Whether a prompt fits, or sums are consistent, is more than a schema can say: such a 400 is a correct answer.
        case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

    check()
