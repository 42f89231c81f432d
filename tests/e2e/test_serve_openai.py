"""OpenAI's interface through its own client, and bodies made by hypothesis, against a server in this process."""

import asyncio
import json
import random

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gorgon.decode.request import Request
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, get, post, server, wait_for


@pytest.fixture(scope="module")
def expected(served):
    return {q: alone(served.engine, Request(chat_ids(served.engine, q), 24)) for q in QUESTIONS}


def test_models(client):
    assert [m.id for m in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").id == "embedded"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


def test_chat_whole_and_streamed(client, expected):
    for question, whole in expected.items():
        body = ask(question, model="embedded")
        answer = client.chat.completions.create(**body)
        assert answer.choices[0].message.content == whole.text
        assert answer.choices[0].finish_reason == ("length" if whole.finish == "length" else "stop")
        assert answer.usage.completion_tokens == len(whole.token_ids)
        speculation = answer.usage.model_extra["speculation"]
        assert speculation["steps"] == len(whole.step_tokens)
        chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == answer.choices[0].finish_reason
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        assert len({c.id for c in chunks}) == 1


def test_stop_strings_are_found_across_tokens_and_never_leak(client, served):
    text = alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[0]), 24)).text
    for stop in (text[9:12], text[3:7], "no such text", text[:1], text[-2:]):
        body = ask(model="embedded", stop=[stop, "\0"])
        whole = client.chat.completions.create(**body).choices[0].message.content
        parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**body, stream=True)]
        assert whole == "".join(parts) == (text[: text.index(stop)] if stop in text else text)


def test_sampling_is_repeatable_and_n_answers_differ(client):
    body = {**ask(model="embedded", seed=11, n=3, max_tokens=20), "temperature": 1.3, "top_p": 0.95}
    first, second = (client.chat.completions.create(**body) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in second.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs(client, served):
    answer = client.chat.completions.create(**ask(model="embedded", logprobs=True, top_logprobs=3))
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    for token in content:
        assert token.logprob <= 0
        assert token.token == token.top_logprobs[0].token  # greedy: the likeliest was chosen
        values = [t.logprob for t in token.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3
        assert bytes(token.bytes).decode() == token.token
    streamed = []
    for chunk in client.chat.completions.create(**ask(model="embedded", logprobs=True), stream=True):
        if chunk.choices[0].logprobs:
            streamed += [t.token for t in chunk.choices[0].logprobs.content]
    assert streamed == [t.token for t in content]
    text = client.completions.create(model="embedded", prompt="SELECT", logprobs=2, temperature=0, max_tokens=4)
    assert len(text.choices[0].logprobs.tokens) == len(text.choices[0].logprobs.token_logprobs)


def test_logprobs_are_the_backbones(client, served):
    """Against a forward of the whole text, without cache or drafts."""
    import torch

    backbone = served.engine.backbone
    prompt = chat_ids(served.engine, QUESTIONS[0])
    whole = alone(served.engine, Request(prompt, 24))
    ids = torch.tensor([[*prompt, *whole.token_ids]])
    logprobs = backbone.logits(backbone.hidden(ids))[0].float().log_softmax(-1)
    expected = [float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(whole.token_ids)]
    answer = client.chat.completions.create(**ask(model="embedded", logprobs=True))
    reported = [t.logprob for t in answer.choices[0].logprobs.content]
    assert reported == pytest.approx(expected[: len(reported)], abs=1e-4)
    assert len(reported) == len(expected) - (whole.finish == "end")


def test_a_bias_bans_and_forces(client, served):
    space = served.engine.backbone.tokenizer("SELECT", add_special_tokens=False)["input_ids"][0]
    banned = client.chat.completions.create(**ask(model="embedded", logit_bias={str(space): -100}))
    assert "SELECT" not in banned.choices[0].message.content
    forced = client.chat.completions.create(**ask(model="embedded", logit_bias={str(space): 100}, max_tokens=3))
    assert forced.choices[0].message.content.count("SELECT") == 3


def test_completions_of_text_ids_and_several(client, served):
    tokenizer = served.engine.backbone.tokenizer
    ids = [int(i) for i in tokenizer("SELECT")["input_ids"]]
    options = {"model": "embedded", "temperature": 0, "max_tokens": 6}
    by_text = client.completions.create(prompt="SELECT", **options)
    by_ids = client.completions.create(prompt=ids, **options)
    both = client.completions.create(prompt=["SELECT", "CREATE TABLE"], n=2, **options)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == by_text.choices[0].text
    assert both.usage.prompt_tokens == len(ids) + len(tokenizer("CREATE TABLE")["input_ids"])


def test_many_clients_at_once(served, expected):
    chance = random.Random(4)

    async def one(client):
        await asyncio.sleep(chance.random() * 0.2)
        question = chance.choice(QUESTIONS)
        if chance.random() < 0.5:
            answer = await client.chat.completions.create(**ask(question, model="embedded"))
            text = answer.choices[0].message.content
        else:
            stream = await client.chat.completions.create(**ask(question, model="embedded"), stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return text == expected[question].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    assert all(asyncio.run(all_of_them()))


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"best": 1}, "best", "not a field"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": True}, "n", "integer"),
        ({"n": 17}, "n", "16"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 100_000}, "max_tokens", "do not fit"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stop": ["a"] * 20}, "stop", "at most 16"),
        ({"temperature": 3, "n": "2", "no": 1}, "temperature", "(and wrong: n, no)"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "system"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "prompt", "does not fit"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "surrogate"),
        ({"\ud800": 1}, None, "unicode"),
    ],
)
def test_wrong_fields_are_named(served, change, param, words):
    status, headers, body = post(served, "/v1/chat/completions", ask(**change))
    assert status == 400
    assert body["error"]["param"] == param and words in body["error"]["message"], body
    assert body["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"]


def test_neutral_values_of_unsupported_fields_are_taken(served):
    body = ask(response_format={"type": "text"}, tools=None, store=False, user="me", max_tokens=2)
    assert post(served, "/v1/chat/completions", body)[0] == 200


def test_model_names(served):
    status, _, body = post(served, "/v1/chat/completions", ask(model="gpt-4"))
    assert (status, body["error"]["code"]) == (404, "model_not_found")


def test_request_ids_come_back_and_strange_ones_do_not(served):
    assert get(served, "/health", {"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
    assert get(served, "/health", {"x-request-id": "a b"})[1]["x-request-id"] != "a b"


def test_metrics_tell_what_happened(served):
    get(served, "/v1/models")
    assert post(served, "/v1/chat/completions", ask())[0] == 200
    status, _, text = get(served, "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert float(values["gorgon_steps_total"]) > 0
    assert float(values["gorgon_output_tokens_total"]) > float(values["gorgon_steps_total"]) / 4
    assert float(values['gorgon_http_requests_total{route="/v1/models",status="200"}']) >= 1
    wait_for(lambda: served.scheduler.active == 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(["messages", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "stream",
                          "logprobs", "top_logprobs", "presence_penalty", "stream_options", "min_p", "response_format",
                          "model"])  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_body_gets_an_answer_in_openais_shape(served, changes):
    body = {**ask(max_tokens=2), **changes}
    if isinstance(body.get("n"), int) and not isinstance(body["n"], bool):
        body["n"] = min(body["n"], 2)
    status, _, answer = post(served, "/v1/chat/completions", body)
    assert status in (200, 400, 404), answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    elif isinstance(answer, bytes):
        assert answer.endswith(b"data: [DONE]\n\n")
    assert served.scheduler.state == "ready"


def test_the_key_is_asked_for(served):
    with server(served.engine, api_key="secret", slots=1) as locked:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer "},
        ):
            for path in ("/v1/chat/completions", "/invocations", "/playground/race"):
                status, headers, body = post(locked, path, ask(), header)
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
                assert headers["www-authenticate"] == "Bearer"
        assert post(locked, "/v1/chat/completions", ask(max_tokens=1), {"authorization": "Bearer secret"})[0] == 200
        assert get(locked, "/v1/models")[0] == 401
        for path in ("/ping", "/health", "/metrics", "/"):
            assert get(locked, path)[0] == 200


def test_a_full_queue_is_429_with_retry_after(served):
    with server(served.engine, slots=1, queue=0) as small:
        endless = json.dumps(ask(max_tokens=400, ignore_eos=True, stream=True)).encode()
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", endless, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read(10)
        wait_for(lambda: small.scheduler.active == 1)
        status, headers, body = post(small, "/v1/chat/completions", ask())
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 60
        status, headers, body = post(small, "/invocations", {"inputs": "x"})
        assert (status, body["error_type"]) == (429, "overloaded")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert post(small, "/v1/chat/completions", b"{")[0] == 429  # before anybody looks at the body
        response.close()
        connection.close()
        wait_for(lambda: small.scheduler.active == 0, 10)
        status, _, body = post(small, "/v1/chat/completions", ask(n=2))
        assert (status, body["error"]["param"]) == (400, "n")  # can never fit
        assert post(small, "/v1/chat/completions", ask(max_tokens=2))[0] == 200


def test_deadlines_are_504(served):
    with server(served.engine, slots=1, deadline_s=0.2) as hurried:
        endless = ask(max_tokens=400, ignore_eos=True)
        status, _, body = post(hurried, "/v1/chat/completions", endless)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        _, _, text = post(hurried, "/v1/chat/completions", {**endless, "stream": True})
        last = text.decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
