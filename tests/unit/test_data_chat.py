"""Prompts and answers as token ids, under the chat templates of several model families."""

from importlib import resources

import pytest
from transformers import AddedToken, AutoTokenizer

from gorgon.data.chat import encode_answer, encode_prompt, special_texts
from gorgon.data.examples import Example
from gorgon.errors import ModelError

CHAT = [{"role": "system", "content": "CREATE TABLE a (b TEXT)"}, {"role": "user", "content": "Show b."}]
EXAMPLE = Example("1", CHAT, "SELECT b FROM a")
END = "<|end|>"
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ZEPHYR
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(str(resources.files("gorgon.models") / "embedded"))


def test_embedded_template(tokenizer):
    prompt, answer = encode_prompt(tokenizer, CHAT), encode_answer(tokenizer, EXAMPLE)
    assert tokenizer.decode(prompt) == f"<|system|>{CHAT[0]['content']}{END}<|user|>Show b.{END}<|assistant|>"
    assert tokenizer.decode(answer) == f"SELECT b FROM a{END}"
    assert type(prompt) is list
    assert all(type(i) is int for i in prompt + answer)


def test_text_after_the_end_token_is_cut(tokenizer):
    tokenizer.chat_template = ZEPHYR
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)).endswith("<|assistant|>\n")
    assert tokenizer.decode(encode_answer(tokenizer, EXAMPLE)) == f"SELECT b FROM a{END}"


def test_system_text_moves_to_the_user_where_a_template_refuses_it(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    text = tokenizer.decode(encode_prompt(tokenizer, CHAT))
    assert text == f"<|user|>\n{CHAT[0]['content']}\n\nShow b.{END}\n<|assistant|>\n"
    assert tokenizer.decode(encode_answer(tokenizer, EXAMPLE)) == f"SELECT b FROM a{END}"
    tokenizer.chat_template = ALTERNATING
    assert "[user]CREATE TABLE a (b TEXT)\n\nShow b." in tokenizer.decode(encode_prompt(tokenizer, CHAT))


def test_a_chat_that_no_folding_saves(tokenizer):
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(ModelError, match="alternate"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ModelError, match="alternate"):
        encode_prompt(tokenizer, [CHAT[0], CHAT[1], CHAT[1]])


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages[0].content.nothing() }}", "{{ messages[9].content.x }}"]
)
def test_broken_template(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="refuses"):
        encode_prompt(tokenizer, CHAT)


def test_end_token_is_added_where_the_template_has_none(tokenizer):
    tokenizer.chat_template = NO_END
    assert tokenizer.decode(encode_answer(tokenizer, EXAMPLE)) == f"SELECT b FROM a{END}"


def test_history_rewriting_template_falls_back_to_the_answer_alone(tokenizer):
    tokenizer.chat_template = REWRITING
    assert tokenizer.decode(encode_answer(tokenizer, EXAMPLE)) == f"SELECT b FROM a{END}"


def test_turn_end_that_is_not_the_end_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<end_of_turn>", special=True)]})
    tokenizer.chat_template = ZEPHYR.replace(END, "<end_of_turn>")
    answer = encode_answer(tokenizer, EXAMPLE)
    assert tokenizer.decode(answer) == "SELECT b FROM a<end_of_turn>"
    assert "<end_of_turn>" in special_texts(tokenizer)


def test_extra_end_ids(tokenizer):
    tokenizer.chat_template = NO_END
    space = tokenizer.encode("SELECT b", add_special_tokens=False)[-1]
    assert encode_answer(tokenizer, EXAMPLE, {space})[-1] == space


def test_exact_ids_win(tokenizer):
    assert encode_answer(tokenizer, Example("1", CHAT, "x", None, [7, 8, 1])) == [7, 8, 1]


def test_answer_with_leading_newline(tokenizer):
    tokenizer.chat_template = ZEPHYR
    answer = encode_answer(tokenizer, Example("1", CHAT, "\nSELECT"))
    assert tokenizer.decode(answer) == f"\nSELECT{END}"


def test_no_template_and_no_end_token(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompt(tokenizer, CHAT)
    tokenizer.chat_template = NO_END
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        encode_answer(tokenizer, EXAMPLE)
