"""Calibration positions against what the engine really does: replaying predicts its steps exactly."""

from collections import Counter

import pytest
import torch

from gorgon.core.heads import MedusaHeads
from gorgon.core.rank_stats import best_tree, count_prefixes, replay
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.calibrate import positions_of
from gorgon.decode.engine import Engine
from gorgon.decode.tune import draft_vocabulary
from gorgon.models.backbone import load_backbone


@pytest.fixture(scope="module")
def setting():
    """The embedded backbone with heads that are right now and then, prompts, and the model's answers."""
    backbone = load_backbone("embedded", dtype="float32")
    heads = MedusaHeads(3, 1, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight)
    torch.manual_seed(0)
    for head in heads:
        torch.nn.init.normal_(head[0].linear.weight, std=0.02)
    heads.requires_grad_(False)
    engine = Engine(backbone, heads, DraftTree())
    rows = generate_rows(3, 12)
    chats = [
        [{"role": "system", "content": r["context"]}, {"role": "user", "content": r["question"]}] for r in rows
    ]  # fmt: skip
    prompts = [encode_prompt(backbone.tokenizer, chat) for chat in chats]
    answers = [engine.generate(p, max_new_tokens=50).token_ids for p in prompts]
    return engine, prompts, answers


@pytest.mark.parametrize("coverage", [1.0, 0.8])
@pytest.mark.parametrize("ngram", [0, 5])
def test_a_replay_is_what_the_engine_does_step_by_step(setting, ngram, coverage):
    engine, prompts, answers = setting
    vocabulary = draft_vocabulary(Counter(t for a in answers for t in a), coverage, engine.backbone.vocab_size)
    assert (vocabulary is None) == (coverage == 1.0)
    vocabulary_U = None if vocabulary is None else torch.tensor(vocabulary)
    engine = Engine(engine.backbone, engine.heads, engine.tree, vocabulary_U)
    texts = [positions_of(engine, p, a) for p, a in zip(prompts, answers, strict=True)]
    counts = count_prefixes((p for t in texts for p in t), max_rank=6, ngram=ngram)
    tree = best_tree(counts, 10, ngram=ngram)
    decoding = engine.with_tree(tree)
    accepted = 0
    for prompt, answer, text in zip(prompts, answers, texts, strict=True):
        generation = decoding.generate(prompt, max_new_tokens=50)
        result = replay([text], tree)
        assert generation.token_ids == answer
        assert len(generation.step_tokens) == result.steps
        assert sum(generation.step_tokens) == result.tokens
        accepted += sum(node > 0 for node in generation.step_nodes)
    assert accepted > 5, "drafts must be accepted, or this test shows nothing"


def test_a_draft_vocabulary_is_the_most_frequent_tokens():
    counts = Counter({7: 90, 3: 9, 5: 1})
    assert draft_vocabulary(counts, 0.9, 100) == [7]
    assert draft_vocabulary(counts, 0.95, 100) == [3, 7]
    assert draft_vocabulary(counts, 0.999, 100) == [3, 5, 7]
    assert draft_vocabulary(counts, 1.0, 100) is None
    assert draft_vocabulary(counts, 0.999, 3) is None
