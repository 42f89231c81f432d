"""`response_format` through OpenAI's client, and TGI's `grammar`: answers that fit, and faults that name the field."""

import json
import re
from typing import Literal

import jsonschema_rs
import pydantic
import pytest

from gorgon.decode.grammar import Grammar, Grammars
from gorgon.decode.request import Request
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, post

SCHEMA = {
    "type": "object", "required": ["table", "limit", "sure"], "additionalProperties": False,
    "properties": {"table": {"type": "string", "maxLength": 6}, "limit": {"enum": [1, 5, 10]},
                   "sure": {"type": "boolean"}},
}  # fmt: skip
FITTED = {"type": "json_schema", "json_schema": {"name": "query", "schema": SCHEMA, "strict": True}}


class Head(pydantic.BaseModel):
    """What the client's own helper asks for."""

    state: Literal["Alabama", "Ohio"]
    ages: list[Literal[50, 60]] = pydantic.Field(max_length=3)


def expected(served, question, schema, **more):
    backbone = served.engine.backbone
    grammar = Grammars(backbone.tokenizer, backbone.vocab_size, backbone.end_ids).json(schema, field="s")
    return alone(served.engine.plain(), Request(chat_ids(served.engine, question), 200, grammar=grammar, **more))


def test_a_schema_whole_and_streamed(client, served):
    for question in QUESTIONS[:3]:
        plain = expected(served, question, SCHEMA)
        body = ask(question, model="embedded", max_tokens=200, response_format=FITTED)
        answer = client.chat.completions.create(**body)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (plain.text, "stop")
        assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(plain.text))
        chunks = list(client.chat.completions.create(**body, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain.text


def test_the_clients_own_helper_parses_a_pydantic_model(client):
    body = ask(model="embedded", max_tokens=200)
    parsed = client.chat.completions.parse(**body, response_format=Head).choices[0].message.parsed
    assert isinstance(parsed, Head)


def test_n_sampled_answers_fit_differ_and_repeat(client):
    body = {**ask(model="embedded", seed=7, n=3, max_tokens=200, response_format=FITTED), "temperature": 1.2}
    first, second = (client.chat.completions.create(**body, top_p=0.9, presence_penalty=0.5) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in second.choices] and len(set(texts)) > 1
    assert all(jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(text)) for text in texts)


def test_any_object_a_short_limit_and_a_stop_string(client):
    body = ask(model="embedded", max_tokens=1, response_format={"type": "json_object"})
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "length" and choice.message.content.startswith("{")
    body = ask(model="embedded", max_tokens=200, response_format=FITTED, stop=["limit"])
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "stop" and re.fullmatch(r'\{\s*"table".*"', choice.message.content, re.DOTALL)


def test_logprobs_are_the_models_own(client):
    """Before the grammar: the likeliest token may be one that was not allowed."""
    body = ask(model="embedded", max_tokens=30, response_format=FITTED, logprobs=True, top_logprobs=1)
    answer = client.chat.completions.create(**body).choices[0]
    tokens = answer.logprobs.content
    assert "".join(t.token for t in tokens) == answer.message.content
    assert tokens[0].logprob < -0.01 and tokens[0].token != tokens[0].top_logprobs[0].token  # an SQL model: no brace


def test_text_and_completions(client, served):
    free = client.chat.completions.create(**ask(model="embedded", response_format={"type": "text"}))
    assert (
        free.choices[0].message.content == alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 24)).text
    )
    extra = {"response_format": FITTED}
    text = client.completions.create(model="embedded", prompt="x", temperature=0, max_tokens=200, extra_body=extra)
    assert set(json.loads(text.choices[0].text)) == {"table", "limit", "sure"}


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ("json", "response_format", "valid dictionary"), ({}, "response_format.type", "required"),
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format", "given with the type"),
        ({"type": "text", "json_schema": {"name": "x", "schema": {}}}, "response_format", "only then"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "required"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema", "required"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name",
         "pattern"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}},
         "response_format.json_schema.schema", "uniqueItems"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"x-guidance": {}}}},
         "response_format.json_schema.schema.x-guidance", "options"),
        ({"type": "json_object", "more": 1}, "response_format.more", "not a field"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(served, value, param, words):
    for path in ("/v1/chat/completions", "/invocations"):
        status, _, body = post(served, path, ask(response_format=value))
        assert status == 400
        assert (body["error"]["param"], body["error"]["type"]) == (param, "invalid_request_error"), body
        assert words in body["error"]["message"], body


def test_a_grammar_and_ignore_eos_contradict(served):
    status, _, body = post(served, "/v1/chat/completions", ask(response_format=FITTED, ignore_eos=True))
    assert (status, body["error"]["param"]) == (400, "ignore_eos")


@pytest.mark.parametrize("kind", ["json", "text", "json_schema", "regex"])
def test_tgis_grammar(served, kind):
    value = {"json": SCHEMA, "text": json.dumps(SCHEMA), "json_schema": {"name": "q", "schema": SCHEMA},
             "regex": "SELECT [a-z]{3}"}[kind]  # fmt: skip
    grammar = {"type": "json" if kind == "text" else kind, "value": value}
    body = {"inputs": "x", "parameters": {"grammar": grammar, "max_new_tokens": 200, "details": True}}
    status, _, answer = post(served, "/invocations", body)
    assert status == 200 and answer[0]["details"]["finish_reason"] == "eos_token"
    if kind == "regex":
        assert re.fullmatch(value, answer[0]["generated_text"])
    else:
        assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(answer[0]["generated_text"]))


@pytest.mark.parametrize(
    ("grammar", "status", "words"),
    [
        ({"type": "json", "value": {"uniqueItems": True}}, 422, "uniqueItems"),
        ({"type": "json", "value": "{"}, 422, "not valid JSON"), ({"type": "json", "value": 3}, 422, "not an object"),
        ({"type": "json_schema", "value": {}}, 422, "schema"), ({"type": "regex", "value": "("}, 422, "pattern"),
        ({"type": "regex", "value": 3}, 422, "not text"), ({"type": "lark", "value": ""}, 400, "grammar.type"),
        ({"type": "json"}, 400, "grammar.value"),
    ],
)  # fmt: skip
def test_tgis_grammar_wrong(served, grammar, status, words):
    found, _, answer = post(served, "/invocations", {"inputs": "x", "parameters": {"grammar": grammar}})
    assert found == status and words in json.dumps(answer), answer


def test_a_fault_of_the_library_fails_its_request_alone(served, monkeypatch):
    """Whatever the matcher raises in the middle of an answer."""
    whole, advance = Grammar.advance, Grammar.advance
    failing = []

    def breaks(self, token):
        advance(self, token)
        failing.append(token)
        if len(failing) == 9:
            raise RuntimeError("no such state")

    monkeypatch.setattr(Grammar, "advance", breaks)
    status, _, body = post(served, "/v1/chat/completions", ask(response_format=FITTED, max_tokens=200))
    assert status == 500 and "no such state" in body["error"]["message"], body
    monkeypatch.setattr(Grammar, "advance", whole)
    assert post(served, "/v1/chat/completions", ask(response_format=FITTED, max_tokens=200))[0] == 200
    assert served.scheduler.state == "ready"
