"""Token ids of prompts and answers, exactly as the tokenizer's own chat template writes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from gorgon.data.examples import Example
from gorgon.errors import ModelError

Message = dict[str, str]


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of the chat up to the point where the assistant begins to write.

    A template that refuses the system role gets the system text at the beginning of the first user message.
    Raises: ModelError when the tokenizer has no chat template, or its template refuses the chat even so.
    """
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode_answer(tokenizer: Any, example: Example, end_ids: Collection[int] = ()) -> list[int]:
    """Ids of the answer up to and including the end token; what follows the end token in a template is not answered.

    `example.answer_ids` if there are any. Otherwise the template with the answer minus the prompt; where the prompt is
    not a prefix of that (a template that rewrites history), the answer's text alone and the end token.
    Args: end_ids: end tokens besides the tokenizer's own, such as those of a generation config.
    Raises: ModelError as for `encode_prompt`, and when there is no end token at all.
    Invariant: exactly one end token, the last one.
    """
    if example.answer_ids is not None:
        return list(example.answer_ids)
    prompt = encode_prompt(tokenizer, example.messages)
    answered = [*example.messages, {"role": "assistant", "content": example.answer}]
    whole = _render(tokenizer, answered, add_generation_prompt=False)
    if whole[: len(prompt)] == prompt:
        ids = whole[len(prompt) :]
    else:
        ids = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    return _ended(tokenizer, ids, end_ids)


def special_texts(tokenizer: Any) -> list[str]:
    """Spellings that the tokenizer reads as control tokens; text that holds one cannot be told from the template."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens))


def _ended(tokenizer: Any, ids: list[int], end_ids: Collection[int]) -> list[int]:
    end = tokenizer.eos_token_id
    ends = set(end_ids) | ({end} if end is not None else set())
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    # Some templates close a turn with a control token that is not the tokenizer's end token (Gemma's <end_of_turn>),
    # and then a line break. The model stops at that token, so it is the end.
    special = set(tokenizer.all_special_ids) | {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    kept = list(ids)
    while kept and kept[-1] not in special and not tokenizer.decode([kept[-1]]).strip():
        kept.pop()
    if kept and kept[-1] in special:
        return kept
    if end is None:
        raise ModelError(
            "the tokenizer has no end token and its chat template writes none", field="eos_token",
            hint="set eos_token in tokenizer_config.json",
        )  # fmt: skip
    return [*ids, end]


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template", value=getattr(tokenizer, "name_or_path", None), field="chat_template",
            hint="use the instruction-tuned variant of the model, or put a chat_template.jinja into its directory",
        )  # fmt: skip
    for chat in (list(messages), _folded(messages)):
        if chat is None:
            break
        try:
            # return_dict: since transformers 5 the default is a dictionary with a mask, not the ids
            ids = tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
            )
        except (TemplateError, TypeError, KeyError) as error:  # whatever the template's own code trips over
            problem = error
            continue
        return [int(i) for i in ids]
    raise ModelError(
        f"the chat template refuses this chat: {problem}", field="chat_template",
        value=[message["role"] for message in messages],
    ) from problem  # fmt: skip


def _folded(messages: Sequence[Message]) -> list[Message] | None:
    """The chat with its system text in front of the first user message, or None where there is none to move."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": text}, *messages[2:]]
