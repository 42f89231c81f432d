"""Every field of a request body either does what the engine does for it, or is a 400 that names it."""

import pytest

from gorgon.core.sampling import Sampling
from gorgon.decode.request import Request
from gorgon.serve.sagemaker import TgiParameters
from gorgon.serve.schemas import ChatBody, CompletionBody
from tests.serve_support import QUESTIONS, alone, ask, chat_ids, post

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("fields", "without"),
    [
        ({"seed": 5}, {"seed": 6}),  # the temperature is 1 unless given
        ({"temperature": 0.4, "seed": 5}, {"temperature": 1.0, "seed": 5}),
        ({"temperature": 1.5, "seed": 5, "top_p": 0.3}, {"temperature": 1.5, "seed": 5}),
        ({"temperature": 1.5, "seed": 5, "top_k": 2}, {"temperature": 1.5, "seed": 5}),
        ({"temperature": 1.5, "seed": 5, "min_p": 0.5}, {"temperature": 1.5, "seed": 5}),
        ({"temperature": 0, "presence_penalty": 2}, {"temperature": 0}),
        ({"temperature": 0, "frequency_penalty": 2}, {"temperature": 0}),
        ({"temperature": 0, "repetition_penalty": 3.0}, {"temperature": 0}),
        ({"temperature": 0, "logit_bias": {"70": 12.5}}, {"temperature": 0}),
    ],
)  # fmt: skip
def test_sampling_fields_are_the_engines(served, fields, without):
    prompt = chat_ids(served.engine, QUESTIONS[1])

    def answer(options):
        options = {"temperature": 1.0, **options}
        if "logit_bias" in options:
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        return alone(served.engine, Request(prompt, 40, sampling=Sampling(**options), ignore_end=True)).text

    expected = answer(fields)
    assert expected != answer(without), "the field changes nothing here: nothing was tested"
    options = {"max_tokens": 40, "ignore_eos": True, **fields}
    messages = ask(QUESTIONS[1])["messages"]
    chat = post(served, CHAT, {"messages": messages, **options})[2]
    assert chat["choices"][0]["message"]["content"] == expected
    text = post(served, TEXT, {"prompt": prompt, **options})[2]
    assert text["choices"][0]["text"] == expected


def test_lengths(served):
    for fields, tokens in (({"max_tokens": 3}, 3), ({"max_tokens": None, "max_completion_tokens": 5}, 5)):
        answer = post(served, CHAT, ask(ignore_eos=True, **fields))[2]
        assert answer["usage"]["completion_tokens"] == tokens
        assert answer["choices"][0]["finish_reason"] == "length"
    text = post(served, TEXT, {"prompt": "SELECT", "ignore_eos": True})[2]
    assert text["usage"]["completion_tokens"] == 16  # OpenAI's default
    prompt = chat_ids(served.engine, QUESTIONS[0])
    whole = post(served, CHAT, {"messages": ask()["messages"], "ignore_eos": True, "temperature": 0})[2]
    assert whole["usage"]["completion_tokens"] == served.scheduler.context - len(prompt)  # as much as there is room for


def test_usage_counts_tokens_and_steps(served):
    whole = alone(served.engine, Request(chat_ids(served.engine, QUESTIONS[2]), 24))
    usage = post(served, CHAT, ask(QUESTIONS[2]))[2]["usage"]
    assert usage["prompt_tokens"] == len(chat_ids(served.engine, QUESTIONS[2]))
    assert usage["completion_tokens"] == len(whole.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    steps = len(whole.step_tokens)
    assert usage["speculation"] == {"steps": steps, "tokens_per_step": round(sum(whole.step_tokens) / steps, 4)}
    again = post(served, CHAT, ask(QUESTIONS[2]))[2]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again == usage["prompt_tokens"] - 1  # all of it but the token that decides the answer's first


def test_completions_stream_what_they_answer_whole(client, served):
    body = {"model": "embedded", "prompt": ["SELECT", "CREATE TABLE"], "n": 2, "temperature": 0.9, "seed": 4,
            "logprobs": 2, "max_tokens": 12}  # fmt: skip
    whole = client.completions.create(**body)
    texts, tokens, offsets = ([""] * 4, [[] for _ in range(4)], [[] for _ in range(4)])
    finishes = [None] * 4
    for chunk in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def _bodies():
    return [(CHAT, ChatBody, ask(max_tokens=2)), (TEXT, CompletionBody, {"prompt": "x", "max_tokens": 2})]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [(path, body, field) for path, schema, body in _bodies() for field in [*schema.neutral, "no_such_field"]],
)
def test_an_unsupported_field_is_named(served, path, body, field):
    for value in ("something else", {"a": 1}, 7):
        status, _, answer = post(served, path, {**body, field: value})
        assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, field, "invalid_request_error")
        assert field in answer["error"]["message"] and "not supported" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "schema", "body"), _bodies(), ids=["chat", "text"])
def test_values_that_change_nothing_are_taken(served, path, schema, body):
    neutral = {name: values[0] if values else None for name, values in schema.neutral.items()}
    assert post(served, path, {**body, **neutral})[0] == 200


@pytest.mark.parametrize("field", sorted(TgiParameters.unsupported))
def test_an_unsupported_field_of_tgis_is_named(served, field):
    values = {"decoder_input_details": True, "watermark": True, "typical_p": 0.5, "adapter_id": "x"}
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2, field: values.get(field, 3)}}
    status, _, answer = post(served, "/invocations", body)
    assert (status, answer["error_type"]) == (422, "validation")
    assert field in answer["error"] and "not supported" in answer["error"]
