"""OpenAI's request bodies: what is supported, with ranges, and what is not.

A field that would change the answer and is not supported is an error, never ignored; at its neutral value it is taken.
Values are checked strictly: "0.5" is not a number, true is not 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_ANSWERS = 16
"""Answers to one prompt at most."""
MOST_STOPS = 16


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character; no tokenizer takes it, and it has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Base of all bodies: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TextPart(Body):
    """A piece of a message; images and sound are not supported."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message of a chat. 'developer' is OpenAI's newer word for 'system'."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def as_dict(self) -> dict[str, str]:
        """The message as chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = Field(False, description="Send a last chunk with the whole usage.")


class JsonSchema(Body):
    """A JSON Schema that the answer must fit."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Changes nothing.")
    description: Text | None = Field(None, description="Changes nothing.")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The answer always fits, whatever is given here.")


class ResponseFormat(Body):
    """What the answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_pair(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' is given with the type 'json_schema', and only then")
        return self


class SamplingBody(Body):
    """What chat and text completions share."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's that are not supported: the values at which they change nothing."""

    model: Text | None = Field(None, description="The served model's name.")
    max_tokens: int | None = Field(None, ge=1, description="Length limit of an answer, in tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 unless given.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling.")
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS, description="Answers to each prompt.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="Strings that end an answer; they are not part of it."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same answer.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="Token ids and what is added to their logits.")
    response_format: ResponseFormat | None = Field(None, description="Hold the answer to JSON, or to a JSON Schema.")
    user: Text | None = Field(None, description="Changes nothing; for logs of the client's own.")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="Beyond OpenAI: keep this many tokens; 0 is off.")
    min_p: float | None = Field(None, ge=0, lt=1, description="Beyond OpenAI: least share of the likeliest token.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Beyond OpenAI; 1 is off.")
    ignore_eos: bool | None = Field(None, description="Beyond OpenAI: go on after the end token, for measurements.")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        """Takes unsupported fields out where they change nothing, and names the first one that would."""
        if not isinstance(data, Mapping):
            return data
        kept = dict(data)
        for name, values in cls.neutral.items():
            if name in kept:
                value = kept.pop(name)
                if value is not None and not any(type(value) is type(v) and value == v for v in values):
                    raise ValueError(f"'{name}' is not supported")
        return kept

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed with 'stream': true")
        return self


class ChatBody(SamplingBody):
    """Body of /v1/chat/completions."""

    neutral = {
        "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False), "modalities": (["text"],), "audio": (), "prediction": (),
        "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (), "service_tier": ("auto", "default"),
        "store": (False,), "metadata": ({},), "prompt_cache_key": (), "safety_identifier": (), "moderation": (),
    }  # fmt: skip
    messages: list[Message] = Field(min_length=1, description="The chat so far; the assistant answers the last one.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer word for max_tokens.")
    logprobs: bool | None = Field(None, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens to report at each place.")

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed with 'logprobs': true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' contradict each other")
        return self


class CompletionBody(SamplingBody):
    """Body of /v1/completions."""

    neutral = {"suffix": ("",), "echo": (False,), "best_of": (1,)}
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    ) = Field(description="Text, token ids, or several of either.")
    logprobs: int | None = Field(None, ge=0, le=5, description="Likeliest tokens to report at each place.")


class Speculation(BaseModel):
    """What the drafts brought."""

    steps: int
    tokens_per_step: float


class PromptDetails(BaseModel):
    """What of the prompt was known already."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; `speculation` is ours."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    speculation: Speculation


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error, in its envelope."""

    error: ErrorDetail


class ChatAnswer(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class CompletionAnswer(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage
