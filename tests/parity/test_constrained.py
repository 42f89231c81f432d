"""Answers held to a grammar: exactly those of plain constrained decoding, whatever is drafted, and they fit."""

import json
import re

import jsonschema_rs
import llguidance
import pytest
import torch

from gorgon.core.sampling import GREEDY, History, Randomness, Sampling, choose
from gorgon.core.tree import DraftTree
from gorgon.decode.grammar import Grammar, Grammars
from gorgon.decode.request import Request
from gorgon.errors import GorgonError, GrammarError, SamplingError
from tests.parity.support import TREES
from tests.serve_support import QUESTIONS, alone, chat_ids, make_engine

ROWS = {
    "type": "object",
    "properties": {"rows": {"type": "array", "minItems": 2, "maxItems": 3, "items": {
        "type": "object", "required": ["name", "age"], "additionalProperties": False,
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [10, 20, 30]}},
    }}},
    "required": ["rows"], "additionalProperties": False,
}  # fmt: skip
KINDS = {
    "greedy": GREEDY,
    "sampled": Sampling(temperature=1.0, seed=3),
    "filtered": Sampling(temperature=1.4, top_p=0.8, top_k=30, min_p=0.01, seed=4),
    "penalized": Sampling(presence_penalty=1.0, frequency_penalty=0.3, repetition_penalty=1.2),
    "biased": Sampling(temperature=0.8, logit_bias={7: 3.0, 40: 100.0, 1: 100.0}, seed=5),
}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def grammars(engine):
    backbone = engine.backbone
    return Grammars(backbone.tokenizer, backbone.vocab_size, backbone.end_ids)


