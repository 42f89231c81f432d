"""One request, token-exact against transformers' own generate in fp32: trees, ends, limits, stop strings, cache."""

import random
from itertools import pairwise

import pytest
import torch

from gorgon.core.draft import Draft
from gorgon.core.sampling import Sampling
from gorgon.decode.engine import Engine
from gorgon.decode.request import Request
from tests.parity.support import CONTEXT, TREES, VOCAB, Oracle, backbone_of, oracle_engine, prompts, reference

every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@pytest.fixture
def llama():
    return backbone_of("llama")


@every_tree
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_tree_writes_what_transformers_writes(family, tree):
    backbone, accepted = backbone_of(family), 0
    for prompt in prompts():
        expected = reference(backbone, prompt, 40)
        generation = oracle_engine(backbone, tree, [prompt]).answer(prompt, max_new_tokens=40)
        assert generation.token_ids == expected
        assert generation.done and sum(generation.step_tokens) == len(expected) - 1
        assert len(generation.step_tokens) == len(generation.step_nodes)
        accepted += sum(node > 0 for node in generation.step_nodes)
    if tree.paths:
        assert accepted > 4, "the oracle's drafts must be accepted, or this test shows nothing"


class Followers:
    """Expands a tree level by level, each node's children being what has followed its own token: what a head reads that
    depends on its parent's token, as Markov and Hydra heads do."""

    nodes, heads, width, copies = 24, 0, 0, False

    def __init__(self, text):
        self.after = {}
        for token, following in pairwise(text):
            children = self.after.setdefault(token, [])
            if following not in children:
                children.append(following)

    def draft(self, root, choices, context):
        draft, level = Draft(root), [0]
        while level:
            level = [
                draft.add(token, parent)
                for parent in level
                for token in self.after.get(draft.tokens[parent], [])
                if draft.nodes < self.nodes
            ]
        return draft


@pytest.mark.parametrize("together", [1, 3])
def test_a_drafter_may_expand_level_by_level(llama, together):
    asked = prompts((9, 30, 12))
    expected = [reference(llama, prompt, 40) for prompt in asked]
    engine = Engine(llama, None, Followers([token for answer in expected for token in answer]))
    found = engine.generate(asked, max_new_tokens=40, together=together)
    assert [g.token_ids for g in found] == expected
    assert max(max(g.step_tokens) for g in found) > 3, "whole paths are accepted"


@every_tree
def test_a_stream_yields_the_growing_answer(llama, tree):
    prompt = prompts()[2]
    expected, lengths = reference(llama, prompt, 40), []
    for generation in oracle_engine(llama, tree, [prompt]).stream(Request(prompt, 40)):
        assert generation.token_ids == expected[: len(generation.token_ids)]
        lengths.append(len(generation.token_ids))
    assert lengths[0] == 1 and lengths[-1] == len(expected) and sorted(set(lengths)) == lengths
    assert generation.done and generation.text == llama.tokenizer.decode(expected[: -1 if expected[-1] == 1 else None])


@every_tree
def test_an_end_token_inside_a_path_ends_the_answer(llama, tree):
    prompt = prompts()[2]
    full = reference(llama, prompt, 40)
    for place in range(1, 12):
        ending = backbone_of("llama", eos=[full[place]])
        expected = full[: full.index(full[place]) + 1]
        engine = Engine(ending, None, Oracle(tree, [(prompt, full)]))  # drafts go on behind the end
        generation = engine.answer(prompt, max_new_tokens=40)
        assert generation.token_ids == expected == reference(ending, prompt, 40)
        assert generation.finish == "end"


@every_tree
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_length_limits_are_met_exactly(tree, limit):
    backbone, prompt = backbone_of("qwen2"), prompts()[3]
    generation = oracle_engine(backbone, tree, [prompt]).answer(prompt, max_new_tokens=limit)
    assert generation.token_ids == reference(backbone, prompt, limit)
    assert len(generation.token_ids) == limit and generation.finish == "length"


@every_tree
@pytest.mark.parametrize("size", [CONTEXT - 1, 80])
def test_an_answer_ends_where_the_context_ends(tree, size):
    """Drafts beyond the last position are verified there and never come out."""
    backbone = backbone_of("gpt2")  # its positions are rows of a table: one too many would fail
    prompt = [random.Random(3).randrange(2, VOCAB) for _ in range(size)]
    generation = oracle_engine(backbone, tree, [prompt], CONTEXT - size).answer(prompt, max_new_tokens=100)
    assert generation.token_ids == reference(backbone, prompt, CONTEXT - size)
    assert generation.finish == "length"


@every_tree
def test_stop_strings_cut_the_text_wherever_steps_fall(llama, tree):
    prompt = prompts()[1]
    full = reference(llama, prompt, 40)
    whole, engine = llama.tokenizer.decode(full), oracle_engine(llama, tree, [prompt])
    for place in range(2, 10):
        stop = llama.tokenizer.decode(full[place : place + 2])
        generation = engine.answer(prompt, max_new_tokens=40, stop=[stop])
        assert generation.finish == "stop"
        assert generation.text == whole[: whole.index(stop)]
        assert generation.token_ids == full[: len(generation.token_ids)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_the_cache_holds_what_plain_decoding_would_hold(family):
    backbone, prompt = backbone_of(family), prompts()[2]
    caches = []
    for name in ("plain", "bushy", "bushy + ngram"):
        slots = oracle_engine(backbone, TREES[name], [prompt]).slots(1, CONTEXT)
        running = slots.admit(Request(prompt, 20, ignore_end=True))
        slots.read_prompt()
        length = running.length
        while not running.done:
            length = running.length
            slots.step()
        caches.append((length, [*slots._cache.keys, *slots._cache.values]))
    shared = min(length for length, _ in caches)
    assert shared > len(prompt) + 4
    for _, buffers in caches[1:]:
        for plain, other in zip(caches[0][1], buffers, strict=True):
            torch.testing.assert_close(plain[:, :, :shared], other[:, :, :shared], atol=1e-4, rtol=1e-4)


@every_tree
def test_a_repetition_penalty_is_that_of_transformers(llama, tree):
    for prompt in prompts():
        engine = oracle_engine(llama, tree, [prompt], repetition_penalty=1.4)
        found = engine.generate([prompt], max_new_tokens=40, sampling=Sampling(repetition_penalty=1.4))[0]
        assert found.token_ids == reference(llama, prompt, 40, repetition_penalty=1.4)
    assert found.token_ids != reference(llama, prompt, 40)


@every_tree
def test_after_an_end_token_measurements_go_on_if_asked(llama, tree):
    prompt = prompts()[2]
    full = reference(llama, prompt, 40)
    assert full[-1] == 1 and len(full) < 40
    last = list(oracle_engine(llama, tree, [prompt]).stream(Request(prompt, 40, ignore_end=True)))[-1]
    assert last.token_ids[: len(full)] == full and len(last.token_ids) == 40 and last.finish == "length"