def one_by_one(engine, prompt, grammar, sampling, most, stream=0):
    """Plain constrained decoding from the definition: the whole text each time, the mask bit by bit, no engine."""
    backbone, state, output = engine.backbone, grammar.copy(), []
    randomness = Randomness(sampling.seed or 0, stream=stream)
    while len(output) < most and not backbone.end_ids & set(output):
        logits_V = backbone.logits(backbone.hidden(torch.tensor([[*prompt, *output]])))[0, -1].clone()
        bits = state._matcher.compute_bitmask()
        for token in range(len(logits_V)):
            if not bits[token // 8] >> token % 8 & 1:
                logits_V[token] = float("-inf")
        output.append(choose(logits_V, sampling, randomness, len(output), History(prompt, output)))
        assert state._matcher.consume_token(output[-1])
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_every_tree_writes_what_plain_constrained_decoding_writes(engine, grammars, kind):
    sampling, prompt = KINDS[kind], chat_ids(engine, QUESTIONS[1])
    grammar = grammars.json(ROWS, field="schema")
    request = Request(prompt, 250, sampling=sampling, grammar=grammar)
    plain = alone(engine.plain(), request)
    assert plain.finish == "end", plain.text
    assert jsonschema_rs.validator_for(ROWS).is_valid(json.loads(plain.text)), plain.text
    with torch.inference_mode():
        assert plain.token_ids[:60] == one_by_one(engine, prompt, grammar, sampling, 60)
    accepted = 0.0
    for tree in ("chain", "bushy + ngram"):
        deep = TREES[tree] if tree != "chain" else DraftTree.chain(3)
        answer = alone(engine.with_tree(deep), request)
        assert (answer.token_ids, answer.text, answer.finish) == (plain.token_ids, plain.text, plain.finish)
        accepted = max(accepted, answer.tokens_per_step)
    assert accepted > 1.1  # drafts were accepted, so trees had a say


def test_rows_with_and_without_grammars_share_steps(engine, grammars):
    requests = []
    for i, question in enumerate(QUESTIONS * 2):
        prompt, sampling = chat_ids(engine, question), list(KINDS.values())[i % 3]
        grammar = [None, grammars.json(ROWS, field="s"), grammars.regex("[A-Z]{2,9}(, [a-z]+)*", field="r")][i % 3]
        requests.append(Request(prompt, 40 + i, sampling=sampling, grammar=grammar))
    slots = engine.slots(4, 512)
    waiting, made = list(requests), {}
    while waiting or slots.running:
        while waiting and slots.free:
            request = waiting.pop()
            made[id(request)] = slots.admit(request)
            slots.read_prompt()
        slots.step()
    for request in requests:
        running = made[id(request)]
        assert running.error is None
        assert running.generation.token_ids == alone(engine, request).token_ids


def test_the_end_token_comes_where_the_answer_is_complete_and_nowhere_else(engine, grammars):
    (end,) = engine.backbone.end_ids
    eager = Sampling(logit_bias={end: 1e6})
    prompt = chat_ids(engine, QUESTIONS[0])
    for pattern, expected in (("a{3}", "aaa"), ("(ab)+", "ab"), ("x?", "")):
        answer = alone(engine, Request(prompt, 30, sampling=eager, grammar=grammars.regex(pattern, field="r")))
        assert (answer.text, answer.finish, answer.token_ids[-1]) == (expected, "end", end)
    never = Sampling(logit_bias={end: -1e6})  # the mask comes first: what alone is left cannot be biased away
    answer = alone(engine, Request(prompt, 30, sampling=never, grammar=grammars.regex("a{3}", field="r")))
    assert (answer.text, answer.finish) == ("aaa", "end")


def test_limits_and_stop_strings_cut_an_answer(engine, grammars):
    prompt, grammar = chat_ids(engine, QUESTIONS[0]), grammars.json(ROWS, field="s")
    whole = alone(engine, Request(prompt, 250, grammar=grammar))
    for most in (1, 2, 7, len(whole.token_ids) - 1):
        cut = alone(engine, Request(prompt, most, grammar=grammar))
        assert (cut.token_ids, cut.finish) == (whole.token_ids[:most], "length")
    stopped = alone(engine, Request(prompt, 250, ("name",), grammar=grammar))
    assert (stopped.text, stopped.finish) == (whole.text[: whole.text.index("name")], "stop")


@pytest.mark.parametrize("seed", range(3))
def test_any_object_parses(engine, grammars, seed):
    """Sampled hot, so that strings, escapes and numbers of all kinds occur; biased towards short ones."""
    quote = engine.backbone.tokenizer.encode('"', add_special_tokens=False)[0]
    brace = engine.backbone.tokenizer.encode("}", add_special_tokens=False)[0]
    sampling = Sampling(temperature=2.0, seed=seed, logit_bias={quote: 9.0, brace: 9.0})
    answer = alone(engine, Request(chat_ids(engine, "x"), 300, sampling=sampling, grammar=grammars.json(field="f")))
    assert answer.finish == "end" and isinstance(json.loads(answer.text), dict), answer.text


def test_each_answer_follows_a_copy(engine, grammars):
    request = Request(chat_ids(engine, "x"), 20, grammar=grammars.regex("[0-9]{4}", field="r"))
    first, second = (alone(engine, request) for _ in range(2))
    assert first.token_ids == second.token_ids and re.fullmatch("[0-9]{4}", first.text)


def test_an_answer_that_outgrows_the_librarys_limits_fails_alone(engine, grammars):
    pattern = {"type": "string", "pattern": "^(a|b)*a(a|b){12}$"}
    text = llguidance.LLMatcher.grammar_from_json_schema(pattern)
    limits = llguidance.LLParserLimits(max_lexer_states=40)
    matcher = llguidance.LLMatcher(grammars._tokens, text, log_level=0, limits=limits)
    prompt = chat_ids(engine, "x")
    slots = engine.slots(2, 256)
    failing = slots.admit(Request(prompt, 100, sampling=KINDS["sampled"], grammar=Grammar(matcher, frozenset())))
    slots.read_prompt()
    healthy = Request(prompt, 30, grammar=grammars.json(ROWS, field="s"))
    other = slots.admit(healthy)
    slots.read_prompt()
    while slots.running:
        slots.step()
    assert isinstance(failing.error, GrammarError) and "too many states" in str(failing.error)
    assert "<state>" not in str(failing.error)
    assert failing.generation.token_ids  # in the middle of its answer
    assert other.generation.token_ids == alone(engine, healthy).token_ids


def test_contradictions_are_refused_before_any_work(engine, grammars):
    grammar = grammars.json(field="f")
    with pytest.raises(GorgonError, match="ends with it") as refused:
        engine.slots(1, 64).admit(Request([5], 4, grammar=grammar, ignore_end=True))
    assert refused.value.field == "ignore_eos"
    typical = Sampling(temperature=1.0, acceptance="typical")
    with pytest.raises(SamplingError, match="typical"):
        engine.slots(1, 64).admit(Request([5], 4, grammar=grammar, sampling=typical))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "strin"), ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"), ({"if": {}, "then": {}}, '"if"'), ({"$ref": "http://x/y"}, "http://x/y"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"), ({"type": "string", "format": "foo"}, "foo"),
        ({"enum": []}, "Unsatisfiable"), ({"const": "\ud800"}, "escape"), ({"const": float("nan")}, "expected value"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text fits"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "options"), ({"minimum": 10**400}, "range"),
        ({"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}}, "oneOf"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_expressed_are_refused_with_the_reason(grammars, schema, words):
    with pytest.raises(GrammarError, match=re.escape(words)) as refused:
        grammars.json(schema, field="here")
    assert refused.value.field.startswith("here") and "\n" not in str(refused.value)


def test_a_schema_that_is_too_deep_is_refused(grammars):
    schema = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="not supported"):
        grammars.json(schema, field="here")


def test_patterns_that_cannot_be_expressed(grammars):
    for pattern in ("(", "(?=a)b", "\ud800", "(a)\\1"):
        with pytest.raises(GrammarError, match="pattern is not supported"):
            grammars.regex(pattern, field="here")


def test_annotations_and_other_drafts_are_taken(grammars):
    grammars.json(
        {"$schema": "http://json-schema.org/draft-07/schema#", "title": "x", "description": "y", "default": {},
         "examples": [], "deprecated": True, "$comment": "c", "type": "object"}, field="s",
    )  # fmt: skip


def test_a_tokenizer_that_cannot_be_read_is_an_error_of_its_own():
    class Slow:
        def __len__(self):
            return 3

    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(Slow(), 3, frozenset([1])).json(field="f")


def test_an_engine_of_another_vocabulary_size_masks_its_own(engine):
    """A vocabulary padded beyond the tokenizer's: the padding is never allowed."""
    backbone = engine.backbone
    padded = Grammars(backbone.tokenizer, backbone.vocab_size + 37, backbone.end_ids).json(field="f")
    masked_V = padded.mask(torch.zeros(backbone.vocab_size + 37))
    assert masked_V[backbone.vocab_size :].eq(float("-inf")).all()
    allowed = [backbone.tokenizer.decode([i]) for i in masked_V.isfinite().nonzero()[:, 0].tolist()]
    assert allowed and all(text.startswith("{") for text in allowed)
